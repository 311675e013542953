"""Bits go where they help: the allocator against brute force, the probe's parts, and whole runs by file bytes."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from compressed import SOURCES, add_tokenizer, chosen, decoded, inputs, largest_difference, load, run, text
from typer.testing import CliRunner

from halfbit import allocation, recipe
from halfbit.cli import app
from halfbit.compress import compress
from halfbit.errors import CalibrationError, RecipeError
from halfbit.evaluate import evaluate
from halfbit.events import Probed, Solved
from halfbit.folder import inspect
from halfbit.probe import between
from halfbit.recipe import Recipe
from halfbit.solve.allocate import Choice, Curve, allocate, hull

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-moe"


def curve(weights: int, *points: tuple[float, float]) -> Curve:
    return Curve(weights, tuple(Choice(bits, loss, i) for i, (bits, loss) in enumerate(points)))


def random_curves(seed: int, count: int = 4) -> list[Curve]:
    """Falling, but neither convex nor of equal sizes; one choice is worse in both."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        bits = (torch.rand(4, generator=random) * 4).sort().values.tolist()
        loss = (torch.rand(4, generator=random) ** 3).sort(descending=True).values.tolist()
        weights = int(torch.randint(1, 5, (1,), generator=random)) * 100
        found.append(curve(weights, *zip(bits, loss, strict=True), (4.5, 2.0)))
    return found


