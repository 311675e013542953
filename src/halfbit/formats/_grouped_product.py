"""The definition of a grouped product: decode one group's matrix at a time, multiply in float32."""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def one_group(tokens: int) -> Tensor:
    """`starts` of a product with one matrix. Kept: making it would take half as long as a product with a small one."""
    return torch.tensor([0, tokens], device="cpu")


def grouped_product(
    x: Tensor,
    starts: Tensor,
    out_features: int,
    matrix: Callable[[int], Tensor],
    order: Callable[[int], Tensor | None] = lambda _: None,
) -> Tensor:
    """Tokens `starts[g]` to `starts[g + 1]` times `matrix(g)`, float32 `[out_features, in]`; see `Codec.product`.

    Column j of `matrix(g)` belongs to column `order(g)[j]` of `x`; None: to column j.
    """
    bounds = starts.tolist()
    if bounds[0] != 0 or bounds[-1] != x.shape[0]:
        raise ValueError(
            f"starts must run from 0 to the number of tokens, {x.shape[0]}, got {bounds[0]} to {bounds[-1]}"
        )
    y = x.new_empty(x.shape[0], out_features)
    for g, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            columns = order(g)
            tokens = x[start:stop] if columns is None else x[start:stop, columns]
            y[start:stop] = tokens.float() @ matrix(g).T
    return y
