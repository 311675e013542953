"""Weights on evenly spaced grids, scale * (code - zero), on GPUs: products, decoding, lookup. For `spqr` and `grouped`.

One thread unpacks whole words: the 32 codes of a row and block of 32 columns are 32 values in its registers, statistics
are read once per group, and columns meet their x there; nothing is looked up code by code.

    _few      1 to 4 tokens per program: a program has some rows and a part of the columns, and adds products in registers.
              Where x has 16 bits codes are not converted: put into the mantissa of a float, a code c of k bits reads 1 + c / 2^k, and
              the 1 leaves a group with its zero: shift, mask, multiply-add.
    _many     tiles of rows x tokens by tensor cores: decoded in registers, rounded to the dtype of x, multiplied.
    _dense    rows as a matrix, columns as stored: for very many tokens some rows at a time, which stay in the L2 cache,
              go through the library's product.
    _looked   single rows, columns where they belong, bit for bit.

Programs of a product with several matrices find their tokens themselves, from `starts` on the device: there are as many
as could be needed, and those that are not end at once. Outliers are added as their difference from the grid's value.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# what Triton compiles is another language in Python's clothes
# ruff: noqa: E501, RUF005
# its tuples grow by +, and lists of arguments are long

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbit import triton_support
from halfbit.formats._triton_parts import add_parts

# of a program by `_few`; beyond them tensor cores are better used
FEW = 4
# of one matrix, from which its rows are decoded for the library's product; and the bytes of rows decoded at a time, which
# fit the L2 cache of an A100 or later
DENSE_TOKENS, DENSE_BYTES = 192, 16 << 20
# of a split product: programs that keep a GPU busy for each of its processors, columns that one is worth starting for
PROGRAMS, LEAST_BLOCKS = 2, 16
# the float 1.0, given at run time: to mask with one constant and set the bits of another would take two instructions
ONE = 0x3F800000
INTERPRETED = tl.constexpr(triton_support.INTERPRETED)
# how a zero is stored: on a second-level grid, as 16 bits, as one of the codes, or not, being the middle code
BILEVEL, STORED, CODE, MIDDLE = 0, 1, 2, 3


class Form(NamedTuple):
    """How the matrices of a codec are stored.

    Attributes:
        bits: of a code.
        group: columns that share statistics; 0: the whole row.
        scale_bits: 16: as stored; else on a second-level grid.
        zero: BILEVEL, STORED, CODE or MIDDLE.
        supergroup: rows that share a second-level grid.
        half: whether each step of the formula is rounded to float16.
        tiled: words and statistics lie in tiles of 16 rows (`spqr/tiled.py`); else row by row, as bit strings.
    """

    bits: int
    group: int
    scale_bits: int
    zero: int
    supergroup: int
    half: bool
    tiled: bool

    def groups(self, columns: int) -> int:
        return max(1, -(-columns // self.group)) if self.group else 1


class Operands(NamedTuple):
    """What kernels read, for k matrices of rows x columns; `blocks` = ceil(columns / 32).

    Attributes:
        words: int32, tiled [k, tiles, blocks, bits, 16], else [k * rows, blocks * bits].
        statistics: uint8, int16 or int32; scale in the lowest `scale_bits` bits, zero above; tiled
            [k, tiles, groups, 16], else [k * rows, groups].
        second: float16 or bfloat16 [k, supergroups, groups, m], as stored; its dtype is that of 16-bit statistics.
        offsets: int32 [k * tiles * 16 + 1], each row's outliers; [1]: there are none.
        columns: int16 or int32 [n], of outliers, as stored, by row.
        values: float16 or bfloat16 [n], of outliers.
        order: int32 [0, 1 or k, columns].
        extent: [rows, columns, 0]; its shape is what it says.
    """

    words: Tensor
    statistics: Tensor
    second: Tensor
    offsets: Tensor
    columns: Tensor
    values: Tensor
    order: Tensor
    extent: Tensor


# --- what one thread does


@triton.jit
def _rounded(t, HALF: tl.constexpr):
    if HALF:
        t = t.to(tl.float16).to(tl.float32)
    return t


@triton.jit
def _stored(code, BFLOAT: tl.constexpr):
    """The lowest 16 bits, a bfloat16 or a float16, as float32."""
    if BFLOAT:
        return (code.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _statistics(
    statistics, second, at, pair, there, pair_there, BITS: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO: tl.constexpr,
    HALF: tl.constexpr, BFLOAT: tl.constexpr,
):  # fmt: skip
    """Scales and zeros, float32 in the shape of `at`; `pair`: which numbers of the second level are theirs."""
    if SCALE_BITS != 16 or ZERO == 0:
        pairs = tl.load(second + pair, pair_there, 0)
    packed = tl.load(statistics + at, there, 0).to(tl.int32)
    if SCALE_BITS == 16:
        scale = _stored(packed, BFLOAT)
    else:
        step, start = _stored(pairs & 0xFFFF, BFLOAT), _stored(pairs >> 16 & 0xFFFF, BFLOAT)
        code = (packed & ((1 << SCALE_BITS) - 1)).to(tl.float32)
        scale = _rounded(step * _rounded(code - start, HALF), HALF)
    if ZERO == 3:
        zero = tl.full(scale.shape, 1 << (BITS - 1), tl.float32)
    else:
        # unsigned, for int32 may be full
        code = (packed.to(tl.uint32, bitcast=True) >> SCALE_BITS).to(tl.int32, bitcast=True)
        if statistics.dtype.element_ty.primitive_bitwidth < 32:
            code = code & ((1 << (statistics.dtype.element_ty.primitive_bitwidth - SCALE_BITS)) - 1)
        if ZERO == 1:
            zero = _stored(code, BFLOAT)
        elif ZERO == 2:
            zero = code.to(tl.float32)
        else:
            if SCALE_BITS != 16:
                pairs = pairs >> 32
            step, start = _stored(pairs & 0xFFFF, BFLOAT), _stored(pairs >> 16 & 0xFFFF, BFLOAT)
            zero = _rounded(step * _rounded(code.to(tl.float32) - start, HALF), HALF)
    return scale, zero


@triton.constexpr_function
def _first(i, bits):
    """Where code i begins among the bits that are left over in a block's words."""
    return (i - 32 // bits * bits) * bits


@triton.jit
def _field(word, FROM: tl.constexpr, BITS: tl.constexpr, TO: tl.constexpr):
    """BITS bits of words, from bit FROM, put at bit TO: one shift and one mask."""
    mask: tl.constexpr = ((1 << BITS) - 1) << TO
    if FROM > TO:
        return (word >> (FROM - TO)) & mask
    elif FROM < TO:
        return (word << (TO - FROM)) & mask
    else:
        return word & mask


@triton.jit
def _codes(words, at, there, BITS: tl.constexpr, TILED: tl.constexpr, TO: tl.constexpr):
    """The codes of 32 columns, at bit TO: a tuple of 32 int32 tensors; the words of a row and block begin at `at`."""
    step: tl.constexpr = 16 if TILED else 1
    w = ()
    for n in tl.static_range(BITS):
        w = w + (tl.load(words + at + n * step, there, 0).to(tl.uint32, bitcast=True),)
    each: tl.constexpr = 32 // BITS
    spare: tl.constexpr = 32 - each * BITS
    found = ()
    for i in tl.static_range(32):
        if TILED and i >= each * BITS:
            # pieces of `spare` bits at the top of the words, as one string
            code = (w[_first(i, BITS) // spare] >> (each * BITS)) >> (_first(i, BITS) % spare)
            for n in tl.static_range(BITS):
                if n * spare > _first(i, BITS) and n * spare < _first(i, BITS) + BITS:
                    code = code | (w[n] >> (each * BITS)) << (n * spare - _first(i, BITS))
            code = _field(code, 0, BITS, TO)
        elif TILED:
            code = _field(w[i // each], BITS * (i % each), BITS, TO)
        elif i * BITS % 32 + BITS > 32:
            code = w[i * BITS // 32] >> (i * BITS % 32) | w[i * BITS // 32 + 1] << (32 - i * BITS % 32)
            code = _field(code, 0, BITS, TO)
        else:
            code = _field(w[i * BITS // 32], i * BITS % 32, BITS, TO)
        found = found + (code.to(tl.int32, bitcast=True),)
    return found


@triton.jit
def _joined(parts):
    """32 tensors as one, with a last dimension of 32."""
    for level in tl.static_range(5):
        joined = ()
        for i in tl.static_range(16 >> level):
            joined = joined + (tl.join(parts[i], parts[i + (16 >> level)]),)
        parts = joined
    return parts[0]


@triton.jit
def _taken_apart(x, NB: tl.constexpr):
    """`[NB, 32]` as a tuple of 32 tensors `[NB]`, of which number i is column `_reversed(i)`."""
    parts = (tl.reshape(x, [NB, 2, 2, 2, 2, 2]),)
    for level in tl.static_range(5):
        split = ()
        for i in tl.static_range(1 << level):
            first, second = tl.split(parts[i])
            split = split + (first, second)
        parts = split
    return parts


@triton.constexpr_function
def _reversed(i):
    return int(f"{i:05b}"[::-1], 2)


@triton.jit
def _find(starts, which, tokens, GROUPS: tl.constexpr, groups, TOKENS: tl.constexpr):
    """Of the tiles of up to TOKENS tokens of one matrix each, number `which`: its matrix, first token, and the end of
    that matrix's tokens. Beyond the last tile, matrix `groups`."""
    if GROUPS == 1:
        return 0, which * TOKENS, tokens
    g = tl.arange(0, GROUPS)
    inside = g < groups
    begin = tl.load(starts + g, inside, 0).to(tl.int32)
    end = tl.load(starts + g + 1, inside, 0).to(tl.int32)
    tiles = (end - begin + TOKENS - 1) // TOKENS
    last = tl.cumsum(tiles, 0)
    matrix = tl.sum((last <= which).to(tl.int32), 0)
    own = g == matrix
    first = tl.sum(tl.where(own, begin + (which - last + tiles) * TOKENS, 0), 0)
    # all that is beyond the last group has no tiles
    matrix = tl.where(matrix >= groups, groups, matrix)
    return matrix, first, tl.sum(tl.where(own, end, 0), 0)


@triton.jit
def _difference(
    offsets, columns_of, values, statistics, second, order, row, matrix, at, end, stat_row, second_row,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO: tl.constexpr, HALF: tl.constexpr,
    TILED: tl.constexpr, BFLOAT: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Of the outliers `at`: the column of x, and the value less that of the grid's, whose code is 0."""
    there = at < end
    column = tl.load(columns_of + at, there, 0).to(tl.int32)
    value = tl.load(values + at, there, 0.0).to(tl.float32)
    group = column // GROUP if GROUP else column * 0
    spread: tl.constexpr = 16 if TILED else 1
    scale, zero = _statistics(
        statistics,
        second,
        stat_row + group * spread,
        second_row + group,
        there,
        there,
        BITS,
        SCALE_BITS,
        ZERO,
        HALF,
        BFLOAT,
    )
    if ORDERED:
        column = tl.load(order + column, there, 0)
    return column, value - _rounded(scale * _rounded(0.0 - zero, HALF), HALF), there


# --- kernels


@triton.jit
def _few(
    x, starts, words, statistics, second, offsets, columns_of, values, order, y,
    tokens, groups, rows, columns, blocks, per_split, x_stride, order_stride, matrix_words, matrix_statistics, matrix_second,
    supergroup, one,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO: tl.constexpr, HALF: tl.constexpr,
    TILED: tl.constexpr, BFLOAT: tl.constexpr, ORDERED: tl.constexpr, OUTLIERS: tl.constexpr, GROUPS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, FAST: tl.constexpr,
    COUNT: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens times ROWS rows, over `per_split` blocks of columns: into y `[splits, tokens, rows]`."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    matrix, first, end = _find(starts, tl.program_id(2), tokens, GROUPS, groups, TOKENS)
    if matrix >= groups:
        return
    # rows of a tile lie side by side, blocks of a row do elsewhere: what varies fastest is the last dimension
    axis: tl.constexpr = 0 if TILED else 1
    matrix = tl.cast(matrix, tl.int64)
    words += matrix * matrix_words
    statistics += matrix * matrix_statistics
    second += matrix * matrix_second
    order += matrix * order_stride
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.expand_dims(row < rows, axis)
    spread: tl.constexpr = 16 if TILED else 1
    if TILED:
        word_row, stat_row = (row // 16) * (blocks * BITS * 16) + row % 16, (row // 16) * (COUNT * 16) + row % 16
    else:
        word_row, stat_row = row * (blocks * BITS), row * COUNT
    second_row = (row // supergroup) * COUNT
    word_row = tl.expand_dims(word_row, axis)
    stat_rows = tl.expand_dims(stat_row, axis)
    if SHARED:
        # one for all rows of the program
        second_rows = tl.zeros([1, 1], tl.int32) + (tl.program_id(0) * ROWS // supergroup) * COUNT
    else:
        # rows beyond the last are not asked for
        second_rows = tl.expand_dims(tl.where(row < rows, second_row, 0), axis)
    run: tl.constexpr = 32 if GROUP == 0 or GROUP % 32 == 0 else (GROUP if 32 % GROUP == 0 else 1)

    sums = ()
    for _ in tl.static_range(TOKENS):
        if TILED:
            sums = sums + (tl.zeros([BLOCKS, ROWS], tl.float32),)
        else:
            sums = sums + (tl.zeros([ROWS, BLOCKS], tl.float32),)
    for start in range(split * per_split, min(blocks, (split + 1) * per_split), BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        whole = block < min(blocks, (split + 1) * per_split)
        b = tl.expand_dims(block, 1 - axis)
        there = inside & tl.expand_dims(whole, 1 - axis)
        codes = _codes(words, word_row + b * (BITS * spread), there, BITS, TILED, 23 - BITS if FAST else 0)
        column = block[:, None] * 32 + tl.arange(0, 32)[None, :]
        real = whole[:, None] & (column < columns)
        if ORDERED:
            column = tl.load(order + column, real, 0)
        inputs = ()
        for t in tl.static_range(TOKENS):
            given = tl.load(x + tl.cast(first + t, tl.int64) * x_stride + column, real & (first + t < end), 0.0)
            inputs = inputs + (_taken_apart(given.to(tl.float32), BLOCKS),)
        for h in tl.static_range(32 // run):
            group = (b * 32 + h * run) // GROUP if GROUP else b * 0
            scale, zero = _statistics(
                statistics, second, stat_rows + group * spread, second_rows + group, there & (group < COUNT), group < COUNT,
                BITS, SCALE_BITS, ZERO, HALF, BFLOAT,
            )  # fmt: skip
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
                        value = _rounded(code.to(tl.float32) - zero, HALF)
                        if HALF:
                            value = _rounded(scale * value, HALF)
                    own = inputs[t][_reversed(h * run + i)]
                    partial += value * tl.expand_dims(own, 1 - axis)
                    plain += own
                if FAST:
                    partial -= zero * tl.expand_dims(plain, 1 - axis)
                if not HALF:
                    partial *= scale
                new = new + (sums[t] + partial,)
            sums = new

    if OUTLIERS:
        tile_rows = (rows + 15) // 16 * 16
        begin = tl.load(offsets + matrix * tile_rows + row, row < rows, 0)
        stop = tl.load(offsets + matrix * tile_rows + row + 1, row < rows, 0)
        more = ()
        for _ in tl.static_range(TOKENS):
            more = more + (tl.zeros([ROWS, SLOTS], tl.float32),)
        for slot in range(split * SLOTS, tl.max(stop - begin, 0), SLOTS * splits):
            at = begin[:, None] + slot + tl.arange(0, SLOTS)[None, :]
            column, difference, there = _difference(
                offsets, columns_of, values, statistics, second, order, row, matrix, at, stop[:, None], stat_row[:, None],
                second_row[:, None], BITS, GROUP, SCALE_BITS, ZERO, HALF, TILED, BFLOAT, ORDERED,
            )  # fmt: skip
            new = ()
            for t in tl.static_range(TOKENS):
                given = tl.load(x + tl.cast(first + t, tl.int64) * x_stride + column, there & (first + t < end), 0.0)
                new = new + (more[t] + tl.where(there, difference, 0.0) * given.to(tl.float32),)
            more = new
    for t in tl.static_range(TOKENS):
        total = tl.sum(sums[t], axis)
        if OUTLIERS:
            total += tl.sum(more[t], 1)
        place = (tl.cast(split, tl.int64) * tokens + first + t) * rows + row
        tl.store(y + place, total, (row < rows) & (first + t < end))


@triton.jit
def _weights(
    words, statistics, second, word_row, stat_row, second_row, b, there, one,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO: tl.constexpr, HALF: tl.constexpr,
    TILED: tl.constexpr, BFLOAT: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The grid's values of blocks `b`, in the shape of `there` and 32: exact in float32, else rounded once or twice."""
    fast: tl.constexpr = (not HALF) and tl.float32 != DTYPE
    spread: tl.constexpr = 16 if TILED else 1
    run: tl.constexpr = 32 if GROUP == 0 or GROUP % 32 == 0 else (GROUP if 32 % GROUP == 0 else 1)
    codes = _codes(words, word_row + b * (BITS * spread), there, BITS, TILED, 23 - BITS if fast else 0)
    w = ()
    for h in tl.static_range(32 // run):
        group = (b * 32 + h * run) // GROUP if GROUP else b * 0
        scale, zero = _statistics(
            statistics, second, stat_row + group * spread, second_row + group, there & (group < COUNT), there & (group < COUNT),
            BITS, SCALE_BITS, ZERO, HALF, BFLOAT,
        )  # fmt: skip
        shift = -scale * ((1 << BITS) + zero)
        for i in tl.static_range(run):
            if fast:
                # codes read 1 + code / 2^bits, as in `_few`
                value = (codes[h * run + i] | one).to(tl.float32, bitcast=True) * (scale * (1 << BITS)) + shift
            else:
                value = _rounded(scale * _rounded(codes[h * run + i].to(tl.float32) - zero, HALF), HALF)
            w = w + (value.to(DTYPE),)
    return _joined(w)


@triton.jit
def _many(
    x, starts, words, statistics, second, offsets, columns_of, values, order, y,
    tokens, groups, rows, columns, blocks, per_split, x_stride, order_stride, matrix_words, matrix_statistics, matrix_second,
    supergroup, one,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO: tl.constexpr, HALF: tl.constexpr,
    TILED: tl.constexpr, BFLOAT: tl.constexpr, ORDERED: tl.constexpr, OUTLIERS: tl.constexpr, GROUPS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, FAST: tl.constexpr,
    COUNT: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens times ROWS rows by tensor cores, over `per_split` blocks: into y `[splits, tokens, rows]`."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    matrix, first, end = _find(starts, tl.program_id(2), tokens, GROUPS, groups, TOKENS)
    if matrix >= groups:
        return
    axis: tl.constexpr = 0 if TILED else 1
    matrix = tl.cast(matrix, tl.int64)
    words += matrix * matrix_words
    statistics += matrix * matrix_statistics
    second += matrix * matrix_second
    order += matrix * order_stride
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if TILED:
        word_row, stat_row = (row // 16) * (blocks * BITS * 16) + row % 16, (row // 16) * (COUNT * 16) + row % 16
    else:
        word_row, stat_row = row * (blocks * BITS), row * COUNT
    second_row = (row // supergroup) * COUNT
    token = first + tl.arange(0, TOKENS)
    # [1, TOKENS]
    given_at = x + (token.to(tl.int64) * x_stride)[None, :]
    taken = (token < end)[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(split * per_split, min(blocks, (split + 1) * per_split), BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        whole = block < min(blocks, (split + 1) * per_split)
        there = tl.expand_dims(row < rows, axis) & tl.expand_dims(whole, 1 - axis)
        w = _weights(
            words, statistics, second, tl.expand_dims(word_row, axis), tl.expand_dims(stat_row, axis),
            tl.expand_dims(second_row, axis), tl.expand_dims(block, 1 - axis), there, one,
            BITS, GROUP, SCALE_BITS, ZERO, HALF, TILED, BFLOAT, COUNT, x.dtype.element_ty,
        )  # fmt: skip
        if TILED:
            w = tl.permute(tl.reshape(w, [BLOCKS, ROWS, 32]), [1, 0, 2])
        w = tl.reshape(w, [ROWS, BLOCKS * 32])
        column = start * 32 + tl.arange(0, BLOCKS * 32)
        real = (column < columns) & (column < (split + 1) * per_split * 32)
        if ORDERED:
            column = tl.load(order + column, real, 0)
        given = tl.load(given_at + column[:, None], real[:, None] & taken, 0.0)
        if INTERPRETED:
            # whose dot takes bfloat16 for whole numbers
            w, given = w.to(tl.float32), given.to(tl.float32)
        total = tl.dot(w, given, total, input_precision="ieee")
    if OUTLIERS:
        tile_rows = (rows + 15) // 16 * 16
        begin = tl.load(offsets + matrix * tile_rows + row, row < rows, 0)
        stop = tl.load(offsets + matrix * tile_rows + row + 1, row < rows, 0)
        for slot in range(split * SLOTS, tl.max(stop - begin, 0), SLOTS * splits):
            at = begin[:, None] + slot + tl.arange(0, SLOTS)[None, :]
            column, difference, there = _difference(
                offsets, columns_of, values, statistics, second, order, row, matrix, at, stop[:, None], stat_row[:, None],
                second_row[:, None], BITS, GROUP, SCALE_BITS, ZERO, HALF, TILED, BFLOAT, ORDERED,
            )  # fmt: skip
            difference = tl.where(there, difference, 0.0)
            given = tl.load(given_at[:, None, :] + column[:, :, None], there[:, :, None] & taken[:, None, :], 0.0)
            total += tl.sum(difference[:, :, None] * given.to(tl.float32), 1)
    place = (tl.cast(split, tl.int64) * tokens + token)[None, :] * rows + row[:, None]
    tl.store(y + place, total, (row < rows)[:, None] & taken)


@triton.jit
def _dense(
    words, statistics, second, offsets, columns_of, values, y, first, rows, columns, blocks, supergroup, wide, one,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO: tl.constexpr, HALF: tl.constexpr,
    TILED: tl.constexpr, BFLOAT: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Rows from `first` of a matrix, without outliers, columns as stored: into y `[some rows, wide]`."""
    axis: tl.constexpr = 0 if TILED else 1
    row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if TILED:
        word_row, stat_row = (row // 16) * (blocks * BITS * 16) + row % 16, (row // 16) * (COUNT * 16) + row % 16
    else:
        word_row, stat_row = row * (blocks * BITS), row * COUNT
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    there = tl.expand_dims(row < rows, axis) & tl.expand_dims(block < blocks, 1 - axis)
    w = _weights(
        words, statistics, second, tl.expand_dims(word_row, axis), tl.expand_dims(stat_row, axis),
        tl.expand_dims((row // supergroup) * COUNT, axis), tl.expand_dims(block, 1 - axis), there, one,
        BITS, GROUP, SCALE_BITS, ZERO, HALF, TILED, BFLOAT, COUNT, y.dtype.element_ty,
    )  # fmt: skip
    if TILED:
        w = tl.permute(tl.reshape(w, [BLOCKS, ROWS, 32]), [1, 0, 2])
    w = tl.reshape(w, [ROWS, BLOCKS * 32])
    column = tl.program_id(1) * (BLOCKS * 32) + tl.arange(0, BLOCKS * 32)
    place = (row - first).to(tl.int64)[:, None] * wide + column[None, :]
    tl.store(y + place, w, (row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _put_outliers(offsets, columns_of, values, y, first, rows, wide, SLOTS: tl.constexpr):
    """A row's outliers, into y `[some rows from first, wide]`, columns as stored."""
    row = first + tl.program_id(0)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    for start in range(begin, end, SLOTS):
        at = start + tl.arange(0, SLOTS)
        column = tl.load(columns_of + at, at < end, 0).to(tl.int32)
        place = (row - first).to(tl.int64) * wide + column
        tl.store(y + place, tl.load(values + at, at < end, 0.0), at < end)


@triton.jit
def _looked(
    which, words, statistics, second, offsets, columns_of, values, order, y, columns, blocks, supergroup,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_BITS: tl.constexpr, ZERO: tl.constexpr, HALF: tl.constexpr,
    TILED: tl.constexpr, BFLOAT: tl.constexpr, ORDERED: tl.constexpr, OUTLIERS: tl.constexpr, BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Row `which[program]`, columns where they belong: float32, into y `[n, columns]`."""
    row = tl.load(which + tl.program_id(0)).to(tl.int32)
    y += tl.program_id(0).to(tl.int64) * columns
    if TILED:
        word_row, stat_row = (row // 16) * (blocks * BITS * 16) + row % 16, (row // 16) * (COUNT * 16) + row % 16
    else:
        word_row, stat_row = row * (blocks * BITS), row * COUNT
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        w = _weights(
            words, statistics, second, word_row, stat_row, (row // supergroup) * COUNT, block, block < blocks, 0,
            BITS, GROUP, SCALE_BITS, ZERO, HALF, TILED, BFLOAT, COUNT, tl.float32,
        )  # fmt: skip
        w = tl.reshape(w, [BLOCKS * 32])
        column = start * 32 + tl.arange(0, BLOCKS * 32)
        real = column < columns
        if ORDERED:
            column = tl.load(order + column, real, 0)
        tl.store(y + column, w, real)
    if OUTLIERS:
        # what the same threads wrote above is not theirs any more
        tl.debug_barrier()
        begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
        for start in range(begin, end, SLOTS):
            at = start + tl.arange(0, SLOTS)
            column = tl.load(columns_of + at, at < end, 0).to(tl.int32)
            if ORDERED:
                column = tl.load(order + column, at < end, 0)
            tl.store(y + column, tl.load(values + at, at < end, 0.0).to(tl.float32), at < end)


# --- launching them


def product(x: Tensor, starts: Tensor, tensors: list[Tensor], form: Form, name: str) -> Tensor:
    """See `Codec.product`; `tensors` are the fields of `Operands`, `name` is the format's, for errors."""
    o = Operands(*tensors)
    rows, columns, _ = o.extent.shape
    triton_support.check_input(x, columns, f"{name}/triton")
    tokens, groups = x.shape[0], starts.shape[0] - 1
    if groups == 1 and tokens >= DENSE_TOKENS:
        return _through_dense(x, o, form)
    y = x.new_empty(tokens, rows)
    if not y.numel():
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    # tokens that a matrix has, as far as can be told without looking: where there are far more matrices, one or none
    each = tokens if groups == 1 else 1 if 8 * tokens <= groups else -(-2 * tokens // groups)
    many = each > FEW
    kernel = _many if many else _few
    at_once = min(64, max(16, triton.next_power_of_2(each))) if many else triton.next_power_of_2(each)
    tiles = -(-tokens // at_once) if groups == 1 else min(tokens, tokens // at_once + groups)
    blocks = -(-columns // 32)
    chosen = triton_support.launch(
        f"grid {'many' if many else 'few'}",
        [form.bits, form.group, rows, columns, groups, at_once],
        _defaults(many, at_once, rows, blocks, tiles, x.device),
        x.device,
    )
    splits = -(-blocks // chosen["per_split"])
    out = y if splits == 1 else torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    kernel[(-(-rows // chosen["ROWS"]), splits, tiles)](
        x,
        starts.to(x.device, non_blocking=True) if groups > 1 else o.offsets,
        *_pointers(o),
        out,
        tokens,
        groups,
        rows,
        columns,
        blocks,
        chosen["per_split"],
        x.stride(0),
        columns if o.order.shape[0] > 1 else 0,
        *_sizes(o, groups),
        form.supergroup,
        ONE,
        **_constants(form, o, columns),
        ORDERED=o.order.shape[0] > 0,
        OUTLIERS=o.offsets.shape[0] > 1,
        GROUPS=triton.next_power_of_2(groups),
        TOKENS=at_once,
        ROWS=chosen["ROWS"],
        BLOCKS=chosen["BLOCKS"],
        SLOTS=chosen["SLOTS"],
        FAST=x.dtype != torch.float32 and not form.half,
        SHARED=form.supergroup % chosen["ROWS"] == 0,
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )
    return y if splits == 1 else add_parts(out, x.dtype)


def _defaults(
    many: bool, at_once: int, rows: int, blocks: int, tiles: int, device: torch.device
) -> triton_support.Launch:
    """How to launch where nothing was tuned: as many programs as keep the device busy, by splitting the columns."""
    found = {"ROWS": 64 if many else 16, "BLOCKS": 8 if many else 32, "SLOTS": 4 if many else 32}
    wanted = PROGRAMS * triton_support.processors(device) // max(1, -(-rows // found["ROWS"]) * tiles)
    splits = max(1, min(wanted, blocks // LEAST_BLOCKS))
    per_split = -(-blocks // splits)
    # no program begins in the middle of what another has
    per_split = -(-per_split // found["BLOCKS"]) * found["BLOCKS"]
    # sums of 64 x 64 would not fit the registers of four warps
    return found | {"per_split": per_split, "num_warps": 8 if at_once > 16 else 4, "num_stages": 2}


def _through_dense(x: Tensor, o: Operands, form: Form) -> Tensor:
    """All tokens of one matrix by the library's product, some decoded rows at a time."""
    rows, columns, _ = o.extent.shape
    y = x.new_empty(x.shape[0], rows)
    given = x if not o.order.shape[0] else x[:, o.order[0]]
    step = max(64, DENSE_BYTES // (max(columns, 1) * x.element_size()) // 64 * 64)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        y[:, first:last] = given @ _decoded(o, form, first, last, x.dtype).T
    return y


def _decoded(o: Operands, form: Form, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows `first` to `last` of a single matrix, columns as stored: `[last - first, columns]`."""
    columns = o.extent.shape[1]
    blocks = -(-columns // 32)
    dense = torch.empty(last - first, columns, dtype=dtype, device=o.words.device)
    if not dense.numel():
        return dense
    _dense[(-(-(last - first) // 64), -(-blocks // 2))](
        *_pointers(o)[:-1],
        dense,
        first,
        last,
        columns,
        blocks,
        form.supergroup,
        columns,
        ONE,
        **_constants(form, o, columns),
        ROWS=64,
        BLOCKS=2,
        num_warps=4,
    )
    if o.offsets.shape[0] > 1:
        _put_outliers[(last - first,)](
            o.offsets, o.columns, o.values, dense, first, last, columns, SLOTS=64, num_warps=1
        )
    return dense


def lookup(which: Tensor, tensors: list[Tensor], form: Form) -> Tensor:
    """Rows `which`, int64 `[n]`, of a single matrix: float32 `[n, columns]`, bit for bit."""
    o = Operands(*tensors)
    columns = o.extent.shape[1]
    y = torch.empty(which.shape[0], columns, device=which.device)
    if y.numel():
        _looked[(which.shape[0],)](
            which.contiguous(),
            *_pointers(o),
            y,
            columns,
            -(-columns // 32),
            form.supergroup,
            **_constants(form, o, columns),
            ORDERED=o.order.shape[0] > 0,
            OUTLIERS=o.offsets.shape[0] > 1,
            BLOCKS=16,
            SLOTS=64,
            num_warps=1,
        )
    return y


def _pointers(o: Operands) -> tuple[Tensor, ...]:
    return o.words, o.statistics, _second(o), o.offsets, o.columns, o.values, o.order


def _sizes(o: Operands, groups: int) -> tuple[int, int, int]:
    """Of one matrix: words, statistics, second-level numbers."""
    return o.words.numel() // groups, o.statistics.numel() // groups, _second(o).numel() // groups


def _second(o: Operands) -> Tensor:
    """The two or four numbers of a group as one of 32 or 64 bits."""
    return o.second.view({0: o.second.dtype, 2: torch.int32, 4: torch.int64}[o.second.shape[-1]])


def _constants(form: Form, o: Operands, columns: int) -> dict[str, int | bool]:
    return {
        "BITS": form.bits,
        "GROUP": form.group,
        "SCALE_BITS": form.scale_bits,
        "ZERO": form.zero,
        "HALF": form.half,
        "TILED": form.tiled,
        "BFLOAT": o.second.dtype == torch.bfloat16,
        "COUNT": form.groups(columns),
    }
