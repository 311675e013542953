"""Products with many tokens: the rows of a block are decoded into memory that stays in L2, and go through tensor cores.

Each program has scratch of its own for one block of rows, which it decodes once for up to PLACES tokens of a matrix. So
never more than PROGRAMS blocks are expanded, whatever the layer's size. A format offers `decode(to, operands, matrix,
out_features, columns, block, SHAPE)`: block number `block` of the rows of a matrix, dense, to `to` `[rows, columns]`;
it returns the first row and how many they are.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# what Triton compiles is given plain numbers

import triton
import triton.language as tl
from torch import Tensor

from halfbit.formats._triton_items import ONE_MATRIX, TABLE, Plan, item
from halfbit.triton_support import INTERPRETED

PLACES = 256
"""Tokens of a matrix for which a block is decoded once."""
PROGRAMS = 264
"""Two for each multiprocessor of an H200; with 64 KiB each they are a third of its L2."""


@triton.jit
def _product(
    y, x, scratch, items, operands, count, blocks, places, matrices, out_features, columns, row_step, column_step, size,
    DECODE: tl.constexpr, SHAPE: tl.constexpr, PLACES: tl.constexpr, ITEMS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    t, r, c = tl.arange(0, TOKENS)[:, None], tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    dense = scratch + tl.program_id(0).to(tl.int64) * size
    work = tl.program_id(0)
    while work < count * blocks:
        matrix, first, tokens = item(work // blocks, items, places, matrices, PLACES, ITEMS)
        if tokens > 0:
            begin, rows = DECODE(dense, operands, matrix, out_features, columns, work % blocks, SHAPE)
            tl.debug_barrier()
            done = 0
            while done < tokens * rows:
                # tiles of TOKENS x ROWS, rows first
                token, row = done // rows, done % rows
                inside = token + t < tokens
                total = tl.zeros([TOKENS, ROWS], tl.float32)
                column = 0
                while column < columns:
                    from_ = x + (first + token + t).to(tl.int64) * row_step + (column + c)[None, :] * column_step
                    value = tl.load(from_, inside & (column + c < columns)[None, :], 0.0)
                    own = dense + (row + r)[None, :] * columns + (column + c)[:, None]
                    weight = tl.load(own, (row + r < rows)[None, :] & (column + c < columns)[:, None], 0.0)
                    if INTERPRETED:
                        # whose dot takes bfloat16 for whole numbers
                        value, weight = value.to(tl.float32), weight.to(tl.float32)
                    total = tl.dot(value, weight, total, input_precision="ieee")
                    column += COLUMNS
                to = y + (first + token + t).to(tl.int64) * out_features + begin + row + r[None, :]
                tl.store(to, total, inside & (row + r < rows)[None, :])
                # behind the last rows come the next tokens
                done = tl.where(row + ROWS < rows, done + ROWS, (token + TOKENS) * rows)
            # before the next block takes the place of this one
            tl.debug_barrier()
        work += tl.num_programs(0)


def multiply(y: Tensor, x: Tensor, items: Tensor | None, matrices: int, plan: Plan) -> None:
    """x `[places, columns]` times the matrices, to y `[places, out_features]`; both in one dtype.

    Args:
        items: of PLACES places at most, see `_triton_items.cut`; None: there is one matrix.
    """
    (places, columns), out_features = x.shape, y.shape[1]
    count = triton.cdiv(places, PLACES) if items is None else items.shape[0]
    programs = min(PROGRAMS, count * plan.blocks)
    # rows of 16 elements, so that each program's begin where loads can be wide
    size = triton.cdiv(plan.rows * columns, 16) * 16
    scratch = x.new_empty(programs * size)
    _product[(programs,)](
        y, x, scratch, items, plan.operands, count, plan.blocks, places, matrices, out_features, columns, *x.stride(),
        size, DECODE=plan.decode, SHAPE=plan.shape, PLACES=PLACES, ITEMS=ONE_MATRIX if items is None else TABLE,
        TOKENS=64, ROWS=32, COLUMNS=64, INTERPRETED=INTERPRETED, num_warps=4,
    )  # fmt: skip
