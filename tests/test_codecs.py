from collections.abc import Callable
from dataclasses import replace

import conformance
import pytest
import torch
from torch import Tensor

from halfbit import formats
from halfbit.errors import FormatError, RecipeError, UnknownName, Unsupported
from halfbit.formats import _order
from halfbit.formats.grouped import Grouped
from halfbit.formats.qmoe import QMoE, reference
from halfbit.grids.affine import Affine
from halfbit.grids.ternary import Ternary
from halfbit.types import Codec, Outliers, Packed, Solution

all_codecs = pytest.mark.parametrize("codec", conformance.codecs(), ids=repr)


def ternary(rows: int, columns: int, zeros: float, seed: int = 0) -> Solution:
    """Independent symbols; levels differ from row to row."""
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(1, 3, (rows, columns), generator=random, dtype=torch.uint8)
    codes = torch.where(torch.rand(rows, columns, generator=random) < zeros, 0, signs)
    levels = torch.rand(rows, 1, 2, generator=random) * torch.tensor([-1.0, 1.0])
    return Solution(Ternary(), codes, {"levels": levels.bfloat16()})


def with_levels(codes: list[list[int]], levels: list[list[float]]) -> Solution:
    stored = torch.tensor(levels)[:, None].bfloat16()
    return Solution(Ternary(), torch.tensor(codes, dtype=torch.uint8), {"levels": stored})


# ---------------------------------------------------------------------------------------------------------- every codec


@all_codecs
@pytest.mark.parametrize("columns", range(1, 34))
def test_decoding_gives_what_was_encoded_at_every_width(codec: Codec, columns: int):
    for solution in conformance.solutions_for(codec, 3, columns, seed=columns):
        conformance.check_law(codec, solution)


@all_codecs
@pytest.mark.parametrize(("rows", "columns"), [(1, 2083), (2083, 1), (63, 257), (0, 5), (0, 0), (3, 0)])
def test_decoding_gives_what_was_encoded_at_odd_shapes(codec: Codec, rows: int, columns: int):
    if rows and columns:
        for solution in conformance.solutions_for(codec, rows, columns):
            conformance.check_law(codec, solution)
    else:
        whole = next(iter(conformance.solutions_for(codec, 4, 32)))
        group = min(whole.grid.group or 32, 32)
        groups = max(1, -(-columns // group))
        params = {key: value[:rows, :groups] for key, value in whole.params.items()}
        conformance.check_law(codec, Solution(whole.grid, whole.codes[:rows, :columns], params))


@all_codecs
@pytest.mark.parametrize("count", [1, 2, 3])
def test_matrices_are_stacked_and_cut_without_decoding(codec: Codec, count: int):
    # with and without an order and outliers, in turn
    kinds = [list(conformance.solutions_for(codec, 17, 37, seed=n)) for n in range(count)]
    for first in range(len(kinds[0])):
        conformance.check_stack(codec, [kind[(first + n) % len(kind)] for n, kind in enumerate(kinds)])
        conformance.check_stack(codec, [kind[first] for kind in kinds])


@all_codecs
def test_rows_are_looked_up_without_decoding_the_others(codec: Codec):
    if codec.name == "qmoe":
        with pytest.raises(Unsupported, match="not looked up"):
            codec.lookup(torch.tensor([0]), [], 37)
        return
    for solution in conformance.solutions_for(codec, 37, 37):
        conformance.check_lookup(codec, solution)


@all_codecs
def test_damage_is_an_error_or_another_matrix_never_a_crash(codec: Codec):
    for solution in conformance.solutions_for(codec, 17, 37):
        assert conformance.check_damage_never_crashes(codec, codec.encode(solution)) > 0


@all_codecs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [[5], [0, 0, 0], [1, 0, 2], [17, 1, 0], [0, 2, 17]])
def test_the_product_is_as_exact_as_torch(codec: Codec, tokens: list[int], dtype: torch.dtype):
    kinds = [list(conformance.solutions_for(codec, 21, 63, seed=n)) for n in range(len(tokens))]
    for first in range(len(kinds[0])):
        solutions = [kind[(first + n) % len(kind)] for n, kind in enumerate(kinds)]
        conformance.check_product(codec, solutions, tokens, dtype)


@all_codecs
def test_encoding_does_not_depend_on_memory_layout(codec: Codec):
    for solution in conformance.solutions_for(codec, 17, 37):
        transposed = replace(solution, codes=solution.codes.T.contiguous().T)
        a, b = codec.encode(solution), codec.encode(transposed)
        assert all(torch.equal(a.tensors[part], b.tensors[part]) for part in codec.parts)


@all_codecs
def test_a_codec_is_its_configuration(codec: Codec):
    assert eval(repr(codec), {type(codec).__name__: type(codec)}) == codec
    assert formats.from_config(formats.to_config(codec)) == codec


@all_codecs
@pytest.mark.parametrize("other", [(3, 16), (4, 8)])
def test_matrices_of_two_shapes_are_not_stacked(codec: Codec, other: tuple[int, int]):
    a, b = (codec.encode(next(iter(conformance.solutions_for(codec, *shape)))) for shape in ((3, 8), other))
    with pytest.raises(ValueError, match="one shape"):
        codec.stack([a, b])


@pytest.mark.parametrize(
    "config", [{"name": "qmoe", "p": 0.9}, {"name": "qmoe", "p0": 0.1}, {"name": "grouped", "bits": 1}, {"p0": 0.9}]
)
def test_damaged_configs_are_refused(config: dict):
    with pytest.raises(FormatError):
        formats.from_config(config)


def test_unknown_formats_are_never_imported():
    with pytest.raises(UnknownName, match="grouped, qmoe"):
        formats.from_config({"name": "_grouped_product"})


# ----------------------------------------------------------------------------------------------------------------- qmoe


def test_sub_one_bit_with_everything_counted():
    solution = ternary(2080, 6144, zeros=0.885)
    packed = conformance.check_law(QMoE(), solution)
    assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors.values())
    assert 8 * packed.nbytes / (2080 * 6144) == packed.bits_per_weight <= 0.76


