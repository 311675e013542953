"""Groups of experts solved by several workers: the same bytes, whoever solves them and whoever dies."""

import io
import os
import pickle
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed import chosen, text

from halfbit.activations import Routed
from halfbit.cluster import Cluster, Worker, hired
from halfbit.compress import compress
from halfbit.crew import Devices
from halfbit.errors import ClusterError, CoverageError, Unsupported
from halfbit.events import Finished, Solved
from halfbit.recipe import Recipe

CHANGES = ("asymmetric = false -> asymmetric = true", "experts_per_batch = 16 -> experts_per_batch = 2")


class Fake:
    """As much of Ray as a cluster asks for: calls are made at once, with arguments that went through pickle."""

    class exceptions:
        class RayTaskError(Exception):
            cause: Exception

        class RayActorError(Exception):
            pass

    def __init__(self, **resources: float):
        self.resources, self.dead, self.late, self.shipped = resources, False, False, 0
        self.util = SimpleNamespace(register_serializer=lambda kind, **pair: setattr(self, "pair", (kind, pair)))

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def through(self, value: Any) -> Any:
        kind, pair = self.pair  # pyright: ignore[reportAttributeAccessIssue]

        class Pickler(pickle.Pickler):
            def reducer_override(self, value: Any) -> Any:
                shipped = type(value) is kind
                return (pair["deserializer"], (pair["serializer"](value),)) if shipped else NotImplemented

        file = io.BytesIO()
        Pickler(file).dump(value)
        self.shipped += 1
        return pickle.loads(file.getvalue())

    put = through

    def remote(self, cls: type) -> Any:
        def make(*args: Any) -> Any:
            # the worker's process would ask the real Ray
            worker: Any = object.__new__(cls)
            worker._device = args[0]
            calls = {
                name: SimpleNamespace(remote=partial(_later, getattr(worker, name))) for name in ("about", "solve")
            }
            return SimpleNamespace(**calls)

        self.options: Any = {}
        return SimpleNamespace(options=lambda **o: (self.options.update(o), SimpleNamespace(remote=make))[1])

    def wait(self, asked: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return ([], asked) if self.late else (asked, [])

    def get(self, asked: Any) -> Any:
        if isinstance(asked, list):
            return [self.get(one) for one in asked]
        call, args = asked
        if self.dead and args:
            raise self.exceptions.RayActorError
        try:
            return self.through(call(*map(self.through, args)))
        except CoverageError as e:
            error = self.exceptions.RayTaskError()
            error.cause = e
            raise error from e


def _later(call: Callable[..., Any], *args: Any) -> Any:
    return call, args


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def steps(source: Path, out: Path, *changes: str, **how: Any) -> Any:
    toml = chosen("qmoe").to_toml()
    for change in (*CHANGES, *changes):
        before, after = change.split(" -> ")
        assert before in toml, before
        toml = toml.replace(before, after)
    return compress(str(source), out, Recipe.from_toml(toml), text(source), **how)


@pytest.fixture
def alone(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], tuple[Path, dict[str, bytes]]]:
    """A source, and what one worker makes of it."""

    def made(name: str) -> tuple[Path, dict[str, bytes]]:
        source = saved(name)
        list(steps(source, tmp_path / "alone"))
        return source, files(tmp_path / "alone")

    return made


@pytest.mark.parametrize("name", ["qwen3-moe", "switch"])
def test_three_devices_write_what_one_writes(name: str, alone, tmp_path) -> None:
    source, expected = alone(name)
    list(steps(source, tmp_path / "out", device="cpu,cpu,cpu"))
    assert files(tmp_path / "out") == expected


@pytest.mark.parametrize("name", ["qwen3-moe", "switch"])
def test_what_is_shipped_to_workers_comes_back_the_same(name: str, alone, tmp_path, monkeypatch) -> None:
    source, expected = alone(name)
    fake = Fake(CPU=8)
    monkeypatch.setattr(sys.modules["halfbit.compress"], "hired", lambda *_: _Context(Cluster(fake, 3, "cpu")))
    list(steps(source, tmp_path / "out"))
    assert files(tmp_path / "out") == expected
    assert fake.shipped > 10
    assert fake.options["num_cpus"] == 2


class _Context:
    def __init__(self, crew: Any):
        self._crew = crew

    def __enter__(self) -> Any:
        return self._crew

    def __exit__(self, *_: object) -> None:
        pass


def test_questions_arrive_whole() -> None:
    routed = Routed(3, 4)
    index = torch.tensor([[0, 2], [2, 5], [1, 0], [2, 1]])
    routed.add(torch.rand(4, 5), index, torch.rand(4, 2), torch.tensor([True, False, True, True]))
    routed.close()
    there = Routed.asked(3, routed.questions())
    for expert in range(3):
        for ours, theirs in zip(routed.tokens_of(expert), there.tokens_of(expert), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(routed.hidden, there.hidden)
    assert torch.equal(routed.keep, there.keep)


def test_errors_of_workers_are_told_as_their_own(saved, tmp_path, monkeypatch) -> None:
    source = saved("qwen3-moe")
    fake = Fake(CPU=1)
    crew = Cluster(fake, 2, "cpu")
    monkeypatch.setattr(sys.modules["halfbit.compress"], "hired", lambda *_: _Context(crew))
    few = 'undersampled = "shrink" -> undersampled = "fail"', "floor = 1 -> floor = 1000000"
    with pytest.raises(CoverageError, match="calibration tokens"):
        list(steps(source, tmp_path / "a", *few))
    fake.dead = True
    with pytest.raises(ClusterError, match=r"experts\.0: the worker that solves its group died 6 times"):
        list(steps(source, tmp_path / "b"))


def test_a_worker_with_another_version_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Worker, "about", lambda self: {"halfbit": "9", "torch": torch.__version__})
    with pytest.raises(ClusterError, match="a worker has halfbit 9 where this process has"):
        Cluster(Fake(CPU=2), 2, "cpu")
    fake = Fake(CPU=2)
    fake.late = True
    with pytest.raises(ClusterError, match="--workers 2: the cluster has started 0 within 300 s; it has 2 CPUs"):
        Cluster(fake, 2, "cpu")


def test_devices_of_two_kinds_are_refused() -> None:
    with hired("cpu,cpu") as crew:
        assert isinstance(crew, Devices)
        assert crew.devices == ["cpu", "cpu"]
    with pytest.raises(Unsupported, match="devices of two kinds"), hired("cpu,cuda:0"):
        pass


def test_a_worker_of_a_real_cluster_is_killed_and_replaced(alone, tmp_path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed; `make cluster` installs it")
    source, expected = alone("qwen3-moe")
    killed = 0
    for event in steps(source, tmp_path / "out", ray="local", workers=2):
        if isinstance(event, Solved) and not killed:
            titles = {int(p.parent.name): p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline")}
            killed = next(pid for pid, title in titles.items() if title.startswith(b"ray::Worker"))
            os.kill(killed, signal.SIGKILL)
    assert isinstance(event, Finished)
    assert killed
    assert not ray.is_initialized()
    assert files(tmp_path / "out") == expected
