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
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from halfbit import bits
from halfbit.errors import FormatError, RecipeError, Unsupported
from halfbit.formats._eager import eager
from halfbit.formats._shapes import check_rotated, one_shape
from halfbit.formats.runlength import kernels, reference
from halfbit.formats.runlength.lanes import EXPONENTS, Lanes
from halfbit.formats.runlength.tables import CLASSES, tables
from halfbit.grids.deadzone import Deadzone
from halfbit.grids.ternary import Ternary
from halfbit.rotation import signs, undo
from halfbit.triton_support import backend
from halfbit.types import Packed, Params, Solution

DTYPES = {
    "stream": torch.uint8,
    "tile_bytes": torch.int32,
    "tile_classes": torch.uint8,
    "exponents": torch.uint8,
    "scale_codes": torch.uint8,
    "scale_grid": torch.bfloat16,
    "levels": torch.bfloat16,
}
# A lane costs some 16 bits whatever it holds; longer ones are fewer, and then there is less to do at once.
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
        if self.scale_bits != 0 and not 2 <= self.scale_bits <= 8:
            raise RecipeError(f"RunLength: scale_bits must be 2 to 8, or 0, got {self.scale_bits}")
        if self.lane is not None and self.lane not in [1 << k for k in EXPONENTS]:
            raise RecipeError(f"RunLength: lane must be a power of two, 256 to 16384, or None, got {self.lane}")

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(DTYPES)

    def encode(self, solution: Solution) -> Packed:
        check_rotated(self, solution)
        grid = Ternary() if self.scale_bits == 0 else Deadzone(self.scale_bits)
        if solution.grid != grid:
            raise Unsupported(f"runlength: {self!r} stores the grid {grid!r}, got {solution.grid!r}")
        if solution.outliers is not None or solution.order is not None:
            raise Unsupported("runlength: stores neither outliers nor a column order; use the format 'spqr'")
        codes = solution.codes
        if codes.numel() and int(codes.max()) > 2:
            raise Unsupported(f"runlength: codes must be 0, 1 or 2, got {int(codes.max())}")
        rows, columns = solution.shape
        lanes = Lanes(rows, columns, self._exponent(codes))
        tensors = (*kernels.encode(codes, lanes), torch.tensor([lanes.exponent], dtype=torch.uint8))
        stored = dict(zip(self.parts, (*tensors, *self._scales(solution.params, rows)), strict=True))
        return Packed(self, (rows, columns), {part: t.to(codes.device) for part, t in stored.items()})

    def _exponent(self, codes: Tensor) -> int:
        if self.lane is not None:
            return self.lane.bit_length() - 1
        p = int(codes.count_nonzero()) / max(codes.numel(), 1)
        entropy = p - p * math.log2(max(p, 1e-9)) - (1 - p) * math.log2(max(1 - p, 1e-9))
        return next((k for k in CHOSEN if entropy * 2**k >= BITS_OF_A_LANE), CHOSEN[-1])

    def _scales(self, params: Params, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """scale_codes, scale_grid, levels."""
        if self.scale_bits == 0:
            no_grid = torch.zeros(0, 2, dtype=torch.bfloat16)
            return torch.zeros(0, 0, dtype=torch.uint8), no_grid, params["levels"][:, 0].contiguous()
        codes = bits.pack(params["scale_codes"].reshape(1, rows), self.scale_bits)
        return codes, params["scale_grid"].reshape(1, 2), torch.zeros(0, 2, dtype=torch.bfloat16)

    def decode(self, packed: Packed) -> Tensor:
        stream, offsets, of_tile, exponents, levels, entries, _ = self._operands(packed)
        rows, columns = packed.shape[0] // len(exponents), packed.shape[1]
        codes, tile = [], 0
        for exponent in exponents.tolist():
            lanes = Lanes(rows, columns, exponent)
            upto = tile + lanes.tiles
            codes.append(kernels.decode(stream, offsets[tile : upto + 1], of_tile[tile:upto], entries, lanes))
            tile = upto
        dense = reference.values(torch.cat(codes), levels)
        if self.rotated and not torch.isfinite(dense := undo(dense)).all():
            raise FormatError(
                "runlength: scales are too large for this matrix; the file is damaged", tensor="scale_grid"
            )
        return dense

    def unrotated(self, packed: Packed) -> Packed:
        """The same bytes as a matrix whose columns are what they are."""
        return replace(packed, codec=replace(self, rotated=False))

    def check(self, packed: Packed) -> None:
        # the last state of each lane and the end of each tile say whether all before them was read aright
        self.decode(packed)

    def stack(self, parts: list[Packed]) -> Packed:
        rows, columns = one_shape(parts)
        tensors = {part: torch.cat([p.tensors[part] for p in parts]) for part in self.parts}
        return Packed(self, (len(parts) * rows, columns), tensors)

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
            "scale_codes": t["scale_codes"][of],
            "scale_grid": t["scale_grid"][of],
            "levels": t["levels"][number * rows : (number + 1) * rows],
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
            self._levels(packed),
            entries,
            turned,
        ]

    def _levels(self, packed: Packed) -> Tensor:
        """What codes 1 and 2 stand for, float32 `[rows, 2]`."""
        t, rows = packed.tensors, packed.shape[0]
        if self.scale_bits == 0:
            return t["levels"].float()
        codes = bits.unpack(t["scale_codes"], self.scale_bits, rows // len(t["exponents"]))
        of_rows = {"scale_codes": codes, "scale_grid": t["scale_grid"][:, None]}
        scale = Deadzone(self.scale_bits).ready(of_rows)["scale"].view(rows, 1)
        if not torch.isfinite(scale).all():
            raise FormatError("runlength: a scale is infinite; the file is damaged", tensor="scale_grid")
        return torch.cat([-scale, scale], 1)

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
        if set(t) != set(self.parts):
            raise FormatError(f"runlength: expected the tensors {', '.join(self.parts)}, got {', '.join(t)}")
        for part, dtype in DTYPES.items():
            if t[part].dtype != dtype:
                raise FormatError(f"runlength: {part} must be {dtype}, got {t[part].dtype}", tensor=part)
        matrices = t["exponents"].numel()
        _check_shape(t["exponents"], "exponents", (max(matrices, 1),))
        if rows % matrices:
            raise FormatError(f"runlength: {rows} rows are not {matrices} matrices of one shape", tensor="exponents")
        exponents = t["exponents"].tolist()
        if not all(k in EXPONENTS for k in exponents):
            raise FormatError(f"runlength: exponents must be 8 to 14, got {exponents}", tensor="exponents")
        tiles = sum(Lanes(rows // matrices, columns, k).tiles for k in exponents)
        _check_shape(t["stream"], "stream", (t["stream"].numel(),))
        _check_shape(t["tile_bytes"], "tile_bytes", (tiles,))
        _check_shape(t["tile_classes"], "tile_classes", (tiles,))
        one, few = (0, 0), (0, 2)
        if self.scale_bits:
            one, few = (matrices, bits.packed_bytes(rows // matrices, self.scale_bits)), (matrices, 2)
        _check_shape(t["scale_codes"], "scale_codes", one)
        _check_shape(t["scale_grid"], "scale_grid", few)
        _check_shape(t["levels"], "levels", (0, 2) if self.scale_bits else (rows, 2))
        self._check_values(t, rows // matrices)

    def _check_values(self, t: dict[str, Tensor], rows: int) -> None:
        if (t["tile_bytes"] < 0).any() or int(t["tile_bytes"].sum(dtype=torch.int64)) != len(t["stream"]):
            raise FormatError(
                f"runlength: the tiles have {int(t['tile_bytes'].sum(dtype=torch.int64))} bytes, the file "
                f"{len(t['stream'])}; it is damaged, compress the block again",
                tensor="tile_bytes",
            )
        if (t["tile_classes"] >= CLASSES).any():
            raise FormatError(f"runlength: classes must be below {CLASSES}; the file is damaged", tensor="tile_classes")
        for part in ("levels", "scale_grid"):
            if not torch.isfinite(t[part]).all():
                raise FormatError(f"runlength: {part} has NaN or infinity; the file is damaged", tensor=part)
        used = rows * self.scale_bits % 8
        if used and (t["scale_codes"][:, -1] >> used).any():
            raise FormatError(
                "runlength: unused bits behind scale_codes are not 0; it is damaged", tensor="scale_codes"
            )


def _check_shape(t: Tensor, part: str, shape: tuple[int, ...]) -> None:
    if t.shape != shape:
        raise FormatError(f"runlength: {part} must have shape {shape}, got {tuple(t.shape)}", tensor=part)


def _offsets(tile_bytes: Tensor) -> Tensor:
    # int64: a stack of experts has more than 2^31 bytes
    lengths = tile_bytes.to(torch.int64)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


CODEC = RunLength
