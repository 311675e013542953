"""Adam as both kinds of tuning use it: a tensor moves by a share of its own size; warm-up, then a cosine to nothing."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WARM_UP = 0.05
BETAS = (0.9, 0.99)


class Learner:
    """Accumulates: parameters change in place, `adam` keeps the moments.

    Args:
        parameters: what learns.
        rate: in units of each tensor's root mean square.
        steps: in all.
    """

    def __init__(self, parameters: Sequence[Tensor], rate: float, steps: int):
        self._parameters, self._steps = parameters, steps
        self._rates = [rate * float(p.detach().square().mean().sqrt().clamp(min=1e-8)) for p in parameters]
        groups = [{"params": [p], "lr": r} for p, r in zip(parameters, self._rates, strict=True)]
        self.adam = torch.optim.Adam(groups, betas=BETAS)

    def begin(self, step: int) -> None:
        """Forget the gradients of the step before."""
        share = min(1.0, (step + 1) / max(1, round(WARM_UP * self._steps)))
        share *= 0.5 * (1 + math.cos(math.pi * step / self._steps))
        for group, rate in zip(self.adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self.adam.zero_grad(set_to_none=True)

    def end(self) -> None:
        """Move by the gradients."""
        for parameter in self._parameters:
            # an expert alone in its format may have no tokens in a step
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.adam.step()
