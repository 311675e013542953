"""The two values that are passed on, `Solution` and `Packed`, and the contracts of grids and codecs.

    weights -> solver -> Solution -> Codec.encode -> Packed -> shard -> PackedExperts, PackedLinear -> kernel

A `Solution` is what a solver decided about one matrix; a `Packed` is the bytes that say the same. The law between them:
`codec.decode(codec.encode(s))` equals `s.dense()` bit for bit. It holds because a grid rounds its parameters to the
dtype they are stored in before the solver uses them.

Matrices are `[out, in]`; a stack of experts is one tall matrix `[experts * out, in]`, made of matrices of one shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from halfbit.rotation import undo

Params = dict[str, Tensor]
# name of what is stored beside a codec's parts
CORRECTION = "correction"


@dataclass(frozen=True, eq=False)
class Levels:
    """Three values: below `below` a weight is `low`, code 1; above `above` it is `high`, code 2; else 0, code 0.

    Attributes, one of each for a row, `[..., out, 1]`; below <= 0 <= above.
    """

    below: Tensor
    above: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False)
class Steps:
    """Equal steps: code round(w / step + before) + after, no less than 0 nor more than `largest`.

    Its value is step * (code - before - after).

    Attributes:
        step, before, after: `[..., out, 1]`; `after` are whole numbers, and `before` or `after` is 0.
        largest: code.
    """

    step: Tensor
    before: Tensor
    after: Tensor
    largest: int


@runtime_checkable
class Grid(Protocol):
    """Which values a weight can take. A frozen dataclass; its fields are its configuration, `eval(repr(g)) == g`.

    All methods accept leading batch dimensions: `w` is `[..., out, in]`, a parameter `[..., out, something]`.
    """

    name: ClassVar[str]

    @property
    def group(self) -> int | None:
        """Columns that share parameters; None: the whole row."""
        ...

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Parameters for `w` `[..., out, columns]` (one group of columns), already rounded to their stored dtype.

        `importance` `[..., columns]`, positive: what a squared error in each column costs. A grid may ignore it.
        """
        ...

    def ready(self, params: Params) -> Params:
        """`params` of one group as `nearest` and `values` compute with them: widened, taken apart. They accept both;
        whoever asks for many columns of one group calls this once. Ready parameters stay as they are."""
        ...

    def plain(self, params: Params) -> Levels | Steps | None:
        """What `nearest` and `values` compute under `params` of one group, for a kernel; None: it is more than that."""
        ...

    def nearest(self, w: Tensor, params: Params) -> Tensor:
        """uint8 codes `[..., out, columns]` of the grid points nearest to `w` under `params` of one group."""
        ...

    def values(self, codes: Tensor, params: Params) -> Tensor:
        """The grid points of `codes` as float32 (exact), or float64 where a parameter is float64."""
        ...


@dataclass(frozen=True, eq=False)
class Outliers:
    """Weights kept in 16 bits; each REPLACES the grid's value (SpQR, arXiv 2306.03078, section 3.2).

    Attributes:
        rows, columns: int64 `[n]`; columns in the stored order. Every place once.
        values: `[n]`, in the dtype they are stored in.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def __len__(self) -> int:
        return self.values.shape[0]


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver decided about one matrix.

    Attributes:
        grid: the grid the codes refer to.
        codes: uint8 `[out, in]`, columns in the stored order.
        params: the grid's parameters in their stored dtype, each `[rows, groups, ...]`; `rows` is `out`, or fewer where
            rows share a parameter; `groups` is 1 for whole rows.
        loss: relative output error tr(dW H dW^T) / tr(W H W^T) under the Hessian that was used.
        outliers: weights that are not on the grid; None: there are none.
        order: int64 `[in]`, stored column j is the matrix's column `order[j]`; None: the columns are where they were.
        rotated: all of the above is of the matrix with rotated columns (`rotation.py`).
    """

    grid: Grid
    codes: Tensor
    params: Params
    loss: float = float("nan")
    outliers: Outliers | None = None
    order: Tensor | None = None
    rotated: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self) -> Tensor:
        """The matrix as float32 `[out, in]`, columns where they belong."""
        width = self.grid.group or max(self.codes.shape[1], 1)
        parts = [
            self.grid.values(block, {k: v[:, g] for k, v in self.params.items()})
            for g, block in enumerate(self.codes.split(width, dim=1))
        ]
        dense = torch.cat(parts, dim=1) if parts else self.codes.to(torch.float32)
        if self.outliers is not None:
            dense[self.outliers.rows, self.outliers.columns] = self.outliers.values.to(dense.dtype)
        dense = dense if self.order is None else torch.empty_like(dense).index_copy_(1, self.order, dense)
        return undo(dense) if self.rotated else dense


