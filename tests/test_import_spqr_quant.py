"""Published SpQR checkpoints: every golden layer bit for bit, the whole model by its logits, every damage by name."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from published import EPSILON, GOLDEN, SPQR, Edit, change, problems, put, run, spqr_with
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import halfbit
from halfbit.errors import CheckpointError, FormatError, OutputError
from halfbit.events import BlockDone, Imported, Noticed
from halfbit.importers.spqr_quant import CODEC, read_layer
from halfbit.nn import PackedLinear

PARTS = ("dense_weights", "row_offsets", "col_vals", "in_perm")
MEANINGS = {"add": "dense_kernel", "replace": "dense_quantiser"}


@cache
def cases() -> dict[str, dict]:
    with safe_open(GOLDEN / "spqr" / "cases.safetensors", "pt") as file:
        return json.loads(file.metadata()["cases"])


@cache
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "spqr" / "cases.safetensors")


def layer(case: str) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The stored tensors of a case, free to be changed, and its shape."""
    found = {part: golden()[f"{case}.{part}"].clone() for part in PARTS if f"{case}.{part}" in golden()}
    return found, (int(golden()[f"{case}.m"]), int(golden()[f"{case}.n"]))


@pytest.fixture(scope="module", params=["add", "replace"])
def spqr(request, tmp_path_factory) -> tuple[str, Path, list]:
    out = tmp_path_factory.mktemp("spqr") / request.param
    return request.param, out, run(SPQR, out, outliers=request.param)


# --- layer by layer


@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("case", cases())
def test_published_layers_decode_bit_for_bit(case: str, meaning: str) -> None:
    parts, shape = layer(case)
    solution, differing = read_layer(parts, shape, meaning, case)
    expected = golden()[f"{case}.{MEANINGS[meaning]}"].float()
    assert torch.equal(solution.dense(), expected)
    packed = CODEC.encode(solution)
    CODEC.check(packed)
    assert torch.equal(CODEC.decode(packed), expected)
    assert len(solution.outliers or ()) == cases()[case]["outliers"]
    assert differing == int((golden()[f"{case}.dense_kernel"] != golden()[f"{case}.dense_quantiser"]).sum())


def test_fields_are_the_published_ones_but_for_codes_under_outliers() -> None:
    parts, shape = layer("48x272-act-ptcsr")
    solution, _ = read_layer(parts, shape, "replace", "x")
    assert solution.outliers is not None
    expected = golden()["48x272-act-ptcsr.codes"].to(torch.uint8)
    expected[solution.outliers.rows, solution.outliers.columns] = 0
    assert torch.equal(solution.codes, expected)
    found = torch.cat([solution.params["scale_grid"], solution.params["zero_grid"]], -1)
    # scale of scales, scale of zeros, zero of scales, zero of zeros
    assert torch.equal(found, golden()["48x272-act-ptcsr.second_order"][..., [0, 2, 1, 3]])


def entry(value: float, column: int) -> int:
    """A word of col_vals as a signed 32-bit number."""
    bits = int(torch.tensor(value, dtype=torch.float16).view(torch.int16))
    return (bits << 16) | column


def csr(rows: list[list[int]]) -> dict[str, Tensor]:
    counts = torch.tensor([0, *map(len, rows)]).cumsum(0).to(torch.int32)
    return {"row_offsets": counts, "col_vals": torch.tensor([e for row in rows for e in row], dtype=torch.int32)}


def ptcsr(rows: list[list[int]]) -> dict[str, Tensor]:
    entries, offsets = [], [0]
    for tile in range(0, len(rows), 16):
        longest = max(map(len, rows[tile : tile + 16]))
        padded = [row + [0] * (longest - len(row)) for row in rows[tile : tile + 16]]
        entries += [row[i] for i in range(longest) for row in padded]
        offsets.append(len(entries))
    return {
        "row_offsets": torch.tensor(offsets, dtype=torch.int32),
        "col_vals": torch.tensor(entries, dtype=torch.int32),
    }


