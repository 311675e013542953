"""QMoE on a CPU through the C++ extension: encode, decode, multiply. How it works is told in `qmoe.cpp` beside this.

Import this file only where `halfbit.native.extension` is there; `available()` says so. The slow and obvious versions
are in `reference.py`.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from halfbit import native
from halfbit.errors import FormatError, Unsupported

INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def available() -> bool:
    """Whether the extension is there; `halfbit.native.reason` says why not."""
    return native.extension is not None


def encode(symbols: Tensor, trie: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy longest match, row by row.

    Args:
        symbols: uint8 `[rows, columns]`, each 0, 1 or 2.
        trie: int32 `[65537, 9]` of the dictionary.

    Returns:
        codewords, uint16 `[n]`, and their number per row, int64 `[rows]`.
    """
    codewords, counts = _extension().qmoe_encode(symbols.contiguous(), trie, torch.get_num_threads())
    return torch.from_numpy(codewords), torch.from_numpy(counts)


def decode(codewords: Tensor, row_offsets: Tensor, entries: Tensor, columns: int) -> Tensor:
    """uint8 symbols `[rows, columns]`. Raises FormatError where a row does not end at its last column.

    Args:
        codewords: uint16 `[n]`.
        row_offsets: int64 `[rows + 1]`, the first codeword of each row and the end of the last.
        entries: int64 `[65536]` of the dictionary.
        columns: weights of a row.
    """
    symbols = torch.empty(row_offsets.shape[0] - 1, columns, dtype=torch.uint8)
    table = entries.view(torch.uint64)
    try:
        _extension().qmoe_decode(codewords, row_offsets, table, symbols, torch.get_num_threads())
    except RuntimeError as error:
        raise _damaged(error) from None
    return symbols


def product(
    x: Tensor,
    starts: Tensor,
    codewords: Tensor,
    row_offsets: Tensor,
    levels: Tensor,
    entries: Tensor,
    out_features: int,
) -> Tensor:
    """Grouped product straight from the codewords, summed in float32.

    Args:
        x: `[tokens, columns]`, float32, bfloat16 or float16, sorted by group; finite.
        starts: int64 `[groups + 1]`; tokens `starts[g]` to `starts[g + 1]` multiply rows `g * out_features` to
            `(g + 1) * out_features`.
        codewords: uint16 `[n]`.
        row_offsets: int64 `[groups * out_features + 1]`.
        levels: float32 `[groups * out_features, 3]`, the values of symbols 0, 1 and 2 in each row.
        entries: int64 `[65536]` of the dictionary.
        out_features: rows of one matrix.

    Returns:
        `[tokens, out_features]` in the dtype of `x`. Raises FormatError on damaged codewords.
    """
    if x.dtype not in INPUTS or x.ndim != 2 or x.device.type != "cpu":
        raise Unsupported(
            f"qmoe/cpu: x must be a matrix of float32, bfloat16 or float16 on the CPU, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}"
        )
    y = torch.empty(x.shape[0], out_features)
    inputs = x.detach().to(torch.float32).contiguous()
    tables = entries.view(torch.uint64), _terms(entries)
    try:
        _extension().qmoe_product(inputs, starts, codewords, row_offsets, levels, *tables, y, torch.get_num_threads())
    except RuntimeError as error:
        raise _damaged(error) from None
    return y.to(x.dtype)


def _extension() -> Any:
    if native.extension is None:
        raise Unsupported(f"qmoe/cpu: {native.reason}")
    return native.extension


# Keyed by the tensor itself: a process has one dictionary, or few. A miss costs a fifth of a millisecond.
@lru_cache(maxsize=8)
def _terms(entries: Tensor) -> Tensor:
    return torch.from_numpy(_extension().qmoe_terms(entries.view(torch.uint64)))


def _damaged(error: RuntimeError) -> FormatError:
    return FormatError(f"qmoe/cpu: {error}; the file is damaged, compress the block again", tensor="codewords")
