"""Weights on evenly spaced grids times tokens, on GPUs: some rows, a part of the columns. See `_grid_triton.py`.

    few       1 to 4 tokens: products are added in registers, where columns meet their x. Where x has 16 bits codes are
              not converted: put into the mantissa of a float, a code c of k bits reads 1 + c / 2^k, and the 1 leaves a
              group with its zero: shift, mask, multiply-add
    many      more tokens: decoded in registers, multiplied by tensor cores
    multiply  all columns of a block of rows times the tokens of an item, see `_triton_items.py`

Tokens are where the caller says: token t and column c at `t * token_step + c * column_step`.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# what Triton compiles is another language in Python's clothes
# ruff: noqa: RUF005
# its tuples grow by +

import triton
import triton.language as tl

from halfbit import triton_support
from halfbit.formats._grid_triton_codes import (
    by_rows,
    codes_at,
    of_matrix,
    places,
    reversed_bits,
    rounded,
    run_of,
    statistics_at,
    taken_apart,
    weights_at,
)

INTERPRETED = tl.constexpr(triton_support.INTERPRETED)


@triton.jit
def few(
    x, token_step, column_step, tokens, own, row, live, columns, begin, end,
    KIND: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, FAST: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Rows `row` `[ROWS]`, those that are `live`, times the first `tokens` of TOKENS, over blocks of columns `begin` to
    `end`: float32 `[ROWS, TOKENS]`, without outliers. SHARED: all rows share second-level numbers."""
    words, statistics, second, _, _, _, order, supergroup, one = own
    # rows of a tile lie side by side, blocks of a row do elsewhere: what varies fastest is the last dimension
    axis: tl.constexpr = 0 if KIND.tiled else 1
    spread: tl.constexpr = 16 if KIND.tiled else 1
    BITS: tl.constexpr = KIND.bits
    GROUP: tl.constexpr = KIND.group
    run: tl.constexpr = run_of(GROUP)
    word_row, stat_row, second_row = places(row, columns, supergroup, KIND)
    inside, word_row = tl.expand_dims(live, axis), tl.expand_dims(word_row, axis)
    stat_row = tl.expand_dims(stat_row, axis)
    if SHARED:
        second_row = tl.zeros([1, 1], tl.int32) + tl.min(second_row, 0)
    else:
        # rows that are not live are not asked for
        second_row = tl.expand_dims(tl.where(live, second_row, 0), axis)

    sums = ()
    for _ in tl.static_range(TOKENS):
        if KIND.tiled:
            sums = sums + (tl.zeros([BLOCKS, ROWS], tl.float32),)
        else:
            sums = sums + (tl.zeros([ROWS, BLOCKS], tl.float32),)
    for start in range(begin, end, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        whole = block < end
        b = tl.expand_dims(block, 1 - axis)
        there = inside & tl.expand_dims(whole, 1 - axis)
        codes = codes_at(words, word_row + b * (BITS * spread), there, BITS, KIND.tiled, 23 - BITS if FAST else 0)
        column = block[:, None] * 32 + tl.arange(0, 32)[None, :]
        real = whole[:, None] & (column < columns)
        if KIND.ordered:
            column = tl.load(order + column, real, 0)
        inputs = ()
        for t in tl.static_range(TOKENS):
            at = tl.cast(t, tl.int64) * token_step + column * column_step
            given = tl.load(x + at, real & (t < tokens), 0.0)
            inputs = inputs + (taken_apart(given.to(tl.float32), BLOCKS),)
        for h in tl.static_range(32 // run):
            group = (b * 32 + h * run) // GROUP if GROUP else b * 0
            at, pair, in_row = stat_row + group * spread, second_row + group, group < KIND.count
            scale, zero = statistics_at(statistics, second, at, pair, there & in_row, in_row, KIND)
            if FAST:
                # codes read 1 + code / 2^bits
                scale, zero = scale * (1 << BITS), 1.0 + zero / (1 << BITS)
            new = ()
            for t in tl.static_range(TOKENS):
                partial, plain = tl.zeros_like(sums[0]), tl.zeros([BLOCKS], tl.float32)
                for i in tl.static_range(run):
                    code = codes[h * run + i]
                    if FAST:
                        value = (code | one).to(tl.float32, bitcast=True)
                    else:
                        # exact sums are worth an instruction where x is exact, too
                        value = rounded(code.to(tl.float32) - zero, KIND.half)
                        if KIND.half:
                            value = rounded(scale * value, KIND.half)
                    of_column = inputs[t][reversed_bits(h * run + i)]
                    partial += value * tl.expand_dims(of_column, 1 - axis)
                    plain += of_column
                if FAST:
                    partial -= zero * tl.expand_dims(plain, 1 - axis)
                if not KIND.half:
                    partial *= scale
                new = new + (sums[t] + partial,)
            sums = new
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for t in tl.static_range(TOKENS):
        total = tl.where(tl.arange(0, TOKENS)[None, :] == t, tl.sum(sums[t], axis)[:, None], total)
    return total


@triton.jit
def many(
    x, token_step, column_step, tokens, own, row, live, columns, begin, end,
    KIND: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """As `few`, by tensor cores in DTYPE."""
    order, supergroup = own[6], own[7]
    axis: tl.constexpr = 0 if KIND.tiled else 1
    word_row, stat_row, second_row = places(row, columns, supergroup, KIND)
    word_row, stat_row = tl.expand_dims(word_row, axis), tl.expand_dims(stat_row, axis)
    second_row = tl.expand_dims(second_row, axis)
    token = tl.arange(0, TOKENS)[None, :]
    given_at = x + token.to(tl.int64) * token_step
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(begin, end, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        there = tl.expand_dims(live, axis) & tl.expand_dims(block < end, 1 - axis)
        b = tl.expand_dims(block, 1 - axis)
        w = by_rows(weights_at(own, word_row, stat_row, second_row, b, there, KIND, DTYPE), ROWS, BLOCKS, KIND)
        column = start * 32 + tl.arange(0, BLOCKS * 32)
        real = (column < columns) & (column < end * 32)
        if KIND.ordered:
            column = tl.load(order + column, real, 0)
        given = tl.load(given_at + (column * column_step)[:, None], real[:, None] & (token < tokens), 0.0).to(DTYPE)
        if INTERPRETED:
            # whose dot takes bfloat16 for whole numbers
            w, given = w.to(tl.float32), given.to(tl.float32)
        total = tl.dot(w, given, total, input_precision="ieee")
    return total


@triton.jit
def outliers(
    x, token_step, column_step, tokens, own, row, live, columns, split, splits,
    KIND: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """What outliers add, by their difference from the grid's value, whose code is 0: a part of `splits` of each row."""
    _, statistics, second, offsets, columns_of, values, order, supergroup, _ = own
    spread: tl.constexpr = 16 if KIND.tiled else 1
    _, stat_row, second_row = places(row, columns, supergroup, KIND)
    token = tl.arange(0, TOKENS)[None, None, :]
    begin, end = tl.load(offsets + row, live, 0), tl.load(offsets + row + 1, live, 0)
    total = tl.zeros([row.shape[0], TOKENS], tl.float32)
    for slot in range(split * SLOTS, tl.max(end - begin, 0), SLOTS * splits):
        at = begin[:, None] + slot + tl.arange(0, SLOTS)[None, :]
        there = at < end[:, None]
        column = tl.load(columns_of + at, there, 0).to(tl.int32)
        value = tl.load(values + at, there, 0.0).to(tl.float32)
        group = column // KIND.group if KIND.group else column * 0
        where, pair = stat_row[:, None] + group * spread, second_row[:, None] + group
        scale, zero = statistics_at(statistics, second, where, pair, there, there, KIND)
        value = tl.where(there, value - rounded(scale * rounded(0.0 - zero, KIND.half), KIND.half), 0.0)
        if KIND.ordered:
            column = tl.load(order + column, there, 0)
        given_at = x + token.to(tl.int64) * token_step + (column * column_step)[:, :, None]
        given = tl.load(given_at, there[:, :, None] & (token < tokens), 0.0)
        total += tl.sum(value[:, :, None] * given.to(tl.float32), 1)
    return total


@triton.jit
def multiply(
    to, there, x, operands, matrix, out_features, columns, block,
    HALVES: tl.constexpr, SHAPE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """See `_triton_items.py`; SHAPE is that of `_grid_triton_codes.py`."""
    BOTH: tl.constexpr = SHAPE.rows * HALVES
    FAST: tl.constexpr = (not SHAPE.half) and tl.float32 != SHAPE.dtype
    half = out_features // HALVES
    first = block * SHAPE.rows
    count = tl.maximum(tl.minimum(half - first, SHAPE.rows), 0)
    index = tl.arange(0, BOTH)
    row, live = first + index % SHAPE.rows + index // SHAPE.rows * half, index % SHAPE.rows < count
    tokens = tl.sum(there.to(tl.int32), 0)
    own, end = of_matrix(operands, matrix), (columns + 31) // 32
    if TOKENS <= 4:
        total = few(
            x, 1, TOKENS, tokens, own, row, live, columns, 0, end, SHAPE, TOKENS, BOTH, SHAPE.blocks, FAST, False
        )
    else:
        total = many(
            x, 1, TOKENS, tokens, own, row, live, columns, 0, end, SHAPE, TOKENS, BOTH, SHAPE.blocks, SHAPE.dtype
        )
    if SHAPE.outliers:
        total += outliers(x, 1, TOKENS, tokens, own, row, live, columns, 0, 1, SHAPE, TOKENS, SHAPE.slots)
    tl.store(to[None, :] + row[:, None], total, live[:, None] & there[None, :])
    return first, count
