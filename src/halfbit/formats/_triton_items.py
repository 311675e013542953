"""Items: some tokens and the matrix that they meet, so that one program reads its rows once for all of them.

    place     a token (of a product) or a choice of an expert (of a layer), in the order of the matrices
    item      a matrix and up to TOKENS places that meet it; a format's kernels are told nothing else
    packed    x of each item, [items, columns, TOKENS], so that what lies in one column is one load

Which matrix has how many tokens is known to the device alone. There are never more items than `most_items` says, and
the rest of them are empty; nothing waits. One matrix, or one token, needs no table of items and no sorting.

A format offers `multiply(to, there, x, operands, matrix, out_features, columns, block, HALVES, SHAPE, TOKENS)`, a
function of Triton: block number `block` of the rows of a matrix, and the same block of its second half if HALVES is
2, times the packed x of an item, float32, to `to[token] + row`. It returns the first of these rows and how many they
are in each half; 0 behind the last block. SHAPE is its own.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# what Triton compiles is given plain numbers

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_MATRIX, ONE_TOKEN, TABLE = 0, 1, 2
MOST_TOKENS = 32
"""Of an item."""


@triton.jit
def item(number, items, places, matrices, TOKENS: tl.constexpr, ITEMS: tl.constexpr):
    """Matrix, first place, number of places; `items` is nothing, the expert of each place, or the table."""
    if ITEMS == 0:
        first = number * TOKENS
        return number * 0, first, tl.minimum(places - first, TOKENS)
    elif ITEMS == 1:
        expert = tl.load(items + number).to(tl.int32)
        return tl.minimum(tl.maximum(expert, 0), matrices - 1), number, 1
    else:
        matrix = tl.minimum(tl.load(items + 3 * number), matrices - 1)
        return matrix, tl.load(items + 3 * number + 1), tl.load(items + 3 * number + 2)


@triton.jit
def _cut(starts, items, groups, bound, TOKENS: tl.constexpr, GROUPS: tl.constexpr):
    """One program: places `starts[g]` to `starts[g + 1]` of each group, in items."""
    g = tl.arange(0, GROUPS)
    begin = tl.load(starts + g, g < groups, 0).to(tl.int32)
    places = tl.load(starts + g + 1, g < groups, 0).to(tl.int32) - begin
    count = (places + TOKENS - 1) // TOKENS
    upto = tl.cumsum(count, 0)
    k, most = 0, tl.max(count)
    while k < most:
        to = items + 3 * (upto - count + k)
        tl.store(to, g, k < count)
        tl.store(to + 1, begin + k * TOKENS, k < count)
        tl.store(to + 2, tl.minimum(places - k * TOKENS, TOKENS), k < count)
        k += 1
    empty = tl.sum(count)
    while empty < bound:
        for part in tl.static_range(3):
            tl.store(items + 3 * (empty + g) + part, 0, empty + g < bound)
        empty += GROUPS


@triton.jit
def _sort(index, order, starts, places, experts, BLOCK: tl.constexpr):
    """Places of each expert, `order[starts[e]]` to `order[starts[e + 1]]`, by counting what comes before each.

    Behind the last expert is one more, who has the places that no expert takes. Each program counts for some places,
    and for some experts where their places begin.
    """
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(index + number, number < places, 0).to(tl.int32)
    own = tl.where((own >= 0) & (own < experts), own, experts)
    place = tl.where(number < places, number, -1)
    own = tl.where(number < places, own, number - places)
    before = tl.zeros([BLOCK], tl.int32)
    first = 0
    while first < places:
        other = first + tl.arange(0, BLOCK)
        theirs = tl.load(index + other, other < places, 0).to(tl.int32)
        theirs = tl.where((theirs >= 0) & (theirs < experts), theirs, experts)
        theirs = tl.where(other < places, theirs, experts + 2)[None, :]
        earlier = (theirs == own[:, None]) & (other[None, :] < place[:, None])
        first += BLOCK
        before += tl.sum(((theirs < own[:, None]) | earlier).to(tl.int32), 1)
    tl.store(order + before, number, number < places)
    tl.store(starts + number - places, before, (number >= places) & (number < places + experts + 2))


@triton.jit
def _pack(
    packed, x, order, items, places, matrices, columns, row_step, column_step, top_k,
    TOKENS: tl.constexpr, ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    _, first, count = item(number, items, places, matrices, TOKENS, ITEMS)
    t, column = tl.arange(0, TOKENS)[None, :], (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    token = (first + t).to(tl.int64)
    if order is not None:
        token = tl.load(order + token, t < count, 0).to(tl.int64) // top_k
    value = tl.load(x + token * row_step + column * column_step, (t < count) & (column < columns), 0.0)
    tl.store(packed + (number.to(tl.int64) * columns + column) * TOKENS + t, value.to(tl.float32), column < columns)


def tokens_at_once(places: int, matrices: int) -> int:
    """TOKENS of an item: 1, or a power of two from 4 on, twice the mean of a matrix; fewer cost as much as four."""
    if places <= 1:
        return 1
    return min(MOST_TOKENS, max(4, triton.next_power_of_2(min(places, 2 * triton.cdiv(places, matrices)))))


def most_items(places: int, matrices: int, tokens: int) -> int:
    return min(places, matrices + places // tokens)


def cut(starts: Tensor, places: int, tokens: int) -> Tensor:
    """int32 `[items, 3]`: matrix, first place, number of places; of groups that `starts` `[groups + 1]` tells."""
    groups = starts.shape[0] - 1
    bound = most_items(places, groups, tokens)
    items = torch.empty(bound, 3, dtype=torch.int32, device=starts.device)
    _cut[(1,)](starts, items, groups, bound, TOKENS=tokens, GROUPS=triton.next_power_of_2(groups))
    return items


def sort(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Of the experts that places choose, `[places]`: order int32 `[places]`, starts int32 `[experts + 2]`."""
    places, block = index.shape[0], 64
    order = torch.empty(places, dtype=torch.int32, device=index.device)
    starts = torch.empty(experts + 2, dtype=torch.int32, device=index.device)
    _sort[(triton.cdiv(places + experts + 2, block),)](index, order, starts, places, experts, BLOCK=block)
    return order, starts


