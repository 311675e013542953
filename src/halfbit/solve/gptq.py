"""Blocked GPTQ with error feedback, batched over experts; with outliers it is SpQR.

Column j is rounded; its error, divided by U[j, j], is spread over the columns still open with row j of U,
the upper Cholesky factor of H^-1 (Frantar et al. 2023, https://arxiv.org/abs/2210.17323, section 3.3).
Within a block of columns this is done at once, for the columns behind the block with one matrix product per block.
Sixteen experts are solved side by side, as in QMoE, since one small expert does not fill a machine.
A weight whose rounding would cost more than a threshold stays in 16 bits (`outliers.py`); the error of those 16 bits is
fed back like any other.
`solve/naive.py` is the same thing without the factorisation; the tests hold the two equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from halfbit.errors import RecipeError, Unsupported
from halfbit.grids.bilevel import DTYPES, Bilevel
from halfbit.solve.hessian import Fallback, OnRepair, factor, warn_of
from halfbit.solve.loss import check_finite, measured
from halfbit.solve.orders import Order, check_order, column_order
from halfbit.solve.outliers import threshold, without_outliers
from halfbit.types import Grid, Outliers, Params, Solution


def gptq(
    w: Float[Tensor, "experts out in"],
    hessian: Float[Tensor, "experts in in"],
    grid: Grid,
    *,
    names: Sequence[str],
    damping: float = 0.1,
    block: int = 128,
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
        block: columns per block; changes speed, and results only by rounding.
        order: in which the columns are rounded and stored, each expert its own; see `orders.py`.
        outliers: tau, SpQR's relative threshold, for all experts or each; None or infinity: no outliers.
        fallback: for an expert whose Hessian cannot be factored; see `factor`.
        on_repair: called once for every expert that needed one; the default issues a warning.

    Raises:
        RecipeError: an unknown order, a tau that is negative or not a number.
        Unsupported: outliers on a grid other than Bilevel, or weights that its dtype cannot hold.
    """
    problem = prepare(w, hessian, names=names, damping=damping, order=order, fallback=fallback, on_repair=on_repair)
    limit = None
    if outliers is not None:
        tau = torch.as_tensor(outliers, dtype=problem.w.dtype, device=w.device).expand(w.shape[0])
        if not (tau >= 0).all():
            raise RecipeError(f"outliers: tau must be at least 0, got {tau[~(tau >= 0)][0].item()}")
        limit = threshold(problem.w, problem.importance, tau)
    answer = solve(problem, grid, limit, block)
    return [measured(answer.solution(problem, grid, e), w[e], hessian[e]) for e in range(w.shape[0])]


@dataclass(frozen=True, eq=False)
class Problem:
    """What several solves of the same matrices share.

    Attributes:
        w: columns in the order in which they are rounded.
        factors: U of the damped Hessian in that order.
        order: None where the columns stay.
    """

    w: Float[Tensor, "experts out in"]
    factors: Float[Tensor, "experts in in"]
    order: Int[Tensor, "experts in"] | None

    @property
    def importance(self) -> Float[Tensor, "experts in"]:
        """What a squared error in a column costs once the columns behind it have made up for it."""
        return self.factors.diagonal(dim1=-2, dim2=-1).square().reciprocal()

    def part(self, experts: Int[Tensor, " part"]) -> "Problem":
        return Problem(self.w[experts], self.factors[experts], None if self.order is None else self.order[experts])


