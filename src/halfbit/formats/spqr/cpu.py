"""SpQR on a CPU through the C++ extension: decode, multiply. How it works is told in `spqr.cpp` and `tile.h`.

Import this file only where `halfbit.native.extension` is there. The slow and obvious versions are in `reference.py`.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfbit import native
from halfbit.errors import Unsupported
from halfbit.formats._order import order_of, put_back
from halfbit.formats.spqr.reference import Form, Operands
from halfbit.formats.spqr.tiled import TILE

INPUTS = (torch.float32, torch.bfloat16, torch.float16)
# Where torch multiplies bfloat16 tiles, or the extension has no vector kernels: tokens of a matrix from which its rows
# are decoded and multiplied by torch, and the weights of rows decoded at a time; measured by bench/products.py
TOKENS_TO_DECODE = 32
WEIGHTS_AT_ONCE = 1 << 21


def decode(tensors: list[Tensor], form: Form) -> Tensor:
    """All matrices, one above another, columns where they belong: float32 `[k * rows, columns]`."""
    operands = Operands(*tensors)
    rows, columns, _ = operands.extent.shape
    matrices = []
    for g in range(operands.codes.shape[0]):
        stored = torch.empty(columns, rows)
        _decode(tensors, form, g, 0, -(-rows // TILE), stored)
        matrices.append(put_back(stored.T.contiguous(), order_of(operands.order, g)))
    return torch.cat(matrices)


def product(x: Tensor, starts: Tensor, tensors: list[Tensor], form: Form) -> Tensor:
    """See `Codec.product`: by the extension, or through torch some decoded rows at a time, where that is faster."""
    if x.dtype not in INPUTS or x.ndim != 2 or not x.is_cpu:
        raise Unsupported(
            f"spqr/cpu: x must be [tokens, columns] on the CPU in {', '.join(map(str, INPUTS))}, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    if x.shape[0] < TOKENS_TO_DECODE or (native.isa() != "portable" and _computed_in(x.dtype) == torch.float32):
        return _few(x, starts, tensors, form)
    operands, counts = Operands(*tensors), starts.diff()
    many = counts >= TOKENS_TO_DECODE
    if not many.any():
        return _few(x, starts, tensors, form)
    y = x.new_empty(x.shape[0], operands.extent.shape[0])
    if not many.all():
        # the groups with many tokens have none here
        few = torch.where(many, 0, counts)
        rows = torch.arange(x.shape[0])[~many.repeat_interleave(counts)]
        y[rows] = _few(x[rows], torch.cat([starts[:1], few.cumsum(0)]), tensors, form)
    for g in torch.nonzero(many).flatten().tolist():
        those = slice(int(starts[g]), int(starts[g + 1]))
        _many(x[those], g, tensors, form, y[those])
    return y


def _few(x: Tensor, starts: Tensor, tensors: list[Tensor], form: Form) -> Tensor:
    """`[tokens, out]`."""
    y = torch.empty(x.shape[0], tensors[-1].shape[0])
    inputs = (x if x.dtype == torch.float32 else x.float()).contiguous()
    _extension().spqr_product(inputs, starts, tensors, tuple(form), y, torch.get_num_threads())
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _many(x: Tensor, number: int, tensors: list[Tensor], form: Form, y: Tensor) -> None:
    """All tokens of one matrix, into `y`."""
    operands = Operands(*tensors)
    rows, columns, _ = operands.extent.shape
    order = order_of(operands.order, number)
    tokens = (x.detach() if order is None else x.detach()[:, order]).to(_computed_in(x.dtype)).contiguous()
    step = TILE * max(1, WEIGHTS_AT_ONCE // (TILE * max(columns, 1)))
    # one cache line wider: columns a power of two apart would share a few places of the cache
    slab = torch.empty(columns, min(step, rows) + TILE, dtype=tokens.dtype)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        _decode(tensors, form, number, first // TILE, -(-last // TILE), slab)
        y[:, first:last] = tokens @ slab[:, : last - first]


@cache
def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """What a product with decoded weights is computed in: float16 is nowhere faster than float32, and bfloat16 several
    times slower where the CPU has no instructions for it."""
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return dtype if dtype == torch.bfloat16 and fast else torch.float32


def _decode(tensors: list[Tensor], form: Form, number: int, first: int, last: int, to: Tensor) -> None:
    """Tiles `first` to `last` of a matrix, columns as stored, into `[columns, rows]`."""
    _extension().spqr_decode(tensors, tuple(form), number, first, last, to, torch.get_num_threads())


def _extension() -> Any:
    if native.extension is None:
        raise Unsupported(f"spqr/cpu: {native.reason}")
    return native.extension
