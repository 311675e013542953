"""Ternary grid {low, 0, high} per row, by min-max: QMoE's grid.

low = min(0, row minimum), high = max(0, row maximum); a weight goes to high above high / 2, to low below low / 2, and
to 0 otherwise. The range is wide on purpose: about 88 % of the weights of an expert become zero, and that is what the
code of `formats/qmoe` lives on (Frantar and Alistarh 2023, https://arxiv.org/abs/2310.16795, section 4.1).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfbit.errors import NonFinite, RecipeError
from halfbit.types import Levels, Params

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Ternary:
    """Code 0 is 0.0, code 1 is low, code 2 is high; one (low, high) per row.

    Attributes:
        dtype: what the levels are rounded to. The formats store "bfloat16"; the others serve comparisons.
    """

    dtype: str = "bfloat16"

    name: ClassVar[str] = "ternary"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"Ternary: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def group(self) -> None:
        """The whole row has one pair of levels."""
        return None

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """{"levels": [..., out, 2]}, low then high."""
        dtype = DTYPES[self.dtype]
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        # a NaN is the least and the largest of its row
        if not torch.isfinite(low + high).all():
            raise NonFinite("Ternary: a weight is NaN or infinite, so its row has no range")
        # any levels do for a row of zeros; these are the reference's
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        # rounding to nearest may leave the range of the dtype: 3.4e38 becomes infinite in bfloat16
        largest = torch.finfo(dtype).max
        return {"levels": torch.stack([low, high], -1).to(dtype).clamp(-largest, largest)}

    def ready(self, params: Params) -> Params:
        """{"low", "high": float [..., out, 1], "below", "above": beyond which a weight goes to them}."""
        if "low" in params:
            return params
        levels = _exact(params["levels"])
        low, high = levels[..., 0, None], levels[..., 1, None]
        return {"low": low, "high": high, "below": low / 2, "above": high / 2}

    def plain(self, params: Params) -> Levels:
        return Levels(**self.ready(params))

    def nearest(self, w: Tensor, params: Params) -> Tensor:
        params = self.ready(params)
        low, high = w < params["below"], w > params["above"]
        return torch.add(low.view(torch.uint8), high.view(torch.uint8), alpha=2)

    def values(self, codes: Tensor, params: Params) -> Tensor:
        params = self.ready(params)
        low, high = params["low"], params["high"]
        # exact, and several times faster than choosing; -0.0 of the first becomes 0.0 by adding
        return torch.addcmul(low * (codes & 1).to(low.dtype), high, (codes >> 1).to(high.dtype))


def _exact(t: Tensor) -> Tensor:
    """Widened to float32 at least, so that no further rounding happens."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


GRID = Ternary