@pytest.mark.parametrize("layout", [csr, ptcsr])
def test_an_outlier_of_zero_is_kept_and_padding_is_not(layout) -> None:
    parts, shape = layer("16x16-nooutlier-noperm-csr")
    rows: list[list[int]] = [[] for _ in range(16)]
    # in row 3 a zero in column 0 is followed by another outlier; row 7 has one elsewhere, row 9 a negative zero
    rows[3], rows[7], rows[9] = [entry(0.0, 0), entry(2.5, 5)], [entry(0.0, 4)], [entry(-0.0, 0)]
    parts |= layout(rows)
    solution, _ = read_layer(parts, shape, "replace", "x")
    assert solution.outliers is not None
    assert sorted(zip(solution.outliers.rows.tolist(), solution.outliers.columns.tolist(), strict=True)) == [
        (3, 0), (3, 5), (7, 4), (9, 0),
    ]  # fmt: skip
    expected = golden()["16x16-nooutlier-noperm-csr.dense_quantiser"].float()
    expected[3, 0], expected[3, 5], expected[7, 4], expected[9, 0] = 0.0, 2.5, 0.0, 0.0
    assert torch.equal(solution.dense(), expected)
    added, _ = read_layer(parts, shape, "add", "x")
    expected = golden()["16x16-nooutlier-noperm-csr.dense_quantiser"].float()
    expected[3, 5] = (expected[3, 5] + 2.5).half()
    assert torch.equal(added.dense(), expected)


