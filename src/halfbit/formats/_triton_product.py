"""Products from compressed weights, for any number of tokens: what a format's `product` is with its kernels."""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# what Triton compiles is given plain numbers

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbit.formats import _triton_dense
from halfbit.formats._triton_items import MOST_TOKENS, ONE_MATRIX, TABLE, Plan, cut, item, pack, tokens_at_once
from halfbit.rotation import rotated_input


@triton.jit
def _product(
    y, x, items, operands, places, matrices, out_features, columns,
    MULTIPLY: tl.constexpr, SHAPE: tl.constexpr, TOKENS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    matrix, first, count = item(number, items, places, matrices, TOKENS, ITEMS)
    if count > 0:
        t = tl.arange(0, TOKENS)
        to = y + (first + t).to(tl.int64) * out_features
        own = x + number.to(tl.int64) * columns * TOKENS
        MULTIPLY(to, t < count, own, operands, matrix, out_features, columns, tl.program_id(1), 1, SHAPE, TOKENS)


def product(x: Tensor, starts: Tensor, out_features: int, plan: Callable[[int], Plan]) -> Tensor:
    """See `Codec.product`; `plan` is asked for a number of TOKENS. With many tokens it goes by `_triton_dense.py`."""
    (places, columns), matrices = x.shape, starts.shape[0] - 1
    y = x.new_empty(places, out_features)
    if not y.numel() or not matrices:
        return y
    if not columns:
        return y.zero_()
    many = places > MOST_TOKENS * matrices
    tokens = _triton_dense.PLACES if many else tokens_at_once(places, matrices)
    launch = plan(tokens)
    x = rotated_input(x).to(x.dtype if many else torch.float32) if launch.rotated else x
    items = None if matrices == 1 else cut(starts.to(x.device, non_blocking=True), places, tokens)
    if many:
        _triton_dense.multiply(y, x, items, matrices, launch)
        return y
    packed = x.contiguous() if places == 1 else pack(x, items, places, matrices, tokens)
    count = triton.cdiv(places, tokens) if items is None else items.shape[0]
    _product[(count, launch.blocks)](
        y, packed, items, launch.operands, places, matrices, out_features, columns,
        MULTIPLY=launch.multiply, SHAPE=launch.shape, TOKENS=tokens,
        ITEMS=ONE_MATRIX if items is None else TABLE, num_warps=launch.num_warps,
    )  # fmt: skip
    return y
