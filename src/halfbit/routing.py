"""Around the products of a Mixture-of-Experts layer: tokens sorted by expert, and the weighted sum of what comes back.

On a CPU in C++ (`csrc/experts.cpp`), where nothing but us looks at the tensors; elsewhere by torch, on any device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbit import native
from halfbit.formats._eager import eager


@dataclass(frozen=True)
class Sorted:
    """Choices of experts, sorted by expert; in the order of the tokens where they chose the same.

    Attributes:
        starts: int64 `[experts + 1]`; choices `starts[e]` to `starts[e + 1]` are of expert `e`.
        expert, choice, token: int64 `[taken]`; `choice` counts through `[tokens, k]`.
        untaken: bool `[taken]`, choices that no expert takes, which are behind the others; None: they are left out.
    """

    starts: Tensor
    expert: Tensor
    choice: Tensor
    token: Tensor
    untaken: Tensor | None = None


def by_expert(index: Tensor, experts: int, *, waiting: bool = True) -> Sorted:
    """`index` int64 `[tokens, k]`: the experts that each token takes; outside [0, experts): none.

    Where a device need not be waited for, `starts` stays there and choices that no expert takes are not left out.
    """
    if native.extension is not None and waiting and index.is_cpu and eager(index):
        starts = torch.empty(experts + 1, dtype=torch.int64)
        places = torch.empty(3, index.numel(), dtype=torch.int64)
        taken = native.extension.experts_sort(index.contiguous(), starts, places)
        if taken < places.shape[1]:
            places = places[:, :taken]
        return Sorted(starts, *places.unbind())
    flat = index.reshape(-1)
    expert = torch.where((flat >= 0) & (flat < experts), flat, experts)
    expert, choice = torch.sort(expert, stable=True)
    starts = torch.searchsorted(expert, torch.arange(experts + 1, device=expert.device))
    if not waiting:
        return Sorted(starts, expert, choice, choice // index.shape[1], expert == experts)
    # once to the CPU, where products want it: every further look would wait for the device again
    starts = starts.cpu()
    taken = int(starts[-1])
    return Sorted(starts, expert[:taken], choice[:taken], choice[:taken] // index.shape[1])


def weighted_sum(y: Tensor, places: Sorted, weights: Tensor) -> Tensor:
    """The experts' outputs `y` `[taken, width]`, sorted, times `weights` `[tokens, k]` -> float32 `[tokens, width]`."""
    y, weights = y.to(torch.float32), weights.to(torch.float32)
    if native.extension is not None and y.is_cpu and places.untaken is None and eager(y) and eager(weights):
        total = torch.empty(weights.shape[0], y.shape[1])
        parts = y.contiguous(), places.choice, weights.contiguous()
        native.extension.experts_sum(*parts, total, torch.get_num_threads())
        return total
    y = y * weights.reshape(-1)[places.choice][:, None]
    if places.untaken is not None:
        # what no expert takes was not computed; each token adds its experts in the order in which it names them, which
        # index_add_ does not on a GPU
        y = y.masked_fill_(places.untaken[:, None], 0)
        return torch.empty_like(y).index_copy_(0, places.choice, y).view(*weights.shape, -1).sum(1)
    total = torch.zeros(weights.shape[0], y.shape[1], dtype=torch.float32, device=y.device)
    return total.index_add_(0, places.token, y)
