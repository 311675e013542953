"""Partial sums of a product whose columns several programs share, added in their order: the same bits in every run."""
# pyright: reportArgumentType=false, reportIndexIssue=false
# what Triton compiles is given plain numbers

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _add(parts, y, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * count + at, inside, 0.0)
    tl.store(y + at, total, inside)


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 `[splits, ...]`, contiguous, to `[...]` in `dtype`: the sum over the first dimension, in its order."""
    y = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    if y.numel():
        _add[(triton.cdiv(y.numel(), BLOCK),)](parts, y, y.numel(), SPLITS=parts.shape[0], BLOCK=BLOCK)
    return y
