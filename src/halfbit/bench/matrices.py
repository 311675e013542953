"""Matrices to be multiplied, in each format by name: random codes with the statistics that trained weights have.

    qmoe                ternary, independent symbols, `zeros` of them 0
    runlength, quads    the same on the grid deadzone; runlength-rotated: its columns are rotated
    spqr-3bit           2 to 8 bits in groups of 16 with statistics of 3 bits, `outliers` of the weights kept, an order
    grouped-4, grouped-4-g64   2 to 8 bits in groups of 128, or of 64

How long a product takes depends on these figures and not on the values.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbit.errors import UnknownName
from halfbit.formats.grouped import Grouped
from halfbit.formats.qmoe import QMoE
from halfbit.formats.quads import Quads
from halfbit.formats.runlength import RunLength
from halfbit.formats.spqr import SpQR
from halfbit.grids.deadzone import Deadzone
from halfbit.grids.ternary import Ternary
from halfbit.types import Codec, Grid, Outliers, Packed, Params, Solution

KNOWN = ["qmoe", "quads", "runlength", "runlength-rotated", "spqr-3bit (2 to 8)", "grouped-4 (2 to 8)", "grouped-4-g64"]
_SPQR, _GROUPED = re.compile(r"spqr-([2-8])bit"), re.compile(r"grouped-([2-8])(?:-g([1-9][0-9]*))?")
# columns that are drawn and fitted; wider matrices repeat them, as fitting takes longer than everything else
DRAWN = 64


@dataclass(frozen=True)
class Statistics:
    """The share of zeros of ternary weights (QMoE's models have 0.885), and of outliers where a format has any."""

    zeros: float = 0.885
    outliers: float = 0.01


def codec_of(name: str) -> Codec:
    """What a name of this file means. Raises UnknownName."""
    if name == "qmoe":
        return QMoE()
    if name == "quads":
        return Quads()
    if name in ("runlength", "runlength-rotated"):
        return RunLength(rotated=name == "runlength-rotated")
    if found := _SPQR.fullmatch(name):
        return SpQR(bits=int(found[1]), group=16, supergroup=16)
    if found := _GROUPED.fullmatch(name):
        return Grouped(bits=int(found[1]), group=int(found[2] or 128))
    raise UnknownName("format", name, KNOWN)


def packed(codec: Codec, rows: int, columns: int, statistics: Statistics) -> Packed:
    """A random matrix `[rows, columns]`, encoded."""
    random = torch.Generator().manual_seed(0)
    if isinstance(codec, QMoE):
        levels = (torch.rand(rows, 1, 2, generator=random) + 0.5) * torch.tensor([-1.0, 1.0])
        solution = Solution(Ternary(), _ternary(rows, columns, statistics.zeros, random), {"levels": levels.bfloat16()})
    elif isinstance(codec, RunLength | Quads):
        grid = Deadzone(codec.scale_bits)
        params = {k: v[:, None] for k, v in grid.store(torch.rand(rows, generator=random) + 0.5).items()}
        codes = _ternary(rows, columns, statistics.zeros, random)
        solution = Solution(grid, codes, params, rotated=codec.rotated)
    elif isinstance(codec, SpQR):
        solution = _kept(_rounded(codec.grid, rows, columns, random), codec, statistics.outliers, random)
    else:
        assert isinstance(codec, Grouped)
        solution = _rounded(codec.grid, rows, columns, random)
    return codec.encode(solution)


def _ternary(rows: int, columns: int, zeros: float, random: torch.Generator) -> Tensor:
    draw = torch.rand(rows, columns, generator=random)
    return (draw > zeros).to(torch.uint8) + (draw > (1 + zeros) / 2)


def _rounded(grid: Grid, rows: int, columns: int, random: torch.Generator) -> Solution:
    """Normal weights on their grid."""
    group = grid.group or columns
    drawn = min(columns, -(-DRAWN // group) * group)
    parts: list[Tensor] = []
    params: list[Params] = []
    for part in torch.randn(rows, drawn, generator=random).split(group, dim=1):
        params.append(grid.fit(part))
        parts.append(grid.nearest(part, params[-1]))
    times, groups = -(-columns // drawn), -(-columns // group)
    codes = torch.cat(parts, 1).repeat(1, times)[:, :columns]
    # a narrower last group takes the statistics of a whole one
    stacked = {key: torch.stack([p[key] for p in params] * times, 1)[:, :groups] for key in params[0]}
    return Solution(grid, codes.contiguous(), stacked)


def _kept(solution: Solution, codec: SpQR, share: float, random: torch.Generator) -> Solution:
    """Some weights as outliers, columns in a random order."""
    rows, columns = solution.shape
    there = torch.rand(rows, columns, generator=random) < share
    at = torch.nonzero(there, as_tuple=True)
    values = torch.randn(len(at[0]), generator=random).to(getattr(torch, codec.dtype))
    codes = solution.codes.masked_fill(there, 0)
    order = torch.randperm(columns, generator=random)
    return Solution(solution.grid, codes, solution.params, outliers=Outliers(at[0], at[1], values), order=order)
