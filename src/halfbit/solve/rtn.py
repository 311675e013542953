"""Round to nearest, batched over experts: each weight on its own, no error feedback. The baseline."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from halfbit.solve.loss import check_finite, measured
from halfbit.types import Grid, Params, Solution


def rtn(
    w: Float[Tensor, "experts out in"],
    hessian: Float[Tensor, "experts in in"] | None,
    grid: Grid,
    *,
    names: Sequence[str],
) -> list[Solution]:
    """One Solution per expert. `hessian` only measures the loss; None measures it under the identity."""
    check_finite(w, names)
    # float32 at least: a grid's thresholds must not be rounded to the dtype of the weights
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    codes: list[Tensor] = []
    params: list[Params] = []
    for columns in w.split(grid.group or max(w.shape[2], 1), dim=2):
        params.append(grid.fit(columns))
        codes.append(grid.nearest(columns, params[-1]))
    stacked = {key: torch.stack([p[key] for p in params], dim=2) for key in params[0]}
    all_codes = torch.cat(codes, dim=2)
    found = []
    for e in range(w.shape[0]):
        solution = Solution(grid, all_codes[e], {key: value[e] for key, value in stacked.items()})
        found.append(measured(solution, w[e], None if hessian is None else hessian[e]))
    return found
