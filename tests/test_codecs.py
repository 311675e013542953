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
from halfbit.formats.spqr import SpQR, tiled
from halfbit.grids.affine import Affine
from halfbit.grids.bilevel import Bilevel
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
@pytest.mark.parametrize("columns", [1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33])
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
        # where rows share a parameter, it has fewer
        share = getattr(whole.grid, "supergroup", 1)
        of = {1: 1, -(-4 // share): -(-rows // share), 4: rows}
        params = {key: value[: of[value.shape[0]], :groups] for key, value in whole.params.items()}
        conformance.check_law(codec, replace(whole, codes=whole.codes[:rows, :columns], params=params))


@all_codecs
@pytest.mark.parametrize("count", [1, 3])
def test_matrices_are_stacked_and_cut_without_decoding(codec: Codec, count: int):
    # with and without an order and outliers, in turn
    kinds = [list(conformance.solutions_for(codec, 17, 37, seed=n)) for n in range(count)]
    for first in range(len(kinds[0])):
        conformance.check_stack(codec, [kind[(first + n) % len(kind)] for n, kind in enumerate(kinds)])
        conformance.check_stack(codec, [kind[first] for kind in kinds])


@all_codecs
def test_rows_are_looked_up_without_decoding_the_others(codec: Codec):
    if codec.name in ("qmoe", "quads", "runlength"):
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
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        ([0, 0, 0], torch.float16),
        ([0, 5, 1], torch.float32),
        ([17, 0, 2, 0], torch.float32),
        ([17, 0, 2, 0], torch.bfloat16),
        ([17, 0, 2, 0], torch.float16),
    ],
)
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
    with pytest.raises(UnknownName, match="grouped, mixed, qmoe, quads, runlength, spqr"):
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


# ----------------------------------------------------------------------------------------------------------------- spqr


