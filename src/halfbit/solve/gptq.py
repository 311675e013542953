"""Blocked GPTQ with error feedback, batched over experts.

Column j is rounded; its error, divided by U[j, j], is spread over the columns still open with row j of U,
the upper Cholesky factor of H^-1 (Frantar et al. 2023, https://arxiv.org/abs/2210.17323, section 3.3).
Within a block of columns this is done at once, for the columns behind the block with one matrix product per block.
Sixteen experts are solved side by side, as in QMoE, since one small expert does not fill a machine.
`solve/naive.py` is the same thing without the factorisation; the tests hold the two equal.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from halfbit.solve.hessian import Fallback, OnRepair, factor, warn_of
from halfbit.solve.loss import check_finite
from halfbit.solve.rtn import solutions
from halfbit.types import Grid, Params, Solution


def gptq(
    w: Float[Tensor, "experts out in"],
    hessian: Float[Tensor, "experts in in"],
    grid: Grid,
    *,
    names: Sequence[str],
    damping: float = 0.1,
    block: int = 128,
    fallback: Fallback = "identity",
    on_repair: OnRepair = warn_of,
) -> list[Solution]:
    """One Solution per expert. Float32, or float64 where `w` is; only the factorisation is float64 in any case.

    Args:
        w: weights of experts of one shape.
        hessian: X^T X of each expert, any scale, undamped.
        grid: groups are fitted when the solver reaches them, whole rows to the original weights.
        names: of the experts, for errors and repairs.
        damping: times the mean of the Hessian's diagonal. QMoE uses 0.1, ten times GPTQ's, as experts see few tokens.
        block: columns per block; changes speed, and results only by rounding.
        fallback: for an expert whose Hessian cannot be factored; see `factor`.
        on_repair: called once for every expert that needed one; the default issues a warning.
    """
    check_finite(w, names)
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    factors, repairs = factor(hessian.to(w.dtype), damping, names, fallback)
    for repair in repairs:
        on_repair(repair)
    codes, params = _feed_back(w, factors, grid, block)
    return solutions(w, codes, params, hessian, grid)


def _feed_back(
    w: Float[Tensor, "experts out in"], U: Float[Tensor, "experts in in"], grid: Grid, block: int
) -> tuple[Tensor, list[Params]]:
    n = w.shape[2]
    group = grid.group or max(n, 1)
    # [experts, in, out]: a column of weights is contiguous; a copy even where it is so already (one row)
    W = w.mT.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=w.device)
    params: list[Params] = []
    for start in range(0, n, block):
        stop = min(start + block, n)
        B, E = W[:, start:stop], torch.empty_like(W[:, start:stop])
        for j in range(start, stop):
            i = j - start
            if j % group == 0:
                # the columns behind the block have not been told of the errors in it
                behind = slice(stop, max(stop, j + group))
                ahead = W[:, behind] - U[:, start:j, behind].mT @ E[:, :i]
                params.append(grid.fit(torch.cat([B[:, i : i + group], ahead], dim=1).mT))
            column = B[:, i, :, None]
            rounded = grid.nearest(column, params[-1])
            codes[:, j] = rounded[..., 0]
            E[:, i] = (column - grid.values(rounded, params[-1]))[..., 0] / U[:, j, j, None]
            B[:, i + 1 :].addcmul_(U[:, j, j + 1 : stop, None], E[:, i, None], value=-1)
        W[:, stop:] -= U[:, start:stop, stop:].mT @ E
    return codes.mT.contiguous(), params
