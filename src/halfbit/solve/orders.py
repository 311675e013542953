"""In which order columns are rounded: the error of an early one can be made up for by many, of the last one by none.

`act_order` puts the columns with the largest inputs first (GPTQ's `--act-order`). `sensitivity` puts those first whose
loss would cost most: sum over rows of w^2 / [H^-1]_jj, the saliency of the Optimal Brain Surgeon (Frantar and Alistarh
2022, https://arxiv.org/abs/2208.11580, Eq. 3).
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from halfbit.errors import RecipeError
from halfbit.solve.hessian import factor

Order = Literal["identity", "act_order", "sensitivity"]


def column_order(
    order: Order,
    w: Float[Tensor, "experts out in"],
    hessian: Float[Tensor, "experts in in"],
    damping: float,
) -> Int[Tensor, "experts in"] | None:
    """Original columns in the order in which they are rounded; None where they stay. Equal ones keep their order.

    Args:
        w, hessian: of the columns in their original order; the Hessian undamped.
        damping: as the solver's. An expert whose Hessian has to be repaired has the order of the repaired one.
    """
    if order == "identity":
        return None
    saliency = hessian.diagonal(dim1=-2, dim2=-1)
    if order == "sensitivity":
        factors, _ = factor(hessian, damping, [""] * len(hessian))
        eye = torch.eye(w.shape[2], dtype=w.dtype, device=w.device)
        # H^-1 = U^T U of U = R^-1
        inverse = torch.linalg.solve_triangular(factors, eye, upper=True).square_().sum(1)
        saliency = w.square().sum(1) / inverse
    return saliency.argsort(dim=-1, descending=True, stable=True)


def check_order(order: str) -> None:
    """Raise RecipeError for an unknown order."""
    if order not in get_args(Order):
        raise RecipeError(f"order must be one of {', '.join(get_args(Order))}, got {order!r}")
