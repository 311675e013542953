"""SpQR's grid: scale * (code - zero) per small group, with scales and zeros that are themselves on small grids.

The zero is not an integer and the range need not contain 0.0, unlike `affine.py`. A group is some columns of one row. The
scales of `supergroup` rows at one column group are quantized to `scale_bits` by min-max with a 16-bit scale and zero of
their own, and so are the zeros: 3 + 6 / 16 + 64 / (16 * 16) = 3.625 bits per weight at the defaults
(Dettmers et al. 2023, https://arxiv.org/abs/2306.03078, section 4.1, Eq. 4; `quant_groups.py` of Vahe1994/SpQR).

    scale = a * (scale_code - b)       zero = c * (zero_code - d)       value = scale * (code - zero)

Everything is rounded to its stored form before the next thing is chosen: the zeros for the scales as they are stored,
the codes for both.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfbit.errors import NonFinite, RecipeError, Unsupported
from halfbit.types import Params

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
ROUNDINGS = ("float32", "float16")
# a zero beyond this many steps buys resolution that the stored statistics do not have
LARGEST_ZERO = 1024.0


@dataclass(frozen=True)
class Bilevel:
    """2^bits equally spaced values per row and group of columns, statistics on two levels.

    Attributes:
        bits: 2 to 8.
        group: columns that share scale and zero (the paper's beta1); None: the whole row. The last may be shorter.
        scale_bits, zero_bits: 2 to 8, or 16: stored as they are, in `dtype`.
        supergroup: rows whose scales (and zeros) share a second-level grid (the paper's beta2). The last may be shorter.
        dtype: of the second-level statistics, of 16-bit ones and of outliers: "float16" or "bfloat16" are stored, the
            others serve comparisons.
        rounding: what each step of the three formulas is rounded to; "float16" is what the published kernels compute and
            what their checkpoints mean.
    """

    bits: int = 3
    group: int | None = 16
    scale_bits: int = 3
    zero_bits: int = 3
    supergroup: int = 16
    dtype: str = "float16"
    rounding: str = "float32"

    name: ClassVar[str] = "bilevel"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"Bilevel: bits must be 2 to 8, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise RecipeError(f"Bilevel: group must be None or at least 1, got {self.group}")
        if self.supergroup < 1:
            raise RecipeError(f"Bilevel: supergroup must be at least 1, got {self.supergroup}")
        for name, bits in (("scale_bits", self.scale_bits), ("zero_bits", self.zero_bits)):
            if bits != 16 and not 2 <= bits <= 8:
                raise RecipeError(f"Bilevel: {name} must be 2 to 8, or 16, got {bits}")
        if self.dtype not in DTYPES:
            raise RecipeError(f"Bilevel: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.rounding not in ROUNDINGS:
            raise RecipeError(f"Bilevel: rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")

    @property
    def largest_code(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """{"scale_codes": uint8 [..., out], "scale_grid": [..., supergroups, 2], "zero_codes", "zero_grid"}.

        With 16 bits: "scale" [..., out] in place of codes and grid; "zero" likewise.
        """
        raise NotImplementedError

    def ready(self, params: Params) -> Params:
        """{"scale": float [..., out, 1], "zero": float [..., out, 1]}."""
        raise NotImplementedError

    def nearest(self, w: Tensor, params: Params) -> Tensor:
        raise NotImplementedError

    def values(self, codes: Tensor, params: Params) -> Tensor:
        raise NotImplementedError


GRID = Bilevel
