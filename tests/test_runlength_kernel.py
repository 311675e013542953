"""Run lengths: the C++ kernels against the reference in torch, byte for byte, and products against float64.

Tolerance of products: the 2x rule. The largest error against float64 is at most twice that of torch's float32 matmul on
the decoded weights, plus two units in the last place of the largest result.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from halfbit import native
from halfbit.errors import FormatError, Unsupported
from halfbit.formats.runlength import reference
from halfbit.formats.runlength.lanes import Lanes
from halfbit.formats.runlength.tables import tables
from halfbit.rotation import signs

if native.extension is None:
    pytest.skip(f"no C++ extension: {native.reason}", allow_module_level=True)

from halfbit.formats.runlength import cpu

set_isa = native.extension.set_isa
# (rows, columns, exponent): several rows to a lane, one, segments of a row, ragged everywhere
CUTS = [(1, 1, 8), (37, 5, 8), (70, 63, 8), (33, 257, 8), (5, 2083, 8), (65, 300, 9), (97, 1000, 12), (2083, 1, 8)]
TOKENS = [0, 1, 2, 5, 8, 16, 17, 32, 33, 40]


def _has(name: str) -> bool:
    try:
        set_isa(name)
    except ValueError:
        return False
    finally:
        set_isa("best")
    return True


@pytest.fixture(params=[name for name in ("portable", "avx2", "avx512") if _has(name)])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    set_isa(request.param)
    assert native.isa() == request.param
    yield request.param
    set_isa("best")


def ternary(rows: int, columns: int, zeros: float = 0.886, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(1, 3, (rows, columns), generator=random)
    return torch.where(torch.rand(rows, columns, generator=random) < zeros, 0, signs).to(torch.uint8)


def random_levels(rows: int) -> Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))


def offsets_of(tile_bytes: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), tile_bytes.to(torch.int64).cumsum(0)])


def check_product(
    x: Tensor, starts: Tensor, matrices: list[Tensor], exponents: list[int], opposite: bool = False
) -> None:
    out, columns = matrices[0].shape
    levels = random_levels(out * len(matrices))
    if opposite:
        levels[:, 0] = -levels[:, 1]
    parts = [cpu.encode(m, Lanes(out, columns, k)) for m, k in zip(matrices, exponents, strict=True)]
    stream, tile_bytes, of_tile = (torch.cat(t) for t in zip(*parts, strict=True))
    k = torch.tensor(exponents, dtype=torch.uint8)
    y = cpu.product(x, starts, stream, offsets_of(tile_bytes), of_tile, k, levels, tables().entries, signs(0), out)
    exact, plain = torch.empty(len(x), out, dtype=torch.float64), torch.empty(len(x), out)
    for g, m in enumerate(matrices):
        those = slice(int(starts[g]), int(starts[g + 1]))
        w = reference.values(m, levels[g * out : (g + 1) * out])
        exact[those], plain[those] = x[those].double() @ w.double().T, x[those].float() @ w.T
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    if y.numel():
        ulp = torch.finfo(x.dtype).eps * float(exact.abs().max())
        assert float((y - exact).abs().max()) <= 2 * float((plain - exact).abs().max()) + 2 * ulp  # false for NaN


@pytest.mark.parametrize("zeros", [0.0, 0.6, 0.886, 0.999, 1.0])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_bytes_are_those_of_the_reference_and_it_decodes_them(cut: tuple[int, int, int], zeros: float):
    lanes = Lanes(*cut)
    codes = ternary(lanes.rows, lanes.columns, zeros, seed=lanes.columns)
    encoded = cpu.encode(codes, lanes)
    for ours, theirs in zip(encoded, reference.encode(codes, lanes), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    stream, tile_bytes, of_tile = encoded
    assert torch.equal(reference.decode(stream, offsets_of(tile_bytes), of_tile, tables().entries, lanes), codes)


@pytest.mark.parametrize("cut", [*CUTS, (40, 3000, 14), (300, 77, 14), (40, 20000, 14)], ids=str)
def test_decoding_inverts_encoding(isa: str, cut: tuple[int, int, int]):
    lanes = Lanes(*cut)
    for zeros in (0.0, 0.3, 0.6, 0.886, 0.97, 0.999, 1.0):
        codes = ternary(lanes.rows, lanes.columns, zeros, seed=lanes.columns)
        stream, tile_bytes, of_tile = cpu.encode(codes, lanes)
        assert torch.equal(cpu.decode(stream, offsets_of(tile_bytes), of_tile, tables().entries, lanes), codes)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_product_equals_the_decoded_product(isa: str, cut: tuple[int, int, int], tokens: int):
    rows, columns, exponent = cut
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    for opposite in (False, True):
        check_product(x, torch.tensor([0, tokens]), [ternary(rows, columns, seed=tokens)], [exponent], opposite)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.99, 1.0])
def test_any_share_of_zeros(isa: str, zeros: float):
    x = torch.randn(3, 700, generator=torch.Generator().manual_seed(9))
    for tokens in (1, 3):
        for opposite in (False, True):
            check_product(x[:tokens], torch.tensor([0, tokens]), [ternary(40, 700, zeros)], [9], opposite)


def test_groups_take_their_own_tokens_and_have_their_own_lanes(isa: str):
    starts = torch.tensor([0, 0, 1, 1, 6, 15, 32, 72, 72])
    x = torch.randn(72, 300, generator=torch.Generator().manual_seed(0))
    matrices = [ternary(70, 300, 0.5 + 0.06 * g, seed=g) for g in range(8)]
    check_product(x, starts, matrices, [8, 9, 10, 11, 12, 13, 14, 8])


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e-20, 1e30, 3e36])
def test_one_token_of_any_magnitude(isa: str, scale: float):
    x = torch.randn(1, 2083, generator=torch.Generator().manual_seed(3)).clamp(-3, 3) * scale
    for first in (1.0, 1e4):  # one number may be far above the others
        x[0, 0] *= first if scale < 1e30 else 1
        # few enough that float32 holds the sums
        check_product(x, torch.tensor([0, 1]), [ternary(40, 2083, 0.99)], [11], opposite=True)


def test_one_token_is_summed_to_the_same_numbers_by_any_instructions():
    codes, lanes = ternary(70, 3000), Lanes(70, 3000, 11)
    stream, tile_bytes, of_tile = cpu.encode(codes, lanes)
    k, levels = torch.tensor([11], dtype=torch.uint8), random_levels(70)
    levels[:, 0] = -levels[:, 1]
    x, starts = torch.randn(1, 3000, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 1])
    found = []
    for name in ("portable", "best"):
        try:
            set_isa(name)
            args = stream, offsets_of(tile_bytes), of_tile, k, levels, tables().entries, signs(0), 70
            found.append(cpu.product(x, starts, *args))
        finally:
            set_isa("best")
    assert torch.equal(*found)
    exact = x.double() @ reference.values(codes, levels).double().T
    assert torch.equal(found[0], exact.float()) or float((found[0] - exact).abs().max() / exact.abs().max()) < 1e-7


@pytest.mark.parametrize("what", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_comes_out_where_it_is_multiplied(isa: str, what: float):
    codes, lanes = ternary(40, 600), Lanes(40, 600, 10)
    stream, tile_bytes, of_tile = cpu.encode(codes, lanes)
    levels = torch.tensor([-0.5, 0.5]).repeat(40, 1)
    x = torch.ones(1, 600)
    x[0, 77] = what
    k, starts = torch.tensor([10], dtype=torch.uint8), torch.tensor([0, 1])
    y = cpu.product(x, starts, stream, offsets_of(tile_bytes), of_tile, k, levels, tables().entries, signs(0), 40)[0]
    meets = codes[:, 77] != 0
    assert 0 < int(meets.sum()) < 40
    assert torch.equal(y.isfinite(), ~meets)
    if what == what:
        assert torch.equal(y[meets].sign(), torch.where(codes[meets, 77] == 2, 1.0, -1.0) * (1 if what > 0 else -1))
    else:
        assert y[meets].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_rounded_once(isa: str, dtype: torch.dtype):
    x = torch.randn(5, 1001, generator=torch.Generator().manual_seed(2)).to(dtype)
    check_product(x, torch.tensor([0, 5]), [ternary(40, 1001)], [10])


def test_work_is_the_same_on_any_number_of_threads_and_x_need_not_be_contiguous():
    lanes = Lanes(2000, 2083, 11)
    stream, tile_bytes, of_tile = cpu.encode(ternary(2000, 2083), lanes)
    x = torch.randn(2083, 20, generator=torch.Generator().manual_seed(3)).T
    operands = stream, offsets_of(tile_bytes), of_tile, torch.tensor([11], dtype=torch.uint8)
    arguments = torch.tensor([0, 20]), *operands, random_levels(2000), tables().entries, signs(0), 2000
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = cpu.product(x, *arguments)
        torch.set_num_threads(2)
        assert torch.equal(cpu.product(x.contiguous(), *arguments), alone)
        assert torch.equal(cpu.encode(ternary(2000, 2083), lanes)[0], stream)
    finally:
        torch.set_num_threads(before)


def test_damaged_bytes_raise_and_never_read_beyond(isa: str):
    lanes = Lanes(70, 300, 8)
    stream, tile_bytes, of_tile = cpu.encode(ternary(70, 300), lanes)
    offsets, entries = offsets_of(tile_bytes), tables().entries
    k, levels = torch.tensor([8], dtype=torch.uint8), random_levels(70)
    opposite = torch.stack([-levels[:, 1], levels[:, 1]], 1)
    random = torch.Generator().manual_seed(4)
    for _ in range(50):
        damaged = stream.clone()
        at = torch.randint(len(stream), (20,), generator=random)
        damaged[at] = torch.randint(256, (20,), generator=random, dtype=torch.uint8)
        for tokens, values in ((1, levels), (9, levels), (1, opposite)):
            x, starts = torch.ones(tokens, 300), torch.tensor([0, tokens])
            with pytest.raises(FormatError, match=r"tile \d+: does not end as it must"):
                cpu.product(x, starts, damaged, offsets, of_tile, k, values, entries, signs(0), 70)
        with pytest.raises(FormatError, match=r"tile \d+: does not end as it must"):
            cpu.decode(damaged, offsets, of_tile, entries, lanes)
        with pytest.raises(FormatError, match=r"tile \d+ takes \d+ bytes of"):
            reference.decode(damaged, offsets, of_tile, entries, lanes)
    for wrong in (offsets + 1, offsets.flip(0), offsets.clamp(max=20)):
        with pytest.raises(FormatError, match=r"tile \d+"):
            cpu.decode(stream, wrong, of_tile, entries, lanes)
    with pytest.raises(FormatError, match="class"):
        cpu.decode(stream, offsets, of_tile + 64, entries, lanes)


def test_what_it_cannot_do_is_said():
    stream, tile_bytes, of_tile = cpu.encode(ternary(4, 9), Lanes(4, 9, 8))
    operands = stream, offsets_of(tile_bytes), of_tile, torch.tensor([8], dtype=torch.uint8), random_levels(4)
    with pytest.raises(Unsupported, match="float64"):
        cpu.product(torch.ones(1, 9).double(), torch.tensor([0, 1]), *operands, tables().entries, signs(0), 4)
    with pytest.raises(ValueError, match="starts"):
        cpu.product(torch.ones(2, 9), torch.tensor([0, 1]), *operands, tables().entries, signs(0), 4)
    with pytest.raises(ValueError, match="tables"):
        cpu.product(torch.ones(1, 9), torch.tensor([0, 1]), *operands, torch.zeros_like(tables().entries), signs(0), 4)
    with pytest.raises(ValueError, match="tiles"):
        cpu.product(torch.ones(1, 2000), torch.tensor([0, 1]), *operands, tables().entries, signs(0), 4)
    with pytest.raises(ValueError, match="fit together"):
        cpu.product(torch.ones(1, 9), torch.tensor([0, 1]), *operands, tables().entries, signs(8), 4)
    with pytest.raises(ValueError, match="codes must be"):
        cpu.encode(torch.full((1, 4), 3, dtype=torch.uint8), Lanes(1, 4, 8))


def test_other_tensors_than_expected_are_refused():
    lanes = Lanes(3, 40, 8)
    stream, tile_bytes, of_tile = cpu.encode(ternary(3, 40), lanes)
    k = torch.tensor([8], dtype=torch.uint8)
    good = [
        torch.tensor([0, 1]),
        stream,
        offsets_of(tile_bytes),
        of_tile,
        k,
        random_levels(3),
        tables().entries,
        signs(40),
    ]
    assert cpu.product(torch.ones(1, 40), *good, out_features=3).shape == (1, 3)
    for n, tensor in enumerate(good):
        others = {
            "another dtype": tensor.double(),
            "strides": torch.stack([tensor, tensor], -1)[..., 0],
            "another dimension": tensor[None],
        }
        for what, other in others.items():
            if other.numel() == 1 and what == "strides":
                continue  # one number has no strides
            operands = [*good[:n], other, *good[n + 1 :]]
            with pytest.raises(ValueError, match=r"expected a contiguous tensor of \d dim.*got \d+ bits.*stride"):
                cpu.product(torch.ones(1, 40), *operands, out_features=3)
