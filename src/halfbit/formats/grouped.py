"""k-bit codes with a scale and a zero per row or per group of columns: the baseline, and the template for a format.

    codes   uint8 [rows, ceil(columns * bits / 8)]   code i of a row at bits i * bits, lowest bit first
    scale   bfloat16 [rows, groups]                  value = scale * (code - zero)
    zero    uint8 [rows, ceil(groups * bits / 8)]    packed like the codes; [rows, 0] where symmetric

A row of 6144 weights in 2 bits with one group costs 2.003 bits per weight, with groups of 64 it costs 2.28.

A format is three things: `encode` and `decode`, which are inverse to each other bit for bit; `check`, which finds every
damage that `decode` would stumble over; `runtime` and `product`, which multiply. It holds no state.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfbit.bits import pack, packed_bytes, unpack
from halfbit.errors import FormatError, RecipeError, Unsupported
from halfbit.formats._grouped_product import grouped_product
from halfbit.grids.affine import Affine
from halfbit.types import Packed, Solution

DTYPES = {"codes": torch.uint8, "scale": torch.bfloat16, "zero": torch.uint8}


@dataclass(frozen=True)
class Grouped:
    """Solutions of the grid Affine with the same bits, group and symmetry.

    Attributes:
        bits: per weight, 2 to 8.
        group: columns that share a scale and a zero; None: the whole row.
        symmetric: there are no zeros to store.
    """

    bits: int = 2
    group: int | None = None
    symmetric: bool = False

    name: ClassVar[str] = "grouped"
    parts: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero")

    def __post_init__(self) -> None:
        try:
            _ = self.grid
        except RecipeError as error:
            raise RecipeError(str(error).replace("Affine", "Grouped")) from None

    @property
    def grid(self) -> Affine:
        """The grid whose solutions this stores."""
        return Affine(bits=self.bits, group=self.group, symmetric=self.symmetric)

    def encode(self, solution: Solution) -> Packed:
        if solution.grid != self.grid:
            raise Unsupported(f"grouped: {self!r} stores {self.grid!r}, got {solution.grid!r}; make the two agree")
        scale = solution.params["scale"]
        zero = pack(solution.params["zero"], self.bits) if not self.symmetric else _no_bytes(scale)
        return Packed(self, solution.shape, {"codes": pack(solution.codes, self.bits), "scale": scale, "zero": zero})

    def decode(self, packed: Packed) -> Tensor:
        return self._dense(*self.runtime(packed), columns=packed.shape[1])

    def check(self, packed: Packed) -> None:
        rows, columns = packed.shape
        groups = self._groups(columns)
        shapes = {
            "codes": (rows, packed_bytes(columns, self.bits)),
            "scale": (rows, groups),
            "zero": (rows, 0 if self.symmetric else packed_bytes(groups, self.bits)),
        }
        if set(packed.tensors) != set(self.parts):
            raise FormatError(f"grouped: expected the tensors {', '.join(self.parts)}, got {', '.join(packed.tensors)}")
        for part, shape in shapes.items():
            got = packed.tensors[part]
            if got.dtype != DTYPES[part] or got.shape != shape:
                raise FormatError(
                    f"grouped: {part} of a {rows} x {columns} matrix must be {DTYPES[part]} {list(shape)}, "
                    f"got {got.dtype} {list(got.shape)}",
                    tensor=part,
                )
        # a bit flip in the exponent gives a scale that is finite while its multiples are not
        if not torch.isfinite(packed.tensors["scale"].float() * (1 << self.bits)).all():
            raise FormatError(
                "grouped: a scale is NaN, infinite or beyond the grid's range; the file is damaged", tensor="scale"
            )

    def concatenate(self, parts: list[Packed]) -> Packed:
        columns = {part.shape[1] for part in parts}
        if len(columns) != 1:
            raise ValueError(f"grouped: only matrices of one width can be put together, got widths {sorted(columns)}")
        tensors = {key: torch.cat([part.tensors[key] for part in parts]) for key in self.parts}
        return Packed(self, (sum(part.shape[0] for part in parts), columns.pop()), tensors)

    def rows(self, packed: Packed, start: int, stop: int) -> Packed:
        """Rows `start` to `stop` as a matrix of their own, without decoding."""
        tensors = {key: packed.tensors[key][start:stop] for key in self.parts}
        return Packed(self, (stop - start, packed.shape[1]), tensors)

    def runtime(self, packed: Packed) -> list[Tensor]:
        """[codes, scale, zero], as stored."""
        self.check(packed)
        return [packed.tensors[part] for part in self.parts]

    def product(self, x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        def matrix(g: int) -> Tensor:
            rows = slice(g * out_features, (g + 1) * out_features)
            return self._dense(*(t[rows] for t in tensors), columns=x.shape[1])

        return grouped_product(x, starts, out_features, matrix)

    def _dense(self, codes: Tensor, scale: Tensor, zero: Tensor, *, columns: int) -> Tensor:
        params = {"scale": scale}
        if not self.symmetric:
            params["zero"] = unpack(zero, self.bits, self._groups(columns))
        return Solution(self.grid, unpack(codes, self.bits, columns), params).dense()

    def _groups(self, columns: int) -> int:
        # a matrix without columns has one group, as a solver fits one
        return 1 if self.group is None else max(1, -(-columns // self.group))


def _no_bytes(like: Tensor) -> Tensor:
    return torch.empty(like.shape[0], 0, dtype=torch.uint8, device=like.device)


CODEC = Grouped
