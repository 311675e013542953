"""In which order columns are rounded: the error of an early one can be made up for by many, of the last one by none.

`act_order` puts the columns with the largest inputs first (GPTQ's `--act-order`). `sensitivity` puts those first whose
loss would cost most: sum over rows of w^2 / [H^-1]_jj, the saliency of the Optimal Brain Surgeon (Frantar and Alistarh
2022, https://arxiv.org/abs/2208.11580, Eq. 3).
"""

from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

from halfbit.errors import RecipeError

Order = Literal["identity", "act_order", "sensitivity"]


def column_order(
    order: Order,
    w: Float[Tensor, "experts out in"],
    hessian: Float[Tensor, "experts in in"],
    factors: Float[Tensor, "experts in in"],
) -> Int[Tensor, "experts in"] | None:
    """Original columns in the order in which they are rounded; None where they stay. Equal ones keep their order.

    Args:
        w, hessian: of the columns in their original order; the Hessian undamped.
        factors: U with U^T U the inverse of the damped Hessian.
    """
    if order == "identity":
        return None
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    saliency = diagonal if order == "act_order" else w.square().sum(1) / factors.square().sum(1)
    return saliency.argsort(dim=-1, descending=True, stable=True)


def check_order(order: str) -> None:
    """Raise RecipeError for an unknown order."""
    if order not in get_args(Order):
        raise RecipeError(f"order must be one of {', '.join(get_args(Order))}, got {order!r}")
