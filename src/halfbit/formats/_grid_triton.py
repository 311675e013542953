"""Weights on evenly spaced grids, scale * (code - zero), on GPUs: products, decoding, lookup. For `spqr` and `grouped`.

    _grid_triton_codes.py    words and statistics to values in registers; no code is looked up
    _grid_triton_sums.py     rows times few tokens, or many, and the outliers
    _grid_triton_rows.py     rows decoded: for the library's product with very many tokens, and for lookups
    here                     products of any number of tokens, and `plan` for the experts layer

Programs of a product with several matrices find their tokens themselves, from `starts` on the device: there are as many
as could be needed, and those that are not end at once. Outliers are added as their difference from the grid's value.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# what Triton compiles is another language in Python's clothes

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbit import triton_support
from halfbit.formats import _grid_triton_rows
from halfbit.formats._grid_triton_codes import BILEVEL, CODE, MIDDLE, ONE, STORED, Kind, Shape, of_matrix
from halfbit.formats._grid_triton_sums import few, many, multiply, outliers
from halfbit.formats._triton_items import Plan
from halfbit.formats._triton_parts import add_parts

__all__ = ["BILEVEL", "CODE", "MIDDLE", "STORED", "Form", "Operands", "lookup", "plan", "product"]

# of a program by `few`; beyond them tensor cores are better used
FEW = 4
# of one matrix, from which its rows are decoded for the library's product; and the bytes of rows decoded at a time,
# which fit the L2 cache of an A100 or later
DENSE_TOKENS, DENSE_BYTES = 192, 16 << 20
# of a split product: programs that keep a GPU busy for each of its processors, columns that one is worth starting for
PROGRAMS, LEAST_BLOCKS = 2, 16
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Form(NamedTuple):
    """How the matrices of a codec are stored; what is not told here is in `Kind`.

    Attributes:
        supergroup: rows that share a second-level grid.
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
def _product(
    y, x, starts, operands, tokens, groups, rows, columns, per_split, x_stride,
    KIND: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr, MANY: tl.constexpr, FAST: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens times ROWS rows, over `per_split` blocks of columns: into y `[splits, tokens, rows]`."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    matrix, first, end = _find(starts, tl.program_id(2), tokens, GROUPS, groups, TOKENS)
    if matrix >= groups:
        return
    own = of_matrix(operands, matrix)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    begin, last = split * per_split, min((columns + 31) // 32, (split + 1) * per_split)
    x += tl.cast(first, tl.int64) * x_stride
    count = end - first
    if MANY:
        dtype: tl.constexpr = x.dtype.element_ty
        total = many(x, x_stride, 1, count, own, row, live, columns, begin, last, KIND, TOKENS, ROWS, BLOCKS, dtype)
    else:
        total = few(
            x, x_stride, 1, count, own, row, live, columns, begin, last, KIND, TOKENS, ROWS, BLOCKS, FAST, SHARED
        )
    if KIND.outliers:
        total += outliers(x, x_stride, 1, count, own, row, live, columns, split, splits, KIND, TOKENS, SLOTS)
    token = first + tl.arange(0, TOKENS)
    place = (tl.cast(split, tl.int64) * tokens + token)[None, :] * rows + row[:, None]
    tl.store(y + place, total, live[:, None] & (token < end)[None, :])


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
    beyond = each > FEW
    at_once = min(64, max(16, triton.next_power_of_2(each))) if beyond else triton.next_power_of_2(each)
    tiles = -(-tokens // at_once) if groups == 1 else min(tokens, tokens // at_once + groups)
    blocks = -(-columns // 32)
    chosen = triton_support.launch(
        f"grid {'many' if beyond else 'few'}",
        [form.bits, form.group, rows, columns, groups, at_once],
        _defaults(beyond, at_once, rows, blocks, tiles, x.device),
        x.device,
    )
    # no program begins in the middle of what another has
    per_split = -(-chosen["per_split"] // chosen["BLOCKS"]) * chosen["BLOCKS"]
    splits = -(-blocks // per_split)
    out = y if splits == 1 else torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    _product[(-(-rows // chosen["ROWS"]), splits, tiles)](
        out,
        x,
        starts.to(x.device, non_blocking=True) if groups > 1 else o.offsets,
        _pointers(o, form, groups),
        tokens,
        groups,
        rows,
        columns,
        per_split,
        x.stride(0),
        KIND=_kind(o, form),
        GROUPS=triton.next_power_of_2(groups),
        TOKENS=at_once,
        ROWS=chosen["ROWS"],
        BLOCKS=chosen["BLOCKS"],
        SLOTS=chosen["SLOTS"],
        MANY=beyond,
        FAST=x.dtype != torch.float32 and not form.half,
        SHARED=form.supergroup % chosen["ROWS"] == 0,
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )
    return y if splits == 1 else add_parts(out, x.dtype)


def _defaults(
    beyond: bool, at_once: int, rows: int, blocks: int, tiles: int, device: torch.device
) -> triton_support.Launch:
    """How to launch where nothing was tuned: as many programs as keep the device busy, by splitting the columns."""
    found = {"ROWS": 64 if beyond else 16, "BLOCKS": 8 if beyond else 32, "SLOTS": 4 if beyond else 32}
    wanted = PROGRAMS * triton_support.processors(device) // max(1, -(-rows // found["ROWS"]) * tiles)
    splits = max(1, min(wanted, blocks // LEAST_BLOCKS))
    # sums of 64 x 64 would not fit the registers of four warps
    return found | {"per_split": -(-blocks // splits), "num_warps": 8 if at_once > 16 else 4, "num_stages": 2}


def plan(tensors: list[Tensor], form: Form, out_features: int, dtype: torch.dtype, halves: int, tokens: int) -> Plan:
    """See `_triton_items.Plan`; `dtype` is that of the layer's input, to which weights may be rounded."""
    o = Operands(*tensors)
    # some formats do not know how many rows are one matrix
    o = o._replace(extent=o.extent[:out_features])
    rows, columns, _ = o.extent.shape
    # an interpreted program takes as long with many rows
    default = {"ROWS": (64 if triton_support.INTERPRETED else 16) // halves, "BLOCKS": 32, "SLOTS": 32, "num_warps": 4}
    if tokens > FEW:
        default |= {"ROWS": (64 if triton_support.INTERPRETED else 32) // halves, "BLOCKS": 8, "SLOTS": 4}
    key = [form.bits, form.group, rows, columns, halves, tokens]
    found = triton_support.launch("grid experts", key, default, o.words.device)
    shape = Shape(found["ROWS"], found["BLOCKS"], found["SLOTS"], DTYPES[dtype], *_kind(o, form))
    matrices = len(o.words) // (1 if form.tiled else rows)
    blocks = triton.cdiv(rows // halves, found["ROWS"])
    return Plan(multiply, None, _pointers(o, form, matrices), blocks, found["ROWS"], shape, found["num_warps"])


def _through_dense(x: Tensor, o: Operands, form: Form) -> Tensor:
    """All tokens of one matrix by the library's product, some decoded rows at a time."""
    rows, columns, _ = o.extent.shape
    y = x.new_empty(x.shape[0], rows)
    given = x if not o.order.shape[0] else x[:, o.order[0]]
    step = max(64, DENSE_BYTES // (max(columns, 1) * x.element_size()) // 64 * 64)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        y[:, first:last] = (
            given @ _grid_triton_rows.decoded(_pointers(o, form, 1), _kind(o, form), first, last, columns, x.dtype).T
        )
    return y


def lookup(which: Tensor, tensors: list[Tensor], form: Form) -> Tensor:
    """Rows `which`, int64 `[n]`, of a single matrix: float32 `[n, columns]`, bit for bit."""
    o = Operands(*tensors)
    return _grid_triton_rows.lookup(which, _pointers(o, form, 1), _kind(o, form), o.extent.shape[1])


def _pointers(o: Operands, form: Form, groups: int) -> tuple[Tensor | int, ...]:
    """What kernels take, see `_grid_triton_codes.of_matrix`."""
    # the two or four numbers of a group as one of 32 or 64 bits
    second = o.second.view({0: o.second.dtype, 2: torch.int32, 4: torch.int64}[o.second.shape[-1]])
    rows, columns, _ = o.extent.shape
    far = [t.numel() // groups for t in (o.words, o.statistics, second)]
    order = columns if o.order.shape[0] > 1 else 0
    ends = -(-rows // 16) * 16 if o.offsets.shape[0] > 1 else 0
    lists = o.offsets, o.columns, o.values, o.order
    return o.words, o.statistics, second, *lists, *far, order, ends, form.supergroup, ONE


def _kind(o: Operands, form: Form) -> Kind:
    return Kind(
        bits=form.bits,
        group=form.group,
        scale_bits=form.scale_bits,
        zero=form.zero,
        half=form.half,
        tiled=form.tiled,
        bfloat=o.second.dtype == torch.bfloat16,
        count=form.groups(o.extent.shape[1]),
        ordered=o.order.shape[0] > 0,
        outliers=o.offsets.shape[0] > 1,
    )
