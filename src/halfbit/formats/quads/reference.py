"""The layout in plain torch, any device: what `cpu.py` is compared with. README.md beside this file has the drawing."""

import torch
from torch import Tensor

from halfbit.errors import FormatError
from halfbit.formats._grouped_product import grouped_product
from halfbit.formats._levels import values
from halfbit.formats.quads import tiles
from halfbit.rotation import rotate


def encode(codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One matrix of codes 0, 1, 2, uint8 `[rows, columns]`.

    Returns:
        masks int64 `[rows, blocks]`; patterns uint8 `[n]`; signs uint8 `[m]`; signs of each tile, int32 `[tiles]`.
    """
    rows, columns = codes.shape
    of_groups = tiles.groups(codes)
    there = of_groups != 0
    pattern = (there << torch.arange(4, device=codes.device)).sum(2)  # [tiles, groups]
    bits = torch.arange(64, device=codes.device)
    masks = ((pattern != 0).view(-1, tiles.ROWS * tiles.BLOCKS, 64).to(torch.int64) << bits).sum(2)
    patterns = _packed(pattern, pattern != 0, 4)
    signs = _packed((of_groups == 2).flatten(1), there.flatten(1), 1)
    width = tiles.blocks(columns)
    return tiles.of_tiles(masks[None], rows, width)[0], patterns, signs, there.sum((1, 2)).to(torch.int32)


def _packed(numbers: Tensor, which: Tensor, bits: int) -> Tensor:
    """Those of each row that are in `which`, of 1 or 4 bits, one after another, each row from a new byte on."""
    each = 8 // bits
    count = which.sum(1)
    begin = tiles.ceil_of(count, each).cumsum(0) - tiles.ceil_of(count, each)
    place = each * begin[:, None] + which.cumsum(1) - 1
    fields = torch.zeros(each * int(tiles.ceil_of(count, each).sum()), dtype=torch.int64, device=numbers.device)
    fields[place[which]] = numbers[which].to(torch.int64)
    shifts = bits * torch.arange(each, device=numbers.device)
    return (fields.view(-1, each) << shifts).sum(1).to(torch.uint8)


def decode(masks: Tensor, patterns: Tensor, signs: Tensor, at: tuple[Tensor, Tensor], columns: int) -> Tensor:
    """uint8 codes `[rows, columns]` of one matrix. Raises FormatError where a tile's parts do not fit together.

    Args:
        masks: int64 `[rows, blocks]`.
        patterns, signs: uint8, of any matrices.
        at: where this matrix's tiles begin in them, and where the last end, int64 `[tiles + 1]` each.
    """
    device, rows = masks.device, masks.shape[0]
    bits = torch.arange(64, device=device)
    there = ((tiles.by_tile(masks[None])[0][:, :, None] >> bits) & 1).flatten(1) == 1
    pattern = _unpacked(patterns, there, at[0], 4)
    if (there != (pattern != 0)).any():
        raise _damaged("patterns", int(torch.nonzero((there != (pattern != 0)).any(1))[0]), "has a pattern of zeros")
    weights = ((pattern[:, :, None] >> torch.arange(4, device=device)) & 1).flatten(1) == 1
    length = tiles.ceil_of(weights.sum(1), 8)
    if (length != at[1].diff()).any():
        raise _damaged("signs", int(torch.nonzero(length != at[1].diff())[0]), "has more or fewer signs than weights")
    plus = _unpacked(signs, weights, at[1], 1)
    codes = torch.where(weights, 1 + plus, 0).to(torch.uint8)
    return tiles.matrix(codes.view(-1, tiles.ROWS * tiles.BLOCKS * 64, 4), rows, columns)


def _unpacked(stored: Tensor, which: Tensor, at: Tensor, bits: int) -> Tensor:
    """The inverse of `_packed`: int64, 0 where `which` is not."""
    each = 8 // bits
    place = (which.cumsum(1) - 1).clamp(min=0)
    # a field more, for there may be none
    byte = torch.cat([stored, stored.new_zeros(1)])[(at[:-1, None] + place // each).clamp(max=len(stored))]
    fields = (byte.to(torch.int64) >> bits * (place % each)) & ((1 << bits) - 1)
    rest = bits * (which.sum(1) % each)
    last = torch.cat([stored.new_zeros(1), stored])[at[1:]].to(torch.int64) >> rest
    if ((rest > 0) & (last != 0)).any():
        tile = int(torch.nonzero((rest > 0) & (last != 0))[0])
        raise _damaged("patterns" if bits == 4 else "signs", tile, "has bits behind its last field")
    return torch.where(which, fields, 0)


def _damaged(part: str, tile: int, what: str) -> FormatError:
    return FormatError(f"quads: {part}: tile {tile} {what}; the file is damaged, compress the block again", tensor=part)


def product(
    x: Tensor,
    starts: Tensor,
    masks: Tensor,
    patterns: Tensor,
    signs: Tensor,
    pattern_offsets: Tensor,
    sign_offsets: Tensor,
    levels: Tensor,
    turned: Tensor,
    out_features: int,
) -> Tensor:
    """See `Codec.product`; the tensors are those of `Quads.runtime`."""
    count = tiles.tiles(out_features, x.shape[1])

    def matrix(g: int) -> Tensor:
        own = slice(g * count, (g + 1) * count + 1)
        codes = decode(masks[g], patterns, signs, (pattern_offsets[own], sign_offsets[own]), x.shape[1])
        return values(codes, levels[g * out_features : (g + 1) * out_features])

    given = rotate(x.to(torch.float32)) if turned.numel() else x
    return grouped_product(given, starts, out_features, matrix).to(x.dtype)
