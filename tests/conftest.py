"""Fixtures of several files of tests: threads, instruction sets, and models that are written and compressed once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from compressed import EVERYTHING, SOURCES, Made, add_tokenizer, run

from halfbit import native


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Matrices of a few dozen rows: waiting for a second thread takes longer than the work."""
    torch.set_num_threads(1)


def instructions() -> list[str]:
    """What this processor has, of what the kernels are written for."""
    found: list[str] = []
    if native.extension is None:
        return found
    for name in ("portable", "avx2", "avx512", "avx512vnni"):
        try:
            native.extension.set_isa(name)
        except ValueError:
            continue
        found.append(name)
        native.extension.set_isa("best")
    return found


@pytest.fixture(params=instructions())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels run with each set of instructions in turn."""
    assert native.extension is not None
    native.extension.set_isa(request.param)
    assert native.isa() == request.param
    yield request.param
    native.extension.set_isa("best")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a source, written once; tests leave it as it is."""
    done: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-")) / "source"
            done[name] = add_tokenizer(SOURCES[name](folder))
        return done[name]

    return save


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, saved: Callable[[str], Path]) -> Callable[[str, str], Made]:
    """A source compressed by a recipe (of halfbit, or of EVERYTHING), once."""
    done: dict[tuple[str, str], Made] = {}

    def make(name: str, rules: str = "qmoe") -> Made:
        if (name, rules) not in done:
            out = tmp_path_factory.mktemp(name.replace(" ", "-")) / "out"
            done[name, rules] = Made(saved(name), out, run(saved(name), out, EVERYTHING.get(rules, rules)))
        return done[name, rules]

    return make