def test_the_configuration_of_the_dictionary_matters():
    solution = ternary(64, 1024, zeros=0.6)
    assert QMoE(p0=0.6).encode(solution).nbytes < 0.9 * QMoE().encode(solution).nbytes
    with pytest.raises(FormatError, match="stand for"):
        QMoE(p0=0.6).decode(Packed(QMoE(p0=0.6), (64, 1024), QMoE().encode(solution).tensors))


def test_rows_without_zeros_cost_no_more_codewords():
    """The same row with values exchanged: mostly zero, mostly low, mostly high, and constant rows."""
    columns = 560
    codes = [
        [1] * 40 + [0] * 520,
        [0] * 40 + [1] * 520,
        [0] * 40 + [2] * 520,
        [0] * columns,
        [1] * columns,
        [2] * columns,
    ]
    packed = conformance.check_law(QMoE(), with_levels(codes, [[-0.5, 0.25]] * 6))
    lengths = packed.tensors["row_lengths"].tolist()
    assert lengths[3:] == [20, 20, 20]
    # symbols 1 and 2 are equally probable, but ties are not broken alike
    assert abs(lengths[0] - lengths[1]) <= 1
    assert abs(lengths[0] - lengths[2]) <= 1
    assert (packed.tensors["pivots"] >> 16).tolist() == [1, 2, 4, 5]


def test_values_that_coincide_share_a_symbol():
    codes = [[0, 1, 2, 0, 1, 2, 0, 1] * 4] * 4
    solution = with_levels(codes, [[0.0, 0.5], [-0.5, 0.0], [0.5, 0.5], [0.0, 0.0]])
    packed = conformance.check_law(QMoE(), solution)
    # row 3 is all zero although its codes are not: 32 weights are two codewords
    assert packed.tensors["row_lengths"].tolist()[3] == 2
    # low = 0 makes code 1 a zero; in row 2 the value 0.5 has two codes and is the most frequent
    assert (packed.tensors["pivots"] >> 16).tolist() == [2]


