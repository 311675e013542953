"""GPTQ with error feedback, batched over experts; with outliers it is SpQR.

With H = F D F^T, F unit upper triangular and D diagonal, column j is rounded to q_j where w_j + sum over k < j of
(w_k - q_k) F_kj is; the w_k are the weights as they were. That is the error feedback of Frantar et al. 2023
(https://arxiv.org/abs/2210.17323, section 3.3) without the inverse of H that is usually taken for it (Chee et al. 2023,
https://arxiv.org/abs/2307.13304, theorem 6): a third to a half of the multiplications, and F is as exact as H. An error
e of column j costs e^2 D_jj once the columns behind have made up for it.

Columns are taken by halves: first all of the first half, then what it wants of the second in one product, then the
second; down to columns of one group, no more than some, which `columns.py` rounds one after another. So nearly all that
is fed back goes through products of large matrices. Experts are solved side by side, as in QMoE, since one small expert
does not fill a machine. A weight whose rounding would cost more than a threshold stays in 16 bits (`outliers.py`); the
error of those 16 bits is fed back like any other.
`solve/naive.py` is the same thing without the factorisation; the tests hold the two equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from halfbit import pages
from halfbit.errors import NonFinite, RecipeError, Unsupported
from halfbit.grids.bilevel import DTYPES, Bilevel
from halfbit.solve import columns
from halfbit.solve.columns import Far, Pass, half
from halfbit.solve.hessian import Fallback, OnRepair, factor, warn_of
from halfbit.solve.loss import check_finite, finite, measured
from halfbit.solve.orders import Order, check_order, column_order
from halfbit.solve.outliers import threshold, without_outliers
from halfbit.types import Grid, Params, Solution


def gptq(
    w: Float[Tensor, "experts out in"],
    hessian: Float[Tensor, "experts in in"],
    grid: Grid,
    *,
    names: Sequence[str],
    damping: float = 0.1,
    order: Order = "identity",
    outliers: float | Float[Tensor, " experts"] | None = None,
    fallback: Fallback = "identity",
    on_repair: OnRepair = warn_of,
) -> list[Solution]:
    """One Solution per expert. Float32, or float64 where `w` is; only the factorisation is float64 in any case.

    Args:
        w: weights of experts of one shape.
        hessian: X^T X of each expert, any scale, undamped.
        grid: groups are fitted when the solver reaches them, whole rows to the original weights.
        names: of the experts, for errors and repairs.
        damping: times the mean of the Hessian's diagonal. QMoE uses 0.1, ten times GPTQ's, as experts see few tokens;
            SpQR's published commands use 1.
        order: in which the columns are rounded and stored, each expert its own; see `orders.py`.
        outliers: tau, SpQR's relative threshold, for all experts or each; None or infinity: no outliers.
        fallback: for an expert whose Hessian cannot be factored; see `factor`.
        on_repair: called once for every expert that needed one; the default issues a warning.

    Raises:
        RecipeError: an unknown order, a tau that is negative or not a number.
        Unsupported: outliers on a grid other than Bilevel, or weights that its dtype cannot hold.
        NonFinite: weights or Hessians that are not finite, or so large that error feedback is not.
    """
    problem = prepare(w, hessian, names=names, damping=damping, order=order, fallback=fallback, on_repair=on_repair)
    limit = None
    if outliers is not None:
        tau = torch.as_tensor(outliers, dtype=problem.w.dtype, device=w.device).expand(w.shape[0])
        if not (tau >= 0).all():
            raise RecipeError(f"outliers: tau must be at least 0, got {tau[~(tau >= 0)][0].item()}")
        limit = threshold(problem.w, problem.importance, tau)
    answer = solve(problem, grid, limit)
    return [measured(answer.solution(problem, grid, e), w[e], hessian[e]) for e in range(w.shape[0])]


@dataclass(frozen=True, eq=False)
class Problem:
    """What several solves of the same matrices share.

    Attributes:
        w: columns in the order in which they are rounded.
        feedback: F of the damped Hessian in that order.
        importance: D, what a squared error in a column costs once the columns behind it have made up for it; in a unit
            of the expert's own, so that it is near 1 for Hessians of any size.
        order: None where the columns stay.
    """

    w: Float[Tensor, "experts out in"]
    feedback: Float[Tensor, "experts in in"]
    importance: Float[Tensor, "experts in"]
    order: Int[Tensor, "experts in"] | None

    def part(self, experts: Int[Tensor, " part"]) -> "Problem":
        order = None if self.order is None else self.order[experts]
        return Problem(self.w[experts], self.feedback[experts], self.importance[experts], order)


@dataclass(frozen=True, eq=False)
class Answer:
    """Of a batch, columns in the order of the problem.

    Attributes:
        codes, params: of the grid.
        far: the outliers; None: there are none.
    """

    codes: UInt8[Tensor, "experts out in"]
    params: Params
    far: Far | None

    def solution(self, problem: Problem, grid: Grid, expert: int) -> Solution:
        """Of one expert, its loss not measured."""
        return Solution(
            grid,
            self.codes[expert],
            {key: value[expert] for key, value in self.params.items()},
            outliers=None if self.far is None else self.far.of(expert),
            order=None if problem.order is None else problem.order[expert],
        )


def prepare(
    w: Float[Tensor, "experts out in"],
    hessian: Float[Tensor, "experts in in"],
    *,
    names: Sequence[str],
    damping: float,
    order: Order,
    fallback: Fallback,
    on_repair: OnRepair,
) -> Problem:
    """Factor the Hessians and bring the columns into order. Arguments as of `gptq`."""
    check_order(order)
    check_finite(w, names)
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    hessian = hessian.to(w.dtype)
    columns = column_order(order, w, hessian, damping)
    if columns is not None:
        rows = columns[:, :, None].expand_as(hessian)
        hessian = hessian.gather(1, rows).gather(2, rows.mT)
        w = w.gather(2, columns[:, None].expand_as(w))
    factors, repairs = factor(hessian, damping, names, fallback)
    for repair in repairs:
        on_repair(repair)
    diagonal = factors.diagonal(dim1=-2, dim2=-1).clone()
    # squares of the roots as they are could leave float32
    importance = (diagonal / diagonal.mean(-1, keepdim=True)).square()
    return Problem(w, factors.div_(diagonal[:, None]), importance, columns)


def solve(problem: Problem, grid: Grid, limit: Float[Tensor, " experts"] | None) -> Answer:
    """Round column by column. Raises Unsupported as `gptq`.

    Args:
        limit: what a weight on the grid may cost at most, of each expert; None or all infinite: no outliers.
    """
    if limit is not None and torch.isinf(limit).all():
        limit = None
    if limit is not None:
        if not isinstance(grid, Bilevel):
            raise Unsupported(f"{grid!r}: outliers need a grid whose format stores them; bilevel does")
        if problem.w.abs().max() > torch.finfo(DTYPES[grid.dtype]).max:
            raise Unsupported(f'a weight is too large for an outlier in {grid.dtype}; dtype="bfloat16" reaches further')
    return _Sweep(problem, grid, limit).answer()


class _Sweep:
    """One pass over the columns, group by group."""

    def __init__(self, problem: Problem, grid: Grid, limit: Float[Tensor, " experts"] | None):
        self._grid, self._importance = grid, problem.importance
        w, (experts, out, self._n) = problem.w.contiguous(), problem.w.shape
        self._group = grid.group or max(self._n, 1)
        far = None
        if limit is not None and isinstance(grid, Bilevel):
            outlying = torch.zeros(w.shape, dtype=torch.bool, device=w.device)
            far = Far(limit.contiguous(), problem.importance.contiguous(), grid.dtype, outlying, torch.empty_like(w))
        codes = pages.zeros(w.shape, torch.uint8, w.device)
        fed = pages.zeros((experts, self._n, out), w.dtype, w.device)
        self._at = Pass(w, problem.feedback.contiguous(), fed, codes, far)
        self._params: list[Params] = []
        # of the group that is being rounded
        self._ready: Params = {}
        self._most = columns.FEW

    def answer(self) -> Answer:
        self._columns(0, self._n)
        if not all(finite(self._at.fed)):
            raise NonFinite("weights are so large that what one column wants of the others is beyond float32")
        stacked = {key: torch.stack([p[key] for p in self._params], dim=2) for key in self._params[0]}
        return Answer(self._at.codes, stacked, self._at.far)

    def _columns(self, start: int, stop: int) -> None:
        """Round columns `start` to `stop`, which were told of all before them: all of a group, or several groups."""
        if start % self._group == 0 and stop == min(start + self._group, self._n):
            self._fit(start, stop)
        if stop - start <= min(self._most, self._group):
            columns.round_columns(self._at, self._grid, self._ready, start, stop)
            return
        middle = start + half(stop - start, self._group if stop - start > self._group else columns.UNIT)
        self._columns(start, middle)
        wanted = self._at.feedback[:, start:middle, middle:stop].mT
        self._at.fed[:, middle:stop].baddbmm_(wanted, self._at.fed[:, start:middle])
        self._columns(middle, stop)

    def _fit(self, start: int, stop: int) -> None:
        """The grid to a group, as its weights are when the columns before it have all been made up for."""
        those = self._at.w[:, :, start:stop]
        if start > 0:
            inside, fed = self._at.feedback[:, start:stop, start:stop].mT, self._at.fed[:, start:stop]
            those = those + torch.linalg.solve_triangular(inside, fed, upper=False, unitriangular=True).mT
        weights, far = self._importance[:, start:stop], self._at.far
        if far is None or not isinstance(self._grid, Bilevel):
            params = self._grid.fit(those, weights)
        else:
            inner = without_outliers(those, weights, far.limit, self._grid.largest_code)
            params = self._grid.fit(inner, weights, original=those, limit=far.limit)
        self._params.append(params)
        self._ready = self._grid.ready(params)
        self._most = columns.most(self._at, self._grid, self._ready)
