"""Quads on a CPU through the C++ extension: encode, decode, multiply. How it works is told in `quads.cpp`.

Import this file only where `halfbit.native.extension` is there. The slow and obvious versions are in `reference.py`.
"""

from typing import Any

import torch
from torch import Tensor

from halfbit import native
from halfbit.errors import FormatError, Unsupported

INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def encode(codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.encode`."""
    masks, patterns, signs, tile_signs = _extension().quads_encode(codes.contiguous(), torch.get_num_threads())
    width = -(-codes.shape[1] // 256)
    return (
        torch.from_numpy(masks).view(codes.shape[0], width),
        torch.from_numpy(patterns),
        torch.from_numpy(signs),
        torch.from_numpy(tile_signs),
    )


def decode(masks: Tensor, patterns: Tensor, signs: Tensor, at: tuple[Tensor, Tensor], columns: int) -> Tensor:
    """See `reference.decode`."""
    codes = torch.empty(masks.shape[0], columns, dtype=torch.uint8)
    try:
        _extension().quads_decode([masks[None], patterns, signs, *at], codes, torch.get_num_threads())
    except RuntimeError as error:
        raise _damaged(error) from None
    return codes


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
    """See `Codec.product`."""
    if x.dtype not in INPUTS or x.ndim != 2 or not x.is_cpu:
        raise Unsupported(
            f"quads/cpu: x must be [tokens, columns] on the CPU in {', '.join(map(str, INPUTS))}, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    # no call of torch that is not needed: from cold caches each takes 10 to 50 microseconds
    y = torch.empty(x.shape[0], out_features)
    inputs = (x if x.dtype == torch.float32 else x.float()).contiguous()
    operands = [masks, patterns, signs, pattern_offsets, sign_offsets, levels, turned]
    try:
        _extension().quads_product(inputs, starts, operands, y, torch.get_num_threads())
    except RuntimeError as error:
        raise _damaged(error) from None
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _extension() -> Any:
    if native.extension is None:
        raise Unsupported(f"quads/cpu: {native.reason}")
    return native.extension


def _damaged(error: RuntimeError) -> FormatError:
    return FormatError(f"quads/cpu: {error}; the file is damaged, compress the block again", tensor="patterns")
