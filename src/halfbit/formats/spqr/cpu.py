"""SpQR on a CPU through the C++ extension: decode, multiply. How it works is told in `spqr.cpp` and `tile.h`.

Import this file only where `halfbit.native.extension` is there. The slow and obvious versions are in `reference.py`.
"""

import torch
from torch import Tensor

from halfbit.formats import _grid_cpu as grid
from halfbit.formats.spqr.reference import Form, Operands


def decode(tensors: list[Tensor], form: Form) -> Tensor:
    """All matrices, one above another, columns where they belong: float32 `[k * rows, columns]`."""
    return grid.decode(_stack(tensors, form), tensors[0].shape[0])


def product(x: Tensor, starts: Tensor, tensors: list[Tensor], form: Form) -> Tensor:
    """See `Codec.product`. Raises Unsupported."""
    return grid.product(x, starts, _stack(tensors, form))


def _stack(tensors: list[Tensor], form: Form) -> grid.Stack:
    own, operands, numbers = grid.extension("spqr"), Operands(*tensors), tuple(form)
    rows, columns, _ = operands.extent.shape

    def multiply(x: Tensor, starts: Tensor, y: Tensor) -> None:
        own.spqr_product(x, starts, tensors, numbers, y, torch.get_num_threads())

    def decode(number: int, first: int, last: int, to: Tensor) -> None:
        own.spqr_decode(tensors, numbers, number, first, last, to, torch.get_num_threads())

    return grid.Stack("spqr", rows, columns, operands.order, multiply, decode)
