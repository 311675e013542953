"""Products of ternary formats as operators of torch.library, so that torch.compile and fake tensors know them."""

from collections.abc import Callable

import torch
from torch import Tensor

Multiply = Callable[[Tensor, Tensor, list[Tensor], int], Tensor]


def product_operator(name: str, multiply: Multiply) -> torch.library.CustomOpDef:
    """`halfbit::{name}_product`: `multiply(x, starts, tensors, out_features)`, see `Codec.product`."""
    product = torch.library.custom_op(
        f"halfbit::{name}_product",
        multiply,
        mutates_args=(),
        schema="(Tensor x, Tensor starts, Tensor[] tensors, int out_features) -> Tensor",
    )

    @product.register_fake
    def _(x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        return x.new_empty(x.shape[0], out_features)

    return product