def bilevel(grid: Bilevel, rows: int, columns: int, *, outliers: float = 0.0, order: bool = False) -> Solution:
    """Random codes and statistics; nothing is fitted."""
    random = torch.Generator().manual_seed(0)

    def codes(*shape: int, bits: int) -> Tensor:
        return torch.randint(1 << bits, shape, generator=random, dtype=torch.uint8)

    dtype = getattr(torch, grid.dtype)
    groups = max(1, -(-columns // grid.group)) if grid.group else 1
    supergroups = -(-rows // grid.supergroup)
    params = {}
    for what, bits in (("scale", grid.scale_bits), ("zero", grid.zero_bits)):
        if bits == 16:
            params[what] = (torch.rand(rows, groups, generator=random) + 0.1).to(dtype)
        else:
            params[f"{what}_codes"] = codes(rows, groups, bits=bits)
            # scale = a * (code - b) > 0: b is negative
            second = torch.rand(supergroups, groups, 2, generator=random) + 0.1
            params[f"{what}_grid"] = (second * torch.tensor([1.0, -1.0])).to(dtype)
    weights = codes(rows, columns, bits=grid.bits)
    there = torch.rand(rows, columns, generator=random) < outliers
    place = torch.nonzero(there, as_tuple=True)
    weights[there] = 0
    values = (20 * torch.randn(len(place[0]), generator=random)).to(dtype)
    permutation = torch.randperm(columns, generator=random) if order else None
    return Solution(grid, weights, params, outliers=Outliers(place[0], place[1], values), order=permutation)


@pytest.mark.parametrize(
    ("fields", "outliers"),
    [
        ({}, 0.01),
        ({}, 0.001),
        ({"bits": 4}, 0.0),
        ({"bits": 3, "group": 8, "supergroup": 64}, 0.001),
        ({"bits": 2, "group": 32, "scale_bits": 4, "zero_bits": 4}, 0.01),
        ({"bits": 8, "group": None, "scale_bits": 16, "zero_bits": 8, "dtype": "bfloat16"}, 0.01),
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(1024, 1024), (1025, 1027), (512, 11008)])
def test_spqr_wastes_nothing(rows: int, columns: int, fields: dict, outliers: float):
    """At most half a percent above the bits of codes, statistics, and 12 + 16 bits for each outlier."""
    codec = SpQR(**fields)
    solution = bilevel(codec.grid, rows, columns, outliers=outliers, order=True)
    packed = codec.encode(solution)
    order = packed.tensors["order"].numel()
    assert order * 8 <= columns * max(8, (columns - 1).bit_length()) + 16
    groups = -(-columns // (codec.group or columns))
    second = sum(2 * 16 for bits in (codec.scale_bits, codec.zero_bits) if bits != 16)
    needed = rows * columns * codec.bits + rows * groups * (codec.scale_bits + codec.zero_bits)
    needed += -(-rows // codec.supergroup) * groups * second + (12 + 16) * (
        len(solution.outliers) if solution.outliers else 0
    )
    assert needed <= 8 * (packed.nbytes - order) <= 1.005 * needed


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (15, 31), (16, 32), (17, 33), (33, 100), (3, 300), (0, 5), (5, 0)]
)
def test_tiled_matrices_are_as_the_drawing_says(rows: int, columns: int, bits: int):
    random = torch.Generator().manual_seed(bits)
    fields = torch.randint(1 << bits, (rows, columns), generator=random, dtype=torch.int32)
    words = tiled.pack(fields, bits)
    expected = drawn(fields.tolist(), columns, bits)
    assert [w & 0xFFFFFFFF for w in words.tolist()] == expected
    assert len(words) == tiled.count_words(rows, columns, bits)
    assert torch.equal(tiled.read(words, torch.arange(rows), rows, columns, bits), fields.long())
    row, column = torch.nonzero(torch.ones(rows, columns), as_tuple=True)
    assert torch.equal(tiled.at(words, row, column, rows, columns, bits), fields.long().flatten())


def drawn(fields: list[list[int]], columns: int, bits: int) -> list[int]:
    """The words of a tiled matrix, bit by bit, from the drawing in README.md."""
    each, whole = 32 // bits, columns // 32
    words = []
    for first in range(0, len(fields), 16):
        tile = fields[first : first + 16]
        for block in range(whole):
            lanes = []
            for lane in tile:
                of_block = lane[32 * block : 32 * block + 32]
                word = [0] * bits
                for i, field in enumerate(of_block[: each * bits]):
                    word[i // each] |= field << bits * (i % each)
                string = sum(field << bits * i for i, field in enumerate(of_block[each * bits :]))
                for bit in range(32 * bits - each * bits * bits):
                    w, top = divmod(bit, 32 - each * bits)
                    word[w] |= (string >> bit & 1) << each * bits + top
                lanes.append(word)
            words += [lane[w] for w in range(bits) for lane in lanes]
    string = sum(field << bits * i for i, field in enumerate(field for row in fields for field in row[32 * whole :]))
    count = -(-len(fields) * (columns % 32) * bits // 32)
    return words + [string >> 32 * i & 0xFFFFFFFF for i in range(count)]


def test_outliers_are_stored_as_the_drawing_says():
    grid = SpQR().grid
    solution = bilevel(grid, 33, 300)
    rows, columns = torch.tensor([32, 0, 5, 31, 0, 5]), torch.tensor([7, 299, 299, 2, 255, 255])
    codes = solution.codes.clone()
    codes[rows, columns] = 0
    values = torch.arange(6).half()
    packed = SpQR().encode(replace(solution, codes=codes, outliers=Outliers(rows, columns, values)))
    conformance.check_law(SpQR(), replace(solution, codes=codes, outliers=Outliers(rows, columns, values)))
    # chunks: tile 0 columns 0-255, tile 0 columns 256-299, tile 1, ...
    assert packed.tensors["outlier_counts"].tolist() == [[2, 2, 1, 0, 1, 0]]
    assert packed.tensors["outlier_columns"].tolist() == [255, 255, 43, 43, 2, 7]
    assert packed.tensors["outlier_rows"].tolist() == [0 | 5 << 4, 0 | 5 << 4, 15 | 0 << 4]
    assert packed.tensors["outlier_values"].tolist() == [4, 5, 1, 2, 3, 0]


def test_what_spqr_cannot_store_is_refused():
    solution = bilevel(SpQR().grid, 4, 40, outliers=0.1)
    assert solution.outliers is not None
    with pytest.raises(Unsupported, match="make the two agree"):
        SpQR(bits=4).encode(solution)
    with pytest.raises(Unsupported, match="outliers as float16, got"):
        SpQR().encode(replace(solution, outliers=replace(solution.outliers, values=solution.outliers.values.float())))
    with pytest.raises(Unsupported, match="code under an outlier must be 0"):
        SpQR().encode(replace(solution, codes=solution.codes.clamp(min=1)))
    given = solution.outliers
    twice = Outliers(given.rows.repeat(2), given.columns.repeat(2), given.values.repeat(2))
    with pytest.raises(Unsupported, match="two outliers are at one place"):
        SpQR().encode(replace(solution, outliers=twice))
    with pytest.raises(RecipeError, match="SpQR: dtype must be one of float16, bfloat16"):
        SpQR(dtype="float32")
    with pytest.raises(ValueError, match="has 1 matrices, not 2"):
        SpQR().part(SpQR().encode(solution), 0, 2)


@pytest.mark.parametrize(
    ("part", "damage", "says"),
    [
        ("outlier_columns", lambda t: t.index_fill(0, torch.tensor([len(t) - 1]), 255), "outside"),
        ("outlier_rows", lambda t: t.index_fill(0, torch.tensor([2]), 1), "outlier 4 is at row 1 of its tile.*outside"),
        ("outlier_rows", lambda t: t.index_fill(0, torch.tensor([0]), 1 | 15 << 4), "outlier 2 is out of order"),
        ("outlier_rows", lambda t: t.index_fill(0, torch.tensor([2]), 240), "unused half"),
        ("outlier_columns", lambda t: t.flip(0), "outlier 2 is out of order"),
        ("outlier_values", lambda t: t / 0, "NaN or infinite"),
        ("outlier_counts", lambda t: (t.int() + 1).to(torch.uint16), "the file 5"),
        ("codes", lambda t: torch.full_like(t, -1), "unused bits|code under the outlier"),
        ("codes", lambda t: t | 7, "code under the outlier at row .*, column .* of matrix 0 is"),
        ("codes", lambda t: t[:, 1:], "codes of 1 matrices 17 x 40 must be"),
        ("codes", lambda t: t[:0], "not 0 matrices"),
        ("scales", lambda t: torch.cat([t[:, :-1], t[:, -1:] | -(1 << 31)], 1), "unused bits"),
        ("second", lambda t: -t, "scale .* must be finite"),
        ("second", lambda t: t * torch.inf, "must be finite"),
        ("second", lambda t: t.float(), "must be torch.float16"),
        ("order", lambda t: t * 0, "no permutation"),
    ],
)
def test_damaged_spqr_tensors_are_named(part: str, damage: Callable[[Tensor], Tensor], says: str):
    solution = bilevel(SpQR().grid, 17, 40, order=True)
    codes = solution.codes.clone()
    # block 0, the tail, the ragged tile; an odd number of them
    rows, columns = torch.tensor([1, 2, 3, 4, 16]), torch.tensor([0, 33, 33, 39, 1])
    codes[rows, columns] = 0
    packed = SpQR().encode(replace(solution, codes=codes, outliers=Outliers(rows, columns, torch.ones(5).half())))
    SpQR().check(packed)
    damaged = Packed(packed.codec, packed.shape, packed.tensors | {part: damage(packed.tensors[part])})
    with pytest.raises(FormatError, match=says) as caught:
        SpQR().check(damaged)
    # what is derived is found where it is used
    assert caught.value.tensor in (part, {"second": "scales"}.get(part, "outlier_columns"))


def test_the_spqr_operator_is_known_to_torch_compile():
    packed = [SpQR().encode(bilevel(SpQR().grid, 17, 40, outliers=0.1, order=order)) for order in (False, True)]
    tensors = SpQR().runtime(SpQR().stack(packed))
    arguments = (torch.randn(5, 40), torch.tensor([0, 2, 5]), tensors, list(SpQR().form))
    torch.library.opcheck(torch.ops.halfbit.spqr_product.default, arguments)
