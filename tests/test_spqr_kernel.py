"""SpQR's CPU kernels against the definition: decoding bit for bit, products against float64.

Tolerance: the 2x rule. The largest error of a product, against float64, is at most twice that of torch's float32 matmul
on the decoded weights, plus two units in the last place of the largest result, for products too small to have an error.
With one token an outlier is added as its difference from the grid's value there, so the same is allowed once more
for the matrix without outliers.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halfbit import native
from halfbit.errors import FormatError, Unsupported
from halfbit.formats.spqr import SpQR
from halfbit.types import Outliers, Packed, Solution

if native.extension is None:
    pytest.skip(f"no C++ extension: {native.reason}", allow_module_level=True)

from test_codecs import bilevel

from halfbit.formats._grid_cpu import TOKENS_TO_DECODE
from halfbit.formats.spqr import cpu, reference

TOKENS = [0, 1, 2, 17, 300]
BITS = [2, 3, 4, 5, 6, 7, 8]
FORMS = [
    {"group": 16},
    {"group": 8, "supergroup": 64, "scale_bits": 16, "dtype": "bfloat16"},
    {"group": 5, "supergroup": 3, "zero_bits": 16},
    {"group": 64, "supergroup": 24, "scale_bits": 8, "zero_bits": 6},
    {"group": None, "scale_bits": 16, "zero_bits": 16},
    {"group": None, "scale_bits": 5, "zero_bits": 7, "dtype": "bfloat16"},
    {"group": 16, "rounding": "float16"},
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch.use_deterministic_algorithms(False)


def operands(codec: SpQR, solutions: list[Solution]) -> list[Tensor]:
    return codec.runtime(codec.stack([codec.encode(s) for s in solutions]))


def check(codec: SpQR, solutions: list[Solution], tokens: list[int], dtype: torch.dtype = torch.float32) -> None:
    tensors = operands(codec, solutions)
    dense = [s.dense() for s in solutions]
    assert torch.equal(cpu.decode(tensors, codec.form), torch.cat(dense))
    # every third column of a wider matrix: not contiguous
    random = torch.Generator().manual_seed(sum(tokens))
    x = torch.randn(sum(tokens), 3 * dense[0].shape[1], generator=random).to(dtype)[:, 1::3]
    starts = torch.tensor([0, *tokens]).cumsum(0)
    y = codec.product(x, starts, tensors, dense[0].shape[0])
    assert (y.dtype, y.shape) == (dtype, (len(x), dense[0].shape[0]))
    for g, solution in enumerate(solutions):
        those = slice(int(starts[g]), int(starts[g + 1]))
        exact = x[those].double() @ dense[g].double().T
        if exact.numel():
            decoded = tokens[g] >= TOKENS_TO_DECODE
            bound = allowed(x[those], dense[g], decoded) + allowed(
                x[those], replace(solution, outliers=None).dense(), decoded
            )
            assert float((y[those].double() - exact).abs().max()) <= bound  # false for NaN


def allowed(x: Tensor, w: Tensor, decoded: bool) -> float:
    exact = x.double() @ w.double().T
    # with many tokens the weights, too, are rounded to the dtype of x, as a dense model's are
    plain = x @ w.to(x.dtype).T if decoded else x.float() @ w.T
    ulp = torch.finfo(x.dtype).eps * float(exact.abs().max())
    return 2 * float((plain.double() - exact).abs().max()) + 2 * ulp


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_a_ragged_matrix(isa: str, bits: int, form: dict):
    codec = SpQR(bits=bits, **form)
    for outliers in (0.0, 0.05):
        solution = bilevel(codec.grid, 33, 300, outliers=outliers, order=outliers > 0)
        for tokens in (1, 3):
            check(codec, [solution], [tokens])


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100, 300])
def test_every_edge(isa: str, rows: int, columns: int):
    for bits, form in ((3, FORMS[0]), (4, FORMS[2]), (2, FORMS[5])):
        codec = SpQR(bits=bits, **form)
        check(codec, [bilevel(codec.grid, rows, columns, outliers=0.3, order=True)], [1])
        check(codec, [bilevel(codec.grid, rows, columns)], [17])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens_in_every_type(isa: str, tokens: int, dtype: torch.dtype):
    for form in (FORMS[0], FORMS[1]):
        codec = SpQR(**form)
        check(codec, [bilevel(codec.grid, 50, 300, outliers=0.02, order=True)], [tokens], dtype)


def test_groups_take_their_own_tokens_and_some_have_none(isa: str):
    codec = SpQR()
    solutions = [bilevel(codec.grid, 33, 300, outliers=0.01 * (g % 3), order=g % 2 > 0) for g in range(7)]
    check(codec, solutions, [0, 1, 0, 5, 300, 17, 0])
    check(codec, solutions, [1, 1, 1, 1, 1, 1, 1])


def test_many_tokens_in_equal_parts(isa: str):
    # more tokens than are taken at once, and more rows than a thread takes: the last of both are fewer
    codec = SpQR()
    check(codec, [bilevel(codec.grid, 150, 300, outliers=0.02, order=True)], [530])
    check(codec, [bilevel(codec.grid, 129, 520, outliers=0.02, order=True) for _ in range(3)], [5, 17, 45])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [8, 16, None])
def test_whole_numbers_hold_the_largest_sums(isa: str, bits: int, group: int | None):
    """All codes at one end and all of x as large as its unit allows: no sum of whole numbers may overflow."""
    codec = SpQR(bits=bits, group=group)
    plain = bilevel(codec.grid, 17, 300)
    for code in (0, 2**bits - 1):
        solution = replace(plain, codes=torch.full_like(plain.codes, code))
        tensors = operands(codec, [solution])
        for size in (1.0, 1.9921, 1.9922, 1.99219, 2 - 2**-23):
            for x in (torch.full((1, 300), size), torch.full((1, 300), -size)):
                exact = x.double() @ solution.dense().double().T
                y = codec.product(x, torch.tensor([0, 1]), tensors, 17)
                terms = float((x.double().abs() @ solution.dense().double().abs().T).max())
                # far above what float32 rounds; an overflow is thousands of times larger
                assert float((y - exact).abs().max()) <= 64 * 2**-24 * terms


def test_one_token_of_any_size(isa: str):
    codec = SpQR()
    solution = bilevel(codec.grid, 33, 300, outliers=0.02, order=True)
    tensors, w = operands(codec, [solution]), solution.dense().double()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 300, generator=random)
    for scale in (0.0, 1e-40, 1e-30, 1e-20, 1e20, 1e30):
        y = codec.product(scale * x, torch.tensor([0, 1]), tensors, 33)
        exact = (scale * x).double() @ w.T
        # the smallest: subnormal products are rounded to multiples of 2^-149
        assert float((y - exact).abs().max()) <= 1e-5 * float(exact.abs().max()) + 300 * 2**-149
    mixed = x * 10.0 ** torch.randint(-12, 4, (300,), generator=random)
    exact = mixed.double() @ w.T
    assert float((codec.product(mixed, torch.tensor([0, 1]), tensors, 33) - exact).abs().max()) <= 1e-6 * float(
        (mixed.double().abs() @ w.abs().T).max()
    )
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[0, 7] = bad
        assert not torch.isfinite(codec.product(broken, torch.tensor([0, 1]), tensors, 33)).any()


def test_outliers_everywhere(isa: str):
    codec = SpQR()
    plain = bilevel(codec.grid, 17, 300)
    rows, columns = torch.nonzero(torch.ones(17, 300), as_tuple=True)
    values = torch.randn(17 * 300, generator=torch.Generator().manual_seed(0)).half()
    solution = replace(plain, codes=torch.zeros_like(plain.codes), outliers=Outliers(rows, columns, values))
    for tokens in (1, 2, 17):
        check(codec, [solution], [tokens])


def test_extreme_halves_are_converted_exactly(isa: str):
    # all float16 and bfloat16 patterns that are finite, as outliers and as 16-bit zeros
    for dtype in (torch.float16, torch.bfloat16):
        codec = SpQR(bits=2, group=1, scale_bits=16, zero_bits=16, dtype=str(dtype).removeprefix("torch."))
        every = torch.arange(65536).to(torch.uint16).view(dtype)
        every = every[torch.isfinite(every) & (every.float().abs() < 1e38)]
        values = torch.nn.functional.pad(every, (0, -len(every) % 512)).view(512, -1)
        params = {"scale": torch.ones_like(values), "zero": values}
        codes = torch.zeros(values.shape, dtype=torch.uint8)
        rows, columns = torch.nonzero(codes[:, ::2] == 0, as_tuple=True)
        outliers = Outliers(rows, 2 * columns, values[rows, 2 * columns])
        solution = Solution(codec.grid, codes, params, outliers=outliers)
        assert torch.equal(cpu.decode(operands(codec, [solution]), codec.form), solution.dense())
        for to in (torch.float16, torch.bfloat16):
            place = torch.empty(values.shape[1], 512, dtype=to)
            cpu._stack(operands(codec, [solution]), codec.form).decode(0, 0, 32, place)
            assert torch.equal(place.T.float(), solution.dense().to(to).float())


def test_work_is_the_same_on_any_number_of_threads():
    codec = SpQR()
    solution = bilevel(codec.grid, 700, 2083, outliers=0.01, order=True)
    tensors = operands(codec, [solution])
    before = torch.get_num_threads()
    try:
        for tokens in (1, 20):
            x = torch.randn(tokens, 2083, generator=torch.Generator().manual_seed(3))
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(codec.product(x, torch.tensor([0, tokens]), tensors, 700))
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


def test_the_reference_gives_the_same():
    for form in FORMS:
        codec = SpQR(**form)
        tensors = operands(codec, [bilevel(codec.grid, 33, 300, outliers=0.1, order=order) for order in (True, False)])
        assert torch.equal(reference.decode(tensors, codec.form), cpu.decode(tensors, codec.form))
        x, starts = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 7])
        ours, plain = (m.product(x, starts, tensors, codec.form) for m in (cpu, reference))
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_damaged_bytes_never_crash(isa: str):
    """Bytes that `check` never saw: the kernels stay inside of the operands, whatever comes out."""
    codec = SpQR()
    solution = bilevel(codec.grid, 33, 300, outliers=0.05, order=True)
    random = torch.Generator().manual_seed(0)
    x = torch.ones(18, 300)
    for _ in range(60):
        tensors = [t.clone() for t in operands(codec, [solution])]
        for n in (0, 2, 4, 6, 8, 9, 10):
            as_bytes = tensors[n].view(-1).view(torch.uint8)
            at = torch.randint(len(as_bytes), (20,), generator=random)
            as_bytes[at] = torch.randint(256, (20,), generator=random, dtype=torch.uint8)
        for tokens in (1, 18):
            codec.product(x[:tokens], torch.tensor([0, tokens]), tensors, 33)
        cpu.decode(tensors, codec.form)
    for part, tensor in codec.encode(solution).tensors.items():
        packed = codec.encode(solution)
        damaged = Packed(packed.codec, packed.shape, packed.tensors | {part: tensor[..., :-1]})
        with pytest.raises(FormatError):
            codec.runtime(damaged)


def test_operands_that_do_not_fit_are_refused():
    codec = SpQR()
    good = operands(codec, [bilevel(codec.grid, 33, 300, outliers=0.05, order=True)])
    x, starts = torch.ones(1, 300), torch.tensor([0, 1])
    for n in range(len(good) - 1):
        bad = [*good[:n], good[n][..., :-1].contiguous(), *good[n + 1 :]]
        with pytest.raises(ValueError, match=r"fit|rise"):
            codec.product(x, starts, bad, 33)
    bad = [*good[:7], good[7].flip(0), *good[8:]]
    with pytest.raises(ValueError, match="rise from 0"):
        codec.product(x, starts, bad, 33)
    bad = [*good[:11], good[11] + 1, good[12]]
    with pytest.raises(ValueError, match="order names columns"):
        codec.product(x, starts, bad, 33)
    with pytest.raises(ValueError, match="starts"):
        codec.product(x, torch.tensor([0, 2]), good, 33)
    with pytest.raises(ValueError, match="x and y"):
        codec.product(x[:, :-1], starts, good, 33)
    with pytest.raises(Unsupported, match="float64"):
        cpu.product(x.double(), starts, good, codec.form)
