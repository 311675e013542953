"""QMoE on GPUs: products straight from the codewords.

A warp takes 32 codewords of a row at once: a running sum of their lengths says in which columns they begin, so no
codeword waits for the one before it. What a codeword stands for is one word of 32 bits with its three non-zeros (no
codeword of the published dictionary has more), 256 KiB for all, in place of the dictionary's 512.

    terms    bits 0-4 place, 5-6 symbol of the first non-zero (0: there is none) | 7-13 the second | 14-20 the third
             | 24-31 weights

A dictionary with more non-zeros in a codeword is read as it is, 28 symbols in a word of 64 bits, and is slower.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# what Triton compiles is given plain numbers

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbit.formats import _triton_product
from halfbit.formats._triton_items import MOST_TOKENS, Plan
from halfbit.triton_support import INTERPRETED, check_input, launch

MOST_TERMS = 3


@triton.jit
def _row(operands, at, live):
    """Of rows: where they begin, their codewords, and the values of symbols 0, 1 and 2."""
    _, offsets, levels, _ = operands
    begin = tl.load(offsets + at, live, 0)
    length = (tl.load(offsets + at + 1, live, 0) - begin).to(tl.int32)
    zero, one, two = (
        tl.load(levels + 3 * at, live, 0.0),
        tl.load(levels + 3 * at + 1, live, 0.0),
        tl.load(levels + 3 * at + 2, live, 0.0),
    )
    return begin, length, zero, one, two


@triton.jit
def _codewords(operands, begin, length, chunk, column, CHUNK: tl.constexpr):
    """CHUNK codewords of each row [rows, CHUNK]: their entries and first columns; the column behind them [rows]."""
    words, _, _, terms = operands
    number = chunk + tl.arange(0, CHUNK)[None, :]
    word = tl.load(words + begin[:, None] + number, number < length[:, None], 0).to(tl.int32)
    entry = tl.load(terms + word, number < length[:, None], 0)
    weights = (entry >> (24 if terms.dtype.element_ty == tl.int32 else 56)).to(tl.int32)
    first = column[:, None] + tl.cumsum(weights, 1) - weights
    return entry, first, column + tl.sum(weights, 1)


@triton.jit
def _term(entry, first, k: tl.constexpr, FEW: tl.constexpr):
    """Non-zero k of each codeword: its column and its symbol; 0: there is none."""
    term = (entry >> (7 if FEW else 2) * k).to(tl.int32)
    return first + (term & 31 if FEW else k), (term >> 5 if FEW else term) & 3


@triton.jit
def multiply(
    to, there, x, operands, matrix, out_features, columns, block,
    HALVES: tl.constexpr, SHAPE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """See `_triton_items.py`; SHAPE is (ROWS of a program, CHUNK of codewords at once).

    Reads 16 bits per codeword (21.6 weights at 88.5 % zeros), 20 bytes per row, and terms and x from the caches: x once
    for each non-zero. Compiled for sm_90, a codeword takes 68 instructions of a lane with one token, 81 with four:
    3.2 and 3.8 per weight. An H200 issues 33e12 a second, which bounds this at 10e12 weights, or 4.3 times what
    reading bfloat16 at 4.8 TB/s allows; random reads of terms from L1 (32 lanes, some 32 lines) may bound it before.
    """
    ROWS: tl.constexpr = SHAPE[0]
    CHUNK: tl.constexpr = SHAPE[1]
    FEW: tl.constexpr = operands[3].dtype.element_ty == tl.int32
    half = out_features // HALVES
    first = block * ROWS
    count = tl.maximum(tl.minimum(half - first, ROWS), 0)
    index = tl.arange(0, HALVES * ROWS)
    row = first + index % ROWS + index // ROWS * half
    live = index % ROWS < count
    begin, length, zero, one, two = _row(operands, matrix.to(tl.int64) * out_features + row, live)
    one, two = (one - zero)[:, None], (two - zero)[:, None]
    t = tl.arange(0, TOKENS)
    column = tl.zeros([HALVES * ROWS], tl.int32)
    sums = tl.zeros([HALVES * ROWS, CHUNK, TOKENS], tl.float32)
    chunk, longest = 0, tl.max(length)
    while chunk < longest:
        entry, begins, column = _codewords(operands, begin, length, chunk, column, CHUNK)
        for k in tl.static_range(3 if FEW else 28):
            place, symbol = _term(entry, begins, k, FEW)
            from_ = x + place[:, :, None] * TOKENS + t[None, None, :]
            value = tl.load(from_, (symbol > 0)[:, :, None], 0.0).to(tl.float32)
            sums += tl.where(symbol == 1, one, two)[:, :, None] * value
        chunk += CHUNK
    total = tl.sum(sums, 1)
    if tl.max(tl.abs(zero)) > 0:
        # rows whose most frequent value is not 0.0: that value in all columns, and the others' distances from it
        of_all = tl.zeros([CHUNK, TOKENS], tl.float32)
        c = tl.arange(0, CHUNK)[:, None]
        while tl.min(c) < columns:
            of_all += tl.load(x + c * TOKENS + t[None, :], c < columns, 0.0).to(tl.float32)
            c += CHUNK
        total += zero[:, None] * tl.sum(of_all, 0)[None, :]
    tl.store(to[None, :] + row[:, None], total, live[:, None] & there[None, :])
    return first, count


@triton.jit
def decode(to, operands, matrix, out_features, columns, block, SHAPE: tl.constexpr):
    """See `_triton_dense.py`. Each column is written once, and those of non-zeros twice."""
    ROWS: tl.constexpr = SHAPE[0]
    CHUNK: tl.constexpr = SHAPE[1]
    FEW: tl.constexpr = operands[3].dtype.element_ty == tl.int32
    first = block * ROWS
    count = tl.maximum(tl.minimum(out_features - first, ROWS), 0)
    row = tl.arange(0, ROWS)
    live = row < count
    begin, length, zero, one, two = _row(operands, matrix.to(tl.int64) * out_features + first + row, live)
    to = to + (row * columns)[:, None]
    c = tl.arange(0, CHUNK)[None, :]
    while tl.min(c) < columns:
        tl.store(to + c, tl.broadcast_to(zero[:, None], [ROWS, CHUNK]), live[:, None] & (c < columns))
        c += CHUNK
    tl.debug_barrier()
    column = tl.zeros([ROWS], tl.int32)
    chunk, longest = 0, tl.max(length)
    while chunk < longest:
        entry, begins, column = _codewords(operands, begin, length, chunk, column, CHUNK)
        for k in tl.static_range(3 if FEW else 28):
            place, symbol = _term(entry, begins, k, FEW)
            tl.store(to + place, tl.where(symbol == 1, one[:, None], two[:, None]), symbol > 0)
        chunk += CHUNK
    return first, count


def plan(
    _codec: object, tensors: list[Tensor], out_features: int, _dtype: torch.dtype, halves: int, tokens: int
) -> Plan:
    """See `_triton_items.Plan`; sums are float32 whatever the layer's dtype."""
    *operands, shape = tensors
    # an interpreted program takes as long with many rows
    rows = 16 if INTERPRETED or tokens > MOST_TOKENS else 4 if tokens <= 4 else 2
    default = {"ROWS": rows, "CHUNK": 32, "num_warps": 1}
    found = launch("qmoe", [out_features, shape.shape[1], tokens], default, shape.device)
    rows = max(1, found["ROWS"] // halves)
    blocks = triton.cdiv(out_features // halves, rows)
    return Plan(multiply, decode, tuple(operands), blocks, rows, (rows, found["CHUNK"]), found["num_warps"])


def product(x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
    """See `Codec.product`; tensors are those of `runtime`."""
    check_input(x, tensors[-1].shape[1], "qmoe/triton")
    return _triton_product.product(
        x, starts, out_features, lambda tokens: plan(None, tensors, out_features, x.dtype, 1, tokens)
    )


def runtime(codewords: Tensor, row_offsets: Tensor, levels: Tensor, entries: Tensor, columns: int) -> list[Tensor]:
    """[codewords, row_offsets, levels, terms, empty [0, columns]]: those of the codec, and what is made of the entries.

    28 bytes per row and 256 KiB in all, on the device.
    """
    return [codewords, row_offsets, levels, _terms(entries, levels.device), levels.new_empty(0, columns)]


@lru_cache(maxsize=8)
def _terms(entries: Tensor, device: torch.device) -> Tensor:
    """int32 `[65536]`, or the entries, int64, where a codeword has more than three non-zeros; shared by all matrices.

    Args:
        entries: of the dictionary, on the CPU.
    """
    symbols = (entries[:, None] >> torch.arange(0, 56, 2)) & 3
    number = (symbols > 0).cumsum(1)
    if int(number.max()) > MOST_TERMS:
        return entries.to(device)
    packed = (entries >> 56) << 24
    for k in range(MOST_TERMS):
        term = torch.where((symbols > 0) & (number == k + 1), torch.arange(28) | symbols << 5, 0).sum(1)
        packed |= term << 7 * k
    return packed.to(torch.int32).to(device)
