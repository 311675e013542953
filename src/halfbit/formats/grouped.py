"""k-bit codes with a scale and a zero per row or per group of columns: the baseline, and the template for a format.

    codes   uint8 [rows, ceil(columns * bits / 8)]   code i of a row at bits i * bits, lowest bit first
    scale   bfloat16 [rows, groups]                  value = scale * (code - zero)
    zero    uint8 [rows, ceil(groups * bits / 8)]    packed like the codes; [rows, 0] where symmetric
    order   uint8 [k, bytes]                         how the columns are sorted, `_order.py`; k = 0: not at all

A row of 6144 weights in 2 bits with one group costs 2.003 bits per weight, with groups of 64 it costs 2.28.

A format is three things: `encode` and `decode`, which are inverse to each other bit for bit; `check`, which finds every
damage that `decode` would stumble over; `runtime` and `product`, which multiply. It holds no state.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfbit import native
from halfbit.bits import pack, packed_bytes, unpack
from halfbit.errors import FormatError, RecipeError, Unsupported
from halfbit.formats._eager import eager
from halfbit.formats._grouped_product import grouped_product
from halfbit.formats._order import check_order, order_of, pack_order, part_order, put_back, stack_orders, unpack_order
from halfbit.formats._shapes import check_rotated, one_shape
from halfbit.grids.affine import Affine
from halfbit.triton_support import backend
from halfbit.types import Packed, Solution

if native.extension is not None:
    from halfbit.formats import _grouped_cpu

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

    def __post_init__(self) -> None:
        try:
            _ = self.grid
        except RecipeError as error:
            raise RecipeError(str(error).replace("Affine", "Grouped")) from None

    @property
    def grid(self) -> Affine:
        """The grid whose solutions this stores."""
        return Affine(bits=self.bits, group=self.group, symmetric=self.symmetric)

    @property
    def _form(self) -> tuple[int, int | None, bool]:
        return self.bits, self.group, self.symmetric

    @property
    def rotated(self) -> bool:
        return False

    @property
    def parts(self) -> tuple[str, ...]:
        return ("codes", "scale", "zero", "order")

    def encode(self, solution: Solution) -> Packed:
        check_rotated(self, solution)
        if solution.grid != self.grid:
            raise Unsupported(f"grouped: {self!r} stores {self.grid!r}, got {solution.grid!r}; make the two agree")
        if solution.outliers is not None:
            raise Unsupported("grouped: stores no outliers; use the format 'spqr'")
        codes, scale = pack(solution.codes, self.bits), solution.params["scale"]
        zero = pack(solution.params["zero"], self.bits) if not self.symmetric else _no_bytes(scale)
        order = pack_order(solution.order, solution.shape[1], codes.device)
        return Packed(self, solution.shape, {"codes": codes, "scale": scale, "zero": zero, "order": order})

    def decode(self, packed: Packed) -> Tensor:
        operands = self._operands(packed)
        if native.extension is not None and operands[0].is_cpu:
            return _grouped_cpu.decode(operands, self._form, packed.shape[1])
        *tensors, order = operands
        dense = self._stored(*tensors, columns=packed.shape[1])
        step = max(1, packed.shape[0] // max(order.shape[0], 1))
        return torch.cat([put_back(part, order_of(order, n)) for n, part in enumerate(dense.split(step))])

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

        matrices = packed.tensors["order"].shape[0] if packed.tensors["order"].ndim else 0
        if matrices > 1 and rows % matrices:
            raise FormatError(f"grouped: {rows} rows are not {matrices} matrices, one per order", tensor="order")
        check_order(packed.tensors["order"], columns, matrices, "grouped")

    def stack(self, parts: list[Packed]) -> Packed:
        rows, columns = one_shape(parts)
        tensors = {key: torch.cat([part.tensors[key] for part in parts]) for key in ("codes", "scale", "zero")}
        tensors["order"] = stack_orders([part.tensors["order"] for part in parts], columns)
        return Packed(self, (len(parts) * rows, columns), tensors)

    def part(self, packed: Packed, number: int, count: int) -> Packed:
        rows, columns = packed.shape[0] // count, packed.shape[1]
        tensors = {key: packed.tensors[key][number * rows : (number + 1) * rows] for key in ("codes", "scale", "zero")}
        tensors["order"] = part_order(packed.tensors["order"], number, columns)
        return Packed(self, (rows, columns), tensors)

    def runtime(self, packed: Packed) -> list[Tensor]:
        """[codes, scale, zero] as stored, the order as int64 [k, columns]; on a GPU what `_grouped_triton.py` makes."""
        operands = self._operands(packed)
        if kernels := backend(self.name, operands[0]):
            return kernels.runtime(operands, self.bits, self.symmetric, packed.shape[1])
        return operands

    def _operands(self, packed: Packed) -> list[Tensor]:
        self.check(packed)
        t = packed.tensors
        stored = [t[part].contiguous() for part in ("codes", "scale", "zero")]
        return [*stored, unpack_order(t["order"], packed.shape[1])]

    def product(self, x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        if kernels := backend(self.name, x):
            return kernels.product(x, starts, tensors, out_features, self._form)
        if x.requires_grad:
            return self._plain_product(x, starts, tensors, out_features)
        if eager(x):
            return self.multiply(x, starts, tensors, out_features)
        form = [self.bits, self.group or 0, int(self.symmetric)]
        return torch.ops.halfbit.grouped_product(x, starts, tensors, out_features, form)

    def multiply(self, x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        """`product` on a CPU, of an x that takes no gradient."""
        if native.extension is not None:
            return _grouped_cpu.product(x, starts, tensors, out_features, self._form)
        return self._plain_product(x, starts, tensors, out_features)

    def _plain_product(self, x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        """The definition, through which gradients flow."""
        *stored, order = tensors

        def matrix(g: int) -> Tensor:
            rows = slice(g * out_features, (g + 1) * out_features)
            return self._stored(*(t[rows] for t in stored), columns=x.shape[1])

        return grouped_product(x, starts, out_features, matrix, lambda g: order_of(order, g))

    def lookup(self, rows: Tensor, tensors: list[Tensor], columns: int) -> Tensor:
        if kernels := backend(self.name, rows):
            return kernels.lookup(rows, tensors, self._form)
        *stored, order = tensors
        return put_back(self._stored(*(t[rows] for t in stored), columns=columns), order_of(order, 0))

    def _stored(self, codes: Tensor, scale: Tensor, zero: Tensor, *, columns: int) -> Tensor:
        """float32 `[rows, columns]` in the stored order."""
        params = {"scale": scale}
        if not self.symmetric:
            params["zero"] = unpack(zero, self.bits, self._groups(columns))
        return Solution(self.grid, unpack(codes, self.bits, columns), params).dense()

    def _groups(self, columns: int) -> int:
        # a matrix without columns has one group, as a solver fits one
        return 1 if self.group is None else max(1, -(-columns // self.group))


@torch.library.custom_op(
    "halfbit::grouped_product",
    mutates_args=(),
    schema="(Tensor x, Tensor starts, Tensor[] tensors, int out_features, int[] form) -> Tensor",
)
def product(x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int, form: list[int]) -> Tensor:
    """`Grouped.multiply`; `form`: bits, group or 0, whether it is symmetric."""
    bits, group, symmetric = form
    return Grouped(bits, group or None, bool(symmetric)).multiply(x, starts, tensors, out_features)


@product.register_fake
def _(x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int, form: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _no_bytes(like: Tensor) -> Tensor:
    return torch.empty(like.shape[0], 0, dtype=torch.uint8, device=like.device)


CODEC = Grouped
