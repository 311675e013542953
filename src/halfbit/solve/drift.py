"""What to solve towards where the inputs have drifted: the weights that make up for it.

A layer behind compressed ones is given x' where the original is given x. Solving W on x' alone keeps W x', not W x
(asymmetric calibration: Li et al. 2025, GPTAQ, https://arxiv.org/abs/2504.02692; Zhang et al. 2025, Qronos,
https://arxiv.org/abs/2505.11695). |W X - Q X'|^2 is, but for a constant, |(V - Q) X'|^2 with V the least squares
solution of V X' = W X; so V is solved by the usual solver on the usual Hessian. V is drawn to W by as much as the
solver damps, or it would learn the drift of a few samples by heart.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from halfbit.solve.hessian import damp


def towards(
    w: Float[Tensor, "experts out in"],
    hessian: Float[Tensor, "experts in in"],
    cross: Float[Tensor, "experts in in"],
    damping: float,
) -> Float[Tensor, "experts out in"]:
    """V, the minimum of |W X - V X'|^2 + d |V - W|^2, d being `damping` times the mean of the Hessian's diagonal.

    Computed in float64, matrix by matrix. A Hessian that cannot be factored leaves W as it is; the solver reports it.

    Args:
        hessian: X' X'^T, undamped.
        cross: X X'^T, on the same scale.
    """
    found = w.clone()
    for e in range(w.shape[0]):
        h = hessian[e].double()
        lower, info = torch.linalg.cholesky_ex(damp(h[None], damping)[0])
        if int(info) == 0:
            away = w[e].double() @ (cross[e].double() - h)
            found[e] += torch.cholesky_solve(away.T, lower).T.to(w.dtype)
    return found