@dataclass(frozen=True, eq=False)
class Packed:
    """One matrix as bytes: nothing but these tensors is consulted when decoding.

    Attributes:
        codec: the codec that wrote it.
        shape: (rows, columns) of the decoded matrix.
        tensors: stored tensors by part name.
        correction: bfloat16 `[matrices, rows of one]`, added to every product; no part of the matrix. None: there is
            none.
    """

    codec: "Codec"
    shape: tuple[int, int]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    correction: Tensor | None = None

    @property
    def stored(self) -> dict[str, Tensor]:
        """Every bit that is stored, by name."""
        return self.tensors if self.correction is None else self.tensors | {CORRECTION: self.correction}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.stored.values())

    def part(self, number: int, count: int) -> "Packed":
        """Matrix `number` of the `count` that were stacked, with its correction."""
        own = None if self.correction is None else self.correction[number : number + 1]
        return replace(self.codec.part(self, number, count), correction=own)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@runtime_checkable
class Codec(Protocol):
    """How a `Solution` becomes bytes, and how bytes multiply. A frozen dataclass, `eval(repr(c)) == c`."""

    name: ClassVar[str]

    @property
    def rotated(self) -> bool:
        """Whether what is stored is the matrix with rotated columns (`rotation.py`)."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the stored tensors, in a fixed order; without dots."""
        ...

    def encode(self, solution: Solution) -> Packed: ...

    def decode(self, packed: Packed) -> Tensor:
        """float32 `[rows, columns]`, bit for bit what was encoded. Raises FormatError on damage."""
        ...

    def check(self, packed: Packed) -> None:
        """Raise FormatError where a structural rule is broken (dtype, shape, offsets, codes out of range)."""
        ...

    def stack(self, parts: list[Packed]) -> Packed:
        """Matrices of one shape, one above another, as one tall matrix. Raises ValueError for unequal shapes."""
        ...

    def part(self, packed: Packed, number: int, count: int) -> Packed:
        """Matrix `number` of the `count` that were stacked, without decoding; the bytes are what `stack` was given."""
        ...

    def runtime(self, packed: Packed) -> list[Tensor]:
        """What `product` needs: the stored tensors and what is derived from them (offsets), in a fixed order.

        For the device that the tensors are on: what Triton kernels take may be arranged otherwise, without loss."""
        ...

    def product(self, x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        """Grouped product from compressed weights, one group per expert.

        Args:
            x: `[tokens, in]`, float32, bfloat16 or float16, sorted by group.
            starts: int64 `[groups + 1]` on the CPU; tokens `starts[g]` to `starts[g + 1]` multiply matrix `g`, that is
                rows `g * out_features` to `(g + 1) * out_features` of the packed tall matrix. Where the format's Triton
                kernels serve `x` (`triton_support.py`), it may be on the device of `x`; rows of the result from
                `starts[-1]` on are then undefined.
            tensors: what `runtime` gave.
            out_features: rows of one matrix.

        Returns:
            `[tokens, out_features]` in the dtype of `x`, accumulated in float32.
        """
        ...

    def lookup(self, rows: Tensor, tensors: list[Tensor], columns: int) -> Tensor:
        """Rows of one matrix, decoded: int64 `[n]` -> float32 `[n, columns]`. What an embedding does.

        Raises Unsupported where a format cannot find a row without decoding those before it.
        """
        ...


def corrections(parts: Sequence[Packed]) -> Tensor | None:
    """Those of several matrices, one below another; None where none of them has any."""
    found = [part.correction for part in parts if part.correction is not None]
    if found and len(found) != len(parts):
        raise ValueError(f"{len(found)} of {len(parts)} matrices have a correction; all of a stack have one, or none")
    return torch.cat(found) if found else None


# matrices of the input and of the output projections, one of each per expert
Roles = tuple[list[Packed], list[Packed]]
