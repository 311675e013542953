"""Experts solved towards what the original computes from its own activations."""

import json
from typing import Any

import pytest
import torch
from compressed import chosen, load, run, text
from torch import Tensor

from halfbit.activations import Routed
from halfbit.compress import _follow, calibration_samples, compress
from halfbit.crew import Devices
from halfbit.errors import Unsupported
from halfbit.events import BlockBegan
from halfbit.expert_pipeline import solve_module
from halfbit.families import open_family
from halfbit.flow import Flow
from halfbit.journal import Journal
from halfbit.pipeline import Profile
from halfbit.reader import Reader
from halfbit.recipe import Recipe, Rule
from halfbit.solve.drift import towards
from halfbit.writer import Writer

ASYMMETRIC = "asymmetric = false -> asymmetric = true"


@pytest.mark.parametrize("damping", [0.01, 0.3, 3.0])
def test_the_corrected_weights_are_the_least_squares_solution(damping: float) -> None:
    """Of one system that holds the outputs wanted and, scaled, the weights themselves."""
    random = torch.Generator().manual_seed(0)
    w, theirs = (torch.randn(*size, generator=random, dtype=torch.float64) for size in ((2, 5, 7), (2, 40, 7)))
    ours = theirs + 0.4 * torch.randn(theirs.shape, generator=random, dtype=torch.float64)
    hessian, cross = ours.mT @ ours, theirs.mT @ ours
    found = towards(w, hessian, cross, damping)
    for e in range(2):
        pull = (damping * hessian[e].diagonal().mean()).sqrt()
        left = torch.cat([ours[e], pull * torch.eye(7, dtype=torch.float64)])
        right = torch.cat([theirs[e] @ w[e].T, pull * w[e].T])
        assert torch.allclose(found[e], torch.linalg.lstsq(left, right).solution.T, rtol=1e-9, atol=1e-9)
    # nothing has drifted, nothing to make up for; a Hessian of nothing is left to the solver
    assert torch.allclose(towards(w, hessian, hessian, damping), w, rtol=1e-12)
    nothing = torch.full_like(hessian, float("nan"))
    assert torch.equal(towards(w, nothing, nothing, damping), w)


@pytest.mark.parametrize("name", ["qwen3-moe", "llama4"])
def test_the_original_is_followed_block_by_block(name: str, saved, tmp_path) -> None:
    """Against what hooks see in the original model."""
    source = saved(name)
    reader = Reader(str(source))
    family = open_family(reader)
    # in one batch, as the hooks see it: what is held back has batches of its own
    recipe = chosen("qmoe").gated(held_back=0)
    _, samples = calibration_samples(reader, family, recipe, text(source))
    family.load_outer("cpu", torch.float32)
    (part,) = family.stacks()
    flow = Flow(part, samples, None, "cpu")
    model = load(source)
    expected: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        return lambda _module, args, kwargs: expected.update({path: args[0] if args else kwargs["hidden_states"]})

    for path in family.experts:
        model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True)
    with torch.no_grad():
        model(torch.stack([s.ids for s in samples]))
    assert expected
    for block in part.blocks:
        module, journal = family.load_block(block), Journal(tmp_path)
        for path, found in _follow(flow, None, family, block, module, recipe, "cpu", journal, None).items():
            assert torch.allclose(found, expected[path].reshape(found.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3-moe", "switch", "llama4", "gpt-oss", "nemotron-h"])
def test_only_what_has_drifted_is_solved_otherwise(name: str, made, tmp_path) -> None:
    source, folder = made(name).source, made(name).folder
    run(source, tmp_path / "out", "qmoe", ASYMMETRIC)
    first, second = (json.loads((f / "manifest.json").read_text())["matrices"] for f in (folder, tmp_path / "out"))
    modules = list(dict.fromkeys(n.rpartition(".")[0].rpartition(".")[0] for n in first))
    # before the first experts nothing is compressed
    up, down = (
        [n for n in first if n.startswith(f"{modules[0]}.") and ("down" in n or "wo" in n) == is_down]
        for is_down in (False, True)
    )
    assert up
    assert down
    assert all(first[n]["loss"] == pytest.approx(second[n]["loss"], rel=1e-4) for n in up)
    assert any(first[n]["loss"] != pytest.approx(second[n]["loss"], rel=1e-3) for n in down)
    later = [n for n in first if n.startswith(f"{modules[-1]}.")]
    assert any(first[n]["loss"] != pytest.approx(second[n]["loss"], rel=1e-3) for n in later)


@pytest.mark.parametrize("name", ["qwen3-moe", "switch"])
def test_an_interrupted_run_continues_to_the_identical_files(name: str, made, tmp_path) -> None:
    source = made(name).source
    run(source, tmp_path / "whole", "qmoe", ASYMMETRIC)
    before, after = ASYMMETRIC.split(" -> ")
    how = Recipe.from_toml(chosen("qmoe").to_toml().replace(before, after))
    steps: Any = compress(str(source), tmp_path / "out", how, text(source))
    next(event for event in steps if isinstance(event, BlockBegan) and event.number == 2)
    steps.close()
    run(source, tmp_path / "out", "qmoe", ASYMMETRIC)
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_rows_that_cannot_be_compared_are_refused(saved, tmp_path) -> None:
    family = open_family(Reader(str(saved("qwen3-moe"))))
    path, stack = next(iter(family.experts.items()))
    routed = Routed(stack.num_experts, 4)
    routed.add(torch.rand(4, 8), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), torch.ones(4).bool())
    recipe = Recipe("", (Rule("*"),))
    writer, crew = Writer(tmp_path / "out", "", {}), Devices(["cpu"])
    with pytest.raises(Unsupported, match=rf"{path}: is called with 4 rows where the original is called with 3"):
        next(
            solve_module(
                family, stack, ([], []), recipe, routed.close(), torch.rand(3, 8), None, writer, crew, Profile()
            )
        )
