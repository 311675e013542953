"""Gates: what goes wrong without a word stops the run, and it is told by which gate and where; honest runs pass.

One step of a run is sabotaged at a time, on a small trained model: errors of random weights would be of no use.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import load
from safetensors.torch import load_file
from typer.testing import CliRunner

import halfbit.writer
from halfbit import recipe
from halfbit.cli import app
from halfbit.compress import compress
from halfbit.errors import GateError, RecipeError
from halfbit.events import Began, Finished, Gated, Solved
from halfbit.expert_groups import Group, SolvedGroup
from halfbit.flow import Flow
from halfbit.folder import inspect, verify
from halfbit.formats.grouped import Grouped
from halfbit.gates import TEXT, _beyond, distinct
from halfbit.manifest import read_manifest
from halfbit.model_gate import few, frequencies, repeats
from halfbit.outputs import Judged
from halfbit.recipe import Recipe
from halfbit.samples import causal_samples
from halfbit.types import Solution

TINY = Path(__file__).parent.parent / "examples" / "tiny-moe"
CALIBRATION = str(TINY / "calibration.txt")
LOOP: Any = sys.modules["halfbit.compress"]
CREW: Any = sys.modules["halfbit.crew"]
BLOCK = "model.layers.0"
EXPERTS = f"{BLOCK}.mlp.experts"


def how(name: str = "qmoe") -> Recipe:
    return recipe.load(name).calibrated(samples=16, sequence_length=256).gated(model=False, held_back=2)


def sabotaged(monkeypatch: pytest.MonkeyPatch, change: Callable[[SolvedGroup], SolvedGroup], step: str) -> None:
    """Where it is solved, as if the solver were wrong, or where that is encoded, as if the codec were."""
    encode, solve = CREW._encoded, CREW.solve
    if step == "solve":
        monkeypatch.setattr(CREW, "solve", lambda *args: change(solve(*args)))
    else:
        monkeypatch.setattr(CREW, "_encoded", lambda rules, solved: encode(rules, change(solved)))


def of_expert(number: int, change: Callable[[Solution], Solution], role: str = "up") -> Callable[..., SolvedGroup]:
    def changed(solved: SolvedGroup) -> SolvedGroup:
        solutions = list(getattr(solved, role))
        solutions[number] = change(solutions[number])
        return replace(solved, **{role: solutions})

    return changed


def failure(out: Path, found: Recipe | None = None, words: str = CALIBRATION) -> GateError:
    with pytest.raises(GateError) as e:
        list(compress(str(TINY), out, found or how(), words))
    return e.value


def failed(out: Path, unit: str = BLOCK) -> dict[str, str]:
    return {row["gate"]: row["where"] for row in read_manifest(out)["gates"][unit] if not row["passed"]}


def scrambled(s: Solution) -> Solution:
    order = torch.randperm(s.codes.shape[1], generator=torch.Generator().manual_seed(0))
    return replace(s, codes=s.codes[:, order])


def swapped(s: Solution) -> Solution:
    """Gate and up, the two halves of the rows."""
    rows = torch.arange(len(s.codes)).roll(len(s.codes) // 2)
    return replace(s, codes=s.codes[rows], params={k: v[rows] for k, v in s.params.items()})


def silent(s: Solution) -> Solution:
    """Every weight 0."""
    zero = s.codes[s.dense() == 0][0]
    return replace(s, codes=torch.full_like(s.codes, int(zero)))


@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize(("step", "gate"), [("encode", "decoded"), ("solve", "noise")])
def test_a_scrambled_expert_is_caught(tmp_path, monkeypatch, role, step, gate) -> None:
    sabotaged(monkeypatch, of_expert(3, scrambled, role), step)
    e = failure(tmp_path / "out")
    assert (e.gate, e.where) == (gate, f"{EXPERTS}.3")
    found = failed(tmp_path / "out")
    assert found["noise"] == found["outlier"] == f"{EXPERTS}.3"
    # among the others one expert is too little for that
    assert "block" not in found


@pytest.mark.parametrize(("step", "gate"), [("encode", "decoded"), ("solve", "outlier")])
def test_swapped_gate_and_up_are_caught(tmp_path, monkeypatch, step, gate) -> None:
    sabotaged(monkeypatch, of_expert(5, swapped), step)
    e = failure(tmp_path / "out")
    assert (e.gate, e.where) == (gate, f"{EXPERTS}.5")


def test_gate_and_up_swapped_in_all_experts_are_caught(tmp_path, monkeypatch) -> None:
    """No expert stands out among the others then."""
    sabotaged(monkeypatch, lambda solved: replace(solved, up=[swapped(s) for s in solved.up]), "encode")
    assert failure(tmp_path / "out").gate == "decoded"
    found = failed(tmp_path / "out")
    assert "noise" in found
    assert "outlier" not in found


@pytest.mark.parametrize(("step", "gate"), [("encode", "decoded"), ("solve", "dead")])
def test_a_dead_expert_is_caught(tmp_path, monkeypatch, step, gate) -> None:
    sabotaged(monkeypatch, of_expert(2, silent, "down"), step)
    e = failure(tmp_path / "out")
    assert (e.gate, e.where) == (gate, f"{EXPERTS}.2")
    assert failed(tmp_path / "out")["dead"] == f"{EXPERTS}.2"


@pytest.mark.parametrize("kind", ["experts", "linear"])
def test_a_wrong_column_order_is_caught(tmp_path, monkeypatch, kind) -> None:
    """Stored the other way round, of one matrix."""
    encode, calls = Grouped.encode, []

    def wrong(self: Grouped, s: Solution) -> Any:
        if s.codes.shape[1] > 2:  # not the trial of a rule
            calls.append(s)
        second = s.order is not None and len(calls) == 2
        return encode(self, replace(s, order=s.order.flip(0)) if second and s.order is not None else s)

    rules = how("gptq-4-g128")
    match = "*.experts.*" if kind == "experts" else "*self_attn*"
    monkeypatch.setattr(Grouped, "encode", wrong)
    e = failure(tmp_path / "out", replace(rules, rules=(replace(rules.rules[-1], match=match),)))
    where = f"{EXPERTS}.1" if kind == "experts" else f"{BLOCK}.self_attn.k_proj"
    assert (e.gate, e.where) == ("decoded", where)
    assert failed(tmp_path / "out")["noise"] == where


@pytest.mark.parametrize("name", ["qmoe", "halfbit"])
def test_outputs_given_to_other_tokens_are_caught(tmp_path, monkeypatch, name) -> None:
    """Every expert is right: it is the block that is not."""
    give = Flow.give

    def wrong(self: Flow, stack: Any, routed: Any) -> None:
        # the samples of the compressed model; those of the original block are apart
        if len(self._batches) > 1:
            routed.outputs.copy_(routed.outputs.roll(1, 0))
        give(self, stack, routed)

    monkeypatch.setattr(Flow, "give", wrong)
    e = failure(tmp_path / "out", how(name))
    assert (e.gate, e.where) == ("block", BLOCK)
    assert list(failed(tmp_path / "out")) == ["block"]


def test_experts_are_read_once_where_nothing_comes_before_them(tmp_path, monkeypatch) -> None:
    """Gates read none once more: not where they are solved anyway, and not where the original is followed."""
    read, groups = Group.read, []

    def counted(family: Any, stack: Any, experts: range, device: str) -> Group:
        groups.append((stack.path, experts.start))
        return read(family, stack, experts, device)

    monkeypatch.setattr(Group, "read", staticmethod(counted))
    plain, followed = how(), replace(how(), solving=replace(how().solving, asymmetric=True))
    for found, times in ((plain, 1), (plain.gated(held_back=0), 1), (followed, 2)):
        groups.clear()
        list(compress(str(TINY), tmp_path / str(len(list(tmp_path.iterdir()))), found, CALIBRATION))
        assert set(Counter(groups).values()) == {times}


def test_what_is_not_finite_is_caught(tmp_path, monkeypatch) -> None:
    decoded = Group.decoded

    def broken(self: Group, up: list[Any], down: list[Any]) -> Group:
        found = decoded(self, up, down)
        found.up[1, 0, 0] = torch.inf
        return found

    monkeypatch.setattr(Group, "decoded", broken)
    e = failure(tmp_path / "out")
    assert (e.gate, e.where, e.value) == ("finite", f"{EXPERTS}.1", 1.0)
    # the manifest is JSON that anybody reads
    json.loads((tmp_path / "out" / "manifest.json").read_text(), parse_constant=pytest.fail)


def test_a_text_of_one_word_is_caught_before_anything_is_solved(tmp_path) -> None:
    words = tmp_path / "text.txt"
    words.write_text("halfbit " * 5000)
    e = failure(tmp_path / "out", words=str(words))
    assert (e.gate, e.where) == ("text", TEXT)
    assert read_manifest(tmp_path / "out")["blocks"] == {}
    steps = iter(compress(str(TINY), tmp_path / "out", how(), str(words), accept=["text"]))
    assert isinstance(next(steps), Began)
    assert read_manifest(tmp_path / "out")["gates"][TEXT][0]["accepted"]


def test_experts_that_no_token_reaches_are_caught(tmp_path) -> None:
    """Two tokens, in two of eight experts each."""
    found = how().calibrated(samples=1, sequence_length=2).gated(text=0.0, coverage=0.5)
    e = failure(tmp_path / "out", found)
    assert e.gate == "coverage"
    assert e.where.endswith(".mlp.experts")


def test_a_failed_gate_keeps_the_work_and_says_how_to_go_on(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    sabotaged(monkeypatch, of_expert(3, scrambled), "solve")
    e = failure(out)
    assert "--accept noise" in str(e)
    assert str(out) in str(e)
    monkeypatch.undo()
    # the same again, without solving anything
    assert failure(out).where == e.where
    assert list(read_manifest(out)["blocks"]) == [BLOCK]
    with pytest.raises(GateError):
        list(compress(str(TINY), out, how(), CALIBRATION, accept=["perplexity", "model.layers.3"]))
    events = list(compress(str(TINY), out, how(), CALIBRATION, accept=[f"{EXPERTS}.3"]))
    assert isinstance(events[-1], Finished)
    assert not any(isinstance(event, Solved) and event.matrix.startswith(BLOCK) for event in events)
    report = inspect(out)["gates"]
    assert {row["gate"] for row in report["failed"]} == set(failed(out))
    assert all(row["accepted"] for row in report["failed"])
    assert not [p for p in verify(out) if not isinstance(p, str)]


def test_the_command_line_tells_what_failed(tmp_path, monkeypatch) -> None:
    sabotaged(monkeypatch, of_expert(3, scrambled), "solve")
    out, file = tmp_path / "out", tmp_path / "how.toml"
    file.write_text(how().to_toml())
    command = ["compress", str(TINY), str(out), "--calibration", CALIBRATION, "--recipe", str(file)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 3
    assert f"{EXPERTS}.3" in result.output
    assert "--accept noise" in result.output
    monkeypatch.undo()
    result = CliRunner().invoke(app, [*command, "--accept", "error", "--accept", "outlier", "--accept", "noise"])
    assert result.exit_code == 0, result.output
    assert f"noise at {EXPERTS}.3 (accepted)" in result.output.replace("\n", " ")
    shown = CliRunner().invoke(app, ["inspect", str(out)]).output
    assert "came nearest to failing" in shown


def test_an_honest_run_passes_every_gate(tmp_path) -> None:
    found = how().gated(model=True)
    events = list(compress(str(TINY), tmp_path / "out", found, CALIBRATION))
    units = {event.unit: event.checks for event in events if isinstance(event, Gated)}
    blocks = [f"model.layers.{i}" for i in range(4)]
    assert list(units) == [TEXT, *blocks, "model"]
    gates = read_manifest(tmp_path / "out")["gates"]
    assert all(row["passed"] and not row.get("accepted") for rows in gates.values() for row in rows)
    each = ["finite", "decoded", "dead", "error", "noise", "outlier", "coverage", "block"]
    assert [row["gate"] for row in gates[BLOCK]] == each
    assert [row["gate"] for row in gates["model"]] == ["perplexity", "divergence", "regret", "entropy", "repetition"]
    # finished, it is not judged again
    assert [type(e) for e in compress(str(TINY), tmp_path / "out", found, CALIBRATION)] == [Finished]


def test_figures_of_the_finished_model_are_those_of_eval(tmp_path) -> None:
    """Against transformers' own forward of both models on the held-back windows."""
    found = how().gated(model=True)
    list(compress(str(TINY), tmp_path / "out", found, CALIBRATION))
    rows = {row["gate"]: row for row in read_manifest(tmp_path / "out")["gates"]["model"]}
    _, samples = LOOP.calibration_samples(
        *(lambda reader: (reader, LOOP.open_family(reader)))(LOOP.Reader(str(TINY))), found, CALIBRATION
    )
    ids = torch.stack([s.ids for s in samples if s.held])
    assert len(ids) == 2
    with torch.no_grad():
        ours, theirs = (load(f)(ids).logits[:, :-1].double().log_softmax(-1) for f in (tmp_path / "out", TINY))
    labels = ids[:, 1:, None]
    rise = (theirs.gather(2, labels) - ours.gather(2, labels)).mean()
    assert rows["perplexity"]["value"] == pytest.approx(float(rise.exp()), rel=1e-3)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert rows["divergence"]["value"] == pytest.approx(float(divergence), rel=1e-3)


