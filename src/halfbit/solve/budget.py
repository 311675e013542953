"""SpQR with a given share of outliers: the threshold is searched, for every expert of a batch on its own.

The share falls as the threshold rises, but not strictly: each solve feeds back other errors. Bracket, then
interpolate log share over log threshold; whoever is close enough takes no part in the next solve. Rows are rounded
independently of each other, up to those that share statistics, so large matrices are searched on some rows first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, inf, log

import torch
from jaxtyping import Float
from torch import Tensor

from halfbit.errors import RecipeError
from halfbit.grids.bilevel import Bilevel
from halfbit.solve.gptq import Problem, prepare, solve
from halfbit.solve.hessian import Fallback, OnRepair, warn_of
from halfbit.solve.loss import measured
from halfbit.solve.orders import Order
from halfbit.solve.outliers import threshold
from halfbit.types import Grid, Solution

# relative, of the number of outliers; a bit budget of 4.6 bits then moves by 0.004 at half a percent of outliers
TOLERANCE = 0.03
LARGEST_SOLVES = 20
# SpQR's authors found the best thresholds between 0.1 and 1 (arXiv 2306.03078, appendix E)
FIRST_TAU = 0.3
# d log share / d log tau of normal and of heavy-tailed weights is about -1 to -3 at shares below 2 %
SLOPE = 1.5
SMALLEST_TAU = 1e-5
# weights to search on first: half a percent of them are 1300, and the root of that is 3 %
SAMPLE = 1 << 18


def gptq_with_share(
    w: Float[Tensor, "experts out in"],
    hessian: Float[Tensor, "experts in in"],
    grid: Grid,
    share: float | Float[Tensor, " experts"],
    *,
    names: Sequence[str],
    damping: float = 0.1,
    order: Order = "identity",
    fallback: Fallback = "identity",
    on_repair: OnRepair = warn_of,
) -> list[Solution]:
    """`gptq` with the threshold at which a `share` of the weights are outliers, up to 3 % of it or one weight.

    Where no threshold does that (few distinct values leave the grid together), the next smaller share that was found.
    `share` is for all experts or each; 0 means no outliers. The other arguments are those of `gptq`.

    Raises:
        RecipeError: a share below 0 or above 1.
    """
    shares = torch.as_tensor(share, dtype=torch.float64).expand(w.shape[0]).tolist()
    for wrong in (s for s in shares if not 0 <= s <= 1):
        raise RecipeError(f"share of outliers must be 0 to 1, got {wrong}")
    problem = prepare(w, hessian, names=names, damping=damping, order=order, fallback=fallback, on_repair=on_repair)
    unit = threshold(problem.w, problem.importance, problem.w.new_ones(w.shape[0]))
    tau = [FIRST_TAU] * len(shares)
    sample = _some_rows(problem, grid)
    if sample is not None:
        guessed, _ = _search(sample, unit, grid, shares, tau)
        # nothing is learned where the sample is to have no outlier, or cannot have enough
        tau = [t if 0 < t < inf else FIRST_TAU for t in guessed]
    _, found = _search(problem, unit, grid, shares, tau)
    return [measured(s, w[e], hessian[e]) for e, s in enumerate(found)]


def _some_rows(problem: Problem, grid: Grid) -> Problem | None:
    """Evenly spread supergroups, some SAMPLE weights of each expert; None where that would save little."""
    _, rows, columns = problem.w.shape
    stride = rows * columns // SAMPLE
    if stride < 3 or not isinstance(grid, Bilevel):
        return None
    chosen = torch.arange(rows, device=problem.w.device) // grid.supergroup % stride == 0
    return replace(problem, w=problem.w[:, chosen])


def _search(
    problem: Problem,
    unit: Float[Tensor, " experts"],
    grid: Grid,
    shares: list[float],
    tau: list[float],
) -> tuple[list[float], list[Solution]]:
    """The best thresholds found, in units of `unit`, and what they give; `tau` are the first to be tried."""
    searches = [_Expert(round(s * problem.w[0].numel()), t) for s, t in zip(shares, tau, strict=True)]
    found: list[Solution | None] = [None] * len(searches)
    for _ in range(LARGEST_SOLVES):
        open_ = [e for e, search in enumerate(searches) if not search.done]
        if not open_:
            break
        those = torch.tensor(open_, device=unit.device)
        part = problem.part(those)
        factor = torch.tensor([searches[e].tau for e in open_], dtype=unit.dtype, device=unit.device)
        # infinity times zero: weights that are all zero
        limit = torch.where(torch.isinf(factor), factor, factor * unit[those])
        answer = solve(part, grid, limit)
        for i, e in enumerate(open_):
            solution = answer.solution(part, grid, i)
            if searches[e].learn(0 if solution.outliers is None else len(solution.outliers)):
                found[e] = solution
    # every threshold gave too many
    without = [e for e, solution in enumerate(found) if solution is None]
    if without:
        part = problem.part(torch.tensor(without, device=unit.device))
        answer = solve(part, grid, None)
        for i, e in enumerate(without):
            found[e] = answer.solution(part, grid, i)
    return [search.tau for search in searches], [solution for solution in found if solution is not None]


@dataclass
class _Expert:
    """The search of one expert. Accumulates: the nearest thresholds on both sides of `target` outliers."""

    target: int
    tau: float
    done: bool = False
    # (tau, count): fewer outliers than wanted, or as many; and more
    below: tuple[float, int] = (inf, -1)
    above: tuple[float, int] = (0.0, -1)

    def __post_init__(self) -> None:
        if self.target == 0:
            self.tau = inf

    def learn(self, count: int) -> bool:
        """Takes in the number of outliers at `tau` and chooses the next one. True: the best so far."""
        target, tau = self.target, self.tau
        if abs(count - target) <= max(1, TOLERANCE * target):
            self.done = True
            return True
        best = False
        if count < target:
            best = count > self.below[1]
            if tau < self.below[0]:
                self.below = (tau, count)
            # not even without a threshold
            self.done = tau == 0
        else:
            self.above = max(self.above, (tau, count))
        self._next()
        return best

    def _next(self) -> None:
        (high, few), (low, many), target = self.below, self.above, self.target
        if many < 0:
            # too few, and no end in sight: further down
            step = _step((target + 1) / (few + 1))
            self.tau = high * exp(-step) if high > SMALLEST_TAU else 0.0
        elif few < 0:
            self.tau = low * exp(_step(many / target))
        else:
            if low == 0:
                low = high / 64
            width = log(high / low)
            if width < 1e-3:
                self.done = True
                return
            part = log(many / target) / log(many / max(few, 0.5))
            self.tau = low * exp(width * min(max(part, 0.1), 0.9))


def _step(ratio: float) -> float:
    """How far to go in log tau for a share that is to change by `ratio`; a little further, to have it bracketed."""
    return min(1.2 * log(ratio) / SLOPE + 0.01, log(8))
