"""The code in plain torch, any device: what `cpu.py` and the GPU kernels are compared with.

All lanes of a matrix advance together, one symbol at a time. README.md beside this file has the derivation.
"""

import torch
from torch import Tensor

from halfbit.errors import FormatError
from halfbit.formats._grouped_product import grouped_product
from halfbit.formats._levels import values
from halfbit.formats.runlength.lanes import LANES, Lanes
from halfbit.formats.runlength.tables import SKIP, classes, tables
from halfbit.rotation import rotate

LOWEST = 256  # of a state between two symbols; where encoding begins and decoding ends


def encode(codes: Tensor, lanes: Lanes) -> tuple[Tensor, Tensor, Tensor]:
    """One matrix of codes 0, 1, 2.

    Args:
        codes: uint8 `[rows, columns]`.

    Returns:
        the stream, uint8 `[n]`; bytes of each tile, int32 `[tiles]`; class of each tile, uint8 `[tiles]`.
    """
    if not lanes.tiles:
        nothing = torch.zeros(0, dtype=torch.uint8, device=codes.device)
        return nothing, nothing.to(torch.int32), nothing
    lines, lengths = lanes.lines(codes), lanes.lengths(codes.device)
    of_tile = classes((lines != 0).sum((1, 2)), lengths.sum(1))
    class_of_lane = of_tile.to(torch.int64).repeat_interleave(LANES)
    symbols = _symbols(lines.flatten(0, 1), lengths.flatten(), class_of_lane)
    of_class = tables()
    slots, first = (t.to(codes.device)[class_of_lane] for t in (of_class.slots, of_class.first))
    state = torch.full_like(class_of_lane, LOWEST)
    emitted = torch.zeros(symbols.shape, dtype=torch.bool, device=codes.device)
    data = torch.zeros(symbols.shape, dtype=torch.uint8, device=codes.device)
    for step in range(len(symbols) - 1, -1, -1):
        symbol = symbols[step].clamp(min=0)[:, None]
        n, start = slots.gather(1, symbol)[:, 0].clamp(min=1), first.gather(1, symbol)[:, 0]
        there = symbols[step] >= 0
        emitted[step] = there & (state >= n << 8)
        data[step] = (state & 255).to(torch.uint8)
        state = torch.where(emitted[step], state >> 8, state)
        state = torch.where(there, (state // n << 8) + start + state % n, state)
    # a tile: the states its lanes begin with, low byte first, then what they take up, step by step, lane by lane
    begin = torch.stack([state & 255, state >> 8], 1).to(torch.uint8).view(lanes.tiles, 2 * LANES)
    is_there = (lengths > 0).repeat_interleave(2, dim=1)
    data, emitted = (t.view(-1, lanes.tiles, LANES).transpose(0, 1).flatten(1) for t in (data, emitted))
    mask = torch.cat([is_there, emitted], 1)
    return torch.cat([begin, data], 1)[mask], mask.sum(1).to(torch.int32), of_tile


def _symbols(lines: Tensor, lengths: Tensor, class_of_lane: Tensor) -> Tensor:
    """Symbols of each lane, int64 `[steps, lanes]`; -1 behind the last."""
    of_class = tables()
    gaps = of_class.gaps.to(lines.device)[class_of_lane]
    lane, position = torch.nonzero(lines, as_tuple=True)
    first = torch.ones_like(lane, dtype=torch.bool)
    first[1:] = lane[1:] != lane[:-1]
    before = torch.where(first, -1, position.roll(1))
    gap = position - before - 1
    symbol = 2 * (gap % gaps[lane]) + lines[lane, position] - 1
    # the zeros behind the last non-zero: skips, and whatever is cheapest that goes beyond the end
    last = torch.full_like(lengths, -1).scatter_reduce(0, lane, position, "amax")
    rest = lengths - 1 - last
    skips, rest = rest // gaps, rest % gaps
    slots = of_class.slots.to(lines.device)[class_of_lane]
    by_gap = slots.gather(1, 2 * rest[:, None])[:, 0] > slots[:, SKIP]
    end = torch.where(by_gap, 2 * rest, SKIP)
    # place of each non-zero's symbol among those of its lane
    upto = (gap // gaps[lane] + 1).cumsum(0)
    total = torch.zeros_like(lengths).index_add(0, lane, gap // gaps[lane] + 1)
    place = upto - 1 - (total.cumsum(0) - total)[lane]
    steps = total + skips + (rest > 0)
    count = int(steps.max()) if len(steps) else 0
    symbols = torch.where(torch.arange(count, device=lines.device)[:, None] < steps, SKIP, -1)
    symbols[place, lane] = symbol
    ends = torch.nonzero(rest > 0).flatten()
    symbols[steps[ends] - 1, ends] = end[ends]
    return symbols


def decode(stream: Tensor, offsets: Tensor, of_tile: Tensor, entries: Tensor, lanes: Lanes) -> Tensor:
    """uint8 codes `[rows, columns]` of one matrix. Raises FormatError where a tile does not end as it must.

    Args:
        stream: uint8 `[n]`.
        offsets: int64 `[tiles + 1]`, where each tile begins in the stream.
        of_tile: uint8 `[tiles]`, classes.
        entries: int32 `[64, 256]`.
    """
    device, tiles = stream.device, lanes.tiles
    if not tiles:
        return torch.zeros(lanes.rows, lanes.columns, dtype=torch.uint8, device=device)
    lengths = lanes.lengths(device)
    padded = torch.cat([stream, stream.new_zeros(2 * LANES)]).to(torch.int64)
    at = offsets[:-1].clamp(max=len(stream))
    present = (lengths > 0).sum(1)
    here = at[:, None] + 2 * torch.arange(LANES, device=device)
    here = here.clamp(max=len(stream))
    state = torch.where(lengths > 0, padded[here] | padded[here + 1] << 8, LOWEST)
    at = at + 2 * present
    row_of_table = of_tile.to(torch.int64)[:, None] * 256
    flat = entries.to(torch.int64).flatten()
    position = torch.zeros_like(lengths)
    # one more than the longest line, for what is no non-zero of the matrix
    beyond = lanes.height * lanes.width
    lines = torch.zeros(tiles, LANES, beyond + 1, dtype=torch.uint8, device=device)
    while bool((live := position < lengths).any()):
        entry = flat[row_of_table + (state & 255)]
        position = torch.where(live, position + (entry >> 16 & 127), position)
        code = entry >> 24
        hit = live & (code > 0) & (position <= lengths)
        place = torch.where(hit, position - 1, beyond)
        lines.scatter_(2, place[:, :, None], code.to(torch.uint8)[:, :, None])
        after = (entry & 255) * (state >> 8) + (entry >> 8 & 255)
        takes = live & (after < LOWEST)
        here = at[:, None] + takes.cumsum(1) - takes.to(torch.int64)
        after = torch.where(takes, after << 8 | padded[here.clamp(max=len(stream))], after)
        state = torch.where(live, after, state)
        at = at + takes.sum(1)
    wrong = (at != offsets[1:]) | (state != LOWEST).any(1)
    if wrong.any():
        tile = int(torch.nonzero(wrong)[0])
        raise FormatError(
            f"runlength: tile {tile} takes {int(at[tile] - offsets[tile])} bytes of "
            f"{int(offsets[tile + 1] - offsets[tile])} and does not end as it must; the file is damaged, "
            "compress the block again",
            tensor="stream",
        )
    return lanes.matrix(lines[:, :, :beyond])


def product(
    x: Tensor,
    starts: Tensor,
    stream: Tensor,
    offsets: Tensor,
    of_tile: Tensor,
    exponents: Tensor,
    levels: Tensor,
    entries: Tensor,
    signs: Tensor,
    out_features: int,
) -> Tensor:
    """See `Codec.product`; the tensors are those of `RunLength.runtime`."""
    cuts = [Lanes(out_features, x.shape[1], k) for k in exponents.tolist()]
    begins = [0]
    for cut in cuts:
        begins.append(begins[-1] + cut.tiles)

    def matrix(g: int) -> Tensor:
        tiles = slice(begins[g], begins[g + 1])
        codes = decode(stream, offsets[begins[g] : begins[g + 1] + 1], of_tile[tiles], entries, cuts[g])
        return values(codes, levels[g * out_features : (g + 1) * out_features])

    given = rotate(x.to(torch.float32)) if signs.numel() else x
    return grouped_product(given, starts, out_features, matrix).to(x.dtype)
