"""QMoE's code in plain torch, any device: what `cpu.py` and the GPU kernels are compared with.

Works on symbols 0, 1, 2 and on codewords; which values the symbols stand for is the codec's business.
"""

import torch
from torch import Tensor

from halfbit.errors import FormatError
from halfbit.formats._grouped_product import grouped_product
from halfbit.formats.qmoe.dictionary import ROOT

# bounds the intermediate tensors to some 100 MB: codewords decoded at once, symbols encoded at once
CODEWORDS_AT_ONCE = 1 << 20
SYMBOLS_AT_ONCE = 1 << 24


def encode(symbols: Tensor, trie: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy longest match: extend the run while the dictionary has it, else emit its codeword and start again.

    Args:
        symbols: uint8 `[rows, columns]`. An odd last column is paired with a 0.
        trie: of the dictionary, on the device of `symbols`.

    Returns:
        codewords, uint16 `[n]`, rows one after another; codewords per row, int64 `[rows]`.
    """
    rows_at_once = max(1, SYMBOLS_AT_ONCE // max(symbols.shape[1], 1))
    parts = [_encode(part, trie) for part in symbols.split(rows_at_once)]
    return torch.cat([codewords for codewords, _ in parts]), torch.cat([counts for _, counts in parts])


def _encode(symbols: Tensor, trie: Tensor) -> tuple[Tensor, Tensor]:
    # [pairs, rows]: the rows advance together, one pair at a time
    even = torch.nn.functional.pad(symbols, (0, symbols.shape[1] % 2)).T.to(torch.int64)
    pairs = even[0::2] + 3 * even[1::2]
    flat = trie.flatten()
    run = torch.full((symbols.shape[0],), ROOT, dtype=torch.int64, device=symbols.device)
    # codeword emitted before each pair and at the end, -1 for none
    emitted = torch.full((pairs.shape[0] + 1, symbols.shape[0]), -1, dtype=torch.int32, device=symbols.device)
    for t, pair in enumerate(pairs):
        longer = flat[9 * run + pair]
        ends = longer < 0
        emitted[t] = torch.where(ends, run, -1)
        # a single pair is always in the dictionary
        run = torch.where(ends, flat[9 * ROOT + pair], longer).to(torch.int64)
    emitted[-1] = torch.where(run == ROOT, -1, run)
    by_row = emitted.T
    some = by_row >= 0
    return by_row[some].to(torch.uint16), some.sum(1)


def decode(codewords: Tensor, row_offsets: Tensor, entries: Tensor, columns: int) -> Tensor:
    """uint8 symbols `[rows, columns]`. Raises FormatError where a row does not end with its last column."""
    rows = row_offsets.shape[0] - 1
    even = columns + columns % 2
    check_widths(codewords, row_offsets, entries, columns)
    shifts = torch.arange(0, 56, 2, device=entries.device)
    of_entry = ((entries[:, None] >> shifts) & 3).to(torch.uint8)
    within = torch.arange(28, device=entries.device) < (entries >> 56)[:, None]
    parts = []
    for part in codewords.split(CODEWORDS_AT_ONCE):
        index = part.to(torch.int64)
        parts.append(of_entry[index][within[index]])
    return torch.cat(parts).view(rows, even)[:, :columns] if even else of_entry.new_zeros(rows, 0)


# codewords
CHECKED_AT_ONCE = 1 << 20


def check_widths(codewords: Tensor, row_offsets: Tensor, entries: Tensor, columns: int) -> None:
    """Raise FormatError for the first row whose codewords do not stand for its columns."""
    even, rows = columns + columns % 2, row_offsets.shape[0] - 1
    # some rows at a time: a count is four times as large as a codeword, and a stack of experts is as large as memory
    step = max(1, CHECKED_AT_ONCE * rows // max(codewords.shape[0], 1))
    for first in range(0, rows, step):
        offsets = row_offsets[first : first + step + 1]
        counts = entries[codewords[offsets[0] : offsets[-1]].to(torch.int64)] >> 56
        before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])[offsets - offsets[0]]
        wrong = before.diff() != even
        if wrong.any():
            row = int(torch.nonzero(wrong)[0])
            raise FormatError(
                f"qmoe: the codewords of row {first + row} stand for {int(before.diff()[row])} columns, not {even}; "
                "the file is damaged, compress the block again"
            )


def product(
    x: Tensor,
    starts: Tensor,
    codewords: Tensor,
    row_offsets: Tensor,
    levels: Tensor,
    entries: Tensor,
    out_features: int,
) -> Tensor:
    """See `Codec.product`; the tensors are those of `QMoE.runtime`."""

    def matrix(g: int) -> Tensor:
        rows = slice(g * out_features, (g + 1) * out_features + 1)
        offsets = row_offsets[rows]
        first, last = int(offsets[0]), int(offsets[-1])
        symbols = decode(codewords[first:last], offsets - first, entries, x.shape[1])
        return values(symbols, levels[g * out_features : (g + 1) * out_features])

    return grouped_product(x, starts, out_features, matrix)


def values(symbols: Tensor, levels: Tensor) -> Tensor:
    """float32 `[rows, columns]` of symbols and the `[rows, 3]` values they stand for."""
    return levels.gather(1, symbols.to(torch.int64))