def spent(curves: list[Curve], choices) -> tuple[float, float]:
    """(bits, loss) in all."""
    return (
        sum(c.weights * x.bits for c, x in zip(curves, choices, strict=True)),
        sum(x.loss for x in choices),
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_of_no_more_bits_has_less_loss_than_the_lagrangian_solution(seed: int) -> None:
    """Whatever is taken is the best of all combinations that take no more bits than it does, up to the one step that
    did not fit; at the budgets where the last step ends exactly it is the best of all."""
    curves = random_curves(seed)
    every = [spent(curves, choices) for choices in itertools.product(*(c.choices for c in curves))]
    least = min(bits for bits, _ in every)
    most = max(bits for bits, _ in every)
    for budget in (least + (most - least) * i / 11 for i in range(12)):
        bits, loss = spent(curves, allocate(curves, budget))
        assert bits <= budget + 1e-6
        step = max(c.weights * (b.bits - a.bits) for c in curves for a, b in itertools.pairwise(hull(c.choices)))
        best = min(other for taken, other in every if taken <= max(least, budget - step) + 1e-6)
        assert loss <= best + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_at_the_budget_of_a_slope_it_is_the_best_of_all(seed: int) -> None:
    curves = random_curves(seed)
    every = [spent(curves, choices) for choices in itertools.product(*(c.choices for c in curves))]
    for price in (1e-5, 1e-4, 1e-3, 1e-2):
        taken, loss = min(every, key=lambda pair: pair[1] + price * pair[0])
        bits, found = spent(curves, allocate(curves, taken + 1e-6))
        assert bits <= taken + 1e-6
        assert found == pytest.approx(loss, abs=1e-9)


def test_a_hull_is_convex_and_leaves_out_what_never_pays() -> None:
    found = hull(curve(1, (1, 8.0), (2, 7.5), (3, 2.0), (4, 3.0), (5, 1.9), (5, 1.0)).choices)
    assert [(c.bits, c.loss) for c in found] == [(1, 8.0), (3, 2.0), (5, 1.0)]


def test_a_budget_below_the_least_gives_the_cheapest() -> None:
    curves = [curve(10, (1, 1.0), (2, 0.5)), curve(10, (0.5, 1.0), (2, 0.1))]
    assert [c.bits for c in allocate(curves, 0)] == [1, 0.5]


def test_large_matrices_are_not_preferred() -> None:
    """The same saving costs ten times as much in the large one."""
    large, small = curve(1000, (1, 1.0), (2, 0.5)), curve(100, (1, 1.0), (2, 0.5))
    assert [c.bits for c in allocate([large, small], 1200)] == [1, 2]
    assert [c.bits for c in allocate([large, small], 2200)] == [2, 2]


def test_between_two_spreads_lies_what_lies_between() -> None:
    ends = [Choice(1.0, 0.01, 0, 2.0), Choice(0.4, 0.16, 0, 8.0), Choice(2.4, 0.001, 1)]
    found = between(ends)
    assert found[:3] == ends
    middle = found[3:][2]
    assert middle.bits == pytest.approx(0.7)
    assert middle.loss == pytest.approx(0.04)
    assert middle.spread == pytest.approx(4.0)
    assert between([Choice(1.0, 0.0, 0, 2.0), Choice(0.4, 0.0, 0, 8.0)])[2:] == []


# --- whole runs

TINY = """
[[rules]]
match = "*.gate"
[[rules]]
match = "*.mlp.experts.*"
bits = 4.0
[[rules.options]]
grid = { name = "bilevel", bits = 2, group = 8, supergroup = 4, fitting = "min-max" }
codec = { name = "spqr" }
[[rules.options]]
grid = { name = "bilevel", bits = 4, group = 8, supergroup = 4, fitting = "min-max" }
codec = { name = "spqr" }
[[rules.options]]
grid = { name = "deadzone" }
codec = { name = "runlength" }
[[rules]]
match = "*.[0-9]*.*"
bits = 6.0
[[rules.options]]
grid = { name = "bilevel", bits = 3, group = 8, supergroup = 4, fitting = "min-max" }
codec = { name = "spqr" }
[[rules.options]]
grid = { name = "bilevel", bits = 8, group = 8, supergroup = 4, fitting = "min-max" }
codec = { name = "spqr" }
order = "act_order"
"""
MODELS = ["qwen3-moe", "deepseek-v3", "switch", "llama", "opt"]


def tiny(bits: float = 4.0) -> str:
    # of matrices this small the overhead is most; 64 bits are more than any option has
    return TINY.replace("bits = 4.0", f"bits = {bits}").replace("bits = 6.0", f"bits = {1.5 * bits}")


@pytest.mark.parametrize("name", MODELS)
def test_any_model_runs_from_what_was_allocated(name: str, tmp_path: Path) -> None:
    """Experts, encoder and decoder, layers before, beside and behind experts, biases."""
    source = add_tokenizer(SOURCES[name](tmp_path / "source"))
    events = run(source, tmp_path / "out", tiny(12.0))
    probed = [e for e in events if isinstance(e, Probed)]
    assert probed[-1].done == probed[-1].matrices
    told = json.loads((tmp_path / "out" / "allocation.json").read_text())
    assert len(told["matrices"]) == probed[-1].matrices
    losses = [loss for _, _, _, loss in told["matrices"].values()]
    assert all(loss >= 0 for loss in losses)
    assert any(loss > 0 for loss in losses)
    model = load(tmp_path / "out")
    dense = decoded(source, model)
    with torch.no_grad():
        found, expected = (m(**inputs(m), use_cache=False).logits for m in (model, dense))
    assert largest_difference(found, expected) < 2e-5


def test_an_interrupted_run_does_not_measure_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = add_tokenizer(SOURCES["qwen3-moe"](tmp_path / "source"))
    run(source, tmp_path / "whole", tiny(12.0))
    chosen_ = chosen(tiny(12.0))
    for event in compress(str(source), tmp_path / "out", chosen_, text(source)):
        if isinstance(event, Solved):
            break
    monkeypatch.setattr(allocation, "Probe", None)
    for _ in compress(str(source), tmp_path / "out", chosen_, text(source)):
        pass
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert not (tmp_path / "out" / allocation.CURVES).exists()


def test_measured_once_for_many_sizes_but_for_no_other_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = add_tokenizer(SOURCES["qwen3-moe"](tmp_path / "source"))
    curves = tmp_path / "curves.json"
    for _ in compress(str(source), tmp_path / "a", chosen(tiny(12.0)), text(source), curves=curves):
        pass
    with pytest.raises(CalibrationError, match="measured on another model, text or set of options"):
        list(compress(str(source), tmp_path / "b", chosen(tiny(6.0), samples=5), text(source), curves=curves))
    monkeypatch.setattr(allocation, "Probe", None)
    for _ in compress(str(source), tmp_path / "c", chosen(tiny(6.0)), text(source), curves=curves):
        pass
    sizes = [inspect(tmp_path / name)["bits_per_packed_weight"] for name in "ac"]
    assert sizes[1] < sizes[0]
    curves.write_text('{"measured_on": 3}')
    with pytest.raises(CalibrationError, match="holds no measured curves"):
        list(compress(str(source), tmp_path / "d", chosen(tiny(6.0)), text(source), curves=curves))


def test_too_few_bits_are_answered_with_what_is_possible(tmp_path: Path) -> None:
    source = add_tokenizer(SOURCES["llama"](tmp_path / "source"))
    with pytest.raises(RecipeError, match=r"possible are \d+\.\d+ to \d+\.\d+"):
        run(source, tmp_path / "out", tiny(0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits = 4.0": ""}, "options need bits"),
        ({'match = "*.mlp.experts.*"': 'match = "*.mlp.experts.*"\ndamping = 0.1'}, "beside them only bits"),
        ({"bits = 3, group": "bits = 3, group"}, ""),
        ({'order = "act_order"': "bits = 4.5"}, "its bits are not given"),
        ({'order = "act_order"': 'solver = "rtn"'}, "is solved by gptq"),
        ({'order = "act_order"': 'match = "x"'}, "unknown field 'match'"),
    ],
)
def test_what_a_rule_with_options_cannot_say(changes: dict[str, str], message: str) -> None:
    toml = TINY
    for before, after in changes.items():
        assert before in toml
        toml = toml.replace(before, after)
    if not message:
        found = Recipe.from_toml(toml)
        assert Recipe.from_toml(found.to_toml()) == found
        return
    with pytest.raises(RecipeError, match=message):
        Recipe.from_toml(toml)


def test_bits_by_file_bytes_and_a_smaller_loss_than_equal_bits(tmp_path: Path) -> None:
    """A trained model, experts ternary at any rate: half a bit each, or where they help."""
    options = '[[rules]]\nmatch = "*.experts.*"\nbits = 0.8\n[[rules.options]]\n' + (
        'grid = { name = "deadzone" }\ncodec = { name = "runlength" }\n'
    )
    found = {}
    for name, how in {"equal": recipe.load("runlength"), "allocated": Recipe.from_toml(options)}.items():
        how = how.calibrated(samples=16, sequence_length=128)
        for _ in compress(str(EXAMPLE), tmp_path / name, how, str(EXAMPLE / "calibration.txt")):
            pass
        report = inspect(tmp_path / name)
        assert report["bits_per_packed_weight"] == pytest.approx(0.8, rel=0.01)
        result = evaluate(
            str(tmp_path / name),
            str(EXAMPLE / "test.txt"),
            against=str(EXAMPLE),
            sequence_length=128,
            max_tokens=4096,
        )
        found[name] = result.kl_divergence
    assert found["allocated"] < 0.95 * found["equal"]


def test_what_was_decided_is_shown_also_before_it_is_done(tmp_path: Path) -> None:
    source = add_tokenizer(SOURCES["qwen3-moe"](tmp_path / "source"))
    for event in compress(str(source), tmp_path / "out", chosen(tiny(12.0)), text(source)):
        if isinstance(event, Solved):
            break
    shown = inspect(tmp_path / "out")["allocation"]
    assert sum(row["share"] for row in shown["projections"].values()) == pytest.approx(1, abs=1e-3)
    experts = shown["projections"]["model.layers.0.mlp.experts.down_proj"]
    assert len(experts["bits"]) == sum(experts["formats"].values()) > 1
    assert {row["bits"] for row in shown["rules"]} == {12.0, 18.0}
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert result.exit_code == 0
    (tmp_path / "out" / "allocation.json").write_text('{"rules": 3}')
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).exit_code == 2
