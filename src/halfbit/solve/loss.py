"""What a solver is judged by: tr(dW H dW^T) / tr(W H W^T), the share of a layer's output that is error."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from halfbit.errors import NonFinite
from halfbit.types import Solution


def relative_loss(
    w: Float[Tensor, "out in"], q: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"] | None
) -> float:
    """The undamped H; None is the identity. 0 / 0 is 0: a layer whose output is always zero has no error."""
    error, whole = _energy(q - w, hessian), _energy(w, hessian)
    if error <= 0:
        return 0.0
    return error / whole if whole > 0 else float("inf")


def measured(solution: Solution, w: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"] | None) -> Solution:
    """The solution of `w` with its loss."""
    return replace(solution, loss=relative_loss(w, solution.dense(), hessian))


def check_finite(w: Float[Tensor, "experts out in"], names: Sequence[str]) -> None:
    """Raise NonFinite with the name of the first expert whose weights are not finite."""
    finite = torch.isfinite(w).flatten(1).all(1).tolist()
    if not all(finite):
        name = names[finite.index(False)]
        raise NonFinite(f"{name}: a weight is NaN or infinite; the checkpoint is damaged", tensor=name)


def _energy(d: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"] | None) -> float:
    """tr(d H d^T)."""
    through = d if hessian is None else d @ hessian.to(d.dtype)
    # row sums in the dtype of d, their sum in float64: 10^7 float32 terms would lose two digits
    return float((through * d).sum(-1).double().sum())
