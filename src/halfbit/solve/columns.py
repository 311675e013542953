"""Columns rounded one after another, with what each wants of the next: C++ on a CPU, plain torch everywhere else.

The kernel, `csrc/columns.cpp`, takes float32 and grids that can say in numbers what they do (`types.Levels`, `Steps`).
Both round each weight alike, bit for bit; what is fed back they add up in different orders. Neither depends on the
number of threads, nor the kernel on the instructions that the CPU has.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from halfbit import native
from halfbit.grids.bilevel import DTYPES
from halfbit.types import Grid, Levels, Outliers, Params, Steps

# columns at most that `round_columns` takes: by the kernel, whose strip of rows stays in the second-level cache for so
# many, and in torch, which has copies of them
MOST, FEW = 1536, 128
# where columns are halved
UNIT = 64
# in torch on a CPU, weights of a column, of experts side by side: the few tensors that rounding takes stay in its cache
CACHED = 1 << 15


@dataclass(frozen=True, eq=False)
class Far:
    """Weights that stay in 16 bits. Accumulates: of columns that are done, which those are.

    Attributes:
        limit: what a weight on the grid may cost at most.
        importance: what a squared error in a column costs.
        dtype: in which they are kept.
        outlying: which they are.
        values: of those, what each weight was when it was rounded; of the others anything.
    """

    limit: Float[Tensor, " experts"]
    importance: Float[Tensor, "experts in"]
    dtype: str
    outlying: Bool[Tensor, "experts out in"]
    values: Float[Tensor, "experts out in"]

    def of(self, expert: int) -> Outliers | None:
        """Those of one expert; None: it has none."""
        rows, columns = self.outlying[expert].nonzero(as_tuple=True)
        values = self.values[expert][rows, columns].to(DTYPES[self.dtype])
        return Outliers(rows, columns, values) if len(values) else None


@dataclass(frozen=True, eq=False)
class Pass:
    """Where a pass over the columns is. Accumulates: the columns before some are done.

    Attributes:
        w: as it was.
        feedback: unit upper triangular; what column j is to make up for of an error in column k is times [k, j].
        fed: turned, so that a column is contiguous. Of a column that is done w - q; of an open one what those that are
            done, as far as it was told, want of it.
        codes: of the columns that are done.
        far: None: no outliers.
    """

    w: Float[Tensor, "experts out in"]
    feedback: Float[Tensor, "experts in in"]
    fed: Float[Tensor, "experts columns rows"]
    codes: UInt8[Tensor, "experts out in"]
    far: Far | None


def most(sweep: Pass, grid: Grid, params: Params) -> int:
    """Columns that `round_columns` takes under `params`, ready."""
    plain = grid.plain(params)
    return MOST if plain is not None and _takes(sweep, plain) else FEW


def round_columns(sweep: Pass, grid: Grid, params: Params, start: int, stop: int) -> None:
    """Round columns `start` to `stop`, no more than `most` and of one group, which were told of all before `start`.

    Args:
        params: of the group, ready.
    """
    plain = grid.plain(params)
    if plain is not None and _takes(sweep, plain):
        _by_kernel(sweep, plain, start, stop)
        return
    experts, out, _ = sweep.w.shape
    side = experts if sweep.w.is_cuda else max(1, CACHED // max(out, 1))
    for first in range(0, experts, side):
        part = slice(first, first + side)
        few = _Few(sweep, grid, {key: value[part] for key, value in params.items()}, part, start, stop)
        few.columns(0, stop - start)
        few.store()


# ----------------------------------------------------------------------------------------------------------- the kernel


def _takes(sweep: Pass, plain: Levels | Steps) -> bool:
    numbers = plain.low if isinstance(plain, Levels) else plain.step
    fits = sweep.w.is_cpu and sweep.w.dtype == numbers.dtype == torch.float32
    return fits and native.extension is not None


def _by_kernel(sweep: Pass, plain: Levels | Steps, start: int, stop: int) -> None:
    assert native.extension is not None
    if isinstance(plain, Levels):
        numbers, largest = [plain.below, plain.above, plain.low, plain.high], 2
    else:
        numbers, largest = [plain.step, plain.before, plain.after, plain.step], plain.largest
    shape = (sweep.w.shape[0], sweep.w.shape[1], 1)
    by_row = torch.cat([n.expand(shape) for n in numbers], -1).mT.contiguous()
    far = sweep.far
    outliers = None if far is None else (far.importance, far.limit, far.values, far.outlying, far.dtype)
    form, threads = "levels" if isinstance(plain, Levels) else "steps", torch.get_num_threads()
    native.extension.round_columns(
        sweep.w, sweep.fed, sweep.codes, sweep.feedback, start, stop, form, by_row, largest, outliers, threads
    )


# ---------------------------------------------------------------------------------------------------------------- torch


class _Few:
    """Some columns of some experts, turned. By halves, so that what is fed back goes through products of matrices."""

    def __init__(self, sweep: Pass, grid: Grid, ready: Params, part: slice, start: int, stop: int):
        self._grid, self._ready, self._far = grid, ready, sweep.far
        self._place = part, slice(None), slice(start, stop)
        self._codes = sweep.codes[self._place]
        self._w = sweep.w[self._place].mT.contiguous()
        self._fed = sweep.fed[part, start:stop]
        self._feedback = sweep.feedback[part, start:stop, start:stop]
        self._rounded = torch.empty(self._w.shape, dtype=torch.uint8, device=self._w.device)
        self._outlying = torch.zeros(self._w.shape, dtype=torch.bool, device=self._w.device)

    def columns(self, start: int, stop: int) -> None:
        if stop - start == 1:
            self._round(start)
            return
        middle = start + half(stop - start, 1)
        self.columns(start, middle)
        self._fed[:, middle:stop].baddbmm_(self._feedback[:, start:middle, middle:stop].mT, self._fed[:, start:middle])
        self.columns(middle, stop)

    def store(self) -> None:
        self._codes.copy_(self._rounded.mT)
        if self._far is not None:
            self._far.outlying[self._place] = self._outlying.mT
            self._far.values[self._place] = self._w.mT

    def _round(self, j: int) -> None:
        w, fed = self._w[:, j], self._fed[:, j]
        column = w + fed
        rounded = self._grid.nearest(column[..., None], self._ready)
        stored = self._grid.values(rounded, self._ready)[..., 0]
        codes = self._rounded[:, j].copy_(rounded[..., 0])
        if self._far is not None:
            kept, outlying = self._outliers(self._far, column, stored, j)
            stored = torch.where(outlying, kept, stored)
            codes.masked_fill_(outlying, 0)
            self._outlying[:, j] = outlying
        torch.sub(w, stored, out=fed)
        if self._far is not None:
            w.copy_(column)

    def _outliers(
        self, far: Far, column: Float[Tensor, "part out"], stored: Float[Tensor, "part out"], j: int
    ) -> tuple[Float[Tensor, "part out"], Bool[Tensor, "part out"]]:
        """What the weights of a column would be as outliers, and which of them are."""
        experts, _, columns = self._place
        cost = (column - stored).square() * far.importance[experts, columns.start + j, None]
        kept = column.to(DTYPES[far.dtype]).to(column.dtype)
        # grown too large for 16 bits: on the grid it has at least the right sign
        return kept, (cost > far.limit[experts, None]) & torch.isfinite(kept)


def half(count: int, unit: int) -> int:
    """About half of `count`, a multiple of `unit`, which is less than `count`."""
    return -(-count // unit) // 2 * unit
