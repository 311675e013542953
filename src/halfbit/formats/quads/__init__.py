"""Ternary matrices that are fast on CPUs: which groups of four columns are not zero, their patterns, their signs.

    masks        int64 [matrices, rows, blocks]   a bit for each of the 64 groups of 256 columns: not all are zero
    patterns     uint8 [n]            of each such group four bits: which columns are not zero
    signs        uint8 [m]            of each weight that is not zero: code 1 (0) or code 2 (1)
    tile_signs   int32 [tiles]        signs of each tile
    columns      int32 [matrices]     of the matrix; masks tell it to 256 only
    scale_codes, scale_grid, levels   what the codes stand for, as `_levels.py` says

At 88.6 % zeros 0.75 bits per weight, where `runlength` takes 0.64 and decodes a third as fast. README.md beside this
file has the drawing and the derivation.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfbit.errors import FormatError, Unsupported
from halfbit.formats import _levels
from halfbit.formats._eager import eager
from halfbit.formats._levels import check_shape
from halfbit.formats._shapes import check_parts, joined
from halfbit.formats.quads import kernels, reference, tiles
from halfbit.rotation import signs as signs_of
from halfbit.types import Packed, Solution

DTYPES = {
    "masks": torch.int64,
    "patterns": torch.uint8,
    "signs": torch.uint8,
    "tile_signs": torch.int32,
    "columns": torch.int32,
    **_levels.DTYPES,
}


@dataclass(frozen=True)
class Quads:
    """Ternary matrices at a quarter of a bit, four for each group of columns with a non-zero, one for each non-zero.

    Attributes:
        scale_bits: of the grid `deadzone`, 2 to 8; 0: the grid is `ternary`, with two bfloat16 per row.
        rotated: the codes are of the matrix with its columns rotated (`rotation.py`); a product rotates x.
    """

    scale_bits: int = 5
    rotated: bool = False

    name: ClassVar[str] = "quads"

    def __post_init__(self) -> None:
        _levels.check_scale_bits("Quads", self.scale_bits)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(DTYPES)

    def encode(self, solution: Solution) -> Packed:
        _levels.check_solution(self, self.scale_bits, solution)
        masks, *rest = kernels.encode(solution.codes)
        columns = torch.tensor([solution.shape[1]], dtype=torch.int32)
        levels = _levels.store(solution.params, self.scale_bits, solution.shape[0])
        stored = dict(zip(self.parts, (masks[None], *rest, columns, *levels), strict=True))
        return Packed(self, solution.shape, {part: t.to(solution.codes.device) for part, t in stored.items()})

    def decode(self, packed: Packed) -> Tensor:
        dense = reference.values(self.codes(packed), self.runtime(packed)[5])
        return _levels.turned_back(self.name, dense) if self.rotated else dense

    def codes(self, packed: Packed) -> Tensor:
        """uint8 `[rows, columns]`. Raises FormatError on damage."""
        masks, patterns, signs, pattern_offsets, sign_offsets, *_ = self.runtime(packed)
        matrices, rows = masks.shape[:2]
        count = tiles.tiles(rows, packed.shape[1])
        found = []
        for g in range(matrices):
            own = slice(g * count, (g + 1) * count + 1)
            at = pattern_offsets[own], sign_offsets[own]
            found.append(kernels.decode(masks[g], patterns, signs, at, packed.shape[1]))
        return torch.cat(found)

    def check(self, packed: Packed) -> None:
        self.decode(packed)

    def stack(self, parts: list[Packed]) -> Packed:
        return joined(self, parts)

    def part(self, packed: Packed, number: int, count: int) -> Packed:
        t = packed.tensors
        each, rows = len(t["masks"]) // count, packed.shape[0] // count
        if each * count != len(t["masks"]):
            raise ValueError(f"quads: the stack has {len(t['masks'])} matrices, not {count}")
        of = slice(number * each, (number + 1) * each)
        each_tiles = each * tiles.tiles(rows // each, packed.shape[1])
        first, last = number * each_tiles, (number + 1) * each_tiles
        patterns, signs = (at[[first, last]].tolist() for at in tiles.offsets(t["masks"], t["tile_signs"]))
        cut = {
            "masks": t["masks"][of],
            "patterns": t["patterns"][slice(*patterns)],
            "signs": t["signs"][slice(*signs)],
            "tile_signs": t["tile_signs"][first:last],
            "columns": t["columns"][of],
            **_levels.part(t, of, slice(number * rows, (number + 1) * rows)),
        }
        return Packed(self, (rows, packed.shape[1]), cut)

    def runtime(self, packed: Packed) -> list[Tensor]:
        """[masks, patterns, signs, where each tile's patterns and signs begin, int64 [tiles + 1] each, levels float32
        [rows, 2], signs int8 [columns] of the rotation or [0]]."""
        at = self._check_tensors(packed)
        t = packed.tensors
        levels = _levels.levels_of(packed, self.scale_bits, len(t["masks"]))
        turned = signs_of(packed.shape[1] if self.rotated else 0).to(t["masks"].device)
        return [t["masks"], t["patterns"], t["signs"], *at, levels, turned]

    def product(self, x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        if eager(x):
            return kernels.multiply(x, starts, tensors, out_features)
        return torch.ops.halfbit.quads_product(x, starts, tensors, out_features)

    def lookup(self, rows: Tensor, tensors: list[Tensor], columns: int) -> Tensor:
        raise Unsupported("quads: single rows are not looked up; store an embedding in 'grouped' or 'spqr'")

    def _check_tensors(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Everything that can be seen without decoding; where the tiles begin."""
        rows, columns = packed.shape
        t = packed.tensors
        check_parts(packed, DTYPES)
        matrices = t["masks"].shape[0] if t["masks"].ndim else 0
        if matrices == 0 or rows % matrices:
            raise FormatError(f"quads: {rows} rows are not {matrices} matrices of one shape", tensor="masks")
        check_shape(packed, "masks", (matrices, rows // matrices, tiles.blocks(columns)))
        check_shape(packed, "tile_signs", (matrices * tiles.tiles(rows // matrices, columns),))
        check_shape(packed, "columns", (matrices,))
        if (t["columns"] != columns).any():
            raise FormatError(f"quads: expected {columns} columns, got {t['columns'].tolist()}", tensor="columns")
        _levels.check(packed, self.scale_bits, matrices)
        if columns and (t["masks"][:, :, -1] & ~tiles.last_mask(columns)).any():
            raise FormatError(f"quads: masks name groups behind column {columns}; it is damaged", tensor="masks")
        if (t["tile_signs"] < 0).any():
            raise FormatError("quads: tile_signs must not be negative; the file is damaged", tensor="tile_signs")
        at = tiles.offsets(t["masks"], t["tile_signs"])
        for part, offsets in zip(("patterns", "signs"), at, strict=True):
            if t[part].shape != (int(offsets[-1]),):
                raise FormatError(
                    f"quads: {part} must have {int(offsets[-1])} bytes, got {list(t[part].shape)}; the file is "
                    "damaged, compress the block again",
                    tensor=part,
                )
        return at


CODEC = Quads
