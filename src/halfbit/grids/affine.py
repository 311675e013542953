"""Integer grid scale * (code - zero) by min-max, per row or per group of columns.

Asymmetric, as in GPTQ and QMoE: the range is [min(0, smallest), max(0, largest)], so that 0.0 is on the grid, and
zero = round(-smallest / scale) is one of the codes (Frantar et al. 2023, https://arxiv.org/abs/2210.17323; `quant.py`
of IST-DASLab/qmoe). Symmetric, as in compressed-tensors and GPTQ's sym: scale = 2 * largest magnitude / (2^bits - 1),
zero is the middle code 2^(bits - 1) and need not be stored.

The scale is rounded to its stored dtype first and the zero is chosen for the rounded scale.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfbit.errors import NonFinite, RecipeError
from halfbit.types import Params, Steps

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Affine:
    """2^bits equally spaced values per row and group of columns.

    Attributes:
        bits: 2 to 8.
        group: columns that share scale and zero; None: the whole row. The last group may be shorter.
        symmetric: the middle code is 0.0 and there is no "zero" parameter.
        dtype: what scales are rounded to. The formats store "bfloat16"; the others serve comparisons.
    """

    bits: int = 2
    group: int | None = None
    symmetric: bool = False
    dtype: str = "bfloat16"

    name: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"Affine: bits must be 2 to 8, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise RecipeError(f"Affine: group must be None or at least 1, got {self.group}")
        if self.dtype not in DTYPES:
            raise RecipeError(f"Affine: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def largest_code(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """{"scale": [..., out], "zero": uint8 [..., out]}; no "zero" where symmetric."""
        if not torch.isfinite(w).all():
            raise NonFinite("Affine: a weight is NaN or infinite, so its group has no range")
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        # any range does for a group of zeros; this is the reference's
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        step = (high - low) / self.largest_code
        # high - low overflows for +-3e38; in this order only the last bit differs
        step = torch.where(torch.isinf(step), high / self.largest_code - low / self.largest_code, step)
        scale = self._round_scale(step)
        if self.symmetric:
            return {"scale": scale}
        zero = torch.round(-low / _exact(scale)).clamp(0, self.largest_code)
        return {"scale": scale, "zero": zero.to(torch.uint8)}

    def ready(self, params: Params) -> Params:
        """{"step": float [..., out, 1], "shift": float [..., out, 1]}, the scale and the zero."""
        if "step" in params:
            return params
        step = _exact(params["scale"])[..., None]
        if self.symmetric:
            return {"step": step, "shift": torch.full_like(step, 1 << (self.bits - 1))}
        # float, because uint8 differences wrap
        return {"step": step, "shift": params["zero"][..., None].to(torch.float32)}

    def plain(self, params: Params) -> Steps:
        ready = self.ready(params)
        return Steps(ready["step"], torch.zeros_like(ready["step"]), ready["shift"], self.largest_code)

    def nearest(self, w: Tensor, params: Params) -> Tensor:
        params = self.ready(params)
        return (torch.round(w / params["step"]) + params["shift"]).clamp_(0, self.largest_code).to(torch.uint8)

    def values(self, codes: Tensor, params: Params) -> Tensor:
        params = self.ready(params)
        # exact for a bfloat16 scale: 8 bits of scale times 9 bits of difference fit the 24 of float32
        return params["step"] * (codes.to(params["step"].dtype) - params["shift"])

    def _round_scale(self, step: Tensor) -> Tensor:
        dtype = DTYPES[self.dtype]
        # below the smallest normal number precision is lost and GPUs may flush to zero, which would divide by zero;
        # above max / 2^bits the outermost grid point is infinite
        smallest = torch.finfo(dtype).tiny
        largest = torch.finfo(torch.promote_types(dtype, torch.float32)).max / (self.largest_code + 1)
        return step.to(torch.promote_types(step.dtype, dtype)).clamp(smallest, largest).to(dtype)


def _exact(t: Tensor) -> Tensor:
    """Widened to float32 at least, so that no further rounding happens."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


GRID = Affine
