"""Ternary grid {-scale, 0, +scale} per row, symmetric, with a scale that is itself coded in a few bits.

The scale is `spread` times the root mean square of the row. A weight goes to the nearest value, so the spread says how
many become zero, and with it the rate after entropy coding: 1.37 bits at 1.8, 0.98 at 2.8, 0.67 at 4.0 (weights of a
trained model with error feedback). Scales this far out cost a larger squared error than the centroids of an
entropy-constrained quantizer, and yet less of the model: rounding to the nearest of wide levels keeps the sums that the
error feedback watches over, centroids shrink them (docs/LOG.md has both measured).
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from halfbit.errors import NonFinite, RecipeError
from halfbit.types import Levels, Params

# of the spread
LEAST, MOST = 0.1, 100


@dataclass(frozen=True)
class Deadzone:
    """Code 0 is 0.0, code 1 is -scale, code 2 is +scale.

    Attributes:
        scale_bits: of each row's scale, 2 to 8; scale = lowest + step * code with two numbers per matrix.
        spread: scale in units of the row's root mean square; says how many weights become zero, and is not stored. One
            number, or one for each matrix of a batch.
    """

    scale_bits: int = 5
    spread: float | tuple[float, ...] = field(default=2.8, compare=False)

    name: ClassVar[str] = "deadzone"

    def __post_init__(self) -> None:
        if not 2 <= self.scale_bits <= 8:
            raise RecipeError(f"Deadzone: scale_bits must be 2 to 8, got {self.scale_bits}")
        spreads = self.spread if isinstance(self.spread, tuple) else (self.spread,)
        if not all(LEAST <= s <= MOST for s in spreads):
            raise RecipeError(f"Deadzone: spread must be {LEAST} to {MOST}, got {self.spread}")

    @property
    def group(self) -> None:
        """The whole row has one scale."""
        return None

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """{"scale_codes": uint8 [..., out], "scale_grid": bfloat16 [..., 1, 2]}, lowest and step."""
        if not torch.isfinite(w).all():
            raise NonFinite("Deadzone: a weight is NaN or infinite, so its row has no scale")
        # of what is left after dividing by the largest, or squares of small weights would vanish
        largest = w.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        spread = torch.tensor(self.spread, dtype=w.dtype, device=w.device)
        # of the matrices, for all of their rows
        spread = spread[:, None] if spread.dim() else spread
        return self.store(spread * largest[..., 0] * (w / largest).square().mean(-1).sqrt())

    def store(self, scale: Tensor) -> Params:
        """Parameters whose scales are as near to `scale` `[..., out]`, at least 0, as the bits allow."""
        largest = torch.finfo(torch.bfloat16).max
        low, high = scale.amin(-1, keepdim=True), scale.amax(-1, keepdim=True)
        codes = (1 << self.scale_bits) - 1
        lowest = low.clamp(max=largest / 2).to(torch.bfloat16)
        step = ((high.clamp(max=largest / 2) - lowest) / codes).clamp(min=0).to(torch.bfloat16)
        wide = step.to(scale.dtype).clamp(min=torch.finfo(torch.float32).tiny)
        code = ((scale - lowest) / wide).round().clamp(0, codes).masked_fill(step == 0, 0)
        return {"scale_codes": code.to(torch.uint8), "scale_grid": torch.cat([lowest, step], -1)[..., None, :]}

    def ready(self, params: Params) -> Params:
        """{"scale": float32 [..., out, 1]}."""
        if "scale" in params:
            return params
        lowest, step = params["scale_grid"].to(torch.float32).unbind(-1)
        # the product is exact, so the sum is rounded once, with or without a fused multiply-add
        return {"scale": (lowest + step * params["scale_codes"])[..., None]}

    def plain(self, params: Params) -> Levels:
        scale = self.ready(params)["scale"]
        return Levels(-scale / 2, scale / 2, -scale, scale)

    def nearest(self, w: Tensor, params: Params) -> Tensor:
        half = self.ready(params)["scale"] / 2
        return torch.add((w < -half).view(torch.uint8), (w > half).view(torch.uint8), alpha=2)

    def values(self, codes: Tensor, params: Params) -> Tensor:
        scale = self.ready(params)["scale"]
        return scale * ((codes >> 1).to(scale.dtype) - (codes & 1).to(scale.dtype))


GRID = Deadzone
