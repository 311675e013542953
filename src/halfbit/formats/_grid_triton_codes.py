"""Weights on evenly spaced grids on GPUs: from words and statistics to values, in registers. See `_grid_triton.py`.

One thread unpacks whole words: the 32 codes of a row and block of 32 columns are 32 values in its registers, and
statistics are read once per group; nothing is looked up code by code.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# what Triton compiles is another language in Python's clothes
# ruff: noqa: RUF005
# its tuples grow by +

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

# how a zero is stored: on a second-level grid, as 16 bits, as one of the codes, or not, being the middle code
BILEVEL, STORED, CODE, MIDDLE = 0, 1, 2, 3
# the float 1.0, given at run time: to mask with one constant and set the bits of another would take two instructions
ONE = 0x3F800000


class Kind(NamedTuple):
    """What kernels are compiled for.

    Attributes:
        bits: of a code.
        group: columns that share statistics; 0: the whole row.
        scale_bits: 16: as stored; else on a second-level grid.
        zero: BILEVEL, STORED, CODE or MIDDLE.
        half: whether each step of the formula is rounded to float16.
        tiled: words and statistics lie in tiles of 16 rows (`spqr/tiled.py`); else row by row, as bit strings.
        bfloat: numbers of 16 bits are bfloat16; else float16.
        count: groups of a row.
        ordered, outliers: whether there are any.
    """

    bits: int
    group: int
    scale_bits: int
    zero: int
    half: bool
    tiled: bool
    bfloat: bool
    count: int
    ordered: bool
    outliers: bool


# a Kind with the tile of `multiply`: rows of each half, blocks of columns, outliers at once, and the dtype that weights
# may be rounded to; Triton forgets the names of a tuple in a tuple
Shape = namedtuple("Shape", ("rows", "blocks", "slots", "dtype", *Kind._fields))


@triton.jit
def of_matrix(operands, matrix):
    """Of one matrix of a stack: words, statistics, second, offsets, columns, values, order, supergroup, one.

    The stack's operands have, behind the order, how much of the first three, the order and the offsets is one matrix.
    """
    words, statistics, second, offsets, columns_of, values, order, w, s, n, o, rows, supergroup, one = operands
    matrix = tl.cast(matrix, tl.int64)
    return (
        words + matrix * w, statistics + matrix * s, second + matrix * n, offsets + matrix * rows, columns_of, values,
        order + matrix * o, supergroup, one,
    )  # fmt: skip


@triton.jit
def places(row, columns, supergroup, KIND: tl.constexpr):
    """Where words, statistics and second-level numbers of rows begin."""
    blocks = (columns + 31) // 32
    if KIND.tiled:
        word = (row // 16) * (blocks * KIND.bits * 16) + row % 16
        return word, (row // 16) * (KIND.count * 16) + row % 16, (row // supergroup) * KIND.count
    else:
        return row * (blocks * KIND.bits), row * KIND.count, (row // supergroup) * KIND.count


@triton.jit
def rounded(t, HALF: tl.constexpr):
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
def statistics_at(statistics, second, at, pair, there, pair_there, KIND: tl.constexpr):
    """Scales and zeros, float32 in the shape of `at`; `pair`: which numbers of the second level are theirs."""
    SCALE_BITS: tl.constexpr = KIND.scale_bits
    HALF: tl.constexpr = KIND.half
    BFLOAT: tl.constexpr = KIND.bfloat
    if SCALE_BITS != 16 or KIND.zero == 0:
        pairs = tl.load(second + pair, pair_there, 0)
    packed = tl.load(statistics + at, there, 0).to(tl.int32)
    if SCALE_BITS == 16:
        scale = _stored(packed, BFLOAT)
    else:
        step, start = _stored(pairs & 0xFFFF, BFLOAT), _stored(pairs >> 16 & 0xFFFF, BFLOAT)
        code = (packed & ((1 << SCALE_BITS) - 1)).to(tl.float32)
        scale = rounded(step * rounded(code - start, HALF), HALF)
    if KIND.zero == 3:
        zero = tl.full(scale.shape, 1 << (KIND.bits - 1), tl.float32)
    else:
        # unsigned, for int32 may be full
        code = (packed.to(tl.uint32, bitcast=True) >> SCALE_BITS).to(tl.int32, bitcast=True)
        if statistics.dtype.element_ty.primitive_bitwidth < 32:
            code = code & ((1 << (statistics.dtype.element_ty.primitive_bitwidth - SCALE_BITS)) - 1)
        if KIND.zero == 1:
            zero = _stored(code, BFLOAT)
        elif KIND.zero == 2:
            zero = code.to(tl.float32)
        else:
            if SCALE_BITS != 16:
                pairs = pairs >> 32
            step, start = _stored(pairs & 0xFFFF, BFLOAT), _stored(pairs >> 16 & 0xFFFF, BFLOAT)
            zero = rounded(step * rounded(code.to(tl.float32) - start, HALF), HALF)
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
def codes_at(words, at, there, BITS: tl.constexpr, TILED: tl.constexpr, TO: tl.constexpr):
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


@triton.constexpr_function
def run_of(group):
    """Of the 32 columns of a block, how many neighbours share statistics."""
    return 32 if group == 0 or group % 32 == 0 else group if 32 % group == 0 else 1


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
def taken_apart(x, NB: tl.constexpr):
    """`[NB, 32]` as a tuple of 32 tensors `[NB]`, of which number i is column `reversed_bits(i)`."""
    parts = (tl.reshape(x, [NB, 2, 2, 2, 2, 2]),)
    for level in tl.static_range(5):
        split = ()
        for i in tl.static_range(1 << level):
            first, second = tl.split(parts[i])
            split = split + (first, second)
        parts = split
    return parts


@triton.constexpr_function
def reversed_bits(i):
    return int(f"{i:05b}"[::-1], 2)


@triton.jit
def weights_at(
    own, word_row, stat_row, second_row, b, there, KIND: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The grid's values of blocks `b`, in the shape of `there` and 32: exact in float32, else rounded once or twice."""
    words, statistics, second, _, _, _, _, _, one = own
    BITS: tl.constexpr = KIND.bits
    fast: tl.constexpr = (not KIND.half) and tl.float32 != DTYPE
    spread: tl.constexpr = 16 if KIND.tiled else 1
    run: tl.constexpr = run_of(KIND.group)
    codes = codes_at(words, word_row + b * (BITS * spread), there, BITS, KIND.tiled, 23 - BITS if fast else 0)
    w = ()
    for h in tl.static_range(32 // run):
        group = (b * 32 + h * run) // KIND.group if KIND.group else b * 0
        in_row = there & (group < KIND.count)
        at, pair = stat_row + group * spread, second_row + group
        scale, zero = statistics_at(statistics, second, at, pair, in_row, in_row, KIND)
        shift = -scale * ((1 << BITS) + zero)
        for i in tl.static_range(run):
            if fast:
                # codes read 1 + code / 2^bits, as for few tokens
                value = (codes[h * run + i] | one).to(tl.float32, bitcast=True) * (scale * (1 << BITS)) + shift
            else:
                value = rounded(scale * rounded(codes[h * run + i].to(tl.float32) - zero, KIND.half), KIND.half)
            w = w + (value.to(DTYPE),)
    return _joined(w)


@triton.jit
def by_rows(w, ROWS: tl.constexpr, BLOCKS: tl.constexpr, KIND: tl.constexpr):
    """What `weights_at` gives, as `[ROWS, columns]`."""
    if KIND.tiled:
        w = tl.permute(tl.reshape(w, [BLOCKS, ROWS, 32]), [1, 0, 2])
    return tl.reshape(w, [ROWS, BLOCKS * 32])