def test_negative_zero_levels_count_as_zero():
    solution = with_levels([[1, 1, 1, 2]] * 2, [[-0.0, 1.0], [-1.0, -0.0]])
    packed = conformance.check_law(QMoE(), solution)
    assert (packed.tensors["pivots"] >> 16).tolist() == [1]


def test_extreme_levels_survive():
    largest = torch.finfo(torch.bfloat16).max
    smallest = 2.0**-133
    conformance.check_law(QMoE(), with_levels([[0, 1, 2], [1, 1, 1], [2, 2, 0]], [[-largest, smallest]] * 3))


@pytest.mark.parametrize("seed", range(20))
def test_random_ternary_matrices_of_every_density(seed: int):
    random = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(1, 70, (2,), generator=random).tolist()
    conformance.check_law(QMoE(), ternary(rows, columns, zeros=seed / 19, seed=seed))


def test_rows_of_too_many_codewords_are_refused(monkeypatch: pytest.MonkeyPatch):
    many = torch.tensor([3, 65536])
    monkeypatch.setattr(
        "halfbit.formats.qmoe.kernels.encode", lambda *_: (torch.zeros(65539, dtype=torch.uint16), many)
    )
    with pytest.raises(Unsupported, match="row 1 needs 65536 codewords"):
        QMoE().encode(ternary(2, 8, zeros=0.9))


def test_what_qmoe_cannot_store_is_refused():
    with pytest.raises(Unsupported, match="got Affine"):
        QMoE().encode(next(iter(conformance.solutions_for(Grouped(), 3, 8))))
    exact = Solution(Ternary("float32"), torch.zeros(2, 4, dtype=torch.uint8), {"levels": torch.ones(2, 1, 2)})
    with pytest.raises(Unsupported, match="bfloat16"):
        QMoE().encode(exact)
    with pytest.raises(RecipeError, match="p0, must be at least 1/3"):
        QMoE(p0=0.2)


@pytest.mark.parametrize(
    ("pivots", "says"),
    [
        ([9 << 16], "pivots must name"),
        ([-1], "pivots must name"),
        ([1 << 16, 1 << 16], "pivots must name"),
        ([2 << 16, 1 << 16], "pivots must name"),
        ([(1 << 16) | 0x7F80], "pivot's value"),
        ([(1 << 16) | 0x7FC0], "pivot's value"),
    ],
)
def test_damaged_pivots_are_found(pivots: list[int], says: str):
    packed = QMoE().encode(ternary(9, 40, zeros=0.9))
    damaged = Packed(packed.codec, packed.shape, packed.tensors | {"pivots": torch.tensor(pivots)})
    with pytest.raises(FormatError, match=says) as caught:
        QMoE().check(damaged)
    assert caught.value.tensor == "pivots"


def test_a_row_that_decodes_to_the_wrong_width_is_named():
    packed = QMoE().encode(ternary(9, 40, zeros=0.9))
    moved = packed.tensors["row_lengths"].to(torch.int32)
    moved[4] += 1
    moved[5] -= 1
    damaged = Packed(packed.codec, packed.shape, packed.tensors | {"row_lengths": moved.to(torch.uint16)})
    with pytest.raises(FormatError, match=r"row 4"):
        QMoE().check(damaged)
    with pytest.raises(FormatError, match=r"row 4"):
        QMoE().decode(damaged)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 20])
def test_widths_are_checked_some_rows_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "CHECKED_AT_ONCE", at_once)
    packed = QMoE().encode(ternary(29, 200, 0.8))
    QMoE().check(packed)
    for row in (0, 13, 28):
        words = packed.tensors["codewords"].to(torch.int64)
        at = int(packed.tensors["row_lengths"].to(torch.int64)[: row + 1].sum()) - 1
        words[at] = 0 if int(words[at]) > 8 else 65535  # the shortest codewords come first, the last ones are long
        damaged = Packed(packed.codec, packed.shape, packed.tensors | {"codewords": words.to(torch.uint16)})
        with pytest.raises(FormatError, match=f"codewords of row {row} stand for"):
            QMoE().check(damaged)


