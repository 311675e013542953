"""Products and decoding of evenly spaced grids on a CPU through the C++ extension, for `spqr` and `grouped`.

Few tokens, or all where the processor has vector instructions but none for bfloat16: by the extension. Otherwise some
rows at a time are decoded into the cache and go through torch's product. How the extension works is told in
`spqr/spqr.cpp`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfbit import native
from halfbit.errors import Unsupported
from halfbit.formats._order import order_of, put_back

INPUTS = (torch.float32, torch.bfloat16, torch.float16)
# Where torch multiplies bfloat16 tiles, or the extension has no vector kernels: tokens of a matrix from which its rows
# are decoded and multiplied by torch, and the weights of rows decoded at a time; measured by bench/products.py
TOKENS_TO_DECODE = 32
WEIGHTS_AT_ONCE = 1 << 21
# rows that the extension decodes together
TILE = 16


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape, as the extension is told of them.

    Attributes:
        name: of the format.
        rows, columns: of one matrix.
        order: int64 `[0, 1 or k, columns]`.
        multiply: `(x, starts, y)`, float32 x and y.
        decode: `(number, first, last, to)`: tiles `first` to `last` of a matrix, columns as stored, into
            `[columns, rows]` in any of INPUTS.
    """

    name: str
    rows: int
    columns: int
    order: Tensor
    multiply: Callable[[Tensor, Tensor, Tensor], None]
    decode: Callable[[int, int, int, Tensor], None]


def decode(stack: Stack, matrices: int) -> Tensor:
    """All matrices, one above another, columns where they belong: float32 `[k * rows, columns]`."""
    found = []
    for g in range(matrices):
        stored = torch.empty(stack.columns, stack.rows)
        stack.decode(g, 0, -(-stack.rows // TILE), stored)
        found.append(put_back(stored.T.contiguous(), order_of(stack.order, g)))
    return torch.cat(found)


def product(x: Tensor, starts: Tensor, stack: Stack) -> Tensor:
    """See `Codec.product`: by the extension, or through torch some decoded rows at a time, where that is faster."""
    if x.dtype not in INPUTS or x.ndim != 2 or not x.is_cpu:
        raise Unsupported(
            f"{stack.name}/cpu: x must be [tokens, columns] on the CPU in {', '.join(map(str, INPUTS))}, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    if x.shape[0] < TOKENS_TO_DECODE or (native.isa() != "portable" and _computed_in(x.dtype) == torch.float32):
        return _few(x, starts, stack)
    counts = starts.diff()
    many = counts >= TOKENS_TO_DECODE
    if not many.any():
        return _few(x, starts, stack)
    y = x.new_empty(x.shape[0], stack.rows)
    if not many.all():
        # the groups with many tokens have none here
        few = torch.where(many, 0, counts)
        rows = torch.arange(x.shape[0])[~many.repeat_interleave(counts)]
        y[rows] = _few(x[rows], torch.cat([starts[:1], few.cumsum(0)]), stack)
    for g in torch.nonzero(many).flatten().tolist():
        those = slice(int(starts[g]), int(starts[g + 1]))
        _many(x[those], g, stack, y[those])
    return y


def _few(x: Tensor, starts: Tensor, stack: Stack) -> Tensor:
    """`[tokens, out]`."""
    y = torch.empty(x.shape[0], stack.rows)
    stack.multiply((x if x.dtype == torch.float32 else x.float()).contiguous(), starts, y)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _many(x: Tensor, number: int, stack: Stack, y: Tensor) -> None:
    """All tokens of one matrix, into `y`."""
    rows, order = stack.rows, order_of(stack.order, number)
    tokens = (x.detach() if order is None else x.detach()[:, order]).to(_computed_in(x.dtype)).contiguous()
    step = TILE * max(1, WEIGHTS_AT_ONCE // (TILE * max(stack.columns, 1)))
    # one cache line wider: columns a power of two apart would share a few places of the cache
    slab = torch.empty(stack.columns, min(step, rows) + TILE, dtype=tokens.dtype)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        stack.decode(number, first // TILE, -(-last // TILE), slab)
        y[:, first:last] = tokens @ slab[:, : last - first]


@cache
def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """What a product with decoded weights is computed in: float16 is nowhere faster than float32, and bfloat16 several
    times slower where the CPU has no instructions for it."""
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return dtype if dtype == torch.bfloat16 and fast else torch.float32


def extension(name: str) -> Any:
    """The extension. Raises Unsupported in the name of the format where there is none."""
    if native.extension is None:
        raise Unsupported(f"{name}/cpu: {native.reason}")
    return native.extension
