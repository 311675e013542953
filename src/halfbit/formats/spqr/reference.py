"""SpQR in plain torch, any device: what `cpu.py` and the GPU kernels are compared with.

`tensors` are those of `SpQR.runtime`. Only some rows are decoded at a time, never a whole matrix.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from halfbit.formats._order import order_of, put_back
from halfbit.formats.spqr import tiled
from halfbit.formats.spqr.tiled import TILE

# bounds the intermediate tensors to some 100 MB
WEIGHTS_AT_ONCE = 1 << 22
# columns that an outlier's stored column counts within
CHUNK = 256


class Form(NamedTuple):
    """A codec as an operator is told of it: whole numbers in a fixed order.

    Attributes:
        group: columns that share statistics; 0: the whole row.
        half: whether each step is rounded to float16.
    """

    bits: int
    group: int
    scale_bits: int
    zero_bits: int
    supergroup: int
    half: int

    def groups(self, columns: int) -> int:
        # a matrix without columns has one group, as a solver fits one
        return max(1, -(-columns // self.group)) if self.group else 1


class Operands(NamedTuple):
    """What `SpQR.runtime` gives, in its order, for k matrices of rows x columns.

    Attributes:
        codes, scales, zeros: int32 `[k, words]`, tiled; `_edge`: int32 `[k, n]`, of `tiled.edge`.
        second: `[k, supergroups, groups, m]`.
        outlier_offsets: int64 `[k * tiles * chunks + 1]`, where each chunk's outliers begin; `[1]` without any.
        outlier_columns, outlier_rows, outlier_values: as stored.
        order: int64 `[0, 1 or k, columns]`.
        extent: `[rows, columns, 0]`; its shape is what it says.
    """

    codes: Tensor
    codes_edge: Tensor
    scales: Tensor
    scales_edge: Tensor
    zeros: Tensor
    zeros_edge: Tensor
    second: Tensor
    outlier_offsets: Tensor
    outlier_columns: Tensor
    outlier_rows: Tensor
    outlier_values: Tensor
    order: Tensor
    extent: Tensor


class Matrix:
    """Matrix `number` of a stack, in the stored order of columns."""

    def __init__(self, operands: Operands, form: Form, number: int):
        self.operands, self.form, self.number = operands, form, number
        self.rows, self.columns, _ = operands.extent.shape
        self.order = order_of(operands.order, number)

    def slabs(self) -> tuple[Tensor, ...]:
        """Its rows, so many at a time that their weights are few."""
        step = TILE * max(1, WEIGHTS_AT_ONCE // (TILE * max(self.columns, 1)))
        return torch.arange(self.rows, device=self.operands.codes.device).split(step)

    def decode(self, which: Tensor) -> Tensor:
        """Rows `which`, int64 `[n]`: float32 `[n, columns]`."""
        scale, zero = (self._spread(s) for s in self.statistics(which))
        codes = tiled.read(self.operands.codes[self.number], which, self.rows, self.columns, self.form.bits)
        w = self.value(scale, zero, codes.to(torch.float32))
        at, column, value = self.outliers(which)
        w[at, column] = value
        return w

    def statistics(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros of rows `which`, float32 `[n, groups]` each."""
        form, operands = self.form, self.operands
        groups = form.groups(self.columns)
        second = operands.second[self.number][which // form.supergroup].to(torch.float32)
        found, used = [], 0
        for words, bits in ((operands.scales, form.scale_bits), (operands.zeros, form.zero_bits)):
            fields = tiled.read(words[self.number], which, self.rows, groups, bits)
            if bits == 16:
                found.append(fields.to(torch.uint16).view(operands.second.dtype).to(torch.float32))
            else:
                step, start = second[..., used], second[..., used + 1]
                found.append(self._rounded(step * self._rounded(fields.to(torch.float32) - start)))
                used += 2
        return found[0], found[1]

    def outliers(self, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows `which`: the index into `which`, the column, the value as float32."""
        o = self.operands
        chunks = -(-self.columns // CHUNK)
        offsets = o.outlier_offsets
        if offsets.shape[0] == 1 or not chunks:
            nothing = which[:0]
            return nothing, nothing, o.outlier_values[:0].to(torch.float32)
        # all outliers of the rows' tiles, of which the rows take their own
        tile = (self.number * -(-self.rows // TILE) + which // TILE) * chunks
        first, count = offsets[tile], offsets[tile + chunks] - offsets[tile]
        index = torch.arange(which.shape[0], device=which.device).repeat_interleave(count)
        place = torch.arange(index.shape[0], device=which.device) - (count.cumsum(0) - count)[index] + first[index]
        own = nibbles(o.outlier_rows, place) == (which % TILE)[index]
        index, place = index[own], place[own]
        chunk = torch.searchsorted(offsets, place, right=True) - 1
        column = chunk % chunks * CHUNK + o.outlier_columns[place].to(torch.int64)
        return index, column, o.outlier_values[place].to(torch.float32)

    def value(self, scale: Tensor, zero: Tensor, code: Tensor | int) -> Tensor:
        """The grid's value."""
        return self._rounded(scale * self._rounded(code - zero))

    def _spread(self, statistics: Tensor) -> Tensor:
        if statistics.shape[1] == 1:
            return statistics
        return statistics.repeat_interleave(self.form.group, 1)[:, : self.columns]

    def _rounded(self, t: Tensor) -> Tensor:
        return t.to(torch.float16).to(torch.float32) if self.form.half else t


def nibbles(packed: Tensor, place: Tensor) -> Tensor:
    """The 4-bit fields at `place`, int64 `[n]`; two per byte, the lower half first."""
    return packed[place // 2].to(torch.int64) >> 4 * (place % 2) & 15


def decode(tensors: list[Tensor], form: Form) -> Tensor:
    """All matrices, one above another, columns where they belong: float32 `[k * rows, columns]`."""
    operands = Operands(*tensors)
    matrices = [Matrix(operands, form, g) for g in range(operands.codes.shape[0])]
    return torch.cat([put_back(m.decode(which), m.order) for m in matrices for which in m.slabs()])


def product(x: Tensor, starts: Tensor, tensors: list[Tensor], form: Form) -> Tensor:
    """See `Codec.product`."""
    operands = Operands(*tensors)
    y = x.new_empty(x.shape[0], operands.extent.shape[0])
    for g, (start, stop) in enumerate(pairwise(starts.tolist())):
        if stop == start:
            continue
        matrix = Matrix(operands, form, g)
        tokens = (x[start:stop] if matrix.order is None else x[start:stop, matrix.order]).to(torch.float32)
        for which in matrix.slabs():
            y[start:stop, which] = (tokens @ matrix.decode(which).T).to(x.dtype)
    return y


def lookup(which: Tensor, tensors: list[Tensor], form: Form) -> Tensor:
    """Rows `which` of a single matrix, columns where they belong: float32 `[n, columns]`."""
    matrix = Matrix(Operands(*tensors), form, 0)
    return put_back(matrix.decode(which), matrix.order)
