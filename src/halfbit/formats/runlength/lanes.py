"""How a matrix is cut: lines of about 2^k weights, one per lane, and tiles of 32 lanes.

    columns <= 2^k:   a lane's line is several whole rows, one after another          (the last lane has the rest)
    columns >  2^k:   it is a segment of one row; segments are of equal width         (the last one has the rest)

A tile is 32 lanes of neighbouring rows (the last ones of a matrix: fewer), in the same segment. Tiles are in the order
of their rows, then of their segments.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 32
# a place in a line and a sign are 16 bits in kernels
EXPONENTS = range(8, 15)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Lanes:
    """One matrix `[rows, columns]` in lines of about `2 ** exponent` weights."""

    rows: int
    columns: int
    exponent: int

    @property
    def height(self) -> int:
        """Rows of a lane."""
        return max(1, (1 << self.exponent) // max(self.columns, 1))

    @property
    def width(self) -> int:
        """Columns of a segment."""
        return ceil(self.columns, max(1, ceil(self.columns, 1 << self.exponent)))

    @property
    def segments(self) -> int:
        return ceil(self.columns, max(1, self.width))

    @property
    def bands(self) -> int:
        """Tiles, one below another."""
        return ceil(self.rows, LANES * self.height)

    @property
    def tiles(self) -> int:
        return self.bands * self.segments

    def lengths(self, device: torch.device) -> Tensor:
        """Weights of each lane, int64 `[tiles, 32]`; 0: there is no such lane."""
        lane = torch.arange(self.bands * LANES, device=device)
        rows = (self.rows - lane * self.height).clamp(0, self.height).view(self.bands, 1, LANES)
        segment = torch.arange(self.segments, device=device)
        columns = (self.columns - segment * self.width).clamp(max=self.width).view(1, self.segments, 1)
        return (rows * columns).view(self.tiles, LANES)

    def lines(self, codes: Tensor) -> Tensor:
        """`[rows, columns]` -> `[tiles, 32, height * width]`, with zeros behind the weights of a lane."""
        missing = self.segments * self.width - self.columns, self.bands * LANES * self.height - self.rows
        whole = pad(codes, (0, missing[0], 0, missing[1]))
        cut = whole.view(self.bands, LANES, self.height, self.segments, self.width)
        return cut.permute(0, 3, 1, 2, 4).reshape(self.tiles, LANES, self.height * self.width)

    def matrix(self, lines: Tensor) -> Tensor:
        """The inverse of `lines`."""
        cut = lines.view(self.bands, self.segments, LANES, self.height, self.width).permute(0, 2, 3, 1, 4)
        whole = cut.reshape(self.bands * LANES * self.height, self.segments * self.width)
        return whole[: self.rows, : self.columns].contiguous()
