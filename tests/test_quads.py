"""Quads: C++ against the reference in torch byte for byte, products against float64 (the 2x rule), sizes, damage."""

import pytest
import torch
from torch import Tensor

from halfbit.errors import FormatError, Unsupported
from halfbit.formats.quads import Quads, reference, tiles
from halfbit.formats.runlength import RunLength
from halfbit.grids.deadzone import Deadzone
from halfbit.rotation import signs
from halfbit.types import Solution

SHAPES = [(1, 1), (3, 5), (33, 257), (5, 2083), (65, 2304), (40, 300)]


def ternary(rows: int, columns: int, zeros: float = 0.886, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    either = torch.randint(1, 3, (rows, columns), generator=random)
    return torch.where(torch.rand(rows, columns, generator=random) < zeros, 0, either).to(torch.uint8)


def deadzone(codes: Tensor) -> Solution:
    params = Deadzone(5).store(torch.rand(len(codes), generator=torch.Generator().manual_seed(1)) + 0.1)
    return Solution(Deadzone(5), codes, {key: value[:, None] for key, value in params.items()})


@pytest.mark.parametrize("zeros", [0.6, 0.8, 0.886, 0.95, 0.99])
def test_it_costs_at_most_a_quarter_of_a_bit_more_than_the_smallest(zeros: float):
    solution = deadzone(ternary(512, 2048, zeros))
    fast, small = Quads().encode(solution), RunLength().encode(solution)
    assert fast.nbytes == sum(t.numel() * t.element_size() for t in fast.tensors.values())
    p = 1 - zeros
    assert fast.bits_per_weight == pytest.approx(0.25 + 1 - (1 - p) ** 4 + p, abs=0.02)
    assert small.bits_per_weight < fast.bits_per_weight <= small.bits_per_weight + 0.25


def test_groups_are_where_the_drawing_says():
    codes = torch.zeros(1, 512, dtype=torch.uint8)
    # group 4 * 3 + 2, its bit 1, of the second block; group 63 of the first
    codes[0, 256 + 64 * 2 + 16 + 3], codes[0, 255] = 2, 1
    masks, patterns, plus, count = reference.encode(codes)
    assert masks.tolist() == [[-(1 << 63), 1 << 14]]
    assert (patterns.tolist(), plus.tolist(), count.tolist()) == ([8 | 2 << 4], [2], [2])


@pytest.mark.parametrize("zeros", [0.0, 0.886, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_reference_and_it_decodes_them(isa: str, shape: tuple[int, int], zeros: float):
    from halfbit.formats.quads import cpu

    codes = ternary(*shape, zeros)
    ours, theirs = cpu.encode(codes), reference.encode(codes)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    at = tiles.offsets(ours[0][None], ours[3])
    assert torch.equal(cpu.decode(*ours[:3], at, shape[1]), codes)
    assert torch.equal(reference.decode(*ours[:3], at, shape[1]), codes)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 5, 17, 32, 33, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_equals_the_decoded_product(isa: str, shape: tuple[int, int], tokens: int):
    from halfbit.formats.quads import cpu

    out, columns = shape
    random = torch.Generator().manual_seed(tokens)
    # a matrix without tokens, one token, the rest
    counts = [0, min(1, tokens), max(0, tokens - 1)]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    matrices = [ternary(out, columns, zeros, seed=n) for n, zeros in enumerate((0.5, 0.886, 0.7))]
    levels, x = torch.randn(3 * out, 2, generator=random), torch.randn(tokens, columns, generator=random)
    masks, patterns, plus, count = zip(*map(cpu.encode, matrices), strict=True)
    stored = torch.stack(masks), torch.cat(patterns), torch.cat(plus)
    y = cpu.product(x, starts, *stored, *tiles.offsets(stored[0], torch.cat(count)), levels, signs(0), out)
    exact, plain = torch.empty(tokens, out, dtype=torch.float64), torch.empty(tokens, out)
    for g, m in enumerate(matrices):
        those = slice(int(starts[g]), int(starts[g + 1]))
        w = reference.values(m, levels[g * out : (g + 1) * out])
        exact[those], plain[those] = x[those].double() @ w.double().T, x[those] @ w.T
    if y.numel():
        ulp = torch.finfo(torch.float32).eps * float(exact.abs().max())
        assert float((y - exact).abs().max()) <= 2 * float((plain - exact).abs().max()) + 2 * ulp


def test_the_number_of_threads_changes_nothing():
    codec = Quads()
    operands = codec.runtime(codec.encode(deadzone(ternary(700, 2083))))
    before = torch.get_num_threads()
    try:
        for tokens in (1, 40):
            x = torch.randn(2083, tokens).T
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(codec.product(x, torch.tensor([0, tokens]), operands, 700))
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


def test_damage_raises_or_stays_inside(isa: str):
    codec = Quads()
    packed = codec.encode(deadzone(ternary(70, 300)))
    masks, patterns, plus, *at, levels, none = codec.runtime(packed)
    random = torch.Generator().manual_seed(4)
    for _ in range(50):
        damaged = patterns.clone()
        damaged[torch.randint(len(patterns), (20,), generator=random)] = 255
        for tokens in (1, 40):
            arguments = torch.ones(tokens, 300), torch.tensor([0, tokens])
            with pytest.raises(FormatError, match=r"tile \d+"):
                codec.product(*arguments, [masks, damaged, plus, *at, levels, none], 70)
    # all bits of a group that ends behind the last column: the product takes zeros for it, decoding says so
    last = masks.clone()
    last[:, :, -1] = -1
    with pytest.raises(FormatError, match="groups behind column 300"):
        codec.check(type(packed)(codec, packed.shape, packed.tensors | {"masks": last}))
    for wrong in (at[0] + 1, at[0].flip(0), at[0] * 100):
        with pytest.raises(FormatError, match=r"tile \d+"):
            codec.product(
                torch.ones(1, 300), torch.tensor([0, 1]), [masks, patterns, plus, wrong, at[1], levels, none], 70
            )


def test_what_it_cannot_do_is_said(isa: str):
    codec = Quads()
    operands = codec.runtime(codec.encode(deadzone(ternary(4, 9))))
    with pytest.raises(Unsupported, match="float64"):
        codec.product(torch.ones(1, 9).double(), torch.tensor([0, 1]), operands, 4)
    with pytest.raises(ValueError, match="starts"):
        codec.product(torch.ones(2, 9), torch.tensor([0, 1]), operands, 4)
    with pytest.raises(ValueError, match="masks"):
        codec.product(torch.ones(1, 300), torch.tensor([0, 1]), operands, 4)
