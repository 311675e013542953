"""SpQR with a given share of outliers: the threshold is searched, for every expert of a batch on its own.

The share falls as the threshold rises, but not strictly: each solve feeds back other errors. Bracket, then
interpolate log share over log threshold; whoever is close enough takes no part in the next solve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log

import torch
from jaxtyping import Float
from torch import Tensor

from halfbit.errors import RecipeError
from halfbit.solve.gptq import prepare, solve
from halfbit.solve.hessian import Fallback, OnRepair, warn_of
from halfbit.solve.loss import measured
from halfbit.solve.orders import Order
from halfbit.types import Grid, Solution

# relative, of the number of outliers; a bit budget of 4.6 bits then moves by 0.004 at half a percent of outliers
TOLERANCE = 0.03
LARGEST_SOLVES = 20
# SpQR's authors found the best thresholds between 0.1 and 1 (arXiv 2306.03078, appendix E)
FIRST_TAU = 0.3
# d log share / d log tau of normal and of heavy-tailed weights is about -1 to -3 at shares below 2 %
SLOPE = 1.5
SMALLEST_TAU = 1e-5


def gptq_with_share(
    w: Float[Tensor, "experts out in"],
    hessian: Float[Tensor, "experts in in"],
    grid: Grid,
    share: float | Float[Tensor, " experts"],
    *,
    names: Sequence[str],
    damping: float = 0.1,
    block: int = 128,
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
    searches = [_Search(round(s * w[0].numel())) for s in shares]
    found: list[Solution | None] = [None] * len(searches)
    for _ in range(LARGEST_SOLVES):
        open_ = [e for e, search in enumerate(searches) if not search.done]
        if not open_:
            break
        tau = torch.tensor([searches[e].tau for e in open_], dtype=problem.w.dtype, device=w.device)
        part = problem.part(torch.tensor(open_, device=w.device))
        answer = solve(part, grid, tau, block)
        for i, e in enumerate(open_):
            solution = answer.solution(part, grid, i)
            if searches[e].learn(0 if solution.outliers is None else len(solution.outliers)):
                found[e] = solution
    without = [e for e, solution in enumerate(found) if solution is None]
    if without:
        part = problem.part(torch.tensor(without, device=w.device))
        answer = solve(part, grid, None, block)
        for i, e in enumerate(without):
            found[e] = answer.solution(part, grid, i)
    return [measured(s, w[e], hessian[e]) for e, s in enumerate(found) if s is not None]


@dataclass
class _Search:
    """The search of one expert. Accumulates: the nearest thresholds on both sides of `target` outliers."""

    target: int
    tau: float = FIRST_TAU
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
            step = min(log((target + 1) / (few + 1)) / SLOPE, log(8)) + 0.1
            self.tau = high * exp(-step) if high > SMALLEST_TAU else 0.0
        elif few < 0:
            self.tau = low * exp(min(log(many / target) / SLOPE, log(8)) + 0.1)
        else:
            if low == 0:
                low = high / 64
            width = log(high / low)
            if width < 1e-3:
                self.done = True
                return
            part = log(many / target) / log(many / max(few, 0.5))
            self.tau = low * exp(width * min(max(part, 0.1), 0.9))
