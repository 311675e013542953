"""What the codecs say alike about the matrices they are given."""

import torch

from halfbit.errors import FormatError, Unsupported
from halfbit.types import Codec, Packed, Solution


def one_shape(parts: list[Packed]) -> tuple[int, int]:
    """The shape that all have. Raises ValueError."""
    shapes = sorted({part.shape for part in parts})
    if len(shapes) != 1:
        raise ValueError(f"only matrices of one shape can be stacked, got the shapes {shapes}")
    return shapes[0]


def joined(codec: Codec, parts: list[Packed]) -> Packed:
    """A stack of matrices of one shape whose tensors follow each other. Raises ValueError."""
    rows, columns = one_shape(parts)
    tensors = {part: torch.cat([p.tensors[part] for p in parts]) for part in codec.parts}
    return Packed(codec, (len(parts) * rows, columns), tensors)


def check_parts(packed: Packed, dtypes: dict[str, torch.dtype]) -> None:
    """Raise FormatError unless the tensors are those of the codec, in these dtypes."""
    name, t = packed.codec.name, packed.tensors
    if set(t) != set(packed.codec.parts):
        raise FormatError(f"{name}: expected the tensors {', '.join(packed.codec.parts)}, got {', '.join(t)}")
    for part, tensor in t.items():
        if tensor.dtype != dtypes[part]:
            raise FormatError(f"{name}: {part} must be {dtypes[part]}, got {tensor.dtype}", tensor=part)


def check_stack(packed: Packed, count: int) -> None:
    """Raise FormatError where the codec finds damage, or finds another number of matrices than `count`."""
    packed.codec.check(packed)
    order = packed.tensors.get("order")
    try:
        if order is not None and order.shape[0] not in (0, 1, count):
            raise ValueError(f"{order.shape[0]} orders")
        packed.codec.part(packed, 0, count)
    except ValueError as e:
        raise FormatError(f"expected a stack of {count}: {e}; the file is damaged") from e


def check_rotated(codec: Codec, solution: Solution) -> None:
    """Raise Unsupported unless the solution's columns are rotated where the codec's are."""
    if solution.rotated != codec.rotated:
        have = "rotated" if solution.rotated else "not rotated"
        raise Unsupported(
            f"{codec.name}: {codec!r} cannot store a solution whose columns are {have}; rotated columns are stored by "
            '{ name = "runlength", rotated = true } and "quads" alone'
        )
