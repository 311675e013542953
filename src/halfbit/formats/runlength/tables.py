"""Sixty-four tables of 256 slots, one per density of non-zeros: how probable each gap is taken to be.

A symbol is a gap of 0 to G - 1 zeros with the sign of the non-zero behind it, or a skip of G zeros. If each weight is
non-zero with probability p, a gap g has p (1 - p)^g. The slots are dealt out in pairs, one for each sign, two for the
skip: one pair for every symbol, the rest by Sainte-Lague's rule, the next pair to the greatest P / (2 pairs + 1). All
is done in whole numbers, so every machine makes the same tables. G is as large as its gap still earns most of a pair.

    entry, 32 bits:   0-7 slots of the symbol | 8-15 number of this slot among them | 16-22 weights that it stands for
                      | 23 zero | 24-25 code of the last of them: 0 skip, 1 minus, 2 plus | 26-31 zero
"""

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = 64
SLOTS = 256
LONGEST = 63  # a gap's symbol and its sign must be told apart in seven bits
ONE = 1 << 32


class Tables(NamedTuple):
    """Of all classes, on the CPU.

    Attributes:
        gaps: int64 `[64]`, G.
        slots, first: int64 `[64, 127]`, of symbol 2 g + (0 minus, 1 plus); of the skip at 126. Gaps beyond G: 0.
        entries: int32 `[64, 256]`, by slot.
    """

    gaps: Tensor
    slots: Tensor
    first: Tensor
    entries: Tensor


SKIP = 2 * LONGEST


@cache
def densities() -> tuple[int, ...]:
    """p of each class times 2^32, falling by an eighth from 15/16 to 0.0002."""
    falling = [ONE * 15 // 16]
    for _ in range(CLASSES - 1):
        falling.append(falling[-1] - (falling[-1] >> 3))
    return tuple(falling)


def pairs(density: int) -> list[int]:
    """Pairs of slots of the gaps 0 to G - 1 and of the skip."""
    left = [ONE]
    for _ in range(LONGEST):
        left.append(left[-1] * (ONE - density) >> 32)
    probable = [before - after for before, after in pairwise(left)]
    half = SLOTS // 2
    # 0.6 of a pair; below 1/64 the longest, since all its gaps are about as rare
    worth = [g for g in range(LONGEST) if 5 * half * probable[g] >= 3 * ONE]
    count = LONGEST if density < ONE // 64 else 1 + max(worth)
    weights = [*probable[:count], left[count]]
    dealt = [1] * (count + 1)
    for _ in range(half - count - 1):
        best = 0
        for i in range(1, count + 1):
            if weights[i] * (2 * dealt[best] + 1) > weights[best] * (2 * dealt[i] + 1):
                best = i
        dealt[best] += 1
    return dealt


@cache
def tables() -> Tables:
    gaps = torch.zeros(CLASSES, dtype=torch.int64)
    slots, first = torch.zeros(2, CLASSES, SKIP + 1, dtype=torch.int64)
    entries = torch.zeros(CLASSES, SLOTS, dtype=torch.int64)
    for number, density in enumerate(densities()):
        *of_gaps, of_skip = pairs(density)
        gaps[number] = len(of_gaps)
        symbols = [(2 * g + sign, n, g + 1, sign + 1) for g, n in enumerate(of_gaps) for sign in (0, 1)]
        at = 0
        for symbol, n, weights, code in [*symbols, (SKIP, 2 * of_skip, len(of_gaps), 0)]:
            slots[number, symbol], first[number, symbol] = n, at
            entries[number, at : at + n] = n | torch.arange(n) << 8 | weights << 16 | code << 24
            at += n
    return Tables(gaps, slots, first, entries.to(torch.int32))


@cache
def limits() -> Tensor:
    """int64 `[63]`, rising: class c is for densities between limit 62 - c and limit 63 - c, in 2^-32."""
    between = [(a + b) // 2 for a, b in pairwise(densities())]
    return torch.tensor(between[::-1])


def classes(nonzeros: Tensor, weights: Tensor) -> Tensor:
    """uint8 class of each tile of `weights` weights (int64, below 2^24), `nonzeros` of them not zero (int64)."""
    density = (nonzeros << 32) // weights.clamp(min=1)
    return (CLASSES - 1 - torch.searchsorted(limits().to(density.device), density, right=True)).to(torch.uint8)
