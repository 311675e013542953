"""What experts answer wrongly on the mean is stored beside their matrices, and added."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed import chosen, load, run, text
from test_expert_groups import EXPERTS, WIDTH, given
from torch import Tensor

from halfbit import formats, hf
from halfbit.compress import calibration_samples, compress
from halfbit.errors import FormatError, RecipeError
from halfbit.events import BlockBegan
from halfbit.expert_groups import Training, off
from halfbit.experts import experts_forward
from halfbit.families import open_family
from halfbit.folder import inspect, verify
from halfbit.layout import Entry
from halfbit.nn import PackedExperts, PackedLinear
from halfbit.reader import Reader
from halfbit.recipe import Coverage, Recipe, Rule, Solving
from halfbit.solve.rtn import rtn
from halfbit.tunable import frozen
from halfbit.types import Packed, corrections

CORRECTED = "mean_correction = false -> mean_correction = true"


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_corrections_are_mean_errors(router: bool, followed: bool, biased: bool) -> None:
    """Against loops in float64, of both projections; the last expert has no token."""
    group, routed = given()
    routed.index[routed.index == EXPERTS - 1] = EXPERTS
    routed = type(routed).asked(EXPERTS, routed.questions() | regrouped(routed.index))
    random = torch.Generator().manual_seed(1)
    theirs = torch.randn(len(routed.hidden), WIDTH, generator=random) if followed else None
    if biased:
        group = replace(group, up_bias=torch.randn(group.up.shape[:2], generator=random))
    other = replace(group, up=0.8 * group.up + 0.1, down=0.5 * group.down - 0.1)
    how = Recipe("", (Rule("*"),), Solving(router_weights=router), Coverage(max_tokens=100.0, shrink_tokens=10.0))
    training = Training.of(group, how, routed)
    for role in ("up", "down"):
        found = off(group, other, role, training, how, routed, theirs)
        assert found.dtype == torch.bfloat16
        for e in range(EXPERTS):
            lack, whole, n = torch.zeros(found.shape[1], dtype=torch.float64), 0.0, 0
            for t in range(len(routed.hidden)):
                for k in range(2):
                    if routed.index[t, k] == e and routed.keep[t]:
                        count = float(routed.weights[t, k]) ** 2 if router else 1.0
                        x = routed.hidden[t] if theirs is None else theirs[routed.places[t]]
                        lack += count * (answer(group, e, x, role) - answer(other, e, routed.hidden[t], role))
                        whole, n = whole + count, n + 1
            expected = n / (n + 10) * lack / whole if n else lack
            assert (n == 0) == (e == EXPERTS - 1)
            assert torch.allclose(found[e].double(), expected, rtol=2**-7, atol=1e-4)


def regrouped(index: Tensor) -> dict[str, Tensor]:
    expert, order = torch.sort(index.reshape(-1), stable=True)
    return {"order": order, "starts": torch.searchsorted(expert, torch.arange(EXPERTS + 1))}


def answer(group: Any, e: int, x: Tensor, role: str) -> Tensor:
    y = group.up[e].double() @ x.double()
    if role == "up":
        return y
    return group.down[e].double() @ torch.relu(y if group.up_bias is None else y + group.up_bias[e].double())


def dense(packed: PackedExperts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by projection, and what is added to their products: the model's own biases and the corrections."""
    weights, added = {}, {}
    stack = packed.stack
    for matrix, names in ((packed.matrix(packed._up), stack.up), (packed.matrix(packed._down), (stack.down,))):
        experts, out, columns = matrix.shape
        sizes = [stack.projections[name][0] for name in names]
        whole = matrix.codec.decode(matrix.packed()).view(experts, out, columns)
        correction = matrix.get_buffer("correction").float()
        assert correction.abs().max() > 0
        for name, w, c in zip(names, whole.split(sizes, 1), correction.split(sizes, 1), strict=True):
            bias = stack.biases[name]
            weights[name], added[name] = w, c if bias is None else c + packed.get_parameter(bias)
    return weights, added


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss", "switch"])
def test_folders_answer_with_their_corrections(name: str, saved, made, tmp_path) -> None:
    """Loaded by transformers, saved by it and loaded again; every byte is counted, every rule holds."""
    source = saved(name)
    run(source, tmp_path / "out", "qmoe", CORRECTED)
    model = load(tmp_path / "out")
    path, packed = next((p, m) for p, m in model.named_modules() if isinstance(m, PackedExperts))
    weights, added = dense(packed)
    stack = packed.stack
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, packed.matrix(packed._up).shape[2], generator=random)
    original = open_family(Reader(str(source))).model.get_submodule(path)
    index = torch.randint(stack.num_experts, (9, 1), generator=random)
    gates = torch.rand(9, 1, generator=random)
    expected = experts_forward(stack, original, weights, added, hidden, index, gates)
    chosen_by = (hidden, index, gates)
    if stack.form == "one_hot":
        hot = torch.nn.functional.one_hot(index, stack.num_experts)
        chosen_by = (hidden, hot, gates)
    answers = packed(*chosen_by)
    assert torch.allclose(answers, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers, experts_forward(stack, original, weights, {}, hidden, index, gates), atol=1e-4)

    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again").get_submodule(path)
    assert torch.equal(again(*chosen_by), answers)

    assert [str(found) for found in verify(tmp_path / "out") if not isinstance(found, str)] == []
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    ours = {n: t for n, t in manifest["tensors"].items() if n.endswith(".correction")}
    rows = sum(2 * torch.tensor(t["shape"]).prod().item() for t in ours.values())
    packed_bytes, before = (inspect(f)["packed"]["experts"]["bytes"] for f in (tmp_path / "out", made(name).folder))
    told = sum(
        manifest["matrices"][f"{p}.{e}.{role}"]["bits_per_weight"] * entry["shape"][1] * entry["shape"][2] / 8
        for p, entries in manifest["packed"].items()
        for role, entry in entries.items()
        for e in range(entry["shape"][0])
    )
    assert packed_bytes == pytest.approx(told)
    if name == "qwen3-moe":
        # before the first experts nothing else is solved
        assert packed_bytes - before == pytest.approx(rows, rel=0.2)


