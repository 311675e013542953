"""SpQR's code: small groups with statistics on two levels, outliers in 16 bits, rows in tiles of 16.

Dettmers et al. 2023, https://arxiv.org/abs/2306.03078. The values are the paper's, the layout is ours: at 3 bits,
groups of 16 and one outlier in a hundred it takes 3.91 bits per weight where the published library takes 4.32.

    codes            int32 [k, words]                   tiled matrix of `bits` bits, rows x columns (`tiled.py`)
    scales, zeros    int32 [k, words]                   tiled matrices, rows x groups; 16 bits: as they are
    second           dtype [k, supergroups, groups, m]  a, b, c, d: scale = a * (code - b), zero = c * (code - d);
                                                        two of them, or none, where scales or zeros have 16 bits
    outlier_counts   uint16 [k, tiles * chunks]         outliers in each 16 rows x 256 columns; [k, 0]: there are none
    outlier_columns  uint8 [n]                          column within its chunk of 256
    outlier_rows     uint8 [ceil(n / 2)]                row within its tile of 16, two per byte, lower half first
    outlier_values   dtype [n]                          what stands in place of the grid's value; the code there is 0
    order            uint8 [0, 1 or k, bytes]           how the columns are sorted (`_order.py`)

k matrices of one shape are stacked, each on its own. Outliers are sorted by matrix, tile, column, row. README.md beside
this file has the drawing and the arithmetic.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from halfbit.errors import FormatError, RecipeError, Unsupported
from halfbit.formats._eager import eager
from halfbit.formats._order import check_order, pack_order, part_order, stack_orders, unpack_order
from halfbit.formats._shapes import check_rotated, one_shape
from halfbit.formats.spqr import kernels, tiled
from halfbit.formats.spqr.reference import CHUNK, Form, Matrix, Operands, nibbles
from halfbit.formats.spqr.tiled import TILE
from halfbit.grids.bilevel import Bilevel
from halfbit.types import Outliers, Packed, Solution

STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SpQR:
    """Solutions of the grid Bilevel with the same fields, with or without outliers and a column order.

    Attributes:
        bits: per weight, 2 to 8.
        group: columns that share a scale and a zero; None: the whole row.
        scale_bits, zero_bits: 2 to 8, or 16: stored as they are.
        supergroup: rows whose scales (and zeros) share a second-level grid.
        dtype: "float16" or "bfloat16", of second-level and 16-bit statistics and of outliers.
        rounding: "float32", or "float16" where each step is rounded to that, as in published checkpoints.
    """

    bits: int = 3
    group: int | None = 16
    scale_bits: int = 3
    zero_bits: int = 3
    supergroup: int = 16
    dtype: str = "float16"
    rounding: str = "float32"

    name: ClassVar[str] = "spqr"

    def __post_init__(self) -> None:
        try:
            _ = self.grid
        except RecipeError as error:
            raise RecipeError(str(error).replace("Bilevel", "SpQR")) from None
        if self.dtype not in STORED:
            raise RecipeError(f"SpQR: dtype must be one of {', '.join(STORED)}, got {self.dtype!r}")

    @property
    def grid(self) -> Bilevel:
        """The grid whose solutions this stores."""
        return Bilevel(**{field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def form(self) -> Form:
        """What the operators are told."""
        half = int(self.rounding == "float16")
        return Form(self.bits, self.group or 0, self.scale_bits, self.zero_bits, self.supergroup, half)

    @property
    def rotated(self) -> bool:
        return False

    @property
    def parts(self) -> tuple[str, ...]:
        return (
            "codes",
            "scales",
            "zeros",
            "second",
            "outlier_counts",
            "outlier_columns",
            "outlier_rows",
            "outlier_values",
            "order",
        )

    def encode(self, solution: Solution) -> Packed:
        check_rotated(self, solution)
        if solution.grid != self.grid:
            raise Unsupported(f"spqr: {self!r} stores {self.grid!r}, got {solution.grid!r}; make the two agree")
        params, second, tensors = solution.params, [], {"codes": tiled.pack(solution.codes, self.bits)[None]}
        for what, bits in (("scale", self.scale_bits), ("zero", self.zero_bits)):
            stored = params[what if bits == 16 else f"{what}_grid"]
            if stored.dtype != STORED[self.dtype]:
                raise Unsupported(f"spqr: {self!r} stores statistics as {self.dtype}, got {stored.dtype}")
            if bits == 16:
                first = stored.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
            else:
                first = params[f"{what}_codes"]
                second.append(stored)
            tensors[f"{what}s"] = tiled.pack(first, bits)[None]
        rows, columns = solution.shape
        shape = (1, *self._second(rows, columns))
        none = torch.empty(shape, dtype=STORED[self.dtype], device=solution.codes.device)
        tensors["second"] = torch.cat(second, -1)[None].contiguous() if second else none
        tensors |= self._outliers(solution)
        tensors["order"] = pack_order(solution.order, columns, solution.codes.device)
        return Packed(self, solution.shape, {part: tensors[part] for part in self.parts})

    def _outliers(self, solution: Solution) -> dict[str, Tensor]:
        device = solution.codes.device
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        given = solution.outliers or Outliers(nothing, nothing, nothing.to(STORED[self.dtype]))
        if given.values.dtype != STORED[self.dtype]:
            raise Unsupported(f"spqr: {self!r} stores outliers as {self.dtype}, got {given.values.dtype}")
        under = solution.codes[given.rows, given.columns]
        if under.any():
            n = int(torch.nonzero(under)[0])
            place = f"row {int(given.rows[n])}, column {int(given.columns[n])}"
            raise Unsupported(f"spqr: the code under an outlier must be 0, got {int(under[n])} at {place}")
        rows, columns = solution.shape
        tiles, chunks = -(-rows // TILE), -(-columns // CHUNK)
        place = ((given.rows // TILE * chunks * CHUNK) + given.columns) * TILE + given.rows % TILE
        place, sorting = place.sort()
        if (place.diff() == 0).any():
            raise Unsupported("spqr: two outliers are at one place")
        counts = torch.bincount(place // (TILE * CHUNK), minlength=tiles * chunks)
        return {
            "outlier_counts": counts[None, : tiles * chunks if len(given) else 0].to(torch.uint16),
            "outlier_columns": (place // TILE % CHUNK).to(torch.uint8),
            "outlier_rows": _pack_nibbles(place % TILE),
            "outlier_values": given.values[sorting],
        }

    def decode(self, packed: Packed) -> Tensor:
        self.check(packed)
        return kernels.decode(self._operands(packed), self.form)

    def check(self, packed: Packed) -> None:
        self._check_tensors(packed)
        operands = Operands(*self._operands(packed))
        self._check_under_outliers(operands)
        for number in range(operands.codes.shape[0]):
            self._check_statistics(Matrix(operands, self.form, number))

    def stack(self, parts: list[Packed]) -> Packed:
        rows, columns = one_shape(parts)
        tensors = {key: torch.cat([part.tensors[key] for part in parts]) for key in self.parts if key in STACKED}
        counts = [part.tensors["outlier_counts"] for part in parts]
        most = max(c.shape[1] for c in counts)
        tensors["outlier_counts"] = torch.cat([c if c.shape[1] else c.new_zeros(1, most) for c in counts])
        tensors["outlier_rows"] = _pack_nibbles(torch.cat([_unpack_nibbles(part.tensors) for part in parts]))
        tensors["order"] = stack_orders([part.tensors["order"] for part in parts], columns)
        return Packed(self, (len(parts) * rows, columns), {part: tensors[part] for part in self.parts})

    def part(self, packed: Packed, number: int, count: int) -> Packed:
        t, one = packed.tensors, slice(number, number + 1)
        if t["codes"].shape[0] != count:
            raise ValueError(f"spqr: the stack has {t['codes'].shape[0]} matrices, not {count}")
        ends = t["outlier_counts"].to(torch.int64).sum(1).cumsum(0)
        start, stop = int(ends[number - 1]) if number else 0, int(ends[number])
        counts = t["outlier_counts"][one] if stop > start else t["outlier_counts"][one, :0]
        tensors = {key: t[key][one] for key in ("codes", "scales", "zeros", "second")}
        tensors |= {key: t[key][start:stop] for key in ("outlier_columns", "outlier_values")}
        tensors |= {"outlier_counts": counts, "outlier_rows": _pack_nibbles(_unpack_nibbles(t)[start:stop])}
        tensors["order"] = part_order(t["order"], number, packed.shape[1])
        shape = (packed.shape[0] // count, packed.shape[1])
        return Packed(self, shape, {part: tensors[part] for part in self.parts})

    def runtime(self, packed: Packed) -> list[Tensor]:
        """The fields of `reference.Operands`; on a GPU what `triton.py` makes of them. Every place that they name is
        inside of the matrix."""
        self._check_tensors(packed)
        return kernels.runtime(self._operands(packed), self.form)

    def product(self, x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        if eager(x):
            return kernels.multiply(x, starts, tensors, self.form)
        return torch.ops.halfbit.spqr_product(x, starts, tensors, list(self.form))

    def lookup(self, rows: Tensor, tensors: list[Tensor], columns: int) -> Tensor:
        return kernels.lookup(rows, tensors, self.form)

    def _operands(self, packed: Packed) -> list[Tensor]:
        t, (rows, columns) = packed.tensors, self._one(packed)
        groups = self.form.groups(columns)
        found = []
        for name, width, bits in self._tiled(columns, groups):
            found.append(t[name])
            found.append(torch.stack([tiled.edge(words, rows, width, bits) for words in t[name]]))
        counts = t["outlier_counts"].to(torch.int64).flatten()
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        outliers = [t["outlier_columns"], t["outlier_rows"], t["outlier_values"]]
        extent = torch.empty(rows, columns, 0, device=counts.device)
        return [*found, t["second"], offsets, *outliers, unpack_order(t["order"], columns), extent]

    def _tiled(self, columns: int, groups: int) -> list[tuple[str, int, int]]:
        return [("codes", columns, self.bits), ("scales", groups, self.scale_bits), ("zeros", groups, self.zero_bits)]

    def _one(self, packed: Packed) -> tuple[int, int]:
        """The shape of one matrix of the stack."""
        return packed.shape[0] // packed.tensors["codes"].shape[0], packed.shape[1]

    def _second(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Supergroups, groups, and the numbers for each."""
        bilevel = (self.scale_bits != 16) + (self.zero_bits != 16)
        return -(-rows // self.supergroup), self.form.groups(columns), 2 * bilevel

    def _check_tensors(self, packed: Packed) -> None:
        """Shapes, and that every place which a kernel goes to is inside of the matrix."""
        t = packed.tensors
        if set(t) != set(self.parts):
            raise FormatError(f"spqr: expected the tensors {', '.join(self.parts)}, got {', '.join(t)}")
        count = t["codes"].shape[0] if t["codes"].ndim else 0
        if not count or packed.shape[0] % count:
            raise FormatError(f"spqr: {packed.shape[0]} rows are not {count} matrices of one height", tensor="codes")
        rows, columns = self._one(packed)
        places = -(-rows // TILE) * -(-columns // CHUNK)
        outliers = t["outlier_values"].numel()
        shapes = {
            **{
                name: (torch.int32, (count, tiled.count_words(rows, width, bits)))
                for name, width, bits in self._tiled(columns, self.form.groups(columns))
            },
            "second": (STORED[self.dtype], (count, *self._second(rows, columns))),
            "outlier_counts": (torch.uint16, (count, places if outliers else 0)),
            "outlier_columns": (torch.uint8, (outliers,)),
            "outlier_rows": (torch.uint8, (-(-outliers // 2),)),
            "outlier_values": (STORED[self.dtype], (outliers,)),
        }
        for part, (dtype, shape) in shapes.items():
            if t[part].dtype != dtype or t[part].shape != shape:
                raise FormatError(
                    f"spqr: {part} of {count} matrices {rows} x {columns} must be {dtype} {list(shape)}, "
                    f"got {t[part].dtype} {list(t[part].shape)}",
                    tensor=part,
                )
        check_order(t["order"], columns, count, "spqr")
        for name, width, bits in self._tiled(columns, self.form.groups(columns)):
            for number, words in enumerate(t[name]):
                if tiled.unused_bits(words, rows, width, bits).any():
                    raise _damaged(name, f"the unused bits of matrix {number} are not zero")
        if outliers:
            self._check_outliers(t, rows, columns)

    def _check_outliers(self, t: dict[str, Tensor], rows: int, columns: int) -> None:
        said, present = int(t["outlier_counts"].to(torch.int64).sum()), t["outlier_values"].shape[0]
        if said != present:
            raise _damaged("outlier_counts", f"the chunks have {said} outliers, the file {present}")
        if present % 2 and int(t["outlier_rows"][-1]) >> 4:
            raise _damaged("outlier_rows", "the unused half of the last byte is not zero")
        chunk, column, row = _places(t, columns)
        height = rows - TILE * (chunk // -(-columns // CHUNK) % -(-rows // TILE))
        for part, wrong in (("outlier_columns", column >= columns), ("outlier_rows", row >= height)):
            if wrong.any():
                n = int(torch.nonzero(wrong)[0])
                raise _damaged(
                    part, f"outlier {n} is at row {int(row[n])} of its tile, column {int(column[n])}: outside"
                )
        falls = ((chunk * CHUNK + column % CHUNK) * TILE + row).diff() <= 0
        if falls.any():
            raise _damaged("outlier_columns", f"outlier {int(torch.nonzero(falls)[0]) + 1} is out of order")
        if not torch.isfinite(t["outlier_values"]).all():
            raise _damaged("outlier_values", "an outlier is NaN or infinite")

    def _check_under_outliers(self, operands: Operands) -> None:
        if not operands.outlier_values.numel():
            return
        rows, columns, _ = operands.extent.shape
        chunks, tiles = -(-columns // CHUNK), -(-rows // TILE)
        stored = {
            "outlier_counts": operands.outlier_offsets.diff(),
            "outlier_columns": operands.outlier_columns,
            "outlier_rows": operands.outlier_rows,
        }
        chunk, column, row = _places(stored, columns)
        row += chunk // chunks % tiles * TILE
        number = chunk // (chunks * tiles)
        for n, words in enumerate(operands.codes):
            own = number == n
            under = tiled.at(words, row[own], column[own], rows, columns, self.bits)
            if under.any():
                place = int(torch.nonzero(under)[0])
                where = f"row {int(row[own][place])}, column {int(column[own][place])} of matrix {n}"
                raise _damaged("codes", f"the code under the outlier at {where} is {int(under[place])}, not 0")

    def _check_statistics(self, matrix: Matrix) -> None:
        for which in matrix.slabs():
            scale, zero = matrix.statistics(which)
            # the values of a group lie between those of its first and last code
            ends = [matrix.value(scale, zero, code) for code in (0, (1 << self.bits) - 1)]
            for name, wrong in (
                # 0 is what published checkpoints have where a group vanishes in float16: all of its weights are 0.0
                ("scales", ~((scale >= 0) & torch.isfinite(scale))),
                ("zeros", ~(torch.isfinite(zero) & torch.isfinite(ends[0]) & torch.isfinite(ends[1]))),
            ):
                if wrong.any():
                    row, group = torch.nonzero(wrong)[0].tolist()
                    where = f"row {int(which[row])}, group {group} of matrix {matrix.number}"
                    bad = float((scale if name == "scales" else zero)[row, group])
                    raise _damaged(
                        name, f"{name[:-1]} {bad} at {where} must be finite and give finite weights, scales >= 0"
                    )


STACKED = ("codes", "scales", "zeros", "second", "outlier_columns", "outlier_values")


def _places(t: dict[str, Tensor], columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each outlier: the chunk, counted through the stack; the column; the row in its tile. int64 `[n]` each."""
    counts = t["outlier_counts"].to(torch.int64).flatten()
    chunk = torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts)
    column = chunk % -(-columns // CHUNK) * CHUNK + t["outlier_columns"].to(torch.int64)
    return chunk, column, nibbles(t["outlier_rows"], torch.arange(chunk.shape[0], device=chunk.device))


def _pack_nibbles(rows: Tensor) -> Tensor:
    """Rows 0 to 15, `[n]`, two per byte, the lower half first."""
    pairs = torch.nn.functional.pad(rows, (0, rows.shape[0] % 2)).view(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8)


def _unpack_nibbles(t: dict[str, Tensor]) -> Tensor:
    count = t["outlier_values"].shape[0]
    return nibbles(t["outlier_rows"], torch.arange(count, device=t["outlier_rows"].device))


def _damaged(part: str, what: str) -> FormatError:
    return FormatError(f"spqr: {part}: {what}; the file is damaged, compress the block again", tensor=part)


CODEC = SpQR
