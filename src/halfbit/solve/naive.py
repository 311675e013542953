"""The definition: rounding to nearest, exact error feedback and SpQR's outliers, float64, one matrix, no tricks.

Nobody runs this on a model: error feedback inverts a matrix per column, O(in^4), and leaving out each weight of a group
takes a fit per weight. The tests hold `rtn.py`, `gptq.py` and `outliers.py` equal to it, because a wrong error feedback
still beats rounding and looks healthy.
"""

from math import inf

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from halfbit.grids.bilevel import DTYPES, Bilevel
from halfbit.solve.hessian import damp
from halfbit.types import Grid, Outliers, Solution


def round_to_nearest(w: Float[Tensor, "out in"], grid: Grid) -> Solution:
    """Each weight on its own."""
    codes, params = [], []
    for columns in w.double().split(grid.group or max(w.shape[1], 1), dim=1):
        params.append(grid.fit(columns))
        codes.append(grid.nearest(columns, params[-1]))
    return _solution(grid, codes, params)


def error_feedback(
    w: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    grid: Grid,
    damping: float,
    order: str = "identity",
    tau: float = inf,
) -> Solution:
    """Column by column; the error of column j is made up for by the columns after it, as well as they can.

    Groups are fitted to the weights as they are when their first column is reached; whole rows, as in QMoE, to the
    original weights. A weight whose error would cost more than the threshold is rounded to the grid's dtype instead.
    """
    H = damp(hessian.double()[None], damping)[0]
    columns = column_order(w.double(), hessian.double(), H, order)
    W, H = w.double()[:, columns], H[columns][:, columns]
    n = W.shape[1]
    group = grid.group or n
    # what a squared error costs once the columns behind have made up for it
    importance = torch.stack([1 / torch.linalg.inv(H[j:, j:])[0, 0] for j in range(n)])
    limit = threshold(W, importance, tau)
    codes, params, outliers = [], [], []
    for j in range(n):
        if j % group == 0:
            here, weights = W[:, j : j + group], importance[j : j + group]
            if isinstance(grid, Bilevel) and limit < inf:
                inner = without_outliers(here, weights, limit, grid.largest_code)
                params.append(grid.fit(inner, weights, original=here, limit=torch.tensor(limit)))
            else:
                params.append(grid.fit(here, weights))
        codes.append(grid.nearest(W[:, j : j + 1], params[-1]))
        stored = grid.values(codes[-1], params[-1])[:, 0].double()
        if isinstance(grid, Bilevel):
            far = (W[:, j] - stored).square() * importance[j] > limit
            kept = W[:, j].to(DTYPES[grid.dtype])
            outliers += [(r, j, kept[r]) for r in far.nonzero()[:, 0].tolist()]
            codes[-1][far] = 0
            stored = torch.where(far, kept.double(), stored)
        # the inverse on what is left: the columns before j are fixed
        Hinv = torch.linalg.inv(H[j:, j:])
        W[:, j:] -= torch.outer((W[:, j] - stored) / Hinv[0, 0], Hinv[0])
    return _solution(grid, codes, params, outliers, None if order == "identity" else columns)


def column_order(
    w: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], damped: Float[Tensor, "in in"], order: str
) -> Int[Tensor, " in"]:
    """Original columns in the order in which they are rounded."""
    inverse = torch.linalg.inv(damped)
    saliency = {
        "identity": [0.0] * w.shape[1],
        "act_order": [float(hessian[j, j]) for j in range(w.shape[1])],
        "sensitivity": [float((w[:, j] ** 2).sum() / inverse[j, j]) for j in range(w.shape[1])],
    }[order]
    return torch.tensor(sorted(range(w.shape[1]), key=lambda j: -saliency[j]), dtype=torch.int64)


def threshold(w: Float[Tensor, "out in"], importance: Float[Tensor, " in"], tau: float) -> float:
    """tau times the mean, over columns, of what a weight as far from its mean as usual costs."""
    if tau == inf:
        return inf
    mean = w.mean(0) if w.shape[0] > 1 else 0.0
    variance = (w - mean).square().sum(0) / max(w.shape[0] - 1, 1)
    return tau * float((variance * importance).mean())


def without_outliers(
    w: Float[Tensor, "out group"], importance: Float[Tensor, " group"], limit: float, largest_code: int
) -> Float[Tensor, "out group"]:
    """Likely outliers replaced by the mean of the row's others, where there are others."""
    likely = likely_outliers(w, importance, limit, largest_code)
    replaced = w.clone()
    for r in range(w.shape[0]):
        if not likely[r].all():
            replaced[r, likely[r]] = w[r, ~likely[r]].mean()
    return replaced


def likely_outliers(
    w: Float[Tensor, "out group"], importance: Float[Tensor, " group"], limit: float, largest_code: int
) -> Bool[Tensor, "out group"]:
    """Weights without which the group, fitted anew, costs less by more than the limit."""
    likely = torch.zeros(w.shape, dtype=torch.bool)
    for r, row in enumerate(w):
        whole = _min_max_cost(row, importance, largest_code)
        for i in range(len(row) if len(row) > 1 else 0):
            others = [j for j in range(len(row)) if j != i]
            likely[r, i] = whole - _min_max_cost(row[others], importance[others], largest_code) > limit
    return likely


def _min_max_cost(row: Float[Tensor, " group"], importance: Float[Tensor, " group"], largest_code: int) -> float:
    low, step = row.min(), (row.max() - row.min()) / largest_code
    if step == 0:
        return 0.0
    return float(((low + step * torch.round((row - low) / step) - row).square() * importance).sum())


def _solution(
    grid: Grid,
    codes: list[Tensor],
    params: list[dict[str, Tensor]],
    outliers: list[tuple[int, int, Tensor]] | None = None,
    order: Int[Tensor, " in"] | None = None,
) -> Solution:
    stacked = {key: torch.stack([p[key] for p in params], dim=1) for key in params[0]}
    found = None
    if outliers:
        rows, columns, values = zip(*outliers, strict=True)
        found = Outliers(torch.tensor(rows), torch.tensor(columns), torch.stack(values))
    return Solution(grid, torch.cat(codes, dim=1), stacked, outliers=found, order=order)
