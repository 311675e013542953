"""Run lengths on GPUs: products straight from the stream, a lane of the code on a lane of a warp.

A warp decodes one tile, a step at a time. Which bytes its lanes take is counted in a mask of the lanes that take one,
as on a CPU. A step waits for the one before it, so it is the number of tiles at work that makes speed: a matrix has one
for 32 * 2^k weights. All bytes of a tile are touched before the first step, so that no step waits for memory off chip.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# what Triton compiles is given plain numbers

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbit.formats import _triton_product
from halfbit.formats._triton_items import Plan
from halfbit.formats.runlength.lanes import LANES, Lanes
from halfbit.formats.runlength.tables import tables
from halfbit.triton_support import INTERPRETED, check_input, launch

# of a tile: where it begins, its bytes, its class
PARTS = 3


@triton.jit
def _ones(mask):
    """How many bits are 1: the compiler knows this as one instruction."""
    mask = mask - (mask >> 1 & 0x55555555)
    mask = (mask & 0x33333333) + (mask >> 2 & 0x33333333)
    return ((mask + (mask >> 4) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _step(state, place, at, length, stream, table, bit):
    """One symbol of each lane [warps, 32]: state, place, at, and the code of the non-zero at place - 1, or 0."""
    live = place < length
    entry = tl.load(table + (state & 255).to(tl.int32), live, 0).to(tl.uint32)
    after = (entry & 255) * (state >> 8) + (entry >> 8 & 255)
    takes = live & (after < 256)
    mask = tl.sum(tl.where(takes, bit, 0), 1)[:, None]
    byte = tl.load(stream + at + _ones(mask & (bit - 1)).to(tl.int32), takes, 0)
    state = tl.where(takes, after << 8 | byte, after)
    place += (entry >> 16 & 127).to(tl.int32)
    at += _ones(mask).to(tl.int32)
    code = tl.where(place <= length, (entry >> 24).to(tl.int32), 0)
    return state, place, at, code


@triton.jit
def _cut(exponents, matrix, columns):
    """Rows of a lane and columns of a segment, as in `lanes.py`."""
    line = 1 << tl.load(exponents + matrix).to(tl.int32)
    parts = (columns + line - 1) // line
    return tl.maximum(line // columns, 1), (columns + parts - 1) // parts


@triton.jit
def _open(operands, matrix, band, segment, length):
    """Of one tile per warp, with lanes of `length` [warps, 32]: its bytes, its table, states, and the bytes read."""
    stream, tiles, _, _, entries, bands, segments = operands
    lane = tl.arange(0, 32)[None, :]
    some = tl.max(length, 1)[:, None] > 0
    tile = tiles + ((matrix.to(tl.int64) * bands + band) * segments + segment) * 3
    own = stream + tl.load(tile, some, 0)
    size = tl.load(tile + 1, some, 0).to(tl.int32)
    table = entries + 256 * tl.load(tile + 2, some, 0).to(tl.int32)
    # every 32 bytes of the tile at once; their sum is never negative, which the compiler does not know
    touched = tl.zeros_like(length)
    ahead = 32 * lane
    while tl.max(size - ahead) > 0:
        touched += tl.load(own + ahead, ahead < size, 0)
        ahead += 1024
    live = (length > 0) & (tl.sum(touched, 1)[:, None] >= 0)
    state = tl.load(own + 2 * lane, live, 0).to(tl.uint32)
    state |= tl.load(own + 2 * lane + 1, live, 0).to(tl.uint32) << 8
    return own, table, state, 2 * tl.sum(live.to(tl.int32), 1)[:, None]


@triton.jit
def multiply(
    to, there, x, operands, matrix, out_features, columns, block,
    HALVES: tl.constexpr, SHAPE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """See `_triton_items.py`; a block is the rows of 32 lanes. SHAPE is (SEGMENTS, STEPS between looks at the end).

    A warp decodes the tile of one segment of one half, HALVES * SEGMENTS warps in all. Where the second half does not
    begin with a band of tiles, its rows are in two bands, which are decoded one after the other.

    Reads each byte of the stream once, 8 bytes per row for levels, 24 per tile; the table, 1 KiB, and x from caches.
    Compiled for sm_90, a step of a lane takes 41 instructions with one token (65 where a lane is several rows), and a
    step is a non-zero: 4.7 per weight at 88.5 % zeros. An H200 issues 33e12 a second: 7e12 weights, or 2.9 times what
    reading bfloat16 at 4.8 TB/s allows, where there are tiles for all its warps: above some 2^28 weights. Below, the
    chain of a step, some 110 cycles, bounds it: a tile of 32 x 2048 weights takes some 18 microseconds.
    """
    SEGMENTS: tl.constexpr = SHAPE[0]
    STEPS: tl.constexpr = SHAPE[1]
    exponents, levels = operands[2], operands[3]
    height, width = _cut(exponents, matrix, columns)
    half = out_features // HALVES
    first = block * 32 * height
    count = tl.maximum(tl.minimum(half - first, 32 * height), 0)

    warp = tl.arange(0, HALVES * SEGMENTS)[:, None]
    lane = tl.arange(0, 32)[None, :]
    bit = tl.full([1, 32], 1, tl.uint32) << lane.to(tl.uint32)
    t = tl.arange(0, TOKENS)[None, None, :]
    segment, low = warp % SEGMENTS, first + warp // SEGMENTS * half
    high = low + count
    columns_here = tl.maximum(tl.minimum(columns - segment * width, width), 0)
    band = low // (32 * height)
    while tl.max((band * 32 * height < high).to(tl.int32)) > 0:
        row = band * 32 * height + lane * height
        length = tl.minimum(tl.maximum(out_features - row, 0), height) * columns_here
        length = tl.where(band * 32 * height < high, length, 0)
        own, table, state, at = _open(operands, matrix, band, segment, length)
        place = tl.zeros([HALVES * SEGMENTS, 32], tl.int32)
        sums = tl.zeros([HALVES * SEGMENTS, 32, TOKENS], tl.float32)
        level = levels + 2 * (matrix.to(tl.int64) * out_features + row)
        if height == 1:
            one, two = tl.load(level, length > 0, 0.0), tl.load(level + 1, length > 0, 0.0)
            from_ = x + (segment * width - 1) * TOKENS
            while tl.max(length - place) > 0:
                for step in tl.static_range(STEPS):  # noqa: B007
                    state, place, at, code = _step(state, place, at, length, own, table, bit)
                    value = tl.load(from_[:, :, None] + place[:, :, None] * TOKENS + t, code[:, :, None] > 0, 0.0)
                    sums += tl.where(code == 1, one, two)[:, :, None] * value.to(tl.float32)
            total = tl.sum(tl.reshape(sums, [HALVES, SEGMENTS, 32, TOKENS]), 1)
            # low and row of each half
            low_ = first + tl.arange(0, HALVES)[:, None] * half
            row_ = tl.max(tl.reshape(band, [HALVES, SEGMENTS]), 1)[:, None] * 32 + lane
            ours = (row_ >= low_) & (row_ < low_ + count)
            tl.store(to[None, None, :] + row_[:, :, None], total, ours[:, :, None] & there[None, None, :])
        else:
            # rows one after another: the sum of each is stored when the next one begins
            done = 0
            while done < tl.minimum(height, out_features):
                ours = (length > 0) & (row + done >= low) & (row + done < tl.minimum(high, out_features))
                tl.store(to[None, None, :] + (row + done)[:, :, None], sums, ours[:, :, None] & there[None, None, :])
                done += 1
            tl.debug_barrier()
            now = tl.zeros([HALVES * SEGMENTS, 32], tl.int32)
            of_column = 1.0 / columns
            while tl.max(length - place) > 0:
                for step in tl.static_range(STEPS):  # noqa: B007
                    state, place, at, code = _step(state, place, at, length, own, table, bit)
                    next_ = _row(place, of_column)
                    moved = (code > 0) & (next_ != now)
                    ours = moved & (row + now >= low) & (row + now < high)
                    tl.store(to[None, None, :] + (row + now)[:, :, None], sums, ours[:, :, None] & there[None, None, :])
                    sums = tl.where(moved[:, :, None], 0.0, sums)
                    now = tl.where(moved, next_, now)
                    weight = tl.load(level + 2 * now + code - 1, code > 0, 0.0)
                    from_ = x + (place - 1 - now * columns)[:, :, None] * TOKENS + t
                    value = tl.load(from_, code[:, :, None] > 0, 0.0)
                    sums += weight[:, :, None] * value.to(tl.float32)
            ours = (length > 0) & (row + now >= low) & (row + now < high)
            tl.store(to[None, None, :] + (row + now)[:, :, None], sums, ours[:, :, None] & there[None, None, :])
        band += 1
    return first, count


@triton.jit
def _row(place, of_column):
    """(place - 1) // columns; `of_column` is 1 / columns. Places are below 2^14 + 63, so float32 is exact enough."""
    return ((place.to(tl.float32) - 0.5) * of_column).to(tl.int32)


