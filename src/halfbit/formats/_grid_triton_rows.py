"""Rows of weights on evenly spaced grids, decoded on GPUs. See `_grid_triton.py`."""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# what Triton compiles is another language in Python's clothes

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbit.formats._grid_triton_codes import Kind, by_rows, of_matrix, places, weights_at


@triton.jit
def _dense(
    y, operands, first, rows, columns, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Rows from `first` of a matrix to `rows`, without outliers, columns as stored: into y `[some rows, columns]`."""
    axis: tl.constexpr = 0 if KIND.tiled else 1
    own = of_matrix(operands, 0)
    row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word_row, stat_row, second_row = places(row, columns, own[7], KIND)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    there = tl.expand_dims(row < rows, axis) & tl.expand_dims(block < (columns + 31) // 32, 1 - axis)
    word_row, stat_row = tl.expand_dims(word_row, axis), tl.expand_dims(stat_row, axis)
    second_row, b = tl.expand_dims(second_row, axis), tl.expand_dims(block, 1 - axis)
    w = weights_at(own, word_row, stat_row, second_row, b, there, KIND, y.dtype.element_ty)
    w = by_rows(w, ROWS, BLOCKS, KIND)
    column = tl.program_id(1) * (BLOCKS * 32) + tl.arange(0, BLOCKS * 32)
    place = (row - first).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(y + place, w, (row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _put_outliers(y, operands, first, columns, SLOTS: tl.constexpr):
    """A row's outliers, into y `[some rows from first, columns]`, columns as stored."""
    _, _, _, offsets, columns_of, values, _, _, _ = of_matrix(operands, 0)
    row = first + tl.program_id(0)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    for start in range(begin, end, SLOTS):
        at = start + tl.arange(0, SLOTS)
        column = tl.load(columns_of + at, at < end, 0).to(tl.int32)
        place = (row - first).to(tl.int64) * columns + column
        tl.store(y + place, tl.load(values + at, at < end, 0.0), at < end)


@triton.jit
def _looked(
    y, which, operands, columns, KIND: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Row `which[program]`, columns where they belong: float32, into y `[n, columns]`."""
    own = of_matrix(operands, 0)
    _, _, _, offsets, columns_of, values, order, supergroup, _ = own
    row = tl.load(which + tl.program_id(0)).to(tl.int32)
    y += tl.program_id(0).to(tl.int64) * columns
    word_row, stat_row, second_row = places(row, columns, supergroup, KIND)
    blocks = (columns + 31) // 32
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        w = weights_at(own, word_row, stat_row, second_row, block, block < blocks, KIND, tl.float32)
        w = tl.reshape(w, [BLOCKS * 32])
        column = start * 32 + tl.arange(0, BLOCKS * 32)
        real = column < columns
        if KIND.ordered:
            column = tl.load(order + column, real, 0)
        tl.store(y + column, w, real)
    if KIND.outliers:
        # what the same threads wrote above is not theirs any more
        tl.debug_barrier()
        begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
        for start in range(begin, end, SLOTS):
            at = start + tl.arange(0, SLOTS)
            column = tl.load(columns_of + at, at < end, 0).to(tl.int32)
            if KIND.ordered:
                column = tl.load(order + column, at < end, 0)
            tl.store(y + column, tl.load(values + at, at < end, 0.0).to(tl.float32), at < end)


def decoded(
    operands: tuple[Tensor | int, ...], kind: Kind, first: int, last: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Rows `first` to `last` of a single matrix, columns as stored: `[last - first, columns]`."""
    dense = torch.empty(last - first, columns, dtype=dtype, device=operands[0].device)
    if not dense.numel():
        return dense
    grid = (triton.cdiv(last - first, 64), triton.cdiv(columns, 64))
    _dense[grid](dense, operands, first, last, columns, KIND=kind, ROWS=64, BLOCKS=2, num_warps=4)
    if kind.outliers:
        _put_outliers[(last - first,)](dense, operands, first, columns, SLOTS=64, num_warps=1)
    return dense


def lookup(which: Tensor, operands: tuple[Tensor | int, ...], kind: Kind, columns: int) -> Tensor:
    """Rows `which`, int64 `[n]`, of a single matrix: float32 `[n, columns]`, bit for bit."""
    y = torch.empty(which.shape[0], columns, device=which.device)
    if y.numel():
        at = which.contiguous()
        _looked[(len(at),)](y, at, operands, columns, KIND=kind, BLOCKS=16, SLOTS=64, num_warps=1)
    return y
