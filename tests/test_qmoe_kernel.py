"""QMoE's CPU kernels against the definition: decoded weights in float64, greedy encoding in five lines of Python.

Tolerance: the 2x rule. The largest error of a product, against float64, is at most twice that of torch's float32 matmul
on the decoded weights, plus two units in the last place of the largest result, for products too small to have an error.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from halfbit import native
from halfbit.errors import FormatError, Unsupported
from halfbit.formats.qmoe.dictionary import dictionary

if native.extension is None:
    pytest.skip(f"no C++ extension: {native.reason}", allow_module_level=True)

from halfbit.formats.qmoe import cpu

GOLDEN = Path(__file__).parent / "golden" / "qmoe"
WIDTHS = [*range(1, 34, 2), 28, 56, 63, 2083]
TOKENS = [0, 1, 2, 5, 8, 17, 40]


def ternary(rows: int, columns: int, *, zeros: float = 0.885, seed: int = 0) -> Tensor:
    draw = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return ((draw > zeros).to(torch.uint8) + (draw > (1 + zeros) / 2)).to(torch.uint8)


def packed(symbols: Tensor, p0: float = 0.885) -> tuple[Tensor, Tensor]:
    codewords, counts = cpu.encode(symbols, dictionary(p0).trie)
    return codewords, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def check_product(x: Tensor, starts: Tensor, symbols: Tensor, levels: Tensor, p0: float = 0.885) -> None:
    groups = len(starts) - 1
    out = symbols.shape[0] // groups
    codewords, offsets = packed(symbols, p0)
    y = cpu.product(x, starts, codewords, offsets, levels, dictionary(p0).entries, out)
    w = levels.gather(1, symbols.long()).view(groups, out, symbols.shape[1])
    exact, dense = torch.empty(len(x), out, dtype=torch.float64), torch.empty(len(x), out)
    for g in range(groups):
        part = slice(int(starts[g]), int(starts[g + 1]))
        exact[part], dense[part] = x[part].double() @ w[g].double().T, x[part].float() @ w[g].T
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    if not y.numel():
        return
    # the result is rounded once more where x is not float32
    ulp = torch.finfo(x.dtype).eps * float(exact.abs().max())
    bound = 2 * float((dense - exact).abs().max()) + 2 * ulp
    assert float((y - exact).abs().max()) <= bound  # false for NaN


def random_levels(rows: int, seed: int = 1) -> Tensor:
    levels = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    levels[:, 0] = 0
    return levels


def greedy(row: list[int], trie: list[list[int]]) -> list[int]:
    words, node = [], 65536
    for first, second in zip(row[::2], [*row[1::2], 0], strict=False):
        pair = first + 3 * second
        if trie[node][pair] < 0:
            words.append(node)
            node = 65536
        node = trie[node][pair]
    return [*words, node] if row else words


@pytest.mark.parametrize("zeros", [0.3, 0.885, 1.0])
def test_encode_is_greedy_longest_match_and_decode_inverts_it(zeros: float):
    book = dictionary()
    trie = book.trie.tolist()
    for columns in WIDTHS:
        symbols = ternary(37, columns, zeros=zeros, seed=columns)
        codewords, counts = cpu.encode(symbols, book.trie)
        rows = [greedy(row, trie) for row in symbols.tolist()]
        assert counts.tolist() == [len(row) for row in rows]
        assert codewords.tolist() == [word for row in rows for word in row]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        assert torch.equal(cpu.decode(codewords, offsets, book.entries, columns), symbols)


def test_codewords_are_the_published_ones():
    cases = load_file(GOLDEN / "cases.safetensors")
    checked = 0
    for name in {key.rsplit(".", 1)[0] for key in cases}:
        dense, stored = cases.get(f"{name}.dense"), cases[f"{name}.w_comp"].view(torch.uint16)
        rows, columns = cases[f"{name}.shape"].tolist()
        offsets = cases[f"{name}.row_off"].to(torch.int64)
        symbols = cpu.decode(stored, offsets, dictionary().entries, columns)
        codewords, counts = cpu.encode(symbols, dictionary().trie)
        assert torch.equal(codewords.int(), stored.int()), name
        assert torch.equal(counts, offsets.diff()), name
        if dense is not None:
            levels = torch.nn.functional.pad(cases[f"{name}.ter_minmax"].view(rows, 2).float(), (1, 0))
            assert torch.equal(levels.gather(1, symbols.long()), dense.float()), name
            checked += 1
    assert checked


@pytest.mark.parametrize("columns", WIDTHS)
def test_product_equals_the_decoded_product(isa: str, columns: int):
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
        symbols = ternary(37, columns, seed=tokens)
        check_product(x, torch.tensor([0, tokens]), symbols, random_levels(37))


def test_groups_take_their_own_tokens_and_some_have_none(isa: str):
    starts = torch.tensor([0, 0, 1, 1, 6, 15, 32, 72, 72])
    x = torch.randn(72, 63, generator=torch.Generator().manual_seed(0))
    check_product(x, starts, ternary(8 * 33, 63), random_levels(8 * 33))


@pytest.mark.parametrize("tokens", TOKENS)
def test_symbol_zero_may_stand_for_something(isa: str, tokens: int):
    levels = random_levels(66)
    levels[::3, 0] = torch.linspace(-2, 2, 22)
    x = 1e4 * torch.randn(tokens, 2083, generator=torch.Generator().manual_seed(tokens))
    check_product(x, torch.tensor([0, tokens // 2, tokens]), ternary(66, 2083), levels)


@pytest.mark.parametrize("zeros", [0.0, 0.4, 0.97])
def test_any_share_of_zeros(isa: str, zeros: float):
    # rows of few zeros have many codewords, further than x is padded
    x = torch.randn(9, 513, generator=torch.Generator().manual_seed(9))
    check_product(x, torch.tensor([0, 9]), ternary(40, 513, zeros=zeros), random_levels(40))


def test_dictionaries_whose_codewords_have_many_terms(isa: str):
    x = torch.randn(9, 129, generator=torch.Generator().manual_seed(9))
    check_product(x, torch.tensor([0, 9]), ternary(40, 129, zeros=0.6), random_levels(40), p0=0.6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_rounded_once(isa: str, dtype: torch.dtype):
    x = torch.randn(5, 1001, generator=torch.Generator().manual_seed(2)).to(dtype)
    check_product(x, torch.tensor([0, 5]), ternary(17, 1001), random_levels(17))


def test_huge_values_do_not_leak_between_codewords(isa: str):
    # the largest float32 at zero weights and past the end of codewords; the sum itself is small
    symbols = ternary(33, 77)
    x = torch.where((symbols != 0).any(0), 1.0, torch.finfo(torch.float32).max).expand(3, 77)
    symbols[:, 5] = 0
    x = x.index_fill(1, torch.tensor([5]), torch.finfo(torch.float32).max)
    check_product(x, torch.tensor([0, 3]), symbols, random_levels(33))


def test_work_is_the_same_on_any_number_of_threads_and_x_need_not_be_contiguous():
    symbols, levels = ternary(2000, 2083), random_levels(2000)
    codewords, offsets = packed(symbols)
    x = torch.randn(2083, 20, generator=torch.Generator().manual_seed(3)).T
    arguments = torch.tensor([0, 20]), codewords, offsets, levels, dictionary().entries, 2000
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu.product(x, *arguments)
        torch.set_num_threads(2)
        assert torch.equal(cpu.product(x.contiguous(), *arguments), one)
    finally:
        torch.set_num_threads(before)


def test_damaged_codewords_raise_and_never_read_beyond():
    symbols = ternary(64, 301)
    codewords, offsets = packed(symbols)
    entries, levels = dictionary().entries, random_levels(64)
    generator = torch.Generator().manual_seed(4)
    for _ in range(50):
        damaged = codewords.int()
        at = torch.randint(len(damaged), (40,), generator=generator)
        damaged[at] = torch.randint(65536, (40,), generator=generator, dtype=torch.int32)
        damaged = damaged.to(torch.uint16)
        for tokens in (1, 9):
            with pytest.raises(FormatError, match=r"row \d+: codewords stand for \d+ columns, expected 302"):
                cpu.product(torch.ones(tokens, 301), torch.tensor([0, tokens]), damaged, offsets, levels, entries, 64)
        with pytest.raises(FormatError, match="expected 302"):
            cpu.decode(damaged, offsets, entries, 301)
    beyond = offsets.clone()
    beyond[-1] += 1
    with pytest.raises(FormatError, match="are not among"):
        cpu.product(torch.ones(1, 301), torch.tensor([0, 1]), codewords, beyond, levels, entries, 64)


def test_what_it_cannot_do_is_said():
    codewords, offsets = packed(ternary(4, 9))
    levels, entries = random_levels(4), dictionary().entries
    with pytest.raises(Unsupported, match="float64"):
        cpu.product(torch.ones(1, 9).double(), torch.tensor([0, 1]), codewords, offsets, levels, entries, 4)
    with pytest.raises(ValueError, match="starts"):
        cpu.product(torch.ones(2, 9), torch.tensor([0, 1]), codewords, offsets, levels, entries, 4)
    with pytest.raises(ValueError, match="symbols must be"):
        cpu.encode(torch.full((1, 4), 3, dtype=torch.uint8), dictionary().trie)
