"""Which weights do not fit their group: SpQR's two outlier rules, batched over experts.

An error e of a weight in column j costs (e / U_jj)^2, what is left of it after the columns behind have made up for it
as well as they can. The threshold T for that cost is `tau` times what it would cost on average to lose a weight
(Dettmers et al. 2023, https://arxiv.org/abs/2306.03078, section 3.2, algorithm 1; `spqr_engine.py` of Vahe1994/SpQR).

Before a group is fitted, its likely outliers are replaced by the mean of the others, so that they do not widen the
range. Likely is a weight without which the group costs less by more than T. Afterwards, column by column, a weight
stays an outlier where its own rounding costs more than T; that is the solver's part.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def threshold(
    w: Float[Tensor, "experts out in"], importance: Float[Tensor, "experts in"], tau: Float[Tensor, " experts"]
) -> Float[Tensor, " experts"]:
    """T = tau * mean over columns of (variance over rows * importance); infinite where tau is."""
    variance = w.var(1, correction=min(1, w.shape[1] - 1))
    mean = (variance * importance).mean(-1)
    # rows that are all alike have no variance, and yet a size
    mean = torch.where(mean > 0, mean, (w.square().mean(1) * importance).mean(-1))
    return torch.where(torch.isinf(tau), tau, tau * mean)


def without_outliers(
    w: Float[Tensor, "experts out group"],
    importance: Float[Tensor, "experts group"],
    threshold: Float[Tensor, " experts"],
    largest_code: int,
) -> Float[Tensor, "experts out group"]:
    """`w` with likely outliers replaced by the mean of the row's other weights in the group."""
    likely = likely_outliers(w, importance, threshold, largest_code)
    others = (~likely).sum(-1, keepdim=True)
    mean = w.masked_fill(likely, 0).sum(-1, keepdim=True) / others.clamp(min=1)
    # a row of nothing but outliers is left as it is: something must be fitted
    return torch.where(likely & (others > 0), mean, w)


def likely_outliers(
    w: Float[Tensor, "experts out group"],
    importance: Float[Tensor, "experts group"],
    threshold: Float[Tensor, " experts"],
    largest_code: int,
) -> Bool[Tensor, "experts out group"]:
    """Leave one out: weights without which the group, fitted anew by min-max, costs less by more than the threshold.

    The range changes only with the smallest or the largest weight, so there are three fits per group and not one per
    weight: to all, and to all but either end. Statistics are not rounded for this test.
    """
    if w.shape[-1] < 2:
        return torch.zeros_like(w, dtype=torch.bool)
    importance = importance[:, None]
    (low, next_low), (high, next_high) = w.topk(2, -1, largest=False).values.unbind(-1), w.topk(2, -1).values.unbind(-1)
    cost = _cost(w, low, high, importance, largest_code)
    whole = cost.sum(-1)
    reduction = cost
    for end, inner_low, inner_high in ((low, next_low, high), (high, low, next_high)):
        inside = _cost(w, inner_low, inner_high, importance, largest_code)
        # where two weights are at this end, the range stays, and both cost nothing in it
        at_end = w == end[..., None]
        without = (whole - inside.masked_fill(at_end, 0).sum(-1))[..., None]
        reduction = torch.where(at_end, without, reduction)
    return reduction > threshold[:, None, None]


def _cost(w: Tensor, low: Tensor, high: Tensor, importance: Tensor, largest_code: int) -> Tensor:
    """What rounding costs, weight by weight, on `largest_code` + 1 values from `low` to `high`."""
    low, step = low[..., None], ((high - low) / largest_code)[..., None]
    # a range of one value
    step = step.masked_fill(step == 0, 1)
    rounded = ((w - low) / step).round_().clamp_(0, largest_code).mul_(step).add_(low)
    return (rounded - w).square_().mul_(importance)