def pack(
    x: Tensor,
    items: Tensor | None,
    places: int,
    matrices: int,
    tokens: int,
    order: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """x `[tokens, columns]` of each item, float32 `[items, columns, TOKENS]`, zero where an item has no token."""
    columns = x.shape[1]
    count = triton.cdiv(places, tokens) if items is None else items.shape[0]
    packed = torch.empty(count, columns, tokens, dtype=torch.float32, device=x.device)
    block = max(16, 1024 // tokens)
    _pack[(count, triton.cdiv(columns, block))](
        packed, x, order, items, places, matrices, columns, *x.stride(), top_k,
        TOKENS=tokens, ITEMS=ONE_MATRIX if items is None else TABLE, BLOCK=block,
    )  # fmt: skip
    return packed


class Plan(NamedTuple):
    """How a stack of matrices is multiplied with up to so many tokens at once.

    A format's module offers `plan(codec, tensors, out_features, dtype, halves, tokens)`: with the operands of its
    `runtime`, the dtype of the layer's input, HALVES and TOKENS.

    Attributes:
        multiply: the format's, see above.
        decode: the format's, see `_triton_dense.py`; None: it has another way for many tokens.
        operands: for both.
        blocks: of the rows of one matrix, or of each of its halves: the most there are.
        rows: of a block, the most there are.
        shape: SHAPE.
        rotated: the columns are; x must be, too (`rotation.py`).
    """

    multiply: Any
    decode: Any
    operands: tuple[Tensor | int, ...]
    blocks: int
    rows: int
    shape: tuple[Any, ...]
    num_warps: int
    rotated: bool = False
