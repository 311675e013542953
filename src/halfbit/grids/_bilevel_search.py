"""Statistics of a bilevel grid by search: of many, those with which a group's rounding costs least.

Min-max ranges serve the largest weight of a group and min-max second levels the most unusual row of a supergroup;
all others pay with resolution. Here the cost of a group is the sum of squared errors, each times the importance of its
column, and no weight costs more than `limit`, the cost at which it would become an outlier. In turn:

    ranges      of each row, shrunk by several factors; the cheapest
    two levels  from these, with shrunk second-level ranges; then each row's pair of codes, out of many pairs
    again       from the scale and zero that least squares find for the codes each row has now, with several
                second-level ranges, the cheapest per supergroup

Nothing is worse than min-max by this measure, since min-max is one of the candidates.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfbit.types import Params

if TYPE_CHECKING:
    from halfbit.grids.bilevel import Bilevel

RANGES = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6)
# for each turn: how many zero codes around the best guess are tried with every scale code, and by which factors the
# ranges of scales and zeros are shrunk. Trying everything twice takes twice as long and gains 1 % of the error
TURNS = ((3, ((0.9, 0.8),)), (8, ((1.0, 1.0), (0.8, 0.8))))
# scale codes tried around the best guess: all there are at 3 bits
SCALE_CODES = 8
# where statistics have 16 bits of their own, factors of the best guess
SCALES = (0.9, 0.95, 1.0, 1.05, 1.1)
# and steps added to it
ZEROS = (-0.3, -0.15, 0.0, 0.15, 0.3)
# of candidates looked at together; 16 MiB of float32
WORKSPACE_ELEMENTS = 1 << 22


class Cost:
    """What rounding `w` costs.

    Attributes:
        w: `[..., out, columns]`.
        importance: `[..., 1, columns]`.
        limit: `[..., 1, 1]` or None.
        largest_code: of the grid.
    """

    def __init__(self, w: Tensor, importance: Tensor | None, limit: Tensor | None, largest_code: int):
        self.w = w
        self.importance = w.new_ones(w.shape[-1]) if importance is None else importance.to(w.dtype)[..., None, :]
        self.limit = None if limit is None else limit.to(w.dtype)[..., None, None]
        self.largest_code = largest_code

    def __call__(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Of each group with each of its candidates: `[..., out, candidates]` -> the same."""
        at_once = max(1, WORKSPACE_ELEMENTS // max(self.w.numel(), 1))
        return torch.cat(
            [self._of(*c) for c in zip(scale.split(at_once, -1), zero.split(at_once, -1), strict=True)], -1
        )

    def _of(self, scale: Tensor, zero: Tensor) -> Tensor:
        w, scale, zero = self.w[..., None, :], scale[..., None].to(self.w.dtype), zero[..., None].to(self.w.dtype)
        error = (w / scale).add_(zero).round_().clamp_(0, self.largest_code).sub_(zero).mul_(scale).sub_(w)
        cost = error.square_().mul_(self.importance[..., None, :])
        if self.limit is not None:
            cost = torch.minimum(cost, self.limit[..., None])
        # min() would take NaN, from 0 * infinity, for the smallest
        return cost.sum(-1).nan_to_num(nan=torch.inf, posinf=torch.inf)


def search(grid: "Bilevel", cost: Cost, scale: Tensor, middle: Tensor, params: Params) -> Params:
    """Parameters that cost at most as much as `params`.

    Args:
        grid: whose `store`, `levels` and `centred` are used.
        cost: of the weights.
        scale, middle: `[..., out]`, of the min-max range.
        params: by min-max.
    """
    scales = torch.stack([factor * scale for factor in RANGES], -1)
    first = cost(scales, grid.centred(middle[..., None], scales)).argmin(-1, keepdim=True)
    best, best_cost = params, cost(*_one(grid, params))[..., 0]
    target = scales.gather(-1, first)[..., 0]
    for turn, (zero_codes, second_levels) in enumerate(TURNS):
        if turn > 0:
            target, middle = _least_squares(grid, cost, best, scale)
        for factors in second_levels:
            candidate = _two_levels(grid, cost, target, middle, factors, zero_codes)
            best, best_cost = _cheaper(grid, (best, best_cost), candidate)
    return best


def _one(grid: "Bilevel", params: Params) -> tuple[Tensor, Tensor]:
    return grid.statistic("scale", params)[..., None], grid.statistic("zero", params)[..., None]


def _two_levels(
    grid: "Bilevel", cost: Cost, scale: Tensor, middle: Tensor, factors: tuple[float, float], zero_codes: int
) -> tuple[Params, Tensor]:
    """Second-level grids around the wanted scales and middles, and the cheapest pair of codes of each row."""
    params = grid.store("scale", _squeezed(grid, scale, factors[0]))
    codes, scales = _around(grid, "scale", params, scale[..., None], SCALE_CODES)
    zeros = grid.centred(middle[..., None], scales)
    chosen = cost(scales, zeros).argmin(-1, keepdim=True)
    params |= grid.store("zero", _squeezed(grid, zeros.gather(-1, chosen)[..., 0], factors[1]))
    coded_zeros, zeros = _around(grid, "zero", params, zeros, zero_codes)
    # [..., out, scales * zeros]
    per_scale = zeros.shape[-1] // scales.shape[-1]
    scales, codes = scales.repeat_interleave(per_scale, -1), codes.repeat_interleave(per_scale, -1)
    costs, chosen = cost(scales, zeros).min(-1, keepdim=True)
    for name, values, coded in (("scale", scales, codes), ("zero", zeros, coded_zeros)):
        if name in params:
            params[name] = values.gather(-1, chosen)[..., 0].to(params[name].dtype)
        else:
            params[f"{name}_codes"] = coded.gather(-1, chosen)[..., 0].to(torch.uint8)
    return params, costs[..., 0]


def _around(grid: "Bilevel", name: str, params: Params, wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Codes around each of the wanted statistics `[..., out, k]` and what they mean, `[..., out, k * count]` each."""
    if name in params:
        # 16 bits: any value there is
        if name == "scale":
            near = torch.stack([factor * wanted for factor in SCALES], -1).flatten(-2)
        else:
            near = torch.stack([wanted + shift for shift in ZEROS], -1).flatten(-2)
        near = grid.store(name, near)[name].to(wanted.dtype)
        return near, near
    bits = grid.scale_bits if name == "scale" else grid.zero_bits
    count = min(count, 1 << bits)
    step, shift = grid.by_row(name, params)[..., None, :].to(wanted.dtype).unbind(-1)
    start = (wanted / step + shift).round().sub(count // 2).clamp(0, (1 << bits) - count)
    codes = (start[..., None] + torch.arange(count, device=wanted.device)).flatten(-2)
    if name == "scale":
        codes = torch.where(
            grid.levels(name, params, codes) > 0, codes, params["scale_codes"][..., None].to(codes.dtype)
        )
    return codes, grid.levels(name, params, codes).to(wanted.dtype)


def _squeezed(grid: "Bilevel", t: Tensor, factor: float) -> Tensor:
    """`[..., out]`; what lies outside of the middle `factor` of its supergroup's range is moved to that one's edge."""
    if factor == 1:
        return t
    groups = grid.supergroups(t)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    margin = (1 - factor) / 2 * (high - low)
    return groups.clamp(low + margin, high - margin).flatten(-2)[..., : t.shape[-1]]


def _least_squares(grid: "Bilevel", cost: Cost, params: Params, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, middle) `[..., out]` with which the codes that the weights have now would cost least."""
    w, ready = cost.w, grid.ready(params)
    codes = grid.nearest(w, ready)
    share = cost.importance.expand_as(w)
    if cost.limit is not None:
        paid = (grid.values(codes, ready) - w).square() * cost.importance
        share = share.masked_fill(paid > cost.limit, 0)
    share = share / share.amax(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    codes = codes.to(w.dtype)
    mean_code, mean = (codes * share).sum(-1, keepdim=True), (w * share).sum(-1, keepdim=True)
    variance = ((codes - mean_code).square() * share).sum(-1)
    found = ((codes - mean_code) * (w - mean) * share).sum(-1) / variance
    now = ready["step"][..., 0].to(w.dtype)
    # all weights have one code, or the only others are outliers
    found = torch.where((variance > 1e-9) & (found > 0), found, now).clamp(0.3 * scale, 1.3 * scale)
    return found, mean[..., 0] + (grid.largest_code / 2 - mean_code[..., 0]) * found


def _cheaper(grid: "Bilevel", a: tuple[Params, Tensor], b: tuple[Params, Tensor]) -> tuple[Params, Tensor]:
    """Of two candidates, the better one for each supergroup."""
    (params, cost), (others, other_cost) = a, b
    better = _total(grid, other_cost) < _total(grid, cost)
    rows = better.repeat_interleave(grid.supergroup, -1)[..., : cost.shape[-1]]
    chosen = {
        key: torch.where(better[..., None] if key.endswith("_grid") else rows, others[key], value)
        for key, value in params.items()
    }
    return chosen, torch.where(rows, other_cost, cost)


def _total(grid: "Bilevel", cost: Tensor) -> Tensor:
    missing = -cost.shape[-1] % grid.supergroup
    return torch.nn.functional.pad(cost, (0, missing)).unflatten(-1, (-1, grid.supergroup)).sum(-1)
