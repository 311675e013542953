"""Compress, load in transformers, run: on tiny random models of every family with experts.

The oracle is the same model with the experts' weights replaced by what the stored codes decode to.
"""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from compressed import chosen, inputs, largest_difference, load, run, text
from safetensors.torch import load_file, save_file
from torch import Tensor

import halfbit
from halfbit import recipe
from halfbit.compress import compress
from halfbit.errors import CoverageError, FormatError, OutputError
from halfbit.evaluate import measure
from halfbit.events import Began, BlockBegan, Noticed, Solved
from halfbit.folder import Problem
from halfbit.nn import PackedExperts, PackedMatrix
from halfbit.reader import Reader
from halfbit.samples import causal_samples, windows

MIXTURES = sorted(
    name
    for name in tiny_models.CONFIGS
    if any(k in name for k in ("m" + "ix", "moe", "deep", "oss", "4", "nemo", "switch"))
)
all_sources = pytest.mark.parametrize("name", [*MIXTURES, "qwen3-moe as built", "gpt-oss mxfp4", "qwen3-moe fp8"])


@all_sources
def test_the_compressed_model_gives_the_logits_of_the_decoded_one(name: str, made) -> None:
    """Up to float32 rounding through a few layers; a wrong row, level or expert changes the logits by 1e-2 and more."""
    model, expected = made(name).model, made(name).logits
    # one op per layer: every gate was recognised
    assert all(m._named_gate is not None for m in model.modules() if isinstance(m, PackedExperts))
    with torch.no_grad():
        got = model(**inputs(model), use_cache=False).logits
    assert largest_difference(got, expected) < 2e-5


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss", "llama4", "deepseek-v3", "switch"])
def test_greedy_text_is_that_of_the_decoded_model(name: str, made) -> None:
    model, dense = made(name).model, made(name).decoded
    ids = inputs(model)["input_ids"]
    wanted = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(ids, **wanted), dense.generate(ids, **wanted))


@all_sources
def test_the_folder_is_whole_and_only_experts_changed(name: str, made) -> None:
    source, folder, events = made(name).source, made(name).folder, made(name).events
    problems = [p for p in halfbit.verify(folder) if isinstance(p, Problem)]
    assert not problems
    manifest = json.loads((folder / "manifest.json").read_text())
    reader = Reader(source)
    untouched = [n for n in manifest["tensors"] if n in reader]
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    for tensor in untouched:
        assert torch.equal(stored[tensor], reader.tensor(tensor))
        assert stored[tensor].dtype == reader.dtype(tensor)
    packed = set(manifest["tensors"]) - set(untouched)
    assert packed
    assert all("experts" in n and n.split(".")[-2].startswith("packed_") for n in packed)
    solved = [e for e in events if isinstance(e, Solved)]
    assert {e.matrix for e in solved} == set(manifest["matrices"])
    assert all(0 <= e.loss < 1 for e in solved)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-tied", "gpt-oss", "granitemoe", "switch"])
def test_saving_and_loading_again_keeps_every_bit(name: str, made, tmp_path) -> None:
    model = made(name).model
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    first, second = model.state_dict(), again.state_dict()
    assert list(first) == list(second)
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype
        assert torch.equal(tensor, second[key]), key
    given = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, again(**given).logits)
    again.save_pretrained(tmp_path / "third")
    files = [sorted(f.name for f in (tmp_path / n).iterdir()) for n in ("again", "third")]
    assert files[0] == files[1]
    for file in files[0]:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "third" / file).read_bytes()


def test_weights_are_never_expanded_and_casts_keep_the_stored_bits(made) -> None:
    model = load(made("qwen3-moe").folder, torch.bfloat16)
    before = {n: m.packed().tensors for n, m in model.named_modules() if isinstance(m, PackedMatrix)}
    for cast in (Tensor.half, Tensor.float, Tensor.bfloat16):
        model._apply(lambda t, cast=cast: cast(t) if t.is_floating_point() else t)
    for name, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            for part, tensor in module.packed().tensors.items():
                assert tensor.dtype == before[name][part].dtype
                assert torch.equal(tensor, before[name][part])
    experts = [t for n, t in model.state_dict().items() if ".experts." in n]
    config = tiny_models.CONFIGS["qwen3-moe"]
    assert max(t.numel() for t in experts) < config.num_experts * config.moe_intermediate_size * config.hidden_size
    with torch.no_grad():
        assert model(**inputs(model)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["qmoe-2bit", "rtn-ternary"])