def test_every_column_number_up_to_the_sixteenth_bit_is_read() -> None:
    """Columns and the upper half of a permutation are unsigned."""
    columns = 40_000
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    words = order[0::2] | (order[1::2] << 16)
    rows: list[list[int]] = [[entry(-1.0, columns - 1)], *([] for _ in range(15))]
    parts = {
        # scale 1 * (1 - 0), zero 0 * (0 - 0)
        "dense_weights": torch.tensor([1 | byte << 54 for byte in (0, 0, 0x3C, 0x3C, *[0] * 12)]).repeat(columns // 16),
        "in_perm": words.where(words < 1 << 31, words - (1 << 32)).to(torch.int32),
        **csr(rows),
    }
    solution, differing = read_layer(parts, (16, columns), "add", "x")
    dense = solution.dense()
    assert differing == 0
    assert dense[0, order[-1]] == -1
    assert int((dense != 0).sum()) == 1


# what is wrong, in which layout, and what the message must say
DAMAGED_LAYERS = {
    "a code word is missing": ("csr", change("dense_weights", lambda t: t[1:]), "expected torch.int64 [816] for"),
    "code words of another dtype": ("csr", change("dense_weights", lambda t: t.int()), "dense_weights: expected"),
    "code words of two dimensions": ("csr", change("dense_weights", lambda t: t[None]), "dense_weights: expected"),
    "a used upper bit": ("csr", change("dense_weights", put(18, 1 << 62)), "dense_weights: bits 62 and 63"),
    "a negative word": ("csr", change("dense_weights", put(17, -1)), "row 1, tile 1"),
    "copies that differ": ("csr", lambda p: p["dense_weights"][16].bitwise_xor_(1 << 54), "byte 0 of the statistics"),
    "a statistic that is infinite": (
        "csr",
        lambda p: [p["dense_weights"][i].bitwise_or_(0xFF << 54) for i in range(16)],
        "a statistic is NaN or infinite, tile row 0, tile 0",
    ),
    "offsets that fall": ("csr", change("row_offsets", put(3, 100)), "row_offsets: offsets must rise"),
    "offsets that begin later": ("csr", change("row_offsets", put(0, 1)), "row_offsets: offsets must rise"),
    "offsets that end early": ("csr", change("col_vals", lambda t: torch.cat([t, t[:1]])), "from 0 to 129"),
    "too few offsets": ("csr", change("row_offsets", lambda t: t[:-1]), "row_offsets: expected torch.int32 [49 or 4]"),
    "offsets of another dtype": ("csr", change("row_offsets", lambda t: t.long()), "row_offsets: expected"),
    "outliers as floats": ("csr", change("col_vals", lambda t: t.float()), "col_vals: expected torch.int32"),
    "a column too far": ("csr", change("col_vals", put(7, entry(1.0, 272))), "col_vals: entry 7: a column beyond"),
    "an infinite outlier": ("csr", change("col_vals", put(9, entry(float("inf"), 3))), "entry 9: a value that is NaN"),
    "a place twice": ("csr", lambda p: twice(p["row_offsets"], p["col_vals"]), "a second outlier in one place"),
    "an order of other columns": ("csr", change("in_perm", put(0, 0)), "in_perm: not a permutation of 272 columns"),
    "an order with a column too far": ("csr", change("in_perm", put(5, 272 << 16)), "in_perm: not a permutation"),
    "half an order": ("csr", change("in_perm", lambda t: t[:68]), "in_perm: expected torch.int32 [136]"),
    "an order of another dtype": ("csr", change("in_perm", lambda t: t.long()), "in_perm: expected"),
    "no offsets": ("csr", lambda p: p.pop("row_offsets"), "row_offsets is missing"),
    "no outliers tensor": ("csr", lambda p: p.pop("col_vals"), "col_vals is missing"),
    "a tile row of odd length": ("ptcsr", lambda p: shift(p["row_offsets"]), "not a multiple of 16"),
    "a column too far in a tile row": ("ptcsr", change("col_vals", put(0, entry(1.0, 999))), "entry 0: a column"),
}  # fmt: skip


def twice(offsets: Tensor, entries: Tensor) -> None:
    """Gives two outliers of one row the same column."""
    row = int((offsets.diff() > 1).nonzero()[0])
    entries[int(offsets[row]) + 1] = (int(entries[int(offsets[row])]) & 0xFFFF) | entry(1.0, 0)


def shift(offsets: Tensor) -> None:
    offsets[1] -= 1


@pytest.mark.parametrize("damage", DAMAGED_LAYERS)
def test_damaged_layers_are_named(damage: str) -> None:
    layout, edit, says = DAMAGED_LAYERS[damage]
    parts, shape = layer(f"48x272-act-{layout}")
    edit(parts)
    with pytest.raises(FormatError) as error:
        read_layer(parts, shape, "add", "model.some.layer")
    assert says in str(error.value)
    assert str(error.value).startswith("model.some.layer.")
    assert str(error.value.tensor).startswith("model.some.layer.")


def test_sizes_that_are_no_multiples_of_sixteen_are_refused() -> None:
    parts, _ = layer("48x272-act-csr")
    with pytest.raises(FormatError, match="40 x 272 are not multiples"):
        read_layer(parts, (40, 272), "add", "x")


def test_a_sum_beyond_float16_is_an_error_only_where_it_is_taken() -> None:
    parts, shape = layer("64x80-shifted-act-csr")
    parts["col_vals"][11] = entry(65504.0, int(parts["col_vals"][11]) & 0xFFFF)
    under = golden()["64x80-shifted-act-csr.dense_quantiser"].abs().max()
    # the nearest float16 to 65504 + 16 is infinity
    assert under < 16
    parts["dense_weights"] = scaled(parts["dense_weights"], 1024.0)
    solution, _ = read_layer(parts, shape, "replace", "x")
    assert solution.outliers is not None
    assert solution.outliers.values.max() == 65504
    with pytest.raises(FormatError, match=r"x.col_vals: entry 11, row .* is beyond float16"):
        read_layer(parts, shape, "add", "x")


def scaled(words: Tensor, factor: float) -> Tensor:
    """Code words with all scales times a factor: the first two of a tile's eight bytes of statistics."""
    tiles = words.view(-1, 16)
    low, high = ((tiles[:, row] >> 54) & 0xFF for row in (0, 2))
    scale = (low | high << 8).to(torch.int16).view(torch.float16) * factor
    bits = scale.view(torch.int16).to(torch.int64) & 0xFFFF
    out = tiles & ~(0xFF << 54)
    rest = (tiles >> 54) & 0xFF
    rest[:, 0:2], rest[:, 2:4] = (bits & 0xFF)[:, None], (bits >> 8)[:, None]
    return (out | rest << 54).flatten()


# --- the whole model


def test_the_model_gives_the_published_logits(spqr) -> None:
    meaning, folder, _ = spqr
    expected = load_file(GOLDEN / "spqr" / "expected_dense.safetensors")
    names = {"add": "kernel", "replace": "quantiser"}
    model = halfbit.load(str(folder))
    modules = {path: m for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(modules) == 14
    for path, module in modules.items():
        dense = module.matrix.codec.decode(module.matrix.packed())
        assert torch.equal(dense, expected[f"{names[meaning]}.{path}.weight"].float())
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits
    wanted = expected[f"logits_{names.pop(meaning)}"]
    other = expected[f"logits_{names.popitem()[1]}"]
    assert (logits - wanted).abs().max() <= 16 * EPSILON * wanted.abs().max()
    assert (logits - other).abs().max() > 1e-2


def test_the_spqr_folder_loads_generates_verifies_and_saves(spqr, tmp_path) -> None:
    _, folder, _ = spqr
    assert problems(folder) == []
    config = json.loads((folder / "config.json").read_text())
    # the published converter leaves both empty
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float16")
    half: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert half.dtype == torch.float16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = load_file(GOLDEN / "spqr" / "expected_dense.safetensors")["input_ids"][:1]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert written.shape == (1, 28)
    assert written[0, 24] == logits[0, -1].argmax()
    with torch.no_grad():
        rounded = half(input_ids=ids).logits.float()
    assert (rounded - logits).abs().max() <= 32 * torch.finfo(torch.float16).eps * logits.abs().max()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, logits)


def test_what_the_two_meanings_of_an_outlier_change_is_counted(spqr) -> None:
    meaning, folder, events = spqr
    expected = load_file(GOLDEN / "spqr" / "expected_dense.safetensors")
    kernel = {n.removeprefix("kernel."): t for n, t in expected.items() if n.startswith("kernel.")}
    differing = sum(int((t != expected[f"quantiser.{n}"]).sum()) for n, t in kernel.items())
    about = json.loads((folder / "manifest.json").read_text())["about"]
    assert (about["imported"], about["outliers"]) == ("spqr", meaning)
    assert (about["outliers_that_differ"], differing > 700) == (differing, True)
    (notice,) = [e.message for e in events if isinstance(e, Noticed)]
    assert f"{differing} of {about['outlier_count']} outliers" in notice
    assert sum(isinstance(e, Imported) for e in events) == 14


def test_other_weights_are_copied_as_they_are_and_orders_are_stored_once(spqr) -> None:
    _, folder, _ = spqr
    source = load_file(SPQR / "model.safetensors")
    written = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    plain = {n for n in source if n.rpartition(".")[2] not in PARTS}
    assert {n for n in written if ".packed_" not in n} == plain
    for name in plain:
        assert written[name].dtype == source[name].dtype
        assert torch.equal(written[name], source[name])
    orders = {n.split("layers.")[1].split(".packed")[0] for n in written if n.endswith(".order")}
    assert orders == {f"{i}.{p}" for i in (0, 1) for p in (
        "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")}  # fmt: skip


def test_an_order_of_its_own_is_stored_and_an_identity_is_not(tmp_path) -> None:
    prefix = "model.layers.1.self_attn"

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{prefix}.k_proj.in_perm"] = tensors[f"{prefix}.k_proj.in_perm"].flip(0).contiguous()
        identity = torch.arange(0, 64, 2) | (torch.arange(1, 64, 2) << 16)
        tensors[f"{prefix}.q_proj.in_perm"] = identity.to(torch.int32)

    run(spqr_with(tmp_path / "source", edit), tmp_path / "out")
    assert problems(tmp_path / "out") == []
    packed = json.loads((tmp_path / "out" / "manifest.json").read_text())["packed"]
    told = {p: packed[f"{prefix}.{p}_proj"]["weight"]["tensors"]["order"] for p in "qkvo"}
    assert told["q"] == ["uint8", [0, 64]]
    assert told["k"] == told["v"] == told["o"] == ["uint8", [1, 64]]
    halfbit.load(str(tmp_path / "out"))


def test_both_layouts_of_outliers_give_one_folder(tmp_path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".row_offsets")]:
            path = name.removesuffix(".row_offsets")
            ends, entries = tensors[name].tolist(), tensors[f"{path}.col_vals"].tolist()
            rows = [entries[start:stop] for start, stop in pairwise(ends)]
            tensors |= {f"{path}.{part}": tensor for part, tensor in ptcsr(rows).items()}

    run(SPQR, tmp_path / "csr")
    run(spqr_with(tmp_path / "checkpoint", edit), tmp_path / "ptcsr")
    for path in (tmp_path / "csr").glob("model*"):
        assert path.read_bytes() == (tmp_path / "ptcsr" / path.name).read_bytes()


