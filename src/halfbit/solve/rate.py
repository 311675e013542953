"""Ternary GPTQ at a rate: the spread of the grid with which the stored matrices take so many bits per weight.

Bits fall steadily as the spread grows. The first guess comes from a table of trained models, the next ones from the
last two tries (secant in the logarithm of the spread). All matrices of a batch share one spread, or one factor on
spreads of their own.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from halfbit.types import Solution

# spread and entropy of the codes, by GPTQ on a small trained model; only where the search begins
MEASURED = ((0.9, 1.58), (1.4, 1.50), (1.8, 1.373), (2.2, 1.207), (2.8, 0.984), (3.4, 0.806), (4.0, 0.666), (5.5, 0.40))
ATTEMPTS = 5


def guess(bits: float) -> float:
    """The spread at which weights of a trained model take about `bits`."""
    points = [(entropy, math.log(spread)) for spread, entropy in MEASURED]
    for (b0, s0), (b1, s1) in pairwise(points):
        if bits >= b1 or b1 == points[-1][0]:
            # beyond the ends too
            return math.exp(s0 + (bits - b0) / (b1 - b0) * (s1 - s0))
    raise AssertionError


def at_rate(
    bits: float,
    solve: Callable[[float], list[Solution]],
    stored: Callable[[list[Solution]], float],
    spread: float,
    tolerance: float,
) -> tuple[list[Solution], float]:
    """Solutions that take `bits` per weight, within `tolerance` of it, or the nearest found; and what they take.

    Args:
        bits: mean of the batch.
        solve: the batch with a spread.
        stored: bits per weight that solutions take in the file.
        spread: to begin with.
        tolerance: share of `bits`.
    """
    tried: list[tuple[float, float]] = []
    best: tuple[list[Solution], float] = [], math.inf
    for _ in range(ATTEMPTS):
        found = solve(spread)
        used = stored(found)
        if abs(used - bits) < abs(best[1] - bits):
            best = found, used
        if abs(used - bits) <= tolerance * bits:
            break
        tried.append((math.log(spread), used))
        # of the table where there is one point
        slope = (math.log(guess(0.9 * bits)) - math.log(guess(1.1 * bits))) / (-0.2 * bits)
        if len(tried) > 1:
            (x0, y0), (x1, y1) = tried[-2:]
            # bits that do not fall with the spread are noise
            slope = (x1 - x0) / (y1 - y0) if (x1 - x0) * (y1 - y0) < 0 else slope
        spread = math.exp(tried[-1][0] + slope * (bits - used))
    return best
