"""What a solver is judged by: tr(dW H dW^T) / tr(W H W^T), the share of a layer's output that is error."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from halfbit.errors import NonFinite
from halfbit.types import Solution

# columns of the Hessian that are multiplied at a time
PANEL = 512
# energies beyond these are computed in float64
LEAST, MOST = 1e-20, 1e30


def relative_loss(
    w: Float[Tensor, "out in"], q: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"] | None
) -> float:
    """The undamped H; None is the identity. 0 / 0 is 0: a layer whose output is always zero has no error."""
    error, whole = _energy(q - w, hessian), _energy(w, hessian)
    if w.dtype != torch.float64 and not (LEAST < whole < MOST and error < MOST):
        # squares that have left float32, or nearly
        return relative_loss(w.double(), q.double(), hessian)
    if error <= 0:
        return 0.0
    return error / whole if whole > 0 else float("inf")


def measured(solution: Solution, w: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"] | None) -> Solution:
    """The solution of `w` with its loss."""
    return replace(solution, loss=relative_loss(w, solution.dense(), hessian))


def finite(matrices: Float[Tensor, "matrices out in"]) -> list[bool]:
    """Which matrices have neither NaN nor infinity; several times faster than `isfinite` of every element."""
    return [bool(torch.isfinite(torch.stack(torch.aminmax(m))).all()) if m.numel() else True for m in matrices]


def check_finite(w: Float[Tensor, "experts out in"], names: Sequence[str]) -> None:
    """Raise NonFinite with the name of the first expert whose weights are not finite."""
    if False in (found := finite(w)):
        name = names[found.index(False)]
        raise NonFinite(f"{name}: a weight is NaN or infinite; the checkpoint is damaged", tensor=name)


def _energy(d: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"] | None) -> float:
    """tr(d H d^T); of the symmetric H no more than half, and the blocks on its diagonal, is multiplied."""
    if hessian is None:
        return _sum(d.square())
    total = 0.0
    for start in range(0, d.shape[1], PANEL):
        panel = hessian[:, start : start + PANEL].to(d.dtype)
        own = d[:, start : start + PANEL]
        through = own @ panel[start : start + PANEL]
        through.addmm_(d[:, :start], panel[:start], alpha=2)
        total += _sum(through.mul_(own))
    return total


def _sum(terms: Float[Tensor, "out in"]) -> float:
    """Row sums in the dtype of the terms, their sum in float64: 10^7 float32 terms would lose two digits."""
    return float(terms.sum(-1).double().sum())
