"""Run lengths on a CPU through the C++ extension: encode, decode, multiply. How it works is told in `runlength.cpp`.

Import this file only where `halfbit.native.extension` is there. The slow and obvious versions are in `reference.py`.
"""

from typing import Any

import torch
from torch import Tensor

from halfbit import native
from halfbit.errors import FormatError, Unsupported
from halfbit.formats.runlength.lanes import LANES, Lanes
from halfbit.formats.runlength.tables import limits, tables

INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def encode(codes: Tensor, lanes: Lanes) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.encode`."""
    arguments = codes.contiguous(), lanes.exponent, limits(), tables().entries
    stream, tile_bytes, of_tile = _extension().runlength_encode(*arguments, torch.get_num_threads())
    return torch.from_numpy(stream), torch.from_numpy(tile_bytes), torch.from_numpy(of_tile)


def decode(stream: Tensor, offsets: Tensor, of_tile: Tensor, entries: Tensor, lanes: Lanes) -> Tensor:
    """See `reference.decode`."""
    codes = torch.empty(lanes.rows, lanes.columns, dtype=torch.uint8)
    _decode([stream, offsets, of_tile, entries], 0, lanes, codes.new_empty(0, 2, dtype=torch.float32), 0, codes)
    return codes


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
    """See `Codec.product`: straight from the stream, 32 tokens at a time."""
    if x.dtype not in INPUTS or x.ndim != 2 or not x.is_cpu:
        raise Unsupported(
            f"runlength/cpu: x must be [tokens, columns] on the CPU in {', '.join(map(str, INPUTS))}, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    operands = [stream, offsets, of_tile, exponents, levels, entries, signs]
    # no call of torch that is not needed: once other weights have passed the caches, each takes 10 to 50 microseconds
    y = torch.empty(x.shape[0], out_features)
    inputs = (x if x.dtype == torch.float32 else x.float()).contiguous()
    try:
        _extension().runlength_product(inputs, starts, operands, y, torch.get_num_threads())
    except RuntimeError as error:
        raise _damaged(error) from None
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _decode(tiles: list[Tensor], first_tile: int, lanes: Lanes, levels: Tensor, band: int, to: Tensor) -> None:
    """The rows from `band` on, as many as `to` has, as codes or as weights."""
    last = min(lanes.bands, band + -(-to.shape[0] // (LANES * lanes.height)))
    matrix = first_tile, lanes.exponent, lanes.rows, levels
    try:
        _extension().runlength_decode(tiles, *matrix, band, last, to, torch.get_num_threads())
    except RuntimeError as error:
        raise _damaged(error) from None


def _extension() -> Any:
    if native.extension is None:
        raise Unsupported(f"runlength/cpu: {native.reason}")
    return native.extension


def _damaged(error: RuntimeError) -> FormatError:
    return FormatError(f"runlength/cpu: {error}; the file is damaged, compress the block again", tensor="stream")
