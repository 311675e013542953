"""Grouped codes on a CPU through the C++ extension: decode, multiply, straight from what is stored.

The kernels are SpQR's, for which rows are made into its tiles on their way to the registers: `spqr/spqr.cpp`. Import
this file only where `halfbit.native.extension` is there.
"""

import torch
from torch import Tensor

from halfbit.formats import _grid_cpu as grid

Form = tuple[int, int | None, bool]
"""Bits, group and whether it is symmetric."""


def decode(tensors: list[Tensor], form: Form, columns: int) -> Tensor:
    """All matrices, one above another, columns where they belong: float32 `[rows, columns]`."""
    codes, *_, order = tensors
    # matrices of one order are one
    matrices = max(order.shape[0], 1)
    return grid.decode(_stack(tensors, form, codes.shape[0] // matrices, columns, matrices), matrices)


def product(x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int, form: Form) -> Tensor:
    """See `Codec.product`. Raises Unsupported."""
    return grid.product(x, starts, _stack(tensors, form, out_features, x.shape[-1], starts.shape[0] - 1))


def _stack(tensors: list[Tensor], form: Form, rows: int, columns: int, matrices: int) -> grid.Stack:
    own, (bits, group, symmetric) = grid.extension("grouped"), form
    numbers = bits, group or 0, int(symmetric)

    def multiply(x: Tensor, starts: Tensor, y: Tensor) -> None:
        own.grouped_product(x, starts, tensors, numbers, y, torch.get_num_threads())

    def decode(number: int, first: int, last: int, to: Tensor) -> None:
        own.grouped_decode(tensors, numbers, matrices, number, first, last, to, torch.get_num_threads())

    return grid.Stack("grouped", rows, columns, tensors[3], multiply, decode)
