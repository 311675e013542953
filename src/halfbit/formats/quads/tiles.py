"""How a matrix is cut: rows into blocks of 256 columns, blocks into 64 groups of four; tiles of 32 rows x 8 blocks.

Group 4 l + j of a block has its columns 64 j + l, and those 16, 32 and 48 further on: so sixteen lanes of a vector,
each with four groups, meet sixteen columns at a time that lie side by side. Tiles are in the order of their rows, then
of their columns; what lies beyond the matrix is zero.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
ROWS, BLOCKS = 32, 8  # of a tile


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def ceil_of(a: Tensor, b: int) -> Tensor:
    return (a + b - 1) // b


def blocks(columns: int) -> int:
    """Of a row."""
    return ceil(columns, BLOCK)


def tiles(rows: int, columns: int) -> int:
    """Of one matrix."""
    return ceil(rows, ROWS) * ceil(blocks(columns), BLOCKS)


def groups(codes: Tensor) -> Tensor:
    """One matrix `[rows, columns]` -> `[tiles, groups of a tile, 4]`."""
    bands, segments = ceil(codes.shape[0], ROWS), ceil(blocks(codes.shape[1]), BLOCKS)
    missing = segments * BLOCKS * BLOCK - codes.shape[1], bands * ROWS - codes.shape[0]
    cut = pad(codes, (0, missing[0], 0, missing[1])).view(bands, ROWS, segments, BLOCKS, 4, 4, 16)
    return cut.permute(0, 2, 1, 3, 6, 4, 5).reshape(bands * segments, ROWS * BLOCKS * 64, 4)


def matrix(of_groups: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `groups`."""
    bands, segments = ceil(rows, ROWS), ceil(blocks(columns), BLOCKS)
    cut = of_groups.view(bands, segments, ROWS, BLOCKS, 16, 4, 4).permute(0, 2, 1, 3, 5, 6, 4)
    return cut.reshape(bands * ROWS, segments * BLOCKS * BLOCK)[:rows, :columns].contiguous()


def by_tile(of_blocks: Tensor) -> Tensor:
    """One number of each block, `[matrices, rows, blocks]` -> `[matrices, tiles, blocks of a tile]`, zeros beyond."""
    count, rows, width = of_blocks.shape
    bands, segments = ceil(rows, ROWS), ceil(width, BLOCKS)
    whole = pad(of_blocks, (0, segments * BLOCKS - width, 0, bands * ROWS - rows))
    cut = whole.view(count, bands, ROWS, segments, BLOCKS).transpose(2, 3)
    return cut.reshape(count, bands * segments, ROWS * BLOCKS)


def of_tiles(numbers: Tensor, rows: int, width: int) -> Tensor:
    """The inverse of `by_tile`: `[matrices, rows, width]`."""
    count, bands, segments = numbers.shape[0], ceil(rows, ROWS), ceil(width, BLOCKS)
    cut = numbers.view(count, bands, segments, ROWS, BLOCKS).transpose(2, 3)
    return cut.reshape(count, bands * ROWS, segments * BLOCKS)[:, :rows, :width].contiguous()


def population(masks: Tensor) -> Tensor:
    """How many bits of each int64 are set (Warren 2012, Hacker's Delight, section 5-1)."""
    v = masks - ((masks >> 1) & 0x5555555555555555)
    v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((v * 0x0101010101010101) >> 56) & 127


def offsets(masks: Tensor, tile_signs: Tensor) -> tuple[Tensor, Tensor]:
    """Where each tile's patterns and signs begin, and where the last end: bytes, int64 `[tiles + 1]` each."""
    count = by_tile(population(masks)).sum(2).flatten()
    return _rising(ceil_of(count, 2)), _rising(ceil_of(tile_signs.to(torch.int64), 8))


def last_mask(columns: int) -> int:
    """Which groups of a row's last block have columns in the matrix, as an int64 mask."""
    there = groups(torch.ones(1, columns - (blocks(columns) - 1) * BLOCK, dtype=torch.uint8))[0, :64].amax(1)
    bits = sum(1 << group for group in torch.nonzero(there).flatten().tolist())
    return bits - (1 << 64) if bits >> 63 else bits


def _rising(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
