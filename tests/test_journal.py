"""Runs that end anywhere, killed or with a full or failing disk: the same command ends in the same bytes.

`make torture` does more of the same.
"""

import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torture
from compressed import text

from halfbit import expert_groups, journal, linear_groups, probe
from halfbit.compress import compress
from halfbit.errors import FormatError, OutputError
from halfbit.events import Event, Finished, Gated, Probed, Solved
from halfbit.family import Family
from halfbit.journal import FLOW, FOLDER, Journal
from halfbit.recipe import Recipe

OPTIONS = """
name = "options"
[[rules]]
match = "*router*"
[[rules]]
match = "*.gate"
[[rules]]
match = "*.[0-9]*.*"
bits = 9.0
[[rules.options]]
grid = { name = "deadzone" }
codec = { name = "runlength", rotated = true }
[[rules.options]]
grid = { name = "bilevel", bits = 3, group = 9, supergroup = 3 }
codec = { name = "spqr" }
[calibration]
samples = 6
sequence_length = 12
[solving]
experts_per_batch = 5
"""


def steps(source: Path, out: Path, recipe: str = torture.RECIPE, **options: Any) -> Iterator[Event]:
    how = Recipe.from_toml(recipe).gated(model=False)
    return compress(str(source), out, how, text(source), **options)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written at once."""
    monkeypatch.setattr(journal, "SECONDS", 0.0)
    monkeypatch.setattr(journal, "WORTH", 0.0)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the names of what is solved."""
    names: list[str] = []
    for module, function in ((expert_groups, "solve_matrices"), (linear_groups, "solve")):
        monkeypatch.setattr(module, function, partial(_noting, names, getattr(module, function)))
    return names


