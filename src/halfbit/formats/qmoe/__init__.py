"""QMoE's code: ternary rows as runs of one fixed dictionary, 16 bits per run of 2 to 28 weights.

The codewords are the published ones, so a published checkpoint can be taken over without encoding it again
(Frantar and Alistarh 2023, https://arxiv.org/abs/2310.16795; IST-DASLab/qmoe). What lies around them is smaller: 48
bits per row instead of 64, and rows whose most frequent value is not 0.0 no longer cost 8 bits per weight.

    codewords    uint16 [n]        rows one after another
    row_lengths  uint16 [rows]     codewords of each row
    levels       bfloat16 [rows, 2]  what symbols 1 and 2 stand for
    pivots       int64 [k]         unusual rows, ascending:   bits 0-15 bfloat16 of symbol 0 | 16-62 row | 63 zero

In any other row symbol 0 is 0.0. README.md beside this file has the drawing and the derivation.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfbit.errors import FormatError, Unsupported
from halfbit.formats._eager import eager
from halfbit.formats._shapes import check_parts, check_rotated, one_shape
from halfbit.formats.qmoe import kernels, reference
from halfbit.formats.qmoe.dictionary import PUBLISHED_P0, Dictionary, check_p0, dictionary
from halfbit.grids.ternary import Ternary
from halfbit.triton_support import backend
from halfbit.types import Packed, Solution

DTYPES = {"codewords": torch.uint16, "row_lengths": torch.uint16, "levels": torch.bfloat16, "pivots": torch.int64}


@dataclass(frozen=True)
class QMoE:
    """Ternary matrices at about 0.75 bits per weight where 88.5 % of the weights are zero.

    Attributes:
        p0: the share of zeros that the dictionary is made for, at least 1/3; 0.885 is the published one.
    """

    p0: float = PUBLISHED_P0

    name: ClassVar[str] = "qmoe"

    def __post_init__(self) -> None:
        check_p0(self.p0)

    @property
    def dictionary(self) -> Dictionary:
        return dictionary(self.p0)

    @property
    def rotated(self) -> bool:
        return False

    @property
    def parts(self) -> tuple[str, ...]:
        return ("codewords", "row_lengths", "levels", "pivots")

    def encode(self, solution: Solution) -> Packed:
        check_rotated(self, solution)
        if not isinstance(solution.grid, Ternary):
            raise Unsupported(f"qmoe: stores the grid 'ternary', got {solution.grid!r}; use the format 'grouped'")
        if solution.outliers is not None or solution.order is not None:
            raise Unsupported("qmoe: stores neither outliers nor a column order; use the format 'spqr'")
        levels = solution.params["levels"]
        if levels.dtype != torch.bfloat16:
            raise Unsupported(f"qmoe: stores levels as bfloat16, got {levels.dtype}; use Ternary(dtype='bfloat16')")
        symbols, table = most_frequent_first(solution.codes, levels[:, 0])
        return self.pack(symbols, table)

    def pack(self, symbols: Tensor, table: Tensor) -> Packed:
        """uint8 symbols `[rows, columns]` and the bfloat16 values `[rows, 3]` that they stand for, as they are."""
        codewords, counts = kernels.encode(symbols, self.dictionary)
        if counts.numel() and int(counts.max()) > 65535:
            row = int(counts.argmax())
            raise Unsupported(
                f"qmoe: row {row} needs {int(counts[row])} codewords, its length field holds at most 65535; "
                "use the format 'grouped' for rows of more than 131070 columns"
            )
        unusual = torch.nonzero(table[:, 0] != 0).flatten()
        pivots = (unusual << 16) | _bits(table[unusual, 0])
        tensors = (codewords, counts.to(torch.uint16), table[:, 1:].contiguous(), pivots)
        return Packed(self, (symbols.shape[0], symbols.shape[1]), dict(zip(self.parts, tensors, strict=True)))

    def decode(self, packed: Packed) -> Tensor:
        codewords, row_offsets, levels = self._operands(packed)
        entries = self.dictionary.entries.to(levels.device)
        symbols = kernels.decode(codewords, row_offsets, entries, packed.shape[1])
        return reference.values(symbols, levels)

    def check(self, packed: Packed) -> None:
        self._check_tensors(packed)
        entries = self.dictionary.entries.to(packed.tensors["codewords"].device)
        offsets = _offsets(packed.tensors["row_lengths"])
        reference.check_widths(packed.tensors["codewords"], offsets, entries, packed.shape[1])

    def stack(self, parts: list[Packed]) -> Packed:
        rows, columns = one_shape(parts)
        tensors = {
            key: torch.cat([part.tensors[key] for part in parts]) for key in ("codewords", "row_lengths", "levels")
        }
        pivots = [part.tensors["pivots"] + (number * rows << 16) for number, part in enumerate(parts)]
        return Packed(self, (len(parts) * rows, columns), tensors | {"pivots": torch.cat(pivots)})

    def part(self, packed: Packed, number: int, count: int) -> Packed:
        t, rows = packed.tensors, packed.shape[0] // count
        start, stop = number * rows, (number + 1) * rows
        offsets = _offsets(t["row_lengths"])
        of_row = t["pivots"] >> 16
        return Packed(
            self,
            (rows, packed.shape[1]),
            {
                "codewords": t["codewords"][int(offsets[start]) : int(offsets[stop])],
                "row_lengths": t["row_lengths"][start:stop],
                "levels": t["levels"][start:stop],
                "pivots": t["pivots"][(of_row >= start) & (of_row < stop)] - (start << 16),
            },
        )

    def runtime(self, packed: Packed) -> list[Tensor]:
        """[codewords, row_offsets int64 [rows + 1], levels float32 [rows, 3], entries int64 [65536]];
        for Triton's kernels see `triton.runtime`."""
        operands, entries = self._operands(packed), self.dictionary.entries
        if (gpu := backend("qmoe", operands[0])) is not None:
            return gpu.runtime(*operands, entries, packed.shape[1])
        return [*operands, entries.to(operands[0].device)]

    def _operands(self, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
        self._check_tensors(packed)
        t = packed.tensors
        levels = torch.nn.functional.pad(t["levels"].float(), (1, 0))
        levels[t["pivots"] >> 16, 0] = (t["pivots"] & 0xFFFF).to(torch.uint16).view(torch.bfloat16).float()
        return t["codewords"], _offsets(t["row_lengths"]), levels

    def product(self, x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        if eager(x):
            return kernels.multiply(x, starts, tensors, out_features)
        return torch.ops.halfbit.qmoe_product(x, starts, tensors, out_features)

    def lookup(self, rows: Tensor, tensors: list[Tensor], columns: int) -> Tensor:
        raise Unsupported("qmoe: single rows are not looked up; store an embedding in 'grouped' or 'spqr'")

    def _check_tensors(self, packed: Packed) -> None:
        """Everything that can be seen without looking at the codewords."""
        rows = packed.shape[0]
        check_parts(packed, DTYPES)
        shapes = {"codewords": 1, "row_lengths": (rows,), "levels": (rows, 2), "pivots": 1}
        for part, shape in shapes.items():
            got = packed.tensors[part]
            if got.ndim != shape if isinstance(shape, int) else got.shape != shape:
                raise FormatError(f"qmoe: {part} must have shape {shape}, got {tuple(got.shape)}", tensor=part)
        said, present = int(packed.tensors["row_lengths"].to(torch.int64).sum()), packed.tensors["codewords"].shape[0]
        if said != present:
            raise FormatError(
                f"qmoe: the rows have {said} codewords, the file {present}; it is damaged, compress the block again",
                tensor="row_lengths",
            )
        self._check_levels(packed.tensors["levels"], packed.tensors["pivots"], rows)

    @staticmethod
    def _check_levels(levels: Tensor, pivots: Tensor, rows: int) -> None:
        if not torch.isfinite(levels).all():
            raise FormatError("qmoe: a level is NaN or infinite; the file is damaged", tensor="levels")
        row = pivots >> 16
        if ((row < 0) | (row >= rows)).any() or (row.diff() <= 0).any():
            raise FormatError(
                f"qmoe: pivots must name ascending rows below {rows}; the file is damaged", tensor="pivots"
            )
        if not torch.isfinite((pivots & 0xFFFF).to(torch.uint16).view(torch.bfloat16)).all():
            raise FormatError("qmoe: a pivot's value is NaN or infinite; the file is damaged", tensor="pivots")


def most_frequent_first(codes: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Symbols renamed so that symbol 0 is the most frequent value of its row, 0.0 where that is one of them.

    Args:
        codes: uint8 `[rows, columns]`, 0 for 0.0, 1 and 2 for the row's levels.
        levels: bfloat16 `[rows, 2]`.

    Returns:
        uint8 symbols `[rows, columns]`, and the bfloat16 values `[rows, 3]` that they stand for.
    """
    low, high = levels[:, 0], levels[:, 1]
    # the symbol of each code, [rows, 3]: one per value, so a level of 0.0 (a row without negatives) is symbol 0
    second = torch.where(high == 0, 0, torch.where(high == low, 1, 2))
    symbol = torch.stack([torch.zeros_like(second), (low != 0).to(second.dtype), second], 1)
    # int32 sums: half the time of int64, and this is most of what encoding costs
    ones, twos = ((codes == code).sum(1, dtype=torch.int32) for code in (1, 2))
    counts = torch.stack([codes.shape[1] - ones - twos, ones, twos], 1).to(torch.int64)
    counts = torch.zeros_like(counts).scatter_add(1, symbol, counts)
    # 0.0 wins ties, then the lower symbol, so that equal matrices give equal bytes
    first = (3 * counts + torch.tensor([2, 1, 0], device=codes.device)).argmax(1, keepdim=True)
    # exchange symbol 0 and symbol `first`
    renamed = torch.where(symbol == 0, first, torch.where(symbol == first, 0, symbol))
    values = torch.cat([torch.zeros_like(levels[:, :1]), levels], 1)
    table = values.scatter(1, first, 0.0)
    table[:, :1] = values.gather(1, first)
    # nearly every row keeps its codes, and touching all weights would take longer than encoding them
    changed = torch.nonzero((renamed != torch.arange(3, device=codes.device)).any(1)).flatten()
    symbols = codes.clone()
    symbols[changed] = renamed[changed].gather(1, codes[changed].to(torch.int64)).to(torch.uint8)
    return symbols, table


def _offsets(row_lengths: Tensor) -> Tensor:
    # int64: a stack of 2048 experts has more than 2^31 codewords
    lengths = row_lengths.to(torch.int64)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _bits(values: Tensor) -> Tensor:
    """The bit patterns of bfloat16 values as int64 0..65535."""
    return values.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF


CODEC = QMoE
