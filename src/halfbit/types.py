"""The two values that are passed on, `Solution` and `Packed`, and the contracts of grids and codecs.

    weights -> solver -> Solution -> Codec.encode -> Packed -> shard -> PackedExperts -> kernel

A `Solution` is what a solver decided about one matrix; a `Packed` is the bytes that say the same. The law between them:
`codec.decode(codec.encode(s))` equals `s.dense()` bit for bit. It holds because a grid rounds its parameters to the
dtype they are stored in before the solver uses them.

Matrices are `[out, in]`; a stack of experts is one tall matrix `[experts * out, in]`, because rows are independent.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

Params = dict[str, Tensor]


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

    def fit(self, w: Tensor) -> Params:
        """Parameters for `w` `[..., out, columns]` (one group of columns), already rounded to their stored dtype."""
        ...

    def nearest(self, w: Tensor, params: Params) -> Tensor:
        """uint8 codes `[..., out, columns]` of the grid points nearest to `w` under `params` of one group."""
        ...

    def values(self, codes: Tensor, params: Params) -> Tensor:
        """The grid points of `codes` as float32 (exact), or float64 where a parameter is float64."""
        ...


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver decided about one matrix.

    Attributes:
        grid: the grid the codes refer to.
        codes: uint8 `[out, in]`.
        params: the grid's parameters in their stored dtype, each `[out, groups, ...]`; `groups` is 1 for whole rows.
        loss: relative output error tr(dW H dW^T) / tr(W H W^T) under the Hessian that was used.
    """

    grid: Grid
    codes: Tensor
    params: Params
    loss: float = float("nan")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self) -> Tensor:
        """The matrix as float32 `[out, in]`."""
        width = self.grid.group or max(self.codes.shape[1], 1)
        parts = [
            self.grid.values(block, {k: v[:, g] for k, v in self.params.items()})
            for g, block in enumerate(self.codes.split(width, dim=1))
        ]
        return torch.cat(parts, dim=1) if parts else self.codes.to(torch.float32)


@dataclass(frozen=True, eq=False)
class Packed:
    """One matrix as bytes: nothing but these tensors is consulted when decoding.

    Attributes:
        codec: the codec that wrote it.
        shape: (rows, columns) of the decoded matrix.
        tensors: stored tensors by part name; every bit that is stored is in here.
    """

    codec: "Codec"
    shape: tuple[int, int]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@runtime_checkable
class Codec(Protocol):
    """How a `Solution` becomes bytes, and how bytes multiply. A frozen dataclass, `eval(repr(c)) == c`."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    """Names of the stored tensors, in a fixed order."""

    def encode(self, solution: Solution) -> Packed: ...

    def decode(self, packed: Packed) -> Tensor:
        """float32 `[rows, columns]`, bit for bit what was encoded. Raises FormatError on damage."""
        ...

    def check(self, packed: Packed) -> None:
        """Raise FormatError where a structural rule is broken (dtype, shape, offsets, codes out of range)."""
        ...

    def concatenate(self, parts: list[Packed]) -> Packed:
        """Matrices of equal width, one above another, as one; equals encoding the tall matrix."""
        ...

    def rows(self, packed: Packed, start: int, stop: int) -> Packed:
        """Rows `start` to `stop` as a matrix of their own, without decoding."""
        ...

    def runtime(self, packed: Packed) -> list[Tensor]:
        """What `product` needs: the stored tensors and what is derived from them (offsets), in a fixed order."""
        ...

    def product(self, x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        """Grouped product from compressed weights, one group per expert.

        Args:
            x: `[tokens, in]`, float32, bfloat16 or float16, sorted by group.
            starts: int64 `[groups + 1]` on the CPU; tokens `starts[g]` to `starts[g + 1]` multiply matrix `g`, that is
                rows `g * out_features` to `(g + 1) * out_features` of the packed tall matrix.
            tensors: what `runtime` gave.
            out_features: rows of one matrix.

        Returns:
            `[tokens, out_features]` in the dtype of `x`, accumulated in float32.
        """
        ...
