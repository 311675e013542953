"""Which implementation runs: C++ on the CPU where the extension is built, plain torch everywhere else.

`halfbit::quads_product` is an operator of torch.library, so that torch.compile and fake tensors know it.
"""

from types import ModuleType

from torch import Tensor

from halfbit import native
from halfbit.formats._operator import product_operator
from halfbit.formats.quads import reference

if native.extension is not None:
    from halfbit.formats.quads import cpu


def encode(codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.encode`."""
    return _of(codes).encode(codes)


def decode(masks: Tensor, patterns: Tensor, signs: Tensor, at: tuple[Tensor, Tensor], columns: int) -> Tensor:
    """See `reference.decode`."""
    return _of(masks).decode(masks, patterns, signs, at, columns)


def _of(t: Tensor) -> ModuleType:
    return cpu if native.extension is not None and t.is_cpu else reference


def multiply(x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
    """See `Codec.product`; `tensors` are those of `Quads.runtime`."""
    return _of(x).product(x, starts, *tensors, out_features)


product = product_operator("quads", multiply)