@pytest.mark.parametrize(("name", "first"), [("opt", "k_proj"), ("qwen3-moe", "q_proj")])
def test_layers_answer_with_their_corrections(name: str, first: str, saved, tmp_path) -> None:
    """Linear layers outside experts, with and without biases; the first one sees what the original sees."""
    source = saved(name)
    run(source, tmp_path / "out", "gptq-2-g8", CORRECTED)
    model, original = load(tmp_path / "out"), load(source)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert layers
    random = torch.Generator().manual_seed(0)
    for layer in layers.values():
        x = torch.randn(2, 3, layer.in_features, generator=random)
        weight = layer.matrix.codec.decode(layer.matrix.packed())
        expected = (
            torch.nn.functional.linear(x, weight, layer.get_parameter("bias") if layer.bias is not None else None)
            + layer.matrix.get_buffer("correction").float()
        )
        assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(frozen(layer)(x), expected, rtol=1e-4, atol=1e-5)
    assert [str(found) for found in verify(tmp_path / "out") if not isinstance(found, str)] == []

    path, layer = next((p, m) for p, m in layers.items() if p.endswith(first))
    family, reader = open_family(Reader(str(source))), Reader(str(source))
    _, samples = calibration_samples(reader, family, chosen("qmoe"), text(source))
    given = []
    hook = original.get_submodule(path).register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    solved_on = [s for s in samples if not s.held]
    with torch.no_grad():
        for sample in solved_on:
            original(input_ids=sample.ids[None])
    hook.remove()
    rows = torch.cat([x[0][s.keep] for x, s in zip(given, solved_on, strict=True)]).double()
    away = original.get_submodule(path).weight.double() - layer.matrix.codec.decode(layer.matrix.packed()).double()
    expected = len(rows) / (len(rows) + 64) * away @ rows.mean(0)
    assert torch.allclose(layer.matrix.get_buffer("correction")[0].double(), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("recipe", ["plain", "asymmetric", "layers"])
def test_an_interrupted_run_continues_to_the_identical_files(recipe: str, saved, tmp_path) -> None:
    source = saved("qwen3-moe")
    how = chosen("gptq-2-g8" if recipe == "layers" else "qmoe")
    sequential = recipe == "layers"
    asymmetric = recipe == "asymmetric"
    solving = replace(how.solving, mean_correction=True, asymmetric=asymmetric, true_sequential=sequential)
    how = replace(how, solving=solving)
    list(compress(str(source), tmp_path / "whole", how, text(source)))
    steps: Any = compress(str(source), tmp_path / "out", how, text(source))
    next(event for event in steps if isinstance(event, BlockBegan) and event.number == 2)
    steps.close()
    list(compress(str(source), tmp_path / "out", how, text(source)))
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_tuning_keeps_corrections(saved, tmp_path) -> None:
    source = saved("qwen3-moe")
    how = replace(chosen("qmoe"), solving=Solving(mean_correction=True))
    list(compress(str(source), tmp_path / "plain", how, text(source)))
    list(compress(str(source), tmp_path / "tuned", how.tuned(steps=3, batch_tokens=48), text(source)))
    plain, tuned = load(tmp_path / "plain"), load(tmp_path / "tuned")
    names = [name for name in plain.state_dict() if name.endswith(".correction")]
    assert names
    for name in names:
        assert torch.equal(plain.state_dict()[name], tuned.state_dict()[name])


def small(experts: int = 3) -> list[Packed]:
    rule = chosen("rtn-ternary").rules[0]
    assert rule.grid is not None
    assert rule.codec is not None
    w = torch.randn(experts, 8, 16, generator=torch.Generator().manual_seed(0))
    found = [rule.codec.encode(s) for s in rtn(w, None, rule.grid, names=["a"] * experts)]
    return [replace(p, correction=torch.full((1, 8), e + 0.5).bfloat16()) for e, p in enumerate(found)]


def test_stacks_and_entries_carry_corrections() -> None:
    parts = small()
    whole = formats.stack(parts)
    assert whole.nbytes == sum(p.nbytes for p in parts) == sum(replace(p, correction=None).nbytes for p in parts) + 48
    for e, part in enumerate(parts):
        own = whole.part(e, 3)
        assert all(torch.equal(own.stored[name], part.stored[name]) for name in part.stored)
    entry = Entry.parse(Entry.of(whole, 3).to_config(), "here")
    assert entry == Entry.of(whole, 3)
    back = entry.packed(whole.stored)
    assert back.correction is whole.correction
    assert "correction" not in back.tensors
    assert corrections([replace(p, correction=None) for p in parts]) is None
    with pytest.raises(ValueError, match="2 of 3 matrices have a correction"):
        corrections([replace(parts[0], correction=None), *parts[1:]])


def test_hostile_corrections_are_refused() -> None:
    whole = formats.stack(small())
    config = Entry.of(whole, 3).to_config()
    for value in (["bfloat16", [3, 9]], ["float32", [3, 8]], ["bfloat16", [8]], ["bfloat16", [3, 8], "other"], 7):
        config["tensors"]["correction"] = value
        with pytest.raises(FormatError, match="here"):
            Entry.parse(config, "here")
    assert whole.correction is not None
    whole.correction[1, 2] = float("nan")
    with pytest.raises(FormatError, match="a correction is NaN or infinite"):
        Entry.of(whole, 3).check(whole)


def test_bits_that_corrections_alone_would_take_are_refused(saved, tmp_path) -> None:
    with pytest.raises(RecipeError, match="mean_correction alone takes"):
        run(saved("qwen3-moe"), tmp_path / "out", "runlength", CORRECTED)
    assert hf.METHOD == "halfbit"