def test_a_damaged_folder_is_caught_at_the_end(tmp_path, monkeypatch) -> None:
    """The embeddings are written in another order: every block was right."""
    save = halfbit.writer.save_file

    def exchange(tensors: dict[str, torch.Tensor], path: Any, **how: Any) -> None:
        for name in tensors:
            if "embed" in name:
                tensors[name] = tensors[name].flip(0)
        save(tensors, path, **how)

    monkeypatch.setattr(halfbit.writer, "save_file", exchange)
    e = failure(tmp_path / "out", how().gated(model=True))
    assert e.gate in ("perplexity", "divergence")
    assert read_manifest(tmp_path / "out")["complete"]
    # what is complete is not done again, and stays failed until that is accepted
    monkeypatch.undo()
    assert failure(tmp_path / "out", how().gated(model=True)).gate == e.gate
    list(compress(str(TINY), tmp_path / "out", how().gated(model=True), CALIBRATION, accept=["all"]))


def test_nothing_is_solved_on_what_is_held_back(tmp_path) -> None:
    """More of it changes no file but the manifest and the recipe."""
    files = []
    for held in (0, 3):
        out = tmp_path / str(held)
        list(compress(str(TINY), out, how().gated(held_back=held), CALIBRATION))
        files.append({p.name: load_file(p) for p in sorted(out.glob("*.safetensors"))})
    for name, tensors in files[0].items():
        assert all(torch.equal(t, files[1][name][k]) for k, t in tensors.items()), name
    covers = [read_manifest(tmp_path / str(held))["coverage"] for held in (0, 3)]
    assert covers[0] == covers[1]


