"""Run lengths: how near the bytes come to the entropy, the tables, how matrices are cut, and what damage is called."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halfbit.errors import FormatError, RecipeError, Unsupported
from halfbit.formats.runlength import RunLength
from halfbit.formats.runlength.lanes import LANES, Lanes
from halfbit.formats.runlength.tables import CLASSES, ONE, SKIP, SLOTS, classes, densities, tables
from halfbit.grids.deadzone import Deadzone
from halfbit.grids.ternary import Ternary
from halfbit.types import Packed, Solution


def deadzone(nonzeros: Tensor, scale_bits: int = 5, seed: int = 0) -> Solution:
    """Codes that are not zero with these probabilities `[rows, columns]`, of either sign; scales of all sizes."""
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(1, 3, nonzeros.shape, generator=random)
    codes = torch.where(torch.rand(nonzeros.shape, generator=random) < nonzeros, signs, 0).to(torch.uint8)
    grid = Deadzone(scale_bits)
    params = grid.store(torch.rand(len(nonzeros), generator=random) + 0.1)
    return Solution(grid, codes, {key: value[:, None] for key, value in params.items()})


def entropy(codes: Tensor) -> float:
    """Bits per weight of independent symbols as frequent as these."""
    share = torch.bincount(codes.flatten(), minlength=3).double() / codes.numel()
    return float(torch.special.entr(share).sum()) / math.log(2)


def ratio(solution: Solution) -> float:
    packed = RunLength(scale_bits=5).encode(solution)
    assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors.values())
    assert torch.equal(RunLength().decode(packed), solution.dense())
    return packed.bits_per_weight / entropy(solution.codes)


@pytest.mark.parametrize("zeros", [0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.886, 0.92, 0.95, 0.97])
def test_bytes_are_near_the_entropy_with_everything_counted(zeros: float):
    # from 97 % on a row of 2048 is no more than 460 bits, of which a lane's own are 16
    assert ratio(deadzone(torch.full((1024, 2048), 1 - zeros))) <= (1.035 if zeros <= 0.95 else 1.05)
    assert ratio(deadzone(torch.full((384, 256), 1 - zeros))) <= 1.12


def test_bytes_are_near_the_entropy_of_the_mixture_where_density_varies():
    random = torch.Generator().manual_seed(1)
    by_row = 0.114 * (2 / 3 + 2 / 3 * torch.rand(1024, 1, generator=random))
    by_column = 0.114 * (2 / 3 + 2 / 3 * torch.rand(1, 2048, generator=random))
    for nonzeros in (by_row.expand(1024, 2048), by_column.expand(1024, 2048), by_row * by_column / 0.114):
        assert ratio(deadzone(nonzeros)) <= 1.03
    # where neighbouring rows are alike, their tile has a table of its own: below the entropy of the mixture
    steep = torch.logspace(math.log10(0.02), math.log10(0.5), 1024)[:, None]
    assert ratio(deadzone(steep.expand(1024, 2048))) <= 0.93


def test_columns_that_are_dense_together_cost_little_more_than_elsewhere():
    nonzeros = torch.full((512, 2048), 0.05)
    nonzeros[:, 700:900] = 0.5
    assert ratio(deadzone(nonzeros)) <= 1.03


@pytest.mark.parametrize("number", range(CLASSES))
def test_tables_hold_every_gap_and_are_near_the_best(number: int):
    of = tables()
    gaps, slots = int(of.gaps[number]), of.slots[number]
    there = [*range(2 * gaps), SKIP]
    assert (slots[there] > 0).all()
    assert int(slots.sum()) == SLOTS
    assert int(slots.max()) < SLOTS  # X < slots * 256 must fit in 16 bits
    p = densities()[number] / ONE
    probable = torch.tensor([p * (1 - p) ** (s // 2) / 2 for s in range(2 * gaps)] + [(1 - p) ** gaps]).double()
    weights = torch.tensor([s // 2 + 1 for s in range(2 * gaps)] + [gaps]).double()
    bits = float(-(probable * (slots[there] / SLOTS).log2()).sum() / (probable * weights).sum())
    best = p - p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert bits / best + 1e-9 >= 1
    if p > 0.01:
        assert bits / best <= 1.01
    # the entries say the same slot by slot
    entries = of.entries[number].to(torch.int64)
    for symbol in there:
        mine = entries[int(of.first[number, symbol]) :][: int(slots[symbol])]
        expected = (gaps, 0) if symbol == SKIP else (symbol // 2 + 1, symbol % 2 + 1)
        assert (mine & 255 == slots[symbol]).all()
        assert (mine >> 8 & 255).tolist() == list(range(len(mine)))
        assert {((e >> 16) & 255, e >> 24) for e in mine.tolist()} == {expected}


def test_tables_never_change():
    """Every file depends on them."""
    assert hashlib.sha256(tables().entries.numpy().astype("<i4").tobytes()).hexdigest() == HASH_OF_TABLES


def test_old_bytes_still_decode():
    codes = torch.tensor([[0, 0, 1, 0, 2, 0, 0, 0, 0, 1], [2, 1, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 10], dtype=torch.uint8)
    params = {"scale_codes": torch.tensor([[0], [31], [7]], dtype=torch.uint8)}
    params["scale_grid"] = torch.tensor([[[0.5, 0.25]]], dtype=torch.bfloat16)
    solution = Solution(Deadzone(5), codes, params)
    packed = RunLength().encode(solution)
    assert bytes(packed.tensors["stream"].tolist()).hex() == GOLDEN_STREAM
    assert packed.tensors["tile_classes"].tolist() == [13]
    assert torch.equal(RunLength().decode(packed), solution.dense())


def test_a_class_is_the_nearest_density():
    p = torch.tensor(densities(), dtype=torch.float64) / ONE
    assert classes((p * 2**20).round().to(torch.int64), torch.tensor(2**20)).tolist() == list(range(CLASSES))
    assert classes(torch.tensor([0, 2**20]), torch.tensor(2**20)).tolist() == [CLASSES - 1, 0]


@pytest.mark.parametrize("exponent", [8, 11])
@pytest.mark.parametrize("columns", [1, 3, 255, 256, 257, 1000, 20000])
@pytest.mark.parametrize("rows", [1, 31, 33, 100])
def test_lines_hold_every_weight_once(rows: int, columns: int, exponent: int):
    lanes = Lanes(rows, columns, exponent)
    numbers = torch.arange(1, rows * columns + 1).view(rows, columns)
    lines, lengths = lanes.lines(numbers), lanes.lengths(numbers.device)
    assert torch.equal(lanes.matrix(lines), numbers)
    assert lines.shape == (lanes.tiles, LANES, lanes.height * lanes.width)
    within = torch.arange(lines.shape[2]) < lengths[:, :, None]
    assert torch.equal(lines[within].sort().values, numbers.flatten())
    assert not lines[~within].any()
    assert lengths.max() <= 2**exponent
    # lanes of a tile that are not there come last
    assert ((lengths > 0).int().diff(dim=1) <= 0).all()


@pytest.mark.parametrize("lane", [256, 16384])
def test_matrices_with_lanes_of_their_own_are_stacked_and_cut(lane: int):
    codecs = [RunLength(), RunLength(lane=lane), RunLength()]
    solutions = [deadzone(torch.full((70, 300), p), seed=n) for n, p in enumerate((0.5, 0.1, 0.001))]
    parts = [c.encode(s) for c, s in zip(codecs, solutions, strict=True)]
    whole = RunLength().stack(parts)
    assert torch.equal(RunLength().decode(whole), torch.cat([s.dense() for s in solutions]))
    for number, part in enumerate(parts):
        cut = RunLength().part(whole, number, 3)
        assert all(torch.equal(cut.tensors[name], part.tensors[name]) for name in RunLength().parts)
    with pytest.raises(ValueError, match="has 3 matrices, not 2"):
        RunLength().part(whole, 0, 2)


def test_what_it_cannot_store_is_refused():
    solution = deadzone(torch.full((3, 8), 0.1))
    with pytest.raises(Unsupported, match=r"stores the grid Deadzone\(scale_bits=4, .*got Deadzone\(scale_bits=5"):
        RunLength(scale_bits=4).encode(solution)
    with pytest.raises(Unsupported, match="neither outliers nor a column order"):
        RunLength().encode(replace(solution, order=torch.arange(8)))
    with pytest.raises(Unsupported, match="codes must be 0, 1 or 2, got 3"):
        RunLength().encode(replace(solution, codes=solution.codes.clamp(max=0) + 3))
    exact = Solution(Ternary("float32"), solution.codes, {"levels": torch.ones(3, 1, 2)})
    with pytest.raises(Unsupported, match="got Ternary"):
        RunLength(scale_bits=0).encode(exact)
    with pytest.raises(RecipeError, match="scale_bits must be 2 to 8, or 0"):
        RunLength(scale_bits=9)
    with pytest.raises(RecipeError, match="lane must be a power of two"):
        RunLength(lane=1000)


@pytest.mark.parametrize(
    ("part", "damage", "says"),
    [
        ("stream", lambda t: t ^ torch.tensor([64] + [0] * (len(t) - 1), dtype=torch.uint8), "does not end as it must"),
        ("stream", lambda t: t ^ torch.tensor([0] * (len(t) - 1) + [1], dtype=torch.uint8), "does not end as it must"),
        ("stream", lambda t: t * 0, "does not end as it must"),
        ("stream", lambda t: t[:-1], "the tiles have .* bytes, the file"),
        ("stream", lambda t: t[None], "stream must have shape"),
        ("tile_bytes", lambda t: t + torch.tensor([1, -1, 0]).int(), "does not end as it must"),
        ("tile_bytes", lambda t: torch.stack([-t[0], t[1] + 2 * t[0], t[2]]), "the tiles have"),
        ("tile_bytes", lambda t: t[:1], "tile_bytes must have shape"),
        ("tile_bytes", lambda t: t.long(), "tile_bytes must be torch.int32"),
        ("tile_classes", lambda t: t + 64, "classes must be below 64"),
        ("tile_classes", lambda t: t - 1, "does not end as it must"),
        ("exponents", lambda t: t + 7, "exponents must be 8 to 14"),
        ("exponents", lambda t: t * 0, "exponents must be 8 to 14"),
        ("exponents", lambda t: t - 2, "tile_bytes must have shape"),
        ("exponents", lambda t: t.repeat(3), "70 rows are not 3 matrices"),
        ("exponents", lambda t: t[:0], "exponents must have shape"),
        ("scale_codes", lambda t: t | 128, "unused bits"),
        ("scale_codes", lambda t: t[:, 1:], "scale_codes must have shape"),
        ("scale_grid", lambda t: t * torch.nan, "NaN or infinity"),
        ("scale_grid", lambda t: t * 0 + 3e38, "a scale is infinite"),
        ("scale_grid", lambda t: t[:0], "scale_grid must have shape"),
        ("levels", lambda t: torch.zeros(70, 2, dtype=t.dtype), "levels must have shape"),
    ],
)
def test_damaged_tensors_are_named(part: str, damage: Callable[[Tensor], Tensor], says: str):
    packed = RunLength().encode(deadzone(torch.full((70, 1500), 0.1)))
    RunLength().check(packed)
    damaged = Packed(packed.codec, packed.shape, packed.tensors | {part: damage(packed.tensors[part])})
    with pytest.raises(FormatError, match=says) as caught:
        RunLength().check(damaged)
    assert caught.value.tensor in (part, {"exponents": "tile_bytes"}.get(part, "stream"), "tile_bytes")


def test_damaged_levels_are_found():
    solution = deadzone(torch.full((70, 300), 0.1))
    packed = RunLength(0).encode(Solution(Ternary(), solution.codes, {"levels": torch.ones(70, 1, 2).bfloat16()}))
    levels = packed.tensors["levels"] / 0
    with pytest.raises(FormatError, match="levels has NaN or infinity"):
        packed.codec.check(Packed(packed.codec, packed.shape, packed.tensors | {"levels": levels}))


def test_the_operator_is_known_to_torch_compile():
    solutions = [deadzone(torch.full((7, 33), 0.1), seed=n) for n in range(2)]
    tensors = RunLength().runtime(RunLength().stack([RunLength().encode(s) for s in solutions]))
    arguments = (torch.randn(5, 33), torch.tensor([0, 2, 5]), tensors, 7)
    torch.library.opcheck(torch.ops.halfbit.runlength_product.default, arguments)


HASH_OF_TABLES = "61fc8bcb153727ce3a8c4ad05fe948a574c7f2977914554c947fcb2cd3c7dd89"
GOLDEN_STREAM = "54023c1dfe"
