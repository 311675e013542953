"""SpQR's grid: scale * (code - zero) per small group, with scales and zeros that are themselves on small grids.

The zero is not an integer and the range need not contain 0.0, unlike `affine.py`. A group is some columns of one row.
The scales of `supergroup` rows at one column group are quantized to `scale_bits` by min-max with a 16-bit scale and a
16-bit zero of their own, and so are the zeros: 3 + 6 / 16 + 64 / (16 * 16) = 3.625 bits per weight at the defaults
(Dettmers et al. 2023, https://arxiv.org/abs/2306.03078, section 4.1, Eq. 4; `quant_groups.py` of Vahe1994/SpQR).

    scale = a * (scale_code - b)       zero = c * (zero_code - d)       value = scale * (code - zero)

Everything is rounded to its stored form before the next thing is chosen: the zeros for the scales as they are stored,
the codes for both.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from halfbit.errors import NonFinite, RecipeError, Unsupported
from halfbit.grids._bilevel_search import Cost, search
from halfbit.types import Params, Steps

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
ROUNDINGS = ("float32", "float16")
FITTINGS = ("min-max", "search")
# columns or rows; None is the way to say "all"
LARGEST_GROUP = 1 << 16
# a zero beyond this many steps buys resolution that the stored statistics do not have
LARGEST_ZERO = 1024.0


@dataclass(frozen=True)
class Bilevel:
    """2^bits equally spaced values per row and group of columns, statistics on two levels.

    Attributes:
        bits: 2 to 8.
        group: columns that share scale and zero (the paper's beta1); None: the whole row. The last may be shorter.
        scale_bits, zero_bits: 2 to 8, or 16: stored as they are, in `dtype`.
        supergroup: rows whose scales (and zeros) share a second-level grid (the paper's beta2). The last may be fewer.
        dtype: of the second-level statistics, of 16-bit ones and of outliers: "float16" or "bfloat16" are stored, the
            others serve comparisons.
        rounding: what each step of the three formulas is rounded to; "float16" is what the published kernels compute
            and what their checkpoints mean.
        fitting: how statistics are found, which no format stores and no comparison of grids looks at. "min-max" as
            published; "search" tries many and takes those with which the group costs least, see `_bilevel_search.py`.
    """

    bits: int = 3
    group: int | None = 16
    scale_bits: int = 3
    zero_bits: int = 3
    supergroup: int = 16
    dtype: str = "float16"
    rounding: str = "float32"
    fitting: str = field(default="search", compare=False)

    name: ClassVar[str] = "bilevel"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"Bilevel: bits must be 2 to 8, got {self.bits}")
        if self.group is not None and not 1 <= self.group <= LARGEST_GROUP:
            raise RecipeError(f"Bilevel: group must be None or 1 to {LARGEST_GROUP}, got {self.group}")
        if not 1 <= self.supergroup <= LARGEST_GROUP:
            raise RecipeError(f"Bilevel: supergroup must be 1 to {LARGEST_GROUP}, got {self.supergroup}")
        for name, bits in (("scale_bits", self.scale_bits), ("zero_bits", self.zero_bits)):
            if bits != 16 and not 2 <= bits <= 8:
                raise RecipeError(f"Bilevel: {name} must be 2 to 8, or 16, got {bits}")
        if self.dtype not in DTYPES:
            raise RecipeError(f"Bilevel: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.rounding not in ROUNDINGS:
            raise RecipeError(f"Bilevel: rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if self.fitting not in FITTINGS:
            raise RecipeError(f"Bilevel: fitting must be one of {', '.join(FITTINGS)}, got {self.fitting!r}")

    @property
    def largest_code(self) -> int:
        return (1 << self.bits) - 1

    def fit(
        self,
        w: Tensor,
        importance: Tensor | None = None,
        *,
        original: Tensor | None = None,
        limit: Tensor | None = None,
    ) -> Params:
        """{"scale_codes": uint8 [..., out], "scale_grid": [..., supergroups, 2], "zero_codes", "zero_grid"}.

        With 16 bits: "scale" [..., out] in place of codes and grid; "zero" likewise.

        Args:
            w: `[..., out, columns]`; likely outliers already replaced by something harmless.
            importance: `[..., columns]`, for `fitting="search"`; None: every column is worth the same.
            original: `w` before outliers were replaced, where they were.
            limit: `[...]`, what one weight of `original` costs at most, because beyond that it will be an outlier.

        Raises NonFinite, and Unsupported where a statistic is beyond the largest number of `dtype`.
        """
        if not torch.isfinite(w).all():
            raise NonFinite("Bilevel: a weight is NaN or infinite, so its group has no range")
        w = _exact(w).contiguous()
        scale, middle, empty = self._range(w)
        params = self.store("scale", scale)
        # what the stored scale is too small or too large by is shared by both ends of the range
        zero = self.centred(middle, self.statistic("scale", params))
        # a group of zeros wants an integer
        params |= self.store("zero", zero.masked_fill(empty, 0))
        if self.fitting == "min-max":
            return params
        weights = w if original is None else _exact(original).contiguous()
        cost = Cost(weights, importance, limit, self.largest_code)
        return search(self, cost, scale, middle, params)

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, middle, empty), each `[..., out]`, by min-max; empty groups have no weight but 0.0."""
        low, high = w.amin(-1), w.amax(-1)
        # a group of one value: with 0.0 in its range the value is a grid point, and the zero is one of the codes
        constant = low == high
        low, high = torch.where(constant, low.clamp(max=0), low), torch.where(constant, high.clamp(min=0), high)
        # in this order nothing overflows
        scale = high / self.largest_code - low / self.largest_code
        scale = torch.maximum(scale, torch.maximum(-low, high) / LARGEST_ZERO)
        empty = scale == 0
        return self._fill(scale, empty), low / 2 + high / 2, empty

    def ready(self, params: Params) -> Params:
        """{"step": float [..., out, 1], "shift": float [..., out, 1]}, the scale and the zero."""
        if "step" in params:
            return params
        return {
            "step": self.statistic("scale", params)[..., None],
            "shift": self.statistic("zero", params)[..., None],
        }

    def plain(self, params: Params) -> Steps | None:
        if self.rounding == "float16":
            return None
        ready = self.ready(params)
        return Steps(ready["step"], ready["shift"], torch.zeros_like(ready["shift"]), self.largest_code)

    def nearest(self, w: Tensor, params: Params) -> Tensor:
        params = self.ready(params)
        codes = (w / params["step"] + params["shift"]).round_().clamp_(0, self.largest_code)
        if self.rounding == "float16":
            # the points are not equally spaced then: a neighbour may be nearer
            for other in ((codes - 1).clamp_(min=0), (codes + 1).clamp_(max=self.largest_code)):
                nearer = (self._value(other, params) - w).abs() < (self._value(codes, params) - w).abs()
                codes = torch.where(nearer, other, codes)
        return codes.to(torch.uint8)

    def values(self, codes: Tensor, params: Params) -> Tensor:
        return self._value(codes, self.ready(params))

    def _value(self, codes: Tensor, ready: Params) -> Tensor:
        return self.rounded(ready["step"] * self.rounded(codes.to(ready["step"].dtype) - ready["shift"]))

    def rounded(self, t: Tensor) -> Tensor:
        return t.to(torch.float16).to(t.dtype) if self.rounding == "float16" else t

    def statistic(self, name: str, params: Params) -> Tensor:
        """Scales or zeros `[..., out]` as they are stored, widened."""
        if name in params:
            return _exact(params[name])
        return self._second_level(params[f"{name}_codes"], self.by_row(name, params))

    def store(self, name: str, t: Tensor) -> Params:
        """Scales or zeros `[..., out]` in their stored form; second-level grids by min-max."""
        bits = self.scale_bits if name == "scale" else self.zero_bits
        if bits == 16:
            stored = t.to(DTYPES[self.dtype]) if name == "zero" else self._round_positive(t)
            self._check(stored)
            return {name: stored}
        largest = (1 << bits) - 1
        groups = self.supergroups(t)
        low, high = groups.amin(-1), groups.amax(-1)
        magnitude = torch.maximum(low.abs(), high.abs())
        step = torch.maximum(high / largest - low / largest, magnitude / LARGEST_ZERO)
        step = self._round_positive(step.masked_fill(magnitude == 0, 1))
        grid = torch.stack([step, (-low / _exact(step)).to(DTYPES[self.dtype])], -1)
        self._check(grid)
        wide = _exact(grid)[..., None, :]
        codes = (groups / wide[..., 0] + wide[..., 1]).round_().clamp_(0, largest)
        if name == "scale":
            # the nearest code with a positive scale: the second-level zero is at most 0
            codes = torch.where(self._second_level(codes, wide) > 0, codes, codes + 1)
        codes = codes.flatten(-2)[..., : t.shape[-1]].to(torch.uint8)
        return {f"{name}_codes": codes, f"{name}_grid": grid}

    def levels(self, name: str, params: Params, codes: Tensor) -> Tensor:
        """The scales or zeros that `codes` `[..., out, k]` would be, on the second-level grids of `params`."""
        return self._second_level(codes, self.by_row(name, params)[..., None, :])

    def centred(self, middle: Tensor, scale: Tensor) -> Tensor:
        """Zeros that put `middle` in the middle of the codes."""
        # the nearest storable scale may be far too small for its row
        return (self.largest_code / 2 - middle / scale).clamp(-2 * LARGEST_ZERO, 2 * LARGEST_ZERO)

    def by_row(self, name: str, params: Params) -> Tensor:
        """Second-level grids, one per row: float `[..., out, 2]`."""
        rows = params[f"{name}_codes"].shape[-1]
        return _exact(params[f"{name}_grid"]).repeat_interleave(self.supergroup, dim=-2)[..., :rows, :]

    def _second_level(self, codes: Tensor, grid: Tensor) -> Tensor:
        return self.rounded(grid[..., 0] * self.rounded(codes.to(grid.dtype) - grid[..., 1]))

    def supergroups(self, t: Tensor) -> Tensor:
        """`[..., out]` -> `[..., supergroups, supergroup]`; the last is filled up with its last row."""
        missing = -t.shape[-1] % self.supergroup
        if missing:
            t = torch.cat([t, t[..., -1:].expand(*t.shape[:-1], missing)], -1)
        return t.unflatten(-1, (-1, self.supergroup))

    def _fill(self, scale: Tensor, empty: Tensor) -> Tensor:
        """Groups of zeros take the smallest scale of their supergroup, and 1 where there are only such."""
        smallest = self.supergroups(scale.masked_fill(empty, torch.inf)).amin(-1, keepdim=True)
        smallest = smallest.masked_fill(smallest == torch.inf, 1).expand(*smallest.shape[:-1], self.supergroup)
        return torch.where(empty, smallest.flatten(-2)[..., : scale.shape[-1]], scale)

    def _round_positive(self, t: Tensor) -> Tensor:
        dtype = DTYPES[self.dtype]
        # float16 has its numbers below the smallest normal one everywhere; for the others a GPU may flush them to zero
        smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
        return t.to(torch.promote_types(t.dtype, dtype)).clamp(min=smallest).to(dtype)

    def _check(self, statistics: Tensor) -> None:
        if not (statistics.abs() <= _largest(statistics.dtype)).all():
            help = 'dtype="bfloat16" reaches further' if self.dtype == "float16" else "are they weights?"
            raise Unsupported(f"Bilevel: the weights are too large for statistics in {self.dtype}; {help}")


def _largest(dtype: torch.dtype) -> float:
    # 2^bits steps of a zero of up to 1024 away must not overflow float32
    return torch.finfo(dtype).max if dtype == torch.float16 else torch.finfo(torch.float32).max / 4096


def _exact(t: Tensor) -> Tensor:
    """Widened to float32 at least, so that no further rounding happens."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


GRID = Bilevel