@triton.jit
def decode(to, operands, matrix, out_features, columns, block, SHAPE: tl.constexpr):
    """See `_triton_dense.py`; a block is the rows of 32 lanes, its segments are decoded at once."""
    SEGMENTS: tl.constexpr = SHAPE[0]
    STEPS: tl.constexpr = SHAPE[1]
    exponents, levels = operands[2], operands[3]
    height, width = _cut(exponents, matrix, columns)
    first = block * 32 * height
    count = tl.maximum(tl.minimum(out_features - first, 32 * height), 0)
    segment = tl.arange(0, SEGMENTS)[:, None]
    lane = tl.arange(0, 32)[None, :]
    bit = tl.full([1, 32], 1, tl.uint32) << lane.to(tl.uint32)
    n = segment * 32 + lane
    while tl.min(n) < count * columns:
        tl.store(to + n, tl.zeros([SEGMENTS, 32], tl.float32), n < count * columns)
        n += SEGMENTS * 32
    tl.debug_barrier()
    lane_row = lane * height
    length = tl.minimum(tl.maximum(count - lane_row, 0), height)
    length *= tl.maximum(tl.minimum(columns - segment * width, width), 0)
    own, table, state, at = _open(operands, matrix, block, segment, length)
    place = tl.zeros([SEGMENTS, 32], tl.int32)
    level = levels + 2 * (matrix.to(tl.int64) * out_features + first + lane_row)
    # a line is rows one after another, or a part of one
    line = to + lane_row * columns + segment * width - 1
    of_column = tl.where(height > 1, 1.0 / columns, 0.0)
    while tl.max(length - place) > 0:
        for step in tl.static_range(STEPS):  # noqa: B007
            state, place, at, code = _step(state, place, at, length, own, table, bit)
            weight = tl.load(level + 2 * _row(place, of_column) + code - 1, code > 0, 0.0)
            tl.store(line + place, weight, code > 0)
    return first, count


