"""Which implementation runs: C++ on the CPU, Triton for products on a GPU, where they are there, else plain torch.

`halfbit::runlength_product` is an operator of torch.library, so that torch.compile and fake tensors know it.
"""

from types import ModuleType

from torch import Tensor

from halfbit import native
from halfbit.formats._operator import product_operator
from halfbit.formats.runlength import reference
from halfbit.formats.runlength.lanes import Lanes
from halfbit.triton_support import backend

if native.extension is not None:
    from halfbit.formats.runlength import cpu


def encode(codes: Tensor, lanes: Lanes) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.encode`."""
    return _of(codes).encode(codes, lanes)


def decode(stream: Tensor, offsets: Tensor, of_tile: Tensor, entries: Tensor, lanes: Lanes) -> Tensor:
    """See `reference.decode`."""
    return _of(stream).decode(stream, offsets, of_tile, entries, lanes)


def _of(t: Tensor) -> ModuleType:
    return cpu if native.extension is not None and t.is_cpu else reference


def multiply(x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
    """See `Codec.product`; `tensors` are those of `RunLength.runtime`."""
    if (gpu := backend("runlength", x)) is not None:
        return gpu.product(x, starts, tensors, out_features)
    return _of(x).product(x, starts, *tensors, out_features)


product = product_operator("runlength", multiply)