@dataclass(frozen=True, eq=False)
class Answer:
    """Of a batch, columns in the order of the problem.

    Attributes:
        codes, params: of the grid.
        kept: each weight as it was when it was rounded, which is what an outlier keeps.
        outlying: which weights are outliers.
    """

    codes: UInt8[Tensor, "experts out in"]
    params: Params
    kept: Float[Tensor, "experts out in"]
    outlying: Bool[Tensor, "experts out in"]

    def solution(self, problem: Problem, grid: Grid, expert: int) -> Solution:
        """Of one expert, its loss not measured."""
        return Solution(
            grid,
            self.codes[expert],
            {key: value[expert] for key, value in self.params.items()},
            outliers=self._outliers(grid, expert),
            order=None if problem.order is None else problem.order[expert],
        )

    def _outliers(self, grid: Grid, expert: int) -> Outliers | None:
        rows, columns = self.outlying[expert].nonzero(as_tuple=True)
        if not isinstance(grid, Bilevel) or rows.numel() == 0:
            return None
        return Outliers(rows, columns, self.kept[expert][rows, columns].to(DTYPES[grid.dtype]))


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
    factors, repairs = factor(hessian, damping, names, fallback)
    for repair in repairs:
        on_repair(repair)
    columns = column_order(order, w, hessian, factors)
    if columns is None:
        return Problem(w, factors, None)
    rows = columns[:, :, None].expand_as(hessian)
    hessian = hessian.gather(1, rows).gather(2, rows.mT)
    # the same repairs as above: the order of the columns changes neither definiteness nor the mean of the diagonal
    factors, _ = factor(hessian, damping, names, fallback)
    return Problem(w.gather(2, columns[:, None].expand_as(w)), factors, columns)


def solve(problem: Problem, grid: Grid, limit: Float[Tensor, " experts"] | None, block: int = 128) -> Answer:
    """Round column by column. Raises Unsupported as `gptq`.

    Args:
        limit: what a weight on the grid may cost at most, of each expert; None or all infinite: no outliers.
    """
    w, U = problem.w, problem.factors
    n = w.shape[2]
    group = grid.group or max(n, 1)
    importance = problem.importance
    dtype = w.dtype
    if limit is not None and torch.isinf(limit).all():
        limit = None
    if limit is not None:
        if not isinstance(grid, Bilevel):
            raise Unsupported(f"{grid!r}: outliers need a grid whose format stores them; bilevel does")
        dtype = DTYPES[grid.dtype]
        if w.abs().max() > torch.finfo(dtype).max:
            raise Unsupported(f'a weight is too large for an outlier in {grid.dtype}; dtype="bfloat16" reaches further')
    # [experts, in, out]: a column of weights is contiguous; a copy even where it is so already (one row)
    W = w.mT.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=w.device)
    outlying = torch.zeros(W.shape, dtype=torch.bool, device=w.device)
    params: list[Params] = []
    ready: Params = {}
    for start in range(0, n, block):
        stop = min(start + block, n)
        B, E = W[:, start:stop], torch.empty_like(W[:, start:stop])
        for j in range(start, stop):
            i = j - start
            if j % group == 0:
                # the columns behind the block have not been told of the errors in it
                behind = slice(stop, max(stop, j + group))
                ahead = W[:, behind] - U[:, start:j, behind].mT @ E[:, :i]
                columns = torch.cat([B[:, i : i + group], ahead], dim=1).mT
                weights = importance[:, j : j + group]
                if limit is None or not isinstance(grid, Bilevel):
                    params.append(grid.fit(columns, weights))
                else:
                    inner = without_outliers(columns, weights, limit, grid.largest_code)
                    params.append(grid.fit(inner, weights, original=columns, limit=limit))
                ready = grid.ready(params[-1])
            column = B[:, i, :, None]
            rounded = grid.nearest(column, ready)
            error = (column - grid.values(rounded, ready))[..., 0] / U[:, j, j, None]
            codes[:, j] = rounded[..., 0]
            if limit is not None:
                far = error.square() > limit[:, None]
                kept = B[:, i].to(dtype).to(B.dtype)
                # grown too large for 16 bits: on the grid it has at least the right sign
                far &= torch.isfinite(kept)
                error = torch.where(far, (B[:, i] - kept) / U[:, j, j, None], error)
                codes[:, j].masked_fill_(far, 0)
                outlying[:, j] = far
            E[:, i] = error
            B[:, i + 1 :].addcmul_(U[:, j, j + 1 : stop, None], E[:, i, None], value=-1)
        W[:, stop:] -= U[:, start:stop, stop:].mT @ E
    stacked = {key: torch.stack([p[key] for p in params], dim=2) for key in params[0]}
    # a column is left as it was when it was rounded, so W holds the outliers
    return Answer(codes.mT.contiguous(), stacked, W.mT, outlying.mT)
