"""H = X^T X of what a linear layer saw: accumulate, shrink towards the pooled one, damp, factor. Batched over experts.

The solver needs R, upper triangular with R R^T = H. With J the reversal of rows and columns and J H J = L L^T it is
J L J: one factorisation, and no inverse.

An expert that saw too little gives a singular H. Failures are found per expert through the `info` of cholesky_ex and
every repair is handed back as a `Repair`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from warnings import warn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from halfbit import pages
from halfbit.errors import NonFinite, NotPositiveDefinite
from halfbit.solve.loss import finite

Fallback = Literal["identity", "raise"]

# for an expert without any input, so that it still gets a positive diagonal
SMALLEST_DAMPING = 1e-6
# from here on the damped matrix is the identity for all purposes
LARGEST_DAMPING = 100.0
# columns of a sum that are added to at a time; for fewer tokens copying the other half would cost more than it saves
PANEL = 512
# columns that are factored at a time, of those again, and so on: products of fewer than 512 are slower, and from 160 on
# MKL's potrf gives other bits with another number of threads, also where it was asked for the same
BLOCKS = 512, 256, 128
# from this damping on float32 is enough
DAMPED = 0.01
# 1 GiB of float64 per factorisation
WORKSPACE_ELEMENTS = 1 << 27


class Hessian:
    """Accumulates X^T X and counts tokens, for a number of experts of one width.

    Products and sums are float32. Rounding grows with the square root of the number of additions: 10,000 batches leave
    a relative error of 1e-5, four orders below the smallest damping in use (0.01), and float64 would double the largest
    buffer of a run (2.4 GB for 16 experts of width 6144). TF32 is not used unless the caller has switched it on.

    Attributes:
        sum: float32 `[experts, in, in]`.
        tokens: int64 `[experts]`, on the CPU.
    """

    def __init__(self, experts: int, width: int, device: torch.device | str = "cpu"):
        self.sum = torch.zeros(experts, width, width, device=device)
        self.tokens = torch.zeros(experts, dtype=torch.int64)

    def add(
        self, x: Float[Tensor, "tokens in"], expert: int = 0, other: Float[Tensor, "tokens in"] | None = None
    ) -> None:
        """What one expert saw; with `other`, what it would have seen elsewhere: the sum is then of other x^T."""
        x = x.to(self.sum.device, torch.float32)
        into, n = self.sum[expert], x.shape[1]
        self.tokens[expert] += x.shape[0]
        if other is not None or n <= PANEL or x.shape[0] < PANEL:
            into.addmm_((x if other is None else other.to(x)).T, x)
            return
        # of the symmetric sum no more than half, and the blocks on its diagonal, is multiplied
        for start in range(0, n, PANEL):
            own = slice(start, start + PANEL)
            into[own, : start + PANEL].addmm_(x[:, own].T, x[:, : start + PANEL])
            into[:start, own] = into[own, :start].T

    def add_sorted(self, x: Float[Tensor, "tokens in"], starts: Int[Tensor, " bounds"]) -> None:
        """Tokens sorted by expert: `starts[e]` to `starts[e + 1]` belong to expert e."""
        for expert, (start, stop) in enumerate(pairwise(starts.tolist())):
            if stop > start:
                self.add(x[start:stop], expert)


@dataclass(frozen=True)
class Repair:
    """What had to be done to factor one Hessian.

    Attributes:
        name: of the expert.
        action: "damped" (more than asked for), or "identity" (rounded to nearest instead).
        damping: the damping that worked, or the last one tried.
    """

    name: str
    action: Literal["damped", "identity"]
    damping: float

    def __str__(self) -> str:
        if self.action == "damped":
            return f"{self.name}: Hessian not positive definite; damping raised to {self.damping:g}"
        return f"{self.name}: no usable Hessian, also with damping {self.damping:g}; its weights are rounded to nearest"


OnRepair = Callable[[Repair], None]


def warn_of(repair: Repair) -> None:
    """What solvers do with a repair unless told otherwise."""
    warn(str(repair), stacklevel=3)


def shrink(
    h: Float[Tensor, "experts in in"],
    tokens: Int[Tensor, " experts"],
    pooled: Float[Tensor, "#experts in in"] | Float[Tensor, "in in"],
    pooled_tokens: int,
    k: float,
) -> Float[Tensor, "experts in in"]:
    """Per-token mean Hessians, moved towards the pooled one where an expert saw few tokens.

    The expert's own mean has the weight n / (n + k), so k is the number of tokens that the pooled one counts for, and
    an expert with no token gets the pooled one whole.
    """
    n = tokens.to(h.device, h.dtype)
    # n = 0 and k = 0 would be 0 / 0: no token of its own, so no weight of its own
    own = torch.where(n > 0, n / (n + k).clamp(min=1e-30), 0)[:, None, None]
    mean = h / n.clamp(min=1)[:, None, None]
    return torch.lerp((pooled / max(pooled_tokens, 1)).expand_as(mean), mean, own)


def damp(h: Float[Tensor, "experts in in"], damping: float) -> Float[Tensor, "experts in in"]:
    """A copy with `damping` times the mean of the diagonal added to the diagonal; 1e-6 where that is zero."""
    return _damp(h.clone(), damping)


def _damp(h: Float[Tensor, "experts in in"], damping: float) -> Float[Tensor, "experts in in"]:
    """In place."""
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean > 0, damping * mean, SMALLEST_DAMPING)
    return h


def factor(
    h: Float[Tensor, "experts in in"],
    damping: float,
    names: Sequence[str],
    fallback: Fallback = "identity",
) -> tuple[Float[Tensor, "experts in in"], list[Repair]]:
    """R, upper triangular with R R^T the damped H, and what had to be repaired, expert by expert.

    Below its diagonal there is anything.

    Computed in float64, or in float32 where `damping` is at least DAMPED, and returned in the dtype of `h`.

    A Hessian that is not positive definite is tried again with ten times the damping, up to 100 times the mean of the
    diagonal. If that fails too, or if the Hessian is zero because the expert saw nothing, `fallback` decides:
    "identity" (rounding to nearest) or "raise" NotPositiveDefinite.
    """
    n = h.shape[-1]
    factors = pages.zeros(h.shape, h.dtype, h.device)
    repairs: list[Repair] = []
    at_once = max(1, WORKSPACE_ELEMENTS // max(n * n, 1))
    for start in range(0, h.shape[0], at_once):
        part, to = h[start : start + at_once], factors[start : start + at_once]
        same = damping >= DAMPED or h.dtype == torch.float64
        a = to.copy_(part) if same else part.to(torch.float64)
        info = _factor(_damp(a, damping))
        if not same:
            to.copy_(a)
        # whatever is not finite comes to the diagonal, or does not let it be factored
        info = info | ~torch.isfinite(to.diagonal(dim1=-2, dim2=-1)).all(-1)
        if info.any():
            _check_finite(part, names[start:])
        unseen = part.diagonal(dim1=-2, dim2=-1).abs().amax(-1) == 0
        for i in map(int, torch.nonzero((info != 0) | unseen)):
            repaired, repair = _repair(part[i], damping, names[start + i], fallback, unseen=bool(unseen[i]))
            factors[start + i] = repaired
            repairs.append(repair)
    return factors, repairs


def _check_finite(h: Float[Tensor, "experts in in"], names: Sequence[str]) -> None:
    if False in (found := finite(h)):
        name = names[found.index(False)]
        raise NonFinite(
            f"{name}: its Hessian has NaN or infinity, so an activation was not finite, or its square not in float32; "
            "the checkpoint may be damaged, or the model's activations too large for the dtype it runs in",
            tensor=name,
        )


def _factor(a: Float[Tensor, "experts in in"]) -> Int[Tensor, " experts"]:
    """R in place of the damped H, below the diagonal anything; 0 per expert where it worked."""
    failed = torch.zeros(len(a), dtype=torch.int32, device=a.device)
    _panel(a, 0, a.shape[-1], BLOCKS, failed)
    return failed


def _panel(
    a: Float[Tensor, "experts in in"], first: int, last: int, blocks: Sequence[int], failed: Int[Tensor, " experts"]
) -> None:
    """Columns `first` to `last` of R, which were told of all behind them, in place of those of H.

    By blocks of columns from the last to the first, and these by smaller ones, so that nearly all of it is large
    products; LAPACK's takes twice as long in one thread.
    """
    block, *inner = blocks
    for stop in range(last, first, -block):
        start = max(stop - block, first)
        if stop < last:
            told = a[:, start:stop, stop:last].mT
            a[:, :stop, start:stop].baddbmm_(a[:, :stop, stop:last], told, alpha=-1)
        if inner:
            _panel(a, start, stop, inner, failed)
            continue
        own, above = a[:, start:stop, start:stop], a[:, :start, start:stop]
        lower, info = torch.linalg.cholesky_ex(own.flip(-1, -2))
        failed |= info
        own.copy_(lower.flip(-1, -2))
        if start > 0:
            eye = torch.eye(stop - start, dtype=a.dtype, device=a.device)
            above.copy_(above @ torch.linalg.solve_triangular(own, eye, upper=True).mT)


def _repair(
    h: Float[Tensor, "in in"], damping: float, name: str, fallback: Fallback, *, unseen: bool
) -> tuple[Float[Tensor, "in in"], Repair]:
    while not unseen and damping < LARGEST_DAMPING:
        damping = min(max(damping, 1e-4) * 10, LARGEST_DAMPING)
        factors = damp(h[None].double(), damping)
        if int(_factor(factors)[0]) == 0:
            return factors[0], Repair(name, "damped", damping)
    repair = Repair(name, "identity", damping)
    if fallback == "raise":
        why = "saw no token" if unseen else f"is not positive definite, also with damping {damping:g}"
        raise NotPositiveDefinite(
            f"{name}: its Hessian {why}; give it more calibration text, or let it be rounded to nearest", name=name
        )
    return torch.eye(h.shape[0], dtype=h.dtype, device=h.device), repair
