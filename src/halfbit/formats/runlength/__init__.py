"""Ternary matrices as gaps between their non-zeros, within a few per cent of their entropy at any density.

A symbol is a gap of zeros with the sign of the non-zero behind it. Symbols are coded by asymmetric numeral systems
(Duda 2013, https://arxiv.org/abs/1311.2540, range variant) with probabilities of 8 bits and states of 16. A tile has 32
lanes, each with a state of its own, which take the bytes they need from one stream, in the order of the lanes.

    stream        uint8 [n]             tiles one after another: the states of the lanes, then the bytes they take
    tile_bytes    int32 [tiles]         bytes of each tile
    tile_classes  uint8 [tiles]         which of 64 tables: the density of non-zeros in the tile
    exponents     uint8 [matrices]      k: a lane decodes about 2^k weights
    scale_codes   uint8 [matrices, .]   codes of the rows' scales, packed to `scale_bits` bits each
    scale_grid    bfloat16 [matrices, 2]  scale = lowest + step * code
    levels        bfloat16 [rows, 2]    what codes 1 and 2 stand for, in place of scales; one of the two is empty

README.md beside this file has the drawing and the derivation.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfbit.errors import FormatError, RecipeError, Unsupported
from halfbit.formats import _levels
from halfbit.formats._eager import eager
from halfbit.formats._levels import check_shape
from halfbit.formats._shapes import check_parts, joined
from halfbit.formats.runlength import kernels, reference
from halfbit.formats.runlength.lanes import EXPONENTS, Lanes
from halfbit.formats.runlength.tables import CLASSES, tables
from halfbit.rotation import signs
from halfbit.triton_support import backend
from halfbit.types import Packed, Solution

DTYPES = {
    "stream": torch.uint8,
    "tile_bytes": torch.int32,
    "tile_classes": torch.uint8,
    "exponents": torch.uint8,
    **_levels.DTYPES,
}
# A lane costs some 16 bits whatever it holds; longer ones are fewer, and then there is less to do at once. A CPU is
# three times as fast where lanes are rows or parts of them.
LONGEST_PART = 12
BITS_OF_A_ROW = 400
BITS_OF_A_LANE = 800
CHOSEN = range(10, 15)


@dataclass(frozen=True)
class RunLength:
    """Ternary matrices at about 1.02 times the entropy of their three symbols.

    Attributes:
        scale_bits: of the grid `deadzone`, 2 to 8; 0: the grid is `ternary`, with two bfloat16 per row.
        lane: weights that one lane decodes, a power of two, 256 to 16384; None: by density, about 800 bits.
        rotated: the codes are of the matrix with its columns rotated (`rotation.py`); a product rotates x.
    """

    scale_bits: int = 5
    lane: int | None = None
    rotated: bool = False

    name: ClassVar[str] = "runlength"

    def __post_init__(self) -> None:
        _levels.check_scale_bits("RunLength", self.scale_bits)
        if self.lane is not None and self.lane not in [1 << k for k in EXPONENTS]:
            raise RecipeError(f"RunLength: lane must be a power of two, 256 to 16384, or None, got {self.lane}")

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(DTYPES)

    def encode(self, solution: Solution) -> Packed:
        _levels.check_solution(self, self.scale_bits, solution)
        codes = solution.codes
        rows, columns = solution.shape
        lanes = Lanes(rows, columns, self._exponent(codes))
        tensors = (*kernels.encode(codes, lanes), torch.tensor([lanes.exponent], dtype=torch.uint8))
        stored = dict(zip(self.parts, (*tensors, *_levels.store(solution.params, self.scale_bits, rows)), strict=True))
        return Packed(self, (rows, columns), {part: t.to(codes.device) for part, t in stored.items()})

    def _exponent(self, codes: Tensor) -> int:
        if self.lane is not None:
            return self.lane.bit_length() - 1
        p = int(codes.count_nonzero()) / max(codes.numel(), 1)
        entropy = p - p * math.log2(max(p, 1e-9)) - (1 - p) * math.log2(max(1 - p, 1e-9))
        part = min(LONGEST_PART, (codes.shape[1] - 1).bit_length())
        if entropy * min(2**part, codes.shape[1]) >= BITS_OF_A_ROW:
            return max(part, EXPONENTS[0])
        return next((k for k in CHOSEN if entropy * 2**k >= BITS_OF_A_LANE), CHOSEN[-1])

    def decode(self, packed: Packed) -> Tensor:
        dense = reference.values(self.codes(packed), self._operands(packed)[4])
        return _levels.turned_back(self.name, dense) if self.rotated else dense

    def codes(self, packed: Packed) -> Tensor:
        """uint8 `[rows, columns]`. Raises FormatError on damage."""
        stream, offsets, of_tile, exponents, _, entries, _ = self._operands(packed)
        rows, columns = packed.shape[0] // len(exponents), packed.shape[1]
        codes, tile = [], 0
        for exponent in exponents.tolist():
            lanes = Lanes(rows, columns, exponent)
            upto = tile + lanes.tiles
            codes.append(kernels.decode(stream, offsets[tile : upto + 1], of_tile[tile:upto], entries, lanes))
            tile = upto
        return torch.cat(codes)

    def check(self, packed: Packed) -> None:
        # the last state of each lane and the end of each tile say whether all before them was read aright
        self.decode(packed)

    def stack(self, parts: list[Packed]) -> Packed:
        return joined(self, parts)

    def part(self, packed: Packed, number: int, count: int) -> Packed:
        t = packed.tensors
        each, rows = len(t["exponents"]) // count, packed.shape[0] // count
        if each * count != len(t["exponents"]):
            raise ValueError(f"runlength: the stack has {len(t['exponents'])} matrices, not {count}")
        tiles = [0]
        for exponent in t["exponents"].tolist():
            tiles.append(tiles[-1] + Lanes(rows // each, packed.shape[1], exponent).tiles)
        of = slice(number * each, (number + 1) * each)
        tile = slice(tiles[of.start], tiles[of.stop])
        offsets = _offsets(t["tile_bytes"])
        cut = {
            "stream": t["stream"][int(offsets[tile.start]) : int(offsets[tile.stop])],
            "tile_bytes": t["tile_bytes"][tile],
            "tile_classes": t["tile_classes"][tile],
            "exponents": t["exponents"][of],
            **_levels.part(t, of, slice(number * rows, (number + 1) * rows)),
        }
        return Packed(self, (rows, packed.shape[1]), cut)

    def runtime(self, packed: Packed) -> list[Tensor]:
        """[stream, offsets int64 [tiles + 1], tile_classes, exponents, levels float32 [rows, 2], entries int32, signs
        int8 [columns] of the rotation or [0]]; for Triton's kernels see `triton.runtime`."""
        t = packed.tensors
        if (gpu := backend("runlength", t["stream"])) is not None:
            stream, _, of_tile, exponents, levels, _, turned = self._operands(packed)
            return gpu.runtime(stream, t["tile_bytes"], of_tile, exponents, levels, turned, packed.shape[1])
        return self._operands(packed)

    def _operands(self, packed: Packed) -> list[Tensor]:
        self._check_tensors(packed)
        t = packed.tensors
        entries = tables().entries.to(t["stream"].device)
        turned = signs(packed.shape[1] if self.rotated else 0).to(t["stream"].device)
        return [
            t["stream"],
            _offsets(t["tile_bytes"]),
            t["tile_classes"],
            t["exponents"],
            _levels.levels_of(packed, self.scale_bits, len(t["exponents"])),
            entries,
            turned,
        ]

    def product(self, x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        if eager(x):
            return kernels.multiply(x, starts, tensors, out_features)
        return torch.ops.halfbit.runlength_product(x, starts, tensors, out_features)

    def lookup(self, rows: Tensor, tensors: list[Tensor], columns: int) -> Tensor:
        raise Unsupported("runlength: single rows are not looked up; store an embedding in 'grouped' or 'spqr'")

    def _check_tensors(self, packed: Packed) -> None:
        """Everything that can be seen without decoding."""
        rows, columns = packed.shape
        t = packed.tensors
        check_parts(packed, DTYPES)
        matrices = t["exponents"].numel()
        check_shape(packed, "exponents", (max(matrices, 1),))
        if rows % matrices:
            raise FormatError(f"runlength: {rows} rows are not {matrices} matrices of one shape", tensor="exponents")
        exponents = t["exponents"].tolist()
        if not all(k in EXPONENTS for k in exponents):
            raise FormatError(f"runlength: exponents must be 8 to 14, got {exponents}", tensor="exponents")
        tiles = sum(Lanes(rows // matrices, columns, k).tiles for k in exponents)
        check_shape(packed, "stream", (t["stream"].numel(),))
        check_shape(packed, "tile_bytes", (tiles,))
        check_shape(packed, "tile_classes", (tiles,))
        _levels.check(packed, self.scale_bits, matrices)
        self._check_values(t)

    def _check_values(self, t: dict[str, Tensor]) -> None:
        if (t["tile_bytes"] < 0).any() or int(t["tile_bytes"].sum(dtype=torch.int64)) != len(t["stream"]):
            raise FormatError(
                f"runlength: the tiles have {int(t['tile_bytes'].sum(dtype=torch.int64))} bytes, the file "
                f"{len(t['stream'])}; it is damaged, compress the block again",
                tensor="tile_bytes",
            )
        if (t["tile_classes"] >= CLASSES).any():
            raise FormatError(f"runlength: classes must be below {CLASSES}; the file is damaged", tensor="tile_classes")


def _offsets(tile_bytes: Tensor) -> Tensor:
    # int64: a stack of experts has more than 2^31 bytes
    lengths = tile_bytes.to(torch.int64)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


CODEC = RunLength
