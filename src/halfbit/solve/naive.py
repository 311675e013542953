"""The definition: rounding to nearest and exact error feedback, float64, one matrix, no tricks.

Nobody runs this on a model: error feedback inverts a matrix per column, O(in^4). The tests hold `rtn.py` and `gptq.py`
equal to it, because a wrong error feedback still beats rounding and looks healthy.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import inv

from halfbit.solve.hessian import damp
from halfbit.types import Grid, Solution


def round_to_nearest(w: Float[Tensor, "out in"], grid: Grid) -> Solution:
    """Each weight on its own."""
    codes, params = [], []
    for columns in w.double().split(grid.group or max(w.shape[1], 1), dim=1):
        params.append(grid.fit(columns))
        codes.append(grid.nearest(columns, params[-1]))
    return _solution(grid, codes, params)


def error_feedback(w: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], grid: Grid, damping: float) -> Solution:
    """Column by column; the error of column j is made up for by the columns after it, as well as they can.

    Groups are fitted to the weights as they are when their first column is reached; whole rows, as in QMoE, to the
    original weights.
    """
    W = w.double().clone()
    H = damp(hessian.double()[None], damping)[0]
    n = W.shape[1]
    group = grid.group or n
    codes, params = [], []
    for j in range(n):
        if j % group == 0:
            params.append(grid.fit(W[:, j : j + group]))
        codes.append(grid.nearest(W[:, j : j + 1], params[-1]))
        error = W[:, j] - grid.values(codes[-1], params[-1])[:, 0]
        # the inverse on what is left: the columns before j are fixed
        Hinv = inv(H[j:, j:])
        W[:, j:] -= torch.outer(error / Hinv[0, 0], Hinv[0])
    return _solution(grid, codes, params)


def _solution(grid: Grid, codes: list[Tensor], params: list[dict[str, Tensor]]) -> Solution:
    stacked = {key: torch.stack([p[key] for p in params], dim=1) for key in params[0]}
    return Solution(grid, torch.cat(codes, dim=1), stacked)