def test_a_text_without_more_samples_gives_some_of_its_own(tmp_path) -> None:
    reader = LOOP.Reader(str(TINY))
    family = LOOP.open_family(reader)
    words = tmp_path / "text.txt"
    words.write_text(Path(CALIBRATION).read_text()[:20000])
    _, every = LOOP.calibration_samples(
        reader, family, recipe.load("qmoe").calibrated(sequence_length=64), str(words), every=True
    )
    have = len(every)
    for samples, held in ((have, have // 8), (have - 1, have // 8), (have - 30, 30), (have - 50, 40)):
        found = recipe.load("qmoe").calibrated(samples=samples, sequence_length=64).gated(held_back=40)
        _, given = LOOP.calibration_samples(reader, family, found, str(words))
        assert sum(s.held for s in given) == held
        # the same text in the same order
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(given, every, strict=False))


def test_error_and_energy_are_what_they_say() -> None:
    y, z = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    assert Judged.of(y, z, 1) == Judged(0.64, 0.36, 1)
    assert Judged.of(torch.zeros(2), torch.zeros(2), 1).error == 0
    assert Judged.of(torch.zeros(2), torch.ones(2), 1).error == 1
    assert Judged.of(y, z * torch.nan, 1) == Judged(None, None, 1)


def test_runs_are_counted() -> None:
    once = causal_samples(torch.arange(40)[None], [])
    assert distinct(once) == 1
    assert distinct([*once, *once]) == 0.5
    assert distinct(causal_samples(torch.ones(1, 40, dtype=torch.int64), [])) == 1 / 33
    text = torch.tensor([1, 2, 3, 4, 9, 1, 2, 3, 4, 5])
    # 1 2 3 4 comes for the second time with the token in place 8
    assert repeats(text, 5, torch.tensor([1, 2, 3, 4, 5])).tolist() == [0, 0, 0, 1, 0]
    assert repeats(text, 5, torch.tensor([1, 2, 3, 7, 5])).tolist() == [0, 0, 0, 0, 0]


def test_a_block_is_held_against_its_parts() -> None:
    """Half of the answers of one part and none of the other are noise: so much may be of the block's, eight times."""
    y = torch.tensor([1.0, 0.0])
    added = Judged.of(y, torch.tensor([1.0, 1.0]), None)
    # energy 2, product 1: as much noise as signal; the error is 1
    assert _beyond(added, [0.5, 1.0]) == pytest.approx(2.0)
    assert _beyond(added, [1.0]) == pytest.approx(20.0)
    assert _beyond(Judged.of(y, y, None), []) == 0
    assert _beyond(Judged.of(y, y * torch.nan, None), []) is None


def test_what_knows_only_frequencies() -> None:
    samples = causal_samples(torch.tensor([[0, 1, 1, 3], [1, 1, 3, 3]]), [])
    logs = frequencies(samples, 5)
    assert torch.allclose(logs.exp(), torch.tensor([2.0, 5.0, 1.0, 4.0, 1.0]) / 13)


def test_long_samples_are_cut_for_the_finished_model() -> None:
    samples = causal_samples(torch.arange(40).view(4, 10), [])
    assert [len(s.ids) for s in few(samples, 25)] == [10, 10]
    assert [len(s.ids) for s in few(samples, 7)] == [7]
    assert len(few(samples, 7)[0].keep) == 7


def test_limits_must_be_limits() -> None:
    with pytest.raises(RecipeError, match="gates"):
        how().gated(error=float("nan"))
    with pytest.raises(RecipeError, match="gates"):
        how().gated(held_back=-1)
    assert Recipe.from_toml(how().to_toml()) == how()