def quantization(**fields: Any) -> Edit:
    return lambda config: config["quantization_config"].update(fields)


DAMAGED_SPQR = {
    "4 bits": (lambda t: None, quantization(bits=4), "bits must be 3"),
    "groups of 8": (lambda t: None, quantization(beta2=8), "beta2 must be 16"),
    "supergroups of 64": (lambda t: None, quantization(beta1=64), "beta1 must be 16"),
    "shapes that are none": (lambda t: None, quantization(shapes=[1]), "shapes must be an object"),
    "a length that is another": (
        lambda t: None,
        lambda c: c["quantization_config"]["shapes"].update({"model.layers.0.mlp.up_proj.col_vals.shape": 3}),
        "model.layers.0.mlp.up_proj.col_vals: config.json says 3 entries",
    ),
    "another width": (
        lambda t: None,
        lambda c: c.update(intermediate_size=176),
        "mlp.gate_proj.dense_weights: expected torch.int64 [704]",
    ),
    "a layer that the model lacks": (
        lambda t: t.update({"model.layers.7.mlp.up_proj.dense_weights": torch.zeros(4, dtype=torch.int64)}),
        lambda c: None,
        "model.layers.7.mlp.up_proj",
    ),
    "outliers without a layer": (
        lambda t: t.pop("model.layers.0.mlp.up_proj.dense_weights"),
        lambda c: None,
        "there is no model.layers.0.mlp.up_proj.dense_weights",
    ),
    "a layer that is missing": (
        lambda t: [t.pop(f"model.layers.0.mlp.up_proj.{p}") for p in PARTS],
        lambda c: None,
        "model.layers.0.mlp.up_proj.weight",
    ),
    "a norm that is missing": (lambda t: t.pop("model.norm.weight"), lambda c: None, "model.norm.weight"),
    "a stranger": (lambda t: t.update(stranger=torch.ones(2)), lambda c: None, "stranger"),
    "an embedding that is packed": (
        lambda t: t.update({"model.embed_tokens.dense_weights": t.pop("model.embed_tokens.weight").long().flatten()}),
        lambda c: None,
        "has no linear layer model.embed_tokens",
    ),
    "scales below zero": (
        lambda t: change("model.layers.0.mlp.up_proj.dense_weights", lambda words: scaled(words, -1.0))(t),
        lambda c: None,
        "model.layers.0.mlp.up_proj: spqr: scales",
    ),
    "outliers that repeat": (
        lambda t: twice(t["model.layers.1.mlp.down_proj.row_offsets"], t["model.layers.1.mlp.down_proj.col_vals"]),
        lambda c: None,
        "model.layers.1.mlp.down_proj.col_vals: entry",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_SPQR)
def test_damaged_spqr_checkpoints_are_named(damage: str, tmp_path) -> None:
    edit, config, says = DAMAGED_SPQR[damage]
    source = spqr_with(tmp_path / "source", edit, config)
    with pytest.raises((FormatError, CheckpointError)) as error:
        run(source, tmp_path / "out")
    assert says in str(error.value)
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_import_goes_on_where_it_stopped(tmp_path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(SPQR, whole)
    for event in halfbit.import_checkpoint(str(SPQR), stopped):
        if isinstance(event, BlockDone):
            break
    assert not (stopped / "config.json").exists()
    events = run(SPQR, stopped)
    assert (events[0].resumed, events[0].solved, events[0].matrices) == (1, 7, 14)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in stopped.iterdir()}
    # finished: nothing is done again
    assert len(run(SPQR, stopped)) == 2
    with pytest.raises(OutputError, match="holds another run"):
        run(SPQR, stopped, outliers="replace")
