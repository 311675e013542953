"""Loading: what the loader fills in itself, and what a hostile folder must not reach."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from compressed import EVERYTHING, decoded, edit_manifest, inputs, largest_difference, load, run
from safetensors.torch import load_file, save_file

import halfbit
from halfbit import formats
from halfbit.errors import FormatError
from halfbit.experts import find_experts
from halfbit.folder import Problem
from halfbit.layout import Entry
from halfbit.manifest import header_checksum, read_manifest, tensor_entry, text_of
from halfbit.nn import OwnGate, PackedEmbedding, PackedLinear, PackedMatrix
from halfbit.solve.rtn import rtn

TABLE = """
        [[rules]]
        match = "*wte"
        solver = "rtn"
        grid = { name = "affine", bits = 8, group = 16 }
        codec = { name = "grouped" }
"""


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", tiny_models.FILLED)
def test_what_no_file_has_is_filled_in(name: str, saved, tmp_path) -> None:
    source = saved(name)
    run(source, tmp_path / "out", TABLE + EVERYTHING["grouped"])
    model, plain = load(tmp_path / "out"), load(source)
    assert any(isinstance(m, PackedLinear) for m in model.modules())
    buffers = dict(model.named_buffers())
    for path, buffer in plain.named_buffers():
        assert torch.equal(buffers[path], buffer), path
    dense, given = decoded(source, model), inputs(model)
    with torch.no_grad():
        wanted, got = dense(**given, use_cache=False).logits, model(**given, use_cache=False).logits
    assert largest_difference(got, wanted) < 2e-5


@pytest.fixture(scope="module")
def llama(made) -> Path:
    """A compressed folder."""
    return made("llama", "spqr").folder


Q, K, UP = (f"model.layers.1.{n}_proj" for n in ("self_attn.q", "self_attn.k", "mlp.up"))
Edit = Callable[[dict[str, Any]], object]


def changed(folder: Path, out: Path, edit: Edit, tie: Edit = lambda _: None) -> Path:
    """A copy with other entries of packed modules, in both files that have them, and another map of tied ones."""
    shutil.copytree(folder, out)
    config, manifest = json.loads((out / "config.json").read_text()), read_manifest(out)
    quantization = config["quantization_config"]
    for modules in (quantization["modules"], manifest["packed"]):
        edit(modules)
    quantization.setdefault("tied", {})
    tie(quantization["tied"])
    text = json.dumps(config)
    (out / "config.json").write_text(text)
    manifest["files"]["config.json"] = hashlib.sha256(text.encode()).hexdigest()
    (out / "manifest.json").write_text(text_of(manifest))
    return out


def problems(folder: Path) -> list[str]:
    return [p.message for p in halfbit.verify(folder) if isinstance(p, Problem)]


def tensors(modules: dict[str, Any], path: str) -> dict[str, list[Any]]:
    return modules[path]["weight"]["tensors"]


SHARING: dict[str, tuple[Edit, str]] = {
    "an order of its own": (lambda m: tensors(m, Q)["order"].append(Q), "has none of its own"),
    "an order in a circle": (lambda m: tensors(m, Q)["order"].append(K), "has none of its own"),
    "an order of nobody": (lambda m: tensors(m, K)["order"].__setitem__(2, "nowhere"), "no packed"),
    "codes": (lambda m: tensors(m, Q)["codes"].append(Q), "only order can be another module's"),
    "outliers": (lambda m: tensors(m, K)["outlier_values"].append(Q), "only order can be another module's"),
}


@pytest.mark.parametrize("case", SHARING)
def test_only_an_order_that_another_module_has_is_shared(case: str, llama, tmp_path) -> None:
    edit, message = SHARING[case]
    hostile = changed(llama, tmp_path / "out", edit)
    assert any(message in p for p in problems(hostile))
    with pytest.raises(FormatError, match=f"{message}|shares with nowhere|has none of its own"):
        load(hostile)


SIZES: dict[str, Edit] = {
    "overflow": lambda m: tensors(m, K)["codes"].__setitem__(1, [2**61, 2**61]),
    "overflow beside a zero": lambda m: tensors(m, K)["codes"].__setitem__(1, [0, 2**61, 2**61]),
    "terabytes": lambda m: tensors(m, K)["codes"].__setitem__(1, [1, 2**40]),
    "terabytes of a shared part": lambda m: tensors(m, K)["order"].__setitem__(1, [1, 2**40]),
    "a shared part of another size": lambda m: tensors(m, K)["order"].__setitem__(1, [1, 37]),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_are_not_believed(case: str, llama, tmp_path) -> None:
    hostile = changed(llama, tmp_path / "out", SIZES[case])
    assert problems(hostile)
    with pytest.raises(FormatError, match=r"self_attn\.k_proj"):
        load(hostile)


def test_what_is_another_modules_takes_no_memory_before_it_is_handed_over() -> None:
    codec: Any = formats.from_config({"name": "grouped", "bits": 4, "group": 16})
    (solution,) = rtn(torch.randn(1, 8, 32), None, codec.grid, names=["x"])
    entry = Entry.of(codec.encode(solution), 1, {"order": "elsewhere"})
    assert PackedMatrix(entry).get_buffer("order").numel() == 0


TIED: dict[str, tuple[dict[str, str], str]] = {
    "another shape": ({"lm_head": UP}, "lm_head: expected the shape"),
    "nobody": ({"lm_head": "nowhere"}, "which is no packed layer"),
    "a norm": ({"lm_head": "model.norm"}, "which is no packed layer"),
    "no layer": ({"model.norm": UP}, "model.norm is no"),
    "no module": ({"model.nothing": UP}, "model.nothing is no"),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_layer_is_a_layer_of_its_matrix_s_shape(case: str, llama, tmp_path) -> None:
    tied, message = TIED[case]
    without = (lambda m: m.pop("lm_head")) if "lm_head" in tied else (lambda _: None)
    hostile = changed(llama, tmp_path / "out", without, lambda t: t.update(tied))
    with pytest.raises(FormatError, match=message):
        load(hostile)
    if tied.get("lm_head") not in (None, UP):
        assert any("lm_head is tied to" in p for p in problems(hostile))


def test_verify_asks_for_every_stored_tensor(llama, tmp_path) -> None:
    out = Path(shutil.copytree(llama, tmp_path / "out"))
    gone, index = f"{K}.packed_weight.codes", out / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][gone]
    index.write_text(json.dumps(content))

    def edit(manifest: dict[str, Any]) -> None:
        del manifest["tensors"][gone]
        for block in manifest["blocks"].values():
            block["tensors"] = [n for n in block["tensors"] if n != gone]

    edit_manifest(out, edit)
    assert any(p.endswith("k_proj.packed_weight.codes is in no file of the manifest") for p in problems(out))


def test_verify_checks_what_lies_in_several_files(llama, tmp_path) -> None:
    """The shared order is in another file, where it is no order."""
    out = Path(shutil.copytree(llama, tmp_path / "out"))
    manifest = read_manifest(out)
    name = f"{Q}.packed_weight.order"
    source = out / manifest["tensors"][name]["file"]
    stored = load_file(source)
    order = stored.pop(name)
    assert order.numel()
    moved = {name: order, "beside": torch.zeros(1)}
    other = order.clone()
    other[:] = 0
    for number, tensor in enumerate((order, other)):
        save_file(stored, source)
        save_file(moved | {name: tensor}, out / "model-moved.safetensors")
        for path, value in (moved | {name: tensor}).items():
            manifest["tensors"][path] = tensor_entry("model-moved.safetensors", value)
        manifest["headers"] |= {p.name: header_checksum(p) for p in (source, out / "model-moved.safetensors")}
        index = json.loads((out / "model.safetensors.index.json").read_text())
        index["weight_map"] = {n: t["file"] for n, t in manifest["tensors"].items()}
        text = json.dumps(index)
        (out / "model.safetensors.index.json").write_text(text)
        manifest["files"]["model.safetensors.index.json"] = hashlib.sha256(text.encode()).hexdigest()
        (out / "manifest.json").write_text(text_of(manifest))
        assert len([p for p in problems(out) if "no permutation" in p]) == 3 * number
        assert number or not problems(out)


@pytest.mark.parametrize("codec", ["spqr", "grouped"])
def test_the_number_of_matrices_is_the_entry_s(codec: str) -> None:
    config = {"spqr": {"name": "spqr", "group": 16}, "grouped": {"name": "grouped", "bits": 4, "group": 16}}[codec]
    chosen: Any = formats.from_config(config)
    order = torch.randperm(64)
    made = []
    for turn in (order, order.flip(0)):
        (solution,) = rtn(torch.randn(1, 32, 64), None, chosen.grid, names=["x"])
        made.append(chosen.encode(replace(solution, order=turn)))
    two = chosen.stack(made)
    for experts, right in ((1, False), (2, True), (4, False)):
        matrix = PackedMatrix(Entry.of(two, experts))
        for part, tensor in two.tensors.items():
            setattr(matrix, part, tensor)
        with nullcontext() if right else pytest.raises(FormatError, match=f"expected a stack of {experts}"):
            matrix.prepare()


@pytest.mark.parametrize("name", ["spqr", "grouped"])
def test_an_embedding_refuses_the_ids_that_a_plain_one_refuses(name: str) -> None:
    codec: Any = formats.from_config({"name": name, "bits": 4, "group": 16})
    (solution,) = rtn(torch.randn(1, 61, 32), None, codec.grid, names=["x"])
    packed = codec.encode(solution)
    matrix = PackedMatrix(Entry.of(packed, 1))
    for part, tensor in packed.tensors.items():
        setattr(matrix, part, tensor)
    table = PackedEmbedding(matrix.prepare(), torch.float32)
    plain = torch.nn.Embedding.from_pretrained(codec.decode(packed))
    ids = torch.tensor([[0, 60], [7, 7]])
    assert torch.equal(table(ids), plain(ids))
    assert table(ids[:0]).shape == (0, 2, 32)
    for wrong in (61, 64, 10**6, -1, -61):
        for layer in (table, plain):
            with pytest.raises(IndexError, match="out of range"):
                layer(torch.tensor([3, wrong]))


def test_a_model_of_nothing_but_packed_weights_tells_its_device_and_dtype(saved, tmp_path) -> None:
    run(saved("olmo"), tmp_path / "out", EVERYTHING["grouped"])
    model = load(tmp_path / "out", torch.bfloat16)
    for part in (model, model.model):
        assert part.dtype == torch.bfloat16
        assert part.device.type == "cpu"
    assert sum(p.numel() for p in model.parameters()) == 0
    assert model.to(torch.float32).dtype == torch.float32
    ids = inputs(model)["input_ids"]
    text = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert text.shape == (2, 14)
    assert not [n for n in model.state_dict() if n.endswith(".weight")]
    assert model.load_state_dict(model.state_dict()).missing_keys == []
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again").generate(ids, max_new_tokens=3, do_sample=False), text)


@pytest.mark.parametrize(
    ("name", "rules"), [("qwen2-moe", "grouped"), ("gpt-oss", "qmoe"), ("switch", "spqr"), ("nemotron-h", "spqr")]
)
def test_a_model_can_be_pickled(name: str, rules: str, made, tmp_path) -> None:
    model = made(name, rules).model
    torch.save(model, tmp_path / "model.pt")
    back = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(back(**inputs(model)).logits, model(**inputs(model)).logits)


def test_a_gate_of_its_own_is_kept_without_the_weights(saved) -> None:
    """A gate that no name stands for: it reads a number of the original module."""
    model = load(saved("gpt-oss"))
    path, stack = next(iter(find_experts(model).items()))
    module = model.get_submodule(path)
    gate = OwnGate(stack, module)
    x = torch.randn(4, 38)
    again = pickle.loads(pickle.dumps(gate))
    assert torch.equal(again(x), stack.gate(module)(x))
    assert len(pickle.dumps(gate)) < sum(p.nbytes for p in module.parameters())
    assert all(p is not None for p in module._parameters.values())
