"""Rows that compete for bits: what an error in a row costs, and how wide a grid each row gets for that.

The solution of a row on a given grid does not depend on what its errors cost: every row of a matrix is solved by the
same Hessian (output-side weights: Kim et al. 2025, GuidedQuant, https://arxiv.org/abs/2505.07004; Tseng et al. 2025,
YAQA, https://arxiv.org/abs/2505.22988; here their diagonal). Where a rate is kept over a matrix, it is the grids that
change: a row whose errors cost more gets a narrower one, with more non-zeros.

The cost is that to the expert's own answers, so that one expert is all that must be in memory: with y what the gate is
given, one column per row of the input projection, it is the mean over tokens of |d answer / d y_i|^2 y_i^2, the squared
error of the answers at a relative error of 1 in row i alone. Of the output projection nothing that is in memory says
that one row's errors cost more than another's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from halfbit.grids.deadzone import Deadzone
from halfbit.types import Grid, Params

# a scale is coded in few bits, from the least to the largest of a matrix
NARROWEST, WIDEST = 0.5, 2.0


def slopes(
    y: Float[Tensor, "tokens features"], gate: Callable[[Tensor], Tensor], down: Float[Tensor, "out inner"]
) -> Float[Tensor, "tokens features"]:
    """|d answer / d y_i| for each token, with the answer `gate(y) @ down.T`, where each y_i goes to one inner feature.

    That is so of every gate of transformers' experts. Of an output norm behind the answer nothing is known here.
    """
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        h = gate(y)
        (found,) = torch.autograd.grad(h, y, down.norm(dim=0).to(h).expand_as(h))
    return found.abs()


def widths(cost: Float[Tensor, "*experts rows"], power: float) -> Float[Tensor, "*experts rows"]:
    """How wide each row's grid is, in units of what the matrix has on the mean: the cost to the power of -`power`.

    In units of the cost's geometric mean; from NARROWEST to WIDEST.
    """
    cost = cost.clamp(min=torch.finfo(cost.dtype).tiny)
    return (-power * (cost.log() - cost.log().mean(-1, keepdim=True))).exp().clamp(NARROWEST, WIDEST)


@dataclass(frozen=True)
class Unequal(Deadzone):
    """The grid deadzone with rows of unequal widths, while it is fitted; what is fitted is stored like any other.

    Attributes:
        widths: `[..., out]`, in units of the spread.
    """

    widths: Tensor = field(default_factory=lambda: torch.ones(1), compare=False)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        return super().fit(w * self.widths[..., None], importance)


def unequal(grid: Grid, widths: Tensor | None) -> Grid:
    """The grid with rows of unequal widths, where it is one whose rows compete."""
    if widths is None or not isinstance(grid, Deadzone):
        return grid
    return Unequal(grid.scale_bits, grid.spread, widths)
