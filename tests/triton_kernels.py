"""Triton's kernels against the definition, of every format that has some: on a GPU, or interpreted on the CPU.

`test_triton.py` runs this file with TRITON_INTERPRET=1, in a process of its own, since Triton looks at the variable
when it is imported; on a machine with a GPU run it as it is: `pytest tests/triton_kernels.py`. Outputs are poisoned
with NaN first, x is not contiguous, sizes are odd. The interpreter is slow, so that everything is small.
"""

from collections.abc import Iterator
from dataclasses import replace

import conformance
import pytest
import torch
from torch import Tensor

from halfbit import registry, triton_support
from halfbit.errors import Unsupported
from halfbit.grids.deadzone import Deadzone
from halfbit.grids.ternary import Ternary
from halfbit.types import Codec, Packed, Solution

if triton_support.why_not():
    pytest.skip(triton_support.why_not(), allow_module_level=True)

from halfbit.formats import _grid_triton
from halfbit.formats._triton_parts import add_parts
from halfbit.formats.grouped import Grouped
from halfbit.formats.spqr import SpQR

DEVICE = torch.device("cpu" if triton_support.INTERPRETED else "cuda")
CODECS = [c for c in conformance.codecs() if triton_support.has_kernels(c.name)]
# of the first shape every number of tokens, of a whole one a few
SHAPES = {(21, 70): [0, 1, 2, 3, 17, 33], (16, 64): [1, 5]}
# what is decoded one symbol after another takes long to interpret
SMALL_SHAPES = {(3, 25): [0, 1, 2, 3, 17, 33], (5, 12): [1, 5]}
SERIAL = ("runlength",)
SHARE_OF_ZEROS = 0.8


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def stacked(codec: Codec, rows: int, columns: int, count: int = 1) -> tuple[Packed, list[Tensor]]:
    """A stack on the device, and what its matrices decode to: the richest kind of solution that the codec stores."""
    solutions: list[Solution] = []
    for seed in range(count):
        *_, last = conformance.solutions_for(codec, rows, columns, seed)
        if isinstance(last.grid, Ternary | Deadzone):
            # fewer symbols take less time to interpret
            zero = torch.rand(last.codes.shape, generator=torch.Generator().manual_seed(seed)) < SHARE_OF_ZEROS
            last = replace(last, codes=last.codes.masked_fill(zero, 0))
        solutions.append(last)
    whole = codec.stack([codec.encode(s) for s in solutions])
    moved = {name: t.to(DEVICE) for name, t in whole.tensors.items()}
    return Packed(codec, whole.shape, moved), [s.dense().to(DEVICE) for s in solutions]


def tokens_of(count: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Every second column of a wider tensor."""
    random = torch.Generator().manual_seed(count)
    return torch.randn(count, 2 * columns, generator=random).to(DEVICE, dtype)[:, ::2]


def check(y: Tensor, x: Tensor, w: Tensor) -> None:
    """The error against float64 is at most twice that of torch's product in the dtype of x."""
    assert (y.dtype, y.shape) == (x.dtype, (x.shape[0], w.shape[0]))
    if not y.numel():
        return
    exact = x.double() @ w.double().T
    plain = (x @ w.to(x.dtype).T).double()
    allowed = 2 * (plain - exact).abs().max() + 2 * torch.finfo(x.dtype).eps * exact.abs().max()
    assert float((y.double() - exact).abs().max()) <= float(allowed)  # false for NaN


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_product_of_one_matrix(codec: Codec):
    shapes = SMALL_SHAPES if codec.name in SERIAL else SHAPES
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for number, ((rows, columns), numbers) in enumerate(shapes.items()):
        packed, (w,) = stacked(codec, rows, columns)
        operands = codec.runtime(packed)
        for turn, tokens in enumerate(numbers):
            # each number of tokens in one dtype, which is another one for the next codec
            x = tokens_of(tokens, columns, dtypes[(turn + number + CODECS.index(codec)) % 3])
            check(codec.product(x, torch.tensor([0, tokens]), operands, rows), x, w)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_product_of_several_matrices_with_starts_on_the_device(codec: Codec):
    rows, columns = (3, 24) if codec.name in SERIAL else (21, 40)
    counts = [3, 0, 1, 7]
    dtype = (torch.float16, torch.float32, torch.bfloat16)[CODECS.index(codec) % 3]
    packed, matrices = stacked(codec, rows, columns, len(counts))
    starts = torch.tensor([0, *counts]).cumsum(0)
    # two tokens more than any matrix takes: what is said of them is undefined
    x = tokens_of(sum(counts) + 2, columns, dtype)
    y = codec.product(x, starts.to(DEVICE), codec.runtime(packed), rows)
    assert y.shape == (sum(counts) + 2, rows)
    for g, w in enumerate(matrices):
        those = slice(int(starts[g]), int(starts[g + 1]))
        check(y[those], x[those], w)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_lookup(codec: Codec):
    packed, (w,) = stacked(codec, 37, 70)
    rows = torch.tensor([36, 0, 5, 5, 17], device=DEVICE)
    try:
        found = codec.lookup(rows, codec.runtime(packed), 70)
    except Unsupported:
        return
    assert found.dtype == torch.float32
    assert torch.equal(found, w[rows])


@pytest.mark.parametrize("codec", [SpQR(), Grouped(3)], ids=repr)
def test_very_many_tokens_go_through_the_librarys_product(codec: Codec, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_grid_triton, "DENSE_TOKENS", 5)
    # two parts of 64 rows
    monkeypatch.setattr(_grid_triton, "DENSE_BYTES", 0)
    packed, (w,) = stacked(codec, 69, 70)
    for dtype in (torch.float32, torch.bfloat16):
        x = tokens_of(5, 70, dtype)
        check(codec.product(x, torch.tensor([0, 5]), codec.runtime(packed), 69), x, w)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_what_kernels_cannot_do_is_said(codec: Codec):
    packed, _ = stacked(codec, 16, 64)
    operands = codec.runtime(packed)
    for x in (torch.ones(1, 64, dtype=torch.float64), torch.ones(1, 63), torch.ones(64)):
        with pytest.raises(Unsupported, match=codec.name):
            codec.product(x.to(DEVICE), torch.tensor([0, 1]), operands, 16)


def test_every_registered_format_says_whether_it_has_kernels():
    for name in registry.names("formats"):
        found = triton_support.backend(name, torch.empty(0, device=DEVICE))
        assert (found is not None) == triton_support.has_kernels(name)


def test_parts_are_added_in_their_order():
    parts = torch.randn(5, 3, 701, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    assert torch.equal(add_parts(parts, torch.float32), total)
    # the interpreter cuts off what a GPU rounds
    assert ((add_parts(parts, torch.bfloat16).float() - total).abs() <= total.abs() / 128).all()
    assert add_parts(parts[:, :, :0].contiguous(), torch.float32).shape == (3, 0)