def test_the_operator_is_known_to_torch_compile():
    solution = ternary(14, 33, zeros=0.9)
    tensors = QMoE().runtime(QMoE().encode(solution))
    arguments = (torch.randn(5, 33), torch.tensor([0, 2, 5]), tensors, 7)
    torch.library.opcheck(torch.ops.halfbit.qmoe_product.default, arguments)


# -------------------------------------------------------------------------------------------------------------- grouped


def test_grouped_bits_per_weight():
    solution = next(iter(conformance.solutions_for(Grouped(bits=2, group=None), 16, 6144)))
    # 2 bits per weight, 16 for the scale and 8 for the zero of a row
    assert Grouped(bits=2).encode(solution).bits_per_weight == 2 + 24 / 6144


def test_an_order_shared_by_all_matrices_is_stored_once():
    plain = next(iter(conformance.solutions_for(Grouped(), 16, 300)))
    random = torch.Generator().manual_seed(0)
    a, b = (replace(plain, order=torch.randperm(300, generator=random)) for _ in range(2))
    # eight bits and one more for each of 300 columns
    for solutions, orders in [([a, a, a], 1), ([a, b, a], 3), ([a, plain, a], 3), ([plain, plain, plain], 0)]:
        packed = Grouped().stack([Grouped().encode(s) for s in solutions])
        assert packed.tensors["order"].shape == (orders, 300 + 38)
    identity = replace(plain, order=torch.arange(300))
    assert Grouped().encode(identity).tensors["order"].shape == (0, 338)


@pytest.mark.parametrize("columns", [1, 3, 255, 256, 257, 65536, 65537])
def test_orders_survive_at_every_width(columns: int):
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    packed = _order.pack_order(order, columns, order.device)
    _order.check_order(packed, columns, 1, "grouped")
    assert all(torch.equal(row, order) for row in _order.unpack_order(packed, columns))
    assert packed.shape[0] == (columns > 1)
    bits = max(8, (columns - 1).bit_length())
    assert 0 <= packed.numel() * 8 - bits * columns * packed.shape[0] < 16


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda o: o.index_fill(1, torch.tensor([0]), int(o[0, 1])), "no permutation"),
        (lambda o: o.index_fill(1, torch.tensor([o.shape[1] - 1]), 255), "no permutation|unused bits"),
        (lambda o: o + torch.tensor([0] * (o.shape[1] - 1) + [128]).to(torch.uint8), "unused bits"),
        (lambda o: o[:, :-1], "order must be uint8"),
        (lambda o: o.to(torch.int64), "order must be uint8"),
        (lambda o: o.expand(3, -1), "not 3 matrices"),
    ],
)
def test_damaged_orders_are_found(damage: Callable[[Tensor], Tensor], says: str):
    _, ordered = list(conformance.solutions_for(Grouped(), 16, 300))[:2]
    packed = Grouped().encode(ordered)
    damaged = Packed(packed.codec, packed.shape, packed.tensors | {"order": damage(packed.tensors["order"])})
    with pytest.raises(FormatError, match=says) as caught:
        Grouped().check(damaged)
    assert caught.value.tensor == "order"


def test_what_only_spqr_stores_is_refused_by_name():
    solution = next(iter(conformance.solutions_for(Grouped(), 3, 8)))
    one = torch.tensor([0])
    outliers = Outliers(one, one, torch.ones(1, dtype=torch.bfloat16))
    with pytest.raises(Unsupported, match="grouped: stores no outliers"):
        Grouped().encode(replace(solution, outliers=outliers))
    for more in ({"outliers": outliers}, {"order": torch.tensor([1, 0, 2, 3])}):
        with pytest.raises(Unsupported, match="qmoe: stores neither"):
            QMoE().encode(replace(ternary(2, 4, zeros=0.5), **more))


def test_grouped_stores_only_its_own_grid():
    solution = next(iter(conformance.solutions_for(Grouped(bits=2), 3, 8)))
    with pytest.raises(Unsupported, match=r"Grouped\(bits=3.*got Affine\(bits=2"):
        Grouped(bits=3).encode(solution)
    assert Grouped(bits=3, group=16).grid == Affine(bits=3, group=16)
