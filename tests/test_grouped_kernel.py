"""The CPU kernels of `grouped` against the definition: decoding bit for bit, products against float64.

Tolerance: the 2x rule. The largest error of a product, against float64, is at most twice that of torch's float32 matmul
on the decoded weights for 64 tokens (that of one token and one row is luck), plus two units in the last place of the
largest result.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from halfbit import native
from halfbit.errors import Unsupported
from halfbit.formats.grouped import Grouped
from halfbit.types import Solution

if native.extension is None:
    pytest.skip(f"no C++ extension: {native.reason}", allow_module_level=True)

from halfbit.formats import _grouped_cpu

BITS = [2, 3, 4, 5, 6, 7, 8]
FORMS = [
    {"group": 128},
    {"group": 64, "symmetric": True},
    {"group": 16},
    {"group": 8},
    {"group": 5},
    {"group": None},
    {"group": None, "symmetric": True},
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_solution(codec: Grouped, rows: int, columns: int, *, order: bool = False, seed: int = 0) -> Solution:
    """Random codes and statistics; nothing is fitted."""
    random = torch.Generator().manual_seed(seed)
    groups = max(1, -(-columns // codec.group)) if codec.group else 1
    params = {"scale": (torch.rand(rows, groups, generator=random) + 0.1).bfloat16()}
    if not codec.symmetric:
        params["zero"] = torch.randint(1 << codec.bits, (rows, groups), generator=random, dtype=torch.uint8)
    codes = torch.randint(1 << codec.bits, (rows, columns), generator=random, dtype=torch.uint8)
    turned = torch.randperm(columns, generator=random) if order else None
    return Solution(codec.grid, codes, params, order=turned)


def operands(codec: Grouped, solutions: list[Solution]) -> list[Tensor]:
    return codec.runtime(codec.stack([codec.encode(s) for s in solutions]))


def check(codec: Grouped, solutions: list[Solution], tokens: list[int], dtype: torch.dtype = torch.float32) -> None:
    packed = codec.stack([codec.encode(s) for s in solutions])
    dense = [s.dense() for s in solutions]
    assert torch.equal(codec.decode(packed), torch.cat(dense))
    # every third column of a wider matrix: not contiguous
    random = torch.Generator().manual_seed(sum(tokens))
    x = torch.randn(sum(tokens), 3 * dense[0].shape[1], generator=random).to(dtype)[:, 1::3]
    starts = torch.tensor([0, *tokens]).cumsum(0)
    y = codec.product(x, starts, codec.runtime(packed), dense[0].shape[0])
    assert (y.dtype, y.shape) == (dtype, (len(x), dense[0].shape[0]))
    for g, w in enumerate(dense):
        those = slice(int(starts[g]), int(starts[g + 1]))
        exact = x[those].double() @ w.double().T
        if exact.numel():
            ulp = torch.finfo(dtype).eps * float(exact.abs().max())
            allowed = 2 * torch_error(dense[0].shape[1], w, dtype, tokens[g] >= 32) + 2 * ulp
            assert float((y[those].double() - exact).abs().max()) <= allowed  # false for NaN


def torch_error(columns: int, w: Tensor, dtype: torch.dtype, many: bool) -> float:
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    # many tokens of 16 bits may meet weights rounded to their dtype, as a dense model's are
    plain = x @ w.to(dtype).T if many else x.float() @ w.T
    return float((plain.double() - x.double() @ w.double().T).abs().max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_a_ragged_matrix(isa: str, bits: int, form: dict):
    codec = Grouped(bits=bits, **form)
    for tokens in (1, 9):
        check(codec, [random_solution(codec, 33, 300, order=tokens == 1)], [tokens])


@pytest.mark.parametrize("rows", [1, 16, 33])
@pytest.mark.parametrize("columns", [1, 31, 33, 517])
def test_every_edge(isa: str, rows: int, columns: int):
    for bits, form in ((3, FORMS[0]), (4, FORMS[4]), (2, FORMS[2]), (5, FORMS[6])):
        codec = Grouped(bits=bits, **form)
        check(codec, [random_solution(codec, rows, columns, order=True)], [1])
        check(codec, [random_solution(codec, rows, columns)], [17])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 17, 33, 300])
def test_any_number_of_tokens_in_every_type(isa: str, tokens: int, dtype: torch.dtype):
    for form in (FORMS[0], FORMS[2]):
        codec = Grouped(bits=3, **form)
        check(codec, [random_solution(codec, 50, 300, order=True)], [tokens], dtype)


def test_groups_take_their_own_tokens_and_some_have_none(isa: str):
    codec = Grouped(bits=4, group=64)
    solutions = [random_solution(codec, 33, 300, order=g % 2 > 0, seed=g) for g in range(7)]
    check(codec, solutions, [0, 1, 0, 5, 300, 17, 0])
    check(codec, solutions, [1, 1, 1, 1, 1, 1, 1])


def test_matrices_without_rows_or_columns(isa: str):
    for bits in (3, 4):
        codec = Grouped(bits=bits, group=16)
        for rows, columns in ((0, 5), (5, 0)):
            solution = random_solution(codec, rows, columns)
            y = codec.product(torch.ones(3, columns), torch.tensor([0, 3]), operands(codec, [solution]), rows)
            assert torch.equal(y, torch.zeros(3, rows))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_whole_numbers_hold_the_largest_sums(isa: str, bits: int):
    """All codes at one end and all of x as large as its unit allows: no sum of whole numbers may overflow."""
    codec = Grouped(bits=bits, group=128)
    plain = random_solution(codec, 17, 300)
    for code in (0, 2**bits - 1):
        solution = Solution(codec.grid, torch.full_like(plain.codes, code), plain.params)
        tensors, w = operands(codec, [solution]), solution.dense().double()
        for size in (1.0, 1.9921, 1.9922, 1.99219, 2 - 2**-23):
            for x in (torch.full((1, 300), size), torch.full((1, 300), -size)):
                y = codec.product(x, torch.tensor([0, 1]), tensors, 17)
                terms = float((x.double().abs() @ w.abs().T).max())
                # far above what float32 rounds; an overflow is thousands of times larger
                assert float((y - x.double() @ w.T).abs().max()) <= 64 * 2**-24 * terms


def test_work_is_the_same_on_any_number_of_threads():
    codec = Grouped(bits=3, group=128)
    tensors = operands(codec, [random_solution(codec, 700, 2083, order=True)])
    before = torch.get_num_threads()
    try:
        for tokens in (1, 3, 20):
            x = torch.randn(tokens, 2083, generator=torch.Generator().manual_seed(3))
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(codec.product(x, torch.tensor([0, tokens]), tensors, 700))
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


def before_a_wall(t: Tensor) -> Tensor:
    """A copy that ends where a page begins that nobody may read."""
    page = mmap.PAGESIZE
    size = -(-max(t.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + page)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=t.nbytes, offset=size - t.nbytes).view(t.dtype)
    return copy.view(t.shape).copy_(t)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as Linux has it")
@pytest.mark.parametrize("bits", BITS)
def test_nothing_behind_the_operands_is_read_whatever_they_say(isa: str, bits: int):
    random = torch.Generator().manual_seed(0)
    for group, columns in ((40, 300), (128, 640), (None, 33)):
        codec = Grouped(bits=bits, group=group)
        *stored, order = operands(codec, [random_solution(codec, 33, columns, order=True)])
        tensors = [before_a_wall(t) for t in stored]
        for _ in range(3):
            for tokens in (1, 3, 18):
                codec.product(torch.ones(tokens, columns), torch.tensor([0, tokens]), [*tensors, order], 33)
            _grouped_cpu.decode([*tensors, order], (bits, group, False), columns)
            for t in tensors:
                t.view(torch.uint8).random_(0, 256, generator=random)


def test_operands_that_do_not_fit_are_refused():
    codec = Grouped(bits=3, group=16)
    good = operands(codec, [random_solution(codec, 33, 300, order=True)])
    x, starts = torch.ones(1, 300), torch.tensor([0, 1])
    for n in range(len(good)):
        for cut in (good[n][..., :-1].contiguous(), good[n][:-1] if n < 3 else good[n].expand(3, -1).contiguous()):
            with pytest.raises(ValueError, match="fit"):
                codec.product(x, starts, [*good[:n], cut, *good[n + 1 :]], 33)
    with pytest.raises(ValueError, match="order names columns"):
        codec.product(x, starts, [*good[:3], good[3] + 1], 33)
    with pytest.raises(ValueError, match="bfloat16"):
        codec.product(x, starts, [good[0], good[1].half(), *good[2:]], 33)
    with pytest.raises(ValueError, match="starts"):
        codec.product(x, torch.tensor([0, 2]), good, 33)
    with pytest.raises(ValueError, match="fit"):
        codec.product(x[:, :-1], starts, good, 33)
    with pytest.raises(Unsupported, match="float64"):
        codec.product(x.double(), starts, good, 33)


def test_torch_knows_the_operator():
    codec = Grouped(bits=3, group=16)
    tensors = operands(codec, [random_solution(codec, 33, 300, order=n > 0, seed=n) for n in range(2)])
    x, starts = torch.randn(5, 300), torch.tensor([0, 2, 5])
    torch.library.opcheck(torch.ops.halfbit.grouped_product, (x, starts, tensors, 33, [3, 16, 0]))
    compiled = torch.compile(lambda x: codec.product(x, starts, tensors, 33), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), codec.product(x, starts, tensors, 33))


def test_gradients_flow_to_the_input():
    codec = Grouped(bits=3, group=16)
    solution = random_solution(codec, 33, 300)
    x = torch.randn(2, 300, requires_grad=True)
    codec.product(x, torch.tensor([0, 2]), operands(codec, [solution]), 33).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, solution.dense().sum(0).expand(2, -1), rtol=1e-5, atol=1e-4)
