"""What the codecs say alike about the matrices they are given."""

from halfbit.types import Packed


def one_shape(parts: list[Packed]) -> tuple[int, int]:
    """The shape that all have. Raises ValueError."""
    shapes = sorted({part.shape for part in parts})
    if len(shapes) != 1:
        raise ValueError(f"only matrices of one shape can be stacked, got the shapes {shapes}")
    return shapes[0]