def test_the_other_recipes(name: str, made) -> None:
    other = made("mixtral", name)
    with torch.no_grad():
        assert largest_difference(other.model(**inputs(other.model)).logits, other.logits) < 2e-5


def test_torch_compile_takes_the_whole_model_in_one_graph(made) -> None:
    """With everything that the layer's op can be given: biases, and a gate with numbers of its own."""
    model = made("gpt-oss").model
    given = inputs(model)
    with torch.no_grad():
        expected = model(**given, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert largest_difference(compiled(**given, use_cache=False).logits, expected) < 1e-5


def test_the_layer_op_passes_opcheck(made) -> None:
    model = made("gpt-oss").model
    layer = next(m for m in model.modules() if isinstance(m, PackedExperts))
    up, down = layer.matrix(layer._up), layer.matrix(layer._down)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, up.shape[2], generator=generator)
    index = torch.randint(0, up.shape[0] + 1, (6, 2), generator=generator)
    assert layer._named_gate is not None
    biases = [layer.get_parameter(n[0]).detach() for n in layer._biases]
    arguments = (
        hidden, index, torch.rand(6, 2, generator=generator), up.operands(), down.operands(), *biases, up.codec_config,
        down.codec_config, up.shape[0], [up.shape[1], down.shape[1]], *layer._named_gate,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.halfbit.experts, arguments)


def test_the_same_run_gives_the_same_bytes(made, tmp_path) -> None:
    source, folder = made("qwen3-moe").source, made("qwen3-moe").folder
    run(source, tmp_path / "again", "qmoe")
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", ["qwen3-moe", "switch"])
@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_continues_to_the_identical_files(name: str, after: int, made, tmp_path) -> None:
    source, folder = made(name).source, made(name).folder
    steps: Any = compress(str(source), tmp_path / "out", chosen("qmoe"), text(source))
    for event in steps:
        if isinstance(event, BlockBegan) and event.number == after:
            next(steps)  # a part of the block is done
            break
    steps.close()
    assert not (tmp_path / "out" / "config.json").exists()
    rest = run(source, tmp_path / "out", "qmoe")
    began = next(e for e in rest if isinstance(e, Began))
    assert after <= began.resumed < began.blocks
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_rules_can_leave_layers_alone(saved, tmp_path) -> None:
    """Packed and plain experts in one model; the plain ones still load through transformers' own conversion."""
    run(
        saved("qwen3-moe"), tmp_path / "out", "qmoe", 'match = "*.experts.*" -> match = "model.layers.[12].*.experts.*"'
    )
    model = load(tmp_path / "out")
    kinds = [isinstance(model.get_submodule(f"model.layers.{i}.mlp.experts"), PackedExperts) for i in range(3)]
    assert kinds == [False, True, True]
    with torch.no_grad():
        before = model(**inputs(model)).logits
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(**inputs(model)).logits, before)


@pytest.mark.parametrize("undersampled", ["shrink", "identity"])
def test_experts_without_tokens_are_named_in_the_coverage_table(undersampled: str, saved, tmp_path) -> None:
    change = f'undersampled = "shrink" -> undersampled = "{undersampled}"'
    events = run(saved("qwen3-moe"), tmp_path / "out", "qmoe", change, samples=1)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    tables = manifest["coverage"]
    assert any(table["below_floor"] for table in tables.values())
    notices = [e.message for e in events if isinstance(e, Noticed)]
    for path, table in tables.items():
        assert sum(table["routed"]) == 12 * 3
        for expert in range(13):
            named = any(n.startswith(f"{path}.{expert}: 0 calibration tokens") for n in notices)
            assert named == (expert in table["below_floor"]) == (table["trained"][expert] == 0)


def test_experts_without_tokens_can_stop_the_run(saved, tmp_path) -> None:
    change = 'undersampled = "shrink" -> undersampled = "fail"'
    with pytest.raises(CoverageError, match=r"model\.layers\.\d\.mlp\.experts\.\d+: got 0") as caught:
        run(saved("qwen3-moe"), tmp_path / "out", "qmoe", change, samples=1)
    assert caught.value.tokens == 0
    assert not (tmp_path / "out" / "config.json").exists()


def test_true_sequential_solves_the_output_on_compressed_inputs(made, tmp_path) -> None:
    source, folder = made("mixtral").source, made("mixtral").folder
    run(source, tmp_path / "out", "qmoe", "true_sequential = false -> true_sequential = true")
    first, second = (json.loads((f / "manifest.json").read_text())["matrices"] for f in (folder, tmp_path / "out"))
    block = [n for n in first if n.startswith("model.layers.0.")]
    assert all(first[n] == second[n] for n in block if n.endswith("gate_up_proj"))
    assert any(first[n]["loss"] != second[n]["loss"] for n in block if n.endswith("down_proj"))


