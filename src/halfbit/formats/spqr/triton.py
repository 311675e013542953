"""SpQR on a GPU by Triton: operands, products and lookup. The kernels are those of `_grid_triton.py`.

Codes are read as they are stored; only a matrix of ragged shape is copied, to whole tiles and blocks. Scale and zero of
a group become one number of 8, 16 or 32 bits, so that a thread finds both in one load: at 3 bits each and groups of 16
this takes 0.5 bits per weight where the file has 0.375. Outliers are sorted by row, with a column of 16 bits: 32 bits
each where the file has 28. What is stored stays on the device beside them, to be saved again.
"""

import torch
from torch import Tensor

from halfbit.formats import _grid_triton as grid
from halfbit.formats._triton_items import Plan
from halfbit.formats.spqr import SpQR, reference, tiled
from halfbit.formats.spqr.reference import Form
from halfbit.formats.spqr.tiled import BLOCK, TILE

SHORT = (torch.uint8, torch.int16, torch.int32)


def runtime(tensors: list[Tensor], form: Form) -> list[Tensor]:
    """The operands of the kernels, of those of `reference.Operands`."""
    o = reference.Operands(*tensors)
    rows, columns, _ = o.extent.shape
    count, device = o.codes.shape[0], o.codes.device
    groups = form.groups(columns)
    every = torch.arange(rows, device=device)
    both = []
    for matrix in range(count):
        fields = [
            tiled.read(words[matrix], every, rows, groups, bits)
            for words, bits in ((o.scales, form.scale_bits), (o.zeros, form.zero_bits))
        ]
        packed = fields[0] | fields[1] << form.scale_bits
        padded = torch.nn.functional.pad(packed, (0, 0, 0, -rows % TILE)).view(-1, TILE, groups).transpose(1, 2)
        both.append(_narrow(padded, form.scale_bits + form.zero_bits))
    offsets, where, values = _by_row(o, form)
    return list(
        grid.Operands(
            _whole(o, rows, columns, form.bits),
            torch.stack(both),
            o.second,
            offsets,
            where,
            values,
            o.order.to(torch.int32),
            o.extent,
        )
    )


def product(x: Tensor, starts: Tensor, tensors: list[Tensor], form: Form) -> Tensor:
    """See `Codec.product`."""
    return grid.product(x, starts, tensors, _form(form), "spqr")


def lookup(which: Tensor, tensors: list[Tensor], form: Form) -> Tensor:
    """See `reference.lookup`."""
    return grid.lookup(which, tensors, _form(form))


def plan(codec: SpQR, tensors: list[Tensor], out_features: int, dtype: torch.dtype, halves: int, tokens: int) -> Plan:
    """See `_triton_items.Plan`."""
    return grid.plan(tensors, _form(codec.form), out_features, dtype, halves, tokens)


def _form(form: Form) -> grid.Form:
    zero = grid.STORED if form.zero_bits == 16 else grid.BILEVEL
    return grid.Form(form.bits, form.group, form.scale_bits, zero, form.supergroup, bool(form.half), True)


def _narrow(fields: Tensor, bits: int) -> Tensor:
    """int64 fields of `bits` bits as the shortest integers that hold them; the highest bit may become a sign."""
    dtype = next(d for d in SHORT if bits <= torch.iinfo(d).bits)
    if dtype == torch.uint8:
        return fields.to(dtype)
    width = torch.iinfo(dtype).bits
    return (fields - (fields >> (width - 1) << width)).to(dtype)


def _whole(o: reference.Operands, rows: int, columns: int, bits: int) -> Tensor:
    """The codes in whole tiles and blocks, int32 `[k, tiles, blocks, bits, 16]`."""
    whole, rest, height = columns // BLOCK, columns % BLOCK, rows % TILE
    tiles, full = -(-rows // TILE), rows // TILE
    count = o.codes.shape[0]
    if not rest and not height:
        return o.codes.view(count, tiles, whole, bits, TILE)
    words = o.codes.new_zeros(count, tiles, whole + (rest > 0), bits, TILE)
    words[:, :full, :whole] = o.codes[:, : full * TILE * whole * bits].view(count, full, whole, bits, TILE)
    edge = o.codes_edge
    if rest:
        words[:, :, whole] = edge[:, : tiles * bits * TILE].view(count, tiles, bits, TILE)
        edge = edge[:, tiles * bits * TILE :]
    if height:
        words[:, full, :whole] = edge.view(count, whole, bits, TILE)
    return words


def _by_row(o: reference.Operands, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """Outliers sorted by matrix and row: where each row's begin, columns as stored, values."""
    rows, columns, _ = o.extent.shape
    tiles = -(-rows // TILE)
    if o.outlier_offsets.shape[0] == 1:
        nothing = torch.zeros(1, dtype=torch.int32, device=o.codes.device)
        return nothing, nothing.to(torch.int16), torch.zeros_like(nothing, dtype=o.outlier_values.dtype)
    chunks = -(-columns // reference.CHUNK)
    counts = o.outlier_offsets.diff()
    chunk = torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts)
    number = torch.arange(chunk.shape[0], device=chunk.device)
    row = chunk // chunks * TILE + reference.nibbles(o.outlier_rows, number)
    column = chunk % chunks * reference.CHUNK + o.outlier_columns.to(torch.int64)
    row, sorting = row.sort(stable=True)
    each = torch.bincount(row, minlength=o.codes.shape[0] * tiles * TILE)
    offsets = torch.nn.functional.pad(each.cumsum(0), (1, 0)).to(torch.int32)
    short = torch.int16 if columns <= 1 << 15 else torch.int32
    return offsets, column[sorting].to(short), o.outlier_values[sorting]
