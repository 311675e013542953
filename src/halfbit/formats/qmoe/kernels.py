"""Which implementation runs: C++ on the CPU, Triton for products on a GPU, where they are there, else plain torch.

`halfbit::qmoe_product` is an operator of torch.library, so that torch.compile and fake tensors know it.
"""

from torch import Tensor

from halfbit import native
from halfbit.formats._operator import product_operator
from halfbit.formats.qmoe import reference
from halfbit.formats.qmoe.dictionary import Dictionary
from halfbit.triton_support import backend

if native.extension is not None:
    from halfbit.formats.qmoe import cpu


def encode(symbols: Tensor, dictionary: Dictionary) -> tuple[Tensor, Tensor]:
    """Codewords, uint16 `[n]`, and their number per row, int64 `[rows]`."""
    if _native(symbols):
        return cpu.encode(symbols, dictionary.trie)
    return reference.encode(symbols, dictionary.trie.to(symbols.device))


def decode(codewords: Tensor, row_offsets: Tensor, entries: Tensor, columns: int) -> Tensor:
    """uint8 symbols `[rows, columns]`. Raises FormatError."""
    if _native(codewords):
        return cpu.decode(codewords, row_offsets, entries, columns)
    return reference.decode(codewords, row_offsets, entries, columns)


def _native(t: Tensor) -> bool:
    return native.extension is not None and t.device.type == "cpu"


def multiply(x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
    """See `Codec.product`; `tensors` are those of `QMoE.runtime`."""
    if (gpu := backend("qmoe", x)) is not None:
        return gpu.product(x, starts, tensors, out_features)
    codewords, row_offsets, levels, entries = tensors
    implementation = cpu if _native(x) else reference
    return implementation.product(x, starts, codewords, row_offsets, levels, entries, out_features)


product = product_operator("qmoe", multiply)