def test_calibrated_beats_round_to_nearest_on_the_calibration_tokens(made) -> None:
    models = [made("olmoe", name).model for name in ("qmoe", "rtn-ternary")]
    original = load(made("olmoe").source)
    samples = causal_samples(
        windows(torch.randint(3, 43, (72,), generator=torch.Generator().manual_seed(0)), 6, 12), []
    )
    distances: Any = [measure(m, samples, original=original).kl_divergence for m in models]
    assert distances[0] < distances[1]


@pytest.mark.parametrize("name", ["qmoe", "qmoe-2bit"])
@pytest.mark.parametrize("lost", ["experts.packed_down_proj", "mlp.gate.weight", "self_attn.q_proj.weight"])
def test_from_pretrained_refuses_a_folder_that_lacks_a_weight(name: str, lost: str, made, tmp_path) -> None:
    """transformers itself would warn and go on with random numbers."""
    out = Path(shutil.copytree(made("mixtral", name).folder, tmp_path / "out"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    # the checkpoint's own name of Mixtral's router is another
    gone = next(n for n in index["weight_map"] if "layers.1." in n and lost.removeprefix("mlp.") in n)
    path = out / index["weight_map"].pop(gone)
    tensors = load_file(path)
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with (
        halfbit.unverified(),
        pytest.raises(FormatError, match=r"model\.layers\.1\..*no file of this folder has this weight"),
    ):
        load(out)


HOSTILE = [
    ("codec", {"name": "os"}),
    ("codec", {"name": "qmoe", "p0": "0.9"}),
    ("codec", None),
    ("shape", [5, 36]),
    ("shape", [5, -36, 19]),
    ("shape", ["a", "b", "c"]),
    ("shape", [1, 5 * 36, 19]),
    ("shape", [5, 10**25, 19]),
    ("tensors", []),
    ("tensors", {"codec": ["uint8", [1]]}),
    ("tensors", {"codewords": ["__class__", [1]], "row_lengths": [], "levels": [], "pivots": []}),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_nothing_in_a_config_is_believed(key: str, value: object, made, tmp_path) -> None:
    copy = Path(shutil.copytree(made("mixtral").folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    entry = config["quantization_config"]["modules"]["model.layers.1.mlp.experts"]["down_proj"]
    entry[key] = value
    (copy / "config.json").write_text(json.dumps(config))
    with halfbit.unverified(), pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.experts\.down_proj"):
        load(copy)


@pytest.mark.parametrize("modules", [[1], "x", {"model.norm": {}}, {"model.layers.1.mlp.experts": [1]}])
def test_modules_of_a_config_must_be_experts(modules: object, made, tmp_path) -> None:
    copy = Path(shutil.copytree(made("mixtral").folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["modules"] = modules
    (copy / "config.json").write_text(json.dumps(config))
    with halfbit.unverified(), pytest.raises(FormatError, match=r"config\.json"):
        load(copy)


def test_another_model_of_the_same_shapes_does_not_continue_a_run(saved, tmp_path) -> None:
    source = saved("qwen3-moe")
    other = Path(shutil.copytree(source, tmp_path / "other"))
    tiny_models.edit(other, lambda tensors: [t.neg_() for n, t in tensors.items() if "experts" in n])
    steps: Any = compress(str(source), tmp_path / "out", chosen("qmoe"), text(source))
    next(e for e in steps if isinstance(e, BlockBegan) and e.number == 1)
    steps.close()
    with pytest.raises(OutputError, match="holds another run"):
        list(compress(str(other), tmp_path / "out", chosen("qmoe"), text(source)))


def test_the_model_can_be_saved_by_torch_and_copied(made, tmp_path) -> None:
    model = made("qwen3-moe").model
    torch.save(model.state_dict(), tmp_path / "state.pt")
    back = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(t, back[n]) for n, t in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(deepcopy(model)(**inputs(model)).logits, model(**inputs(model)).logits)


def test_rules_that_do_nothing_are_told(saved, tmp_path) -> None:
    rule = recipe.load("qmoe").to_toml().split("[solving]")[0].split("[[rules]]")[1]
    rules = recipe.load("qmoe").to_toml() + "[[rules]]" + rule.replace("*.experts.*", "*.norm_of_nothing")
    events = run(saved("mixtral"), tmp_path / "out", rules, samples=2)
    told = [e.message for e in events if isinstance(e, Noticed)]
    assert any("'*.norm_of_nothing' is the first match of no matrix" in m for m in told)
