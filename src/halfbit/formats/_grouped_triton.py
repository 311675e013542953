"""Grouped codes on a GPU by Triton: operands, products and lookup. The kernels are those of `_grid_triton.py`.

Codes are read as they are stored where a row is whole words, that is where 32 divides the columns; others are copied.
Symmetric scales are read as they are stored; otherwise scale and zero of a group become one number of 32 bits, beside
what is stored: 0.25 bits per weight at groups of 128.
"""

import torch
from torch import Tensor

from halfbit.bits import unpack
from halfbit.formats import _grid_triton as grid
from halfbit.formats._triton_items import Plan
from halfbit.formats.grouped import Grouped


def runtime(tensors: list[Tensor], bits: int, symmetric: bool, columns: int) -> list[Tensor]:
    """The operands of the kernels, of codes, scale, zero and order; see `Grouped.runtime`."""
    codes, scale, zero, order = tensors
    rows, groups = scale.shape
    bytes_of_row = -(-columns // 32) * bits * 4
    if codes.shape[1] != bytes_of_row or codes.data_ptr() % 16 or not codes.is_contiguous():
        codes = torch.nn.functional.pad(codes, (0, bytes_of_row - codes.shape[1])).clone()
    statistics = scale.contiguous().view(torch.int16)
    if not symmetric:
        statistics = (statistics.to(torch.int32) & 0xFFFF) | unpack(zero, bits, groups).to(torch.int32) << 16
    nothing = torch.zeros(1, dtype=torch.int32, device=codes.device)
    return list(
        grid.Operands(
            codes.view(torch.int32),
            statistics,
            scale.new_empty(0, 0),
            nothing,
            nothing.to(torch.int16),
            scale.new_zeros(1),
            order.to(torch.int32),
            # rows of one matrix are known to the product alone
            torch.empty(rows, columns, 0, device=codes.device),
        )
    )


def product(
    x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int, form: tuple[int, int | None, bool]
) -> Tensor:
    """See `Codec.product`; `form` is bits, group and symmetric."""
    o = grid.Operands(*tensors)
    one = o._replace(extent=o.extent[:out_features])
    return grid.product(x, starts, list(one), _form(*form), "grouped")


def lookup(which: Tensor, tensors: list[Tensor], form: tuple[int, int | None, bool]) -> Tensor:
    """See `Codec.lookup`."""
    return grid.lookup(which, tensors, _form(*form))


def plan(
    codec: Grouped, tensors: list[Tensor], out_features: int, dtype: torch.dtype, halves: int, tokens: int
) -> Plan:
    """See `_triton_items.Plan`."""
    form = _form(codec.bits, codec.group, codec.symmetric)
    return grid.plan(tensors, form, out_features, dtype, halves, tokens)


def _form(bits: int, group: int | None, symmetric: bool) -> grid.Form:
    return grid.Form(bits, group or 0, 16, grid.MIDDLE if symmetric else grid.CODE, 1, False, False)