def _noting(names: list[str], original: Any, *args: Any, **kwargs: Any) -> Any:
    names.extend(args[4])
    return original(*args, **kwargs)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the blocks that are loaded."""
    names: list[str] = []
    original = Family.load_block

    def load_block(self: Any, block: str, *args: Any) -> Any:
        names.append(block)
        return original(self, block, *args)

    monkeypatch.setattr(Family, "load_block", load_block)
    return names


def stop_after(events: Iterator[Event], matrices: int) -> None:
    for _ in itertools.islice((e for e in events if isinstance(e, Solved)), matrices):
        pass
    events.close()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["qwen3-moe", "switch"])
def test_no_more_than_a_group_is_solved_twice_and_no_block_before_the_open_one_runs(
    name: str, saved, tmp_path, always, solved, loaded
) -> None:
    source = saved(name)
    list(steps(source, tmp_path / "whole"))
    matrices, blocks = sorted(solved), list(loaded)
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    for stop in (2, len(matrices) // 4, len(matrices) // 2, len(matrices) - 3):
        solved.clear()
        out = tmp_path / str(stop)
        stop_after(steps(source, out), stop)
        committed = [b for b in blocks if b in json.loads((out / "manifest.json").read_text())["blocks"]]
        loaded.clear()
        assert isinstance(list(steps(source, out))[-1], Finished)
        assert loaded == blocks[len(committed) :]
        # but for the group of experts that was being solved beside the one that was kept
        again = Counter(solved) - Counter(matrices)
        assert set(solved) == set(matrices)
        assert again.total() <= 6
        assert {p.name: p.read_bytes() for p in out.iterdir()} == files


@pytest.mark.parametrize("name", ["qwen3-moe", "switch"])
def test_measuring_goes_on_behind_the_last_block(name: str, saved, tmp_path, always, loaded) -> None:
    source, recipe = saved(name), OPTIONS
    list(steps(source, tmp_path / "whole", recipe))
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    blocks = loaded[: len(loaded) // 2]
    assert loaded == blocks * 2
    seen: list[str] = []
    for after in (1, len(blocks) * 2 // 3):
        out, events = tmp_path / str(after), None
        loaded.clear()
        events = steps(source, out, recipe)
        while len(loaded) <= after:
            assert isinstance(next(events), Probed | Gated)
        events.close()  # pyright: ignore[reportAttributeAccessIssue]
        loaded.clear()
        assert isinstance(list(steps(source, out, recipe))[-1], Finished)
        assert loaded == blocks[after:] + blocks
        seen.append(blocks[after])
        assert {p.name: p.read_bytes() for p in out.iterdir()} == files
    assert seen


@pytest.mark.parametrize("followed", ["true", "false"])
@pytest.mark.parametrize("name", ["qwen3-moe", "switch"])
def test_groups_that_have_answered_are_neither_read_nor_run_again(
    name: str, followed: str, saved, tmp_path, always, monkeypatch
) -> None:
    source, read = saved(name), []
    original = expert_groups.Group.read.__func__

    def noted(cls: Any, family: Any, stack: Any, experts: range, device: str) -> Any:
        read.append((stack.path, experts.start))
        return original(cls, family, stack, experts, device)

    monkeypatch.setattr(expert_groups.Group, "read", classmethod(noted))
    recipe = torture.RECIPE.replace("asymmetric = true", f"asymmetric = {followed}")
    list(steps(source, tmp_path / "whole", recipe))
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    out, events, groups = tmp_path / "out", steps(source, tmp_path / "out", recipe), 0
    # closed at the first matrix of the second group: the first has answered
    for event in events:
        if isinstance(event, Solved) and event.matrix.endswith(".3.gate_up_proj" if name == "qwen3-moe" else ".3.wi"):
            break
        groups += isinstance(event, Solved)
    events.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert groups
    stack = read[-1][0]
    assert (stack, 0) in read
    read.clear()
    assert isinstance(list(steps(source, out, recipe))[-1], Finished)
    assert next(start for path, start in read if path == stack) == 3
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files


def test_answers_of_another_module_or_without_their_groups_are_not_used(saved, tmp_path, always) -> None:
    kept = Journal(tmp_path)
    kept.open("block.0")
    kept.add("a", {"x": torch.ones(2)}, {})
    kept.keep_answers("a", 1, {"y": torch.ones(3)}, {"z": 0.5})
    groups, answers, facts = Journal(tmp_path).answers("a")
    assert (groups, facts) == (1, {"z": 0.5})
    assert torch.equal(answers["y"], torch.ones(3))
    assert Journal(tmp_path).answers("b") == (0, {}, None)
    # what has answered was written before
    again = Journal(tmp_path)
    again.open("block.0")
    assert again.get("a") is not None
    source, out = saved("qwen3-moe"), tmp_path / "out"
    stop_after(steps(source, out), 12)
    for path in (out / FOLDER).glob("0*.safetensors"):
        path.unlink()
    with pytest.raises(FormatError, match="has answered, but is not there; delete"):
        list(steps(source, out))


@pytest.mark.parametrize("name", ["qwen3-moe", "switch"])
def test_measuring_goes_on_inside_of_a_block(name: str, saved, tmp_path, always, monkeypatch) -> None:
    source, probed = saved(name), []
    monkeypatch.setattr(probe, "solve", partial(_noting, probed, probe.solve))
    events = [e for e in steps(source, tmp_path / "whole", OPTIONS) if isinstance(e, Probed)]
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    once = Counter(probed)
    for stop in (1, len(events) // 2 + 1):
        probed.clear()
        out = tmp_path / str(stop)
        going = steps(source, out, OPTIONS)
        for _ in itertools.islice((e for e in going if isinstance(e, Probed)), stop):
            pass
        going.close()  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(list(steps(source, out, OPTIONS))[-1], Finished)
        # nothing is probed twice: the journal is written behind every group here
        assert Counter(probed) == once
        assert {p.name: p.read_bytes() for p in out.iterdir()} == files


def test_damage_of_the_journal_is_found(saved, tmp_path, always) -> None:
    source, out = saved("qwen3-moe"), tmp_path / "out"
    stop_after(steps(source, out), 12)
    path = max((out / FOLDER).glob("0*.safetensors"))
    data = bytearray(path.read_bytes())
    for at, says in ((len(data) - 1, "its checksum differs"), (3, "delete")):
        changed = data.copy()
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(FormatError, match=says) as caught:
            list(steps(source, out))
        assert str(out / FOLDER) in str(caught.value)
    # as the message says
    shutil.rmtree(out / FOLDER)
    assert isinstance(list(steps(source, out))[-1], Finished)
    assert not (out / FOLDER).exists()


def test_what_is_left_of_another_block_is_deleted(tmp_path, always) -> None:
    kept = Journal(tmp_path)
    kept.open("block.0")
    kept.add("a", {"x": torch.arange(5)}, {"loss": 0.1})
    kept.add("b", {"x": torch.zeros(0)}, {})
    again = Journal(tmp_path)
    again.open("block.0")
    found = again.get("a")
    assert found is not None
    assert torch.equal(found[0]["x"], torch.arange(5))
    assert found[1] == {"loss": 0.1}
    assert again.get("c") is None
    again.open("block.1")
    assert again.get("a") is None
    assert not list((tmp_path / FOLDER).iterdir())


def test_the_journal_is_written_from_time_to_time(tmp_path, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    kept = Journal(tmp_path)
    kept.open("block.0")
    for second in range(0, 100, 10):
        now[0] = 100.0 + second
        kept.add(str(second), {"x": torch.ones(2)}, {})
        kept.keep_flow(FLOW, "block.0", {"flow": torch.ones(second)})
    assert len(list((tmp_path / FOLDER).glob("0*"))) == 3
    found = Journal(tmp_path).flow(FLOW)
    assert found is not None
    assert found[0] == "block.0"
    assert len(found[1]["flow"]) == 90


def test_another_run_is_refused_by_what_differs_and_deleted_when_asked(saved, tmp_path) -> None:
    source, out = saved("qwen3-moe"), tmp_path / "out"
    stop_after(steps(source, out), 4)
    other = torture.RECIPE.replace("tau = 0.5", "tau = 0.4")
    with pytest.raises(OutputError, match=r"holds another run .*; recipe differs\. .*--restart"):
        list(steps(source, out, other))
    longer = torture.RECIPE.replace("samples = 6", "samples = 5")
    with pytest.raises(OutputError, match="recipe and calibration text differ"):
        list(steps(source, out, longer))
    (out / "notes.txt").write_text("mine")
    (out / ".open").mkdir(exist_ok=True)
    with pytest.raises(OutputError, match="is not empty"):
        list(steps(source, out, other, restart=True))
    # the run is deleted, what others have put there is not
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    assert isinstance(list(steps(source, out, other, restart=True))[-1], Finished)
    list(steps(source, tmp_path / "alone", other))
    assert (out / "manifest.json").read_bytes() == (tmp_path / "alone" / "manifest.json").read_bytes()


def tortured(*options: str) -> dict[str, Any]:
    script = [str(Path(torture.__file__)), "--model", "qwen3-moe-tied"]
    done = subprocess.run([sys.executable, *script, *options], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_runs_end_in_the_same_bytes() -> None:
    assert tortured("--kills", "3")["kills"] == 3


def test_killed_runs_that_are_tuned_end_in_the_same_bytes() -> None:
    assert tortured("--kills", "2", "--tune")["kills"] == 2


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the library that lets calls fail")
def test_runs_whose_writes_failed_end_in_the_same_bytes() -> None:
    assert tortured("--writes", "4")["failed in turn"] == 4


def can_mount() -> bool:
    """Whether this user may mount file systems in a namespace of its own."""
    try:
        command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="file systems cannot be mounted here")
def test_runs_on_a_full_disk_end_in_the_same_bytes() -> None:
    assert tortured("--full")["times full"] > 2
