"""Bits where they matter: of all ways to spend a budget over matrices, the one with the least predicted loss.

Every matrix has a curve, what the model loses with it at several sizes; losses of different matrices add up. On the
lower convex hull of a curve each step down costs some bits and saves some loss, fewer and fewer per bit. Taking the
steps of all curves in the order of what they save per bit is the Lagrangian solution (Shoham & Gersho 1988,
https://doi.org/10.1109/29.90373) at every budget that a step ends on; a step that does not fit is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix.

    Attributes:
        bits: stored, per weight.
        loss: predicted increase of the model's loss, nats per token.
        option: which of its rule's options.
        spread: of the grid deadzone, at which it was measured; None: another grid.
    """

    bits: float
    loss: float
    option: int
    spread: float | None = None


@dataclass(frozen=True)
class Curve:
    """What can be done with one matrix of `weights` weights."""

    weights: int
    choices: tuple[Choice, ...]


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull, from the fewest bits to the least loss."""
    found: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.bits, c.loss)):
        if found and c.loss >= found[-1].loss:
            continue
        # the last one lies above the line from the one before it to this one
        while len(found) > 1 and _gain(found[-2], c) >= _gain(found[-2], found[-1]):
            found.pop()
        found.append(c)
    return found


def _gain(worse: Choice, better: Choice) -> float:
    """What is saved per bit."""
    bits = better.bits - worse.bits
    return (worse.loss - better.loss) / bits if bits > 0 else float("inf")


def allocate(curves: Sequence[Curve], budget: float) -> list[Choice]:
    """One choice per curve: `budget` bits in all at most, but never less than the cheapest choices take.

    Args:
        budget: total, bits times weights.
    """
    hulls = [hull(curve.choices) for curve in curves]
    left = budget - sum(c.weights * h[0].bits for c, h in zip(curves, hulls, strict=True))
    taken = [0] * len(curves)
    # per weight here as there, so that large matrices are not preferred
    steps = [
        (-_gain(worse, better) / curve.weights, number, level, curve.weights * (better.bits - worse.bits))
        for number, (curve, h) in enumerate(zip(curves, hulls, strict=True))
        for level, (worse, better) in enumerate(pairwise(h))
    ]
    for _, number, level, cost in sorted(steps):
        # behind a step that did not fit comes none of the same curve
        if taken[number] == level and cost <= left:
            taken[number] = level + 1
            left -= cost
    return [h[t] for h, t in zip(hulls, taken, strict=True)]
