"""Which implementation runs: C++ on the CPU where the extension is built, Triton on GPUs, plain torch everywhere else.

`halfbit::spqr_product` is an operator of torch.library, so that torch.compile and fake tensors know it.
"""

import torch
from torch import Tensor

from halfbit import native
from halfbit.formats.spqr import reference
from halfbit.formats.spqr.reference import Form
from halfbit.triton_support import backend

if native.extension is not None:
    from halfbit.formats.spqr import cpu


def decode(tensors: list[Tensor], form: Form) -> Tensor:
    """All matrices, one above another: float32 `[k * rows, columns]`."""
    return (cpu if _native(tensors[0]) else reference).decode(tensors, form)


def _native(t: Tensor) -> bool:
    return native.extension is not None and t.device.type == "cpu"


def multiply(x: Tensor, starts: Tensor, tensors: list[Tensor], form: Form) -> Tensor:
    """See `Codec.product`; `tensors` are those of `SpQR.runtime`, `form` is `SpQR.form`."""
    return (backend("spqr", x) or (cpu if _native(x) else reference)).product(x, starts, tensors, form)


def lookup(rows: Tensor, tensors: list[Tensor], form: Form) -> Tensor:
    """See `Codec.lookup`."""
    return (backend("spqr", rows) or reference).lookup(rows, tensors, form)


def runtime(tensors: list[Tensor], form: Form) -> list[Tensor]:
    """The operands for the device that they are on; `tensors` are the fields of `reference.Operands`."""
    found = backend("spqr", tensors[0])
    return found.runtime(tensors, form) if found else tensors


@torch.library.custom_op(
    "halfbit::spqr_product",
    mutates_args=(),
    schema="(Tensor x, Tensor starts, Tensor[] tensors, int[] form) -> Tensor",
)
def product(x: Tensor, starts: Tensor, tensors: list[Tensor], form: list[int]) -> Tensor:
    """`multiply`, with the form as an operator takes it."""
    return multiply(x, starts, tensors, Form(*form))


@product.register_fake
def _(x: Tensor, starts: Tensor, tensors: list[Tensor], form: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], tensors[-1].shape[0])