def plan(
    _codec: object, tensors: list[Tensor], out_features: int, _dtype: torch.dtype, halves: int, tokens: int
) -> Plan:
    """See `_triton_items.Plan`; sums are float32 whatever the layer's dtype."""
    stream, tiles, exponents, levels, entries, signs, tallest = tensors
    _, bands, segments, _ = tiles.shape
    abreast = triton.next_power_of_2(segments)
    default = {"STEPS": 1 if INTERPRETED else 8, "num_warps": min(16, abreast * halves)}
    found = launch("runlength", [out_features, tallest.shape[1], tokens], default, stream.device)
    operands = stream, tiles, exponents, levels, entries, bands, segments
    shape = abreast, found["STEPS"]
    blocks, rows = triton.cdiv(bands, halves), min(LANES * tallest.shape[2], out_features)
    return Plan(multiply, decode, operands, blocks, rows, shape, found["num_warps"], signs.numel() > 0)


def product(x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
    """See `Codec.product`; tensors are those of `runtime`."""
    check_input(x, tensors[-1].shape[1], "runlength/triton")
    return _triton_product.product(
        x, starts, out_features, lambda tokens: plan(None, tensors, out_features, x.dtype, 1, tokens)
    )


def runtime(
    stream: Tensor, tile_bytes: Tensor, of_tile: Tensor, exponents: Tensor, levels: Tensor, signs: Tensor, columns: int
) -> list[Tensor]:
    """[stream, tiles, exponents, levels, entries, signs, empty [0, columns, most rows of a lane]].

    tiles: int64 `[matrices, bands, segments, 3]`: where a tile begins, its bytes, its class; bands and segments are
    the most that a matrix has. 24 bytes for some 2^16 weights, 8 for each row.
    """
    rows = levels.shape[0] // len(exponents)
    cuts = [Lanes(rows, columns, k) for k in exponents.tolist()]
    sizes = tile_bytes.cpu().to(torch.int64)
    of_all = torch.stack([sizes.cumsum(0) - sizes, sizes, of_tile.cpu().to(torch.int64)], 1)
    tiles = torch.zeros(len(cuts), max(c.bands for c in cuts), max(c.segments for c in cuts), PARTS, dtype=torch.int64)
    for g, (cut, own) in enumerate(zip(cuts, of_all.split([c.tiles for c in cuts]), strict=True)):
        tiles[g, : cut.bands, : cut.segments] = own.view(cut.bands, cut.segments, PARTS)
    device, tallest = stream.device, max(cut.height for cut in cuts)
    return [stream, tiles.to(device), exponents, levels, _entries(device), signs, levels.new_empty(0, columns, tallest)]


@lru_cache(maxsize=8)
def _entries(device: torch.device) -> Tensor:
    """Of all classes, int32 `[64, 256]`; shared by all matrices."""
    return tables().entries.to(device)
