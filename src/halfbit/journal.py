"""What a run has decided since its last commit, on the disk, so that a kill in a block that takes hours loses little.

A folder `.open` inside the run folder, which is gone when the run has ended:

    00000.safetensors, ...   groups of matrices of the open block, packed, some per file, and their facts
    flow.safetensors         the activations behind the last block, so that blocks before it need not run again
    probe.safetensors        the same of the pass that measures what bits buy, and what it has measured
    followed.safetensors     the activations behind the open block as it was, and what its experts were given
    answers.safetensors      what the groups of one experts module have answered so far, so that they need not run again

Every file is written like a block: temporary name, fsync, rename, fsync of the folder. What a killed run is asked for
again is read from here and is the same to the bit, so when and how often it is written changes nothing in the result.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halfbit.disk import atomically, make_folder
from halfbit.errors import FormatError
from halfbit.manifest import fast_checksum

FOLDER = ".open"
FLOW, PROBE, FOLLOWED, ANSWERS = "flow", "probe", "followed", "answers"
# what is said of the tensors of a file: JSON, as one more of them
ABOUT = "about"
# what a kill loses is the matrices of so many seconds, and those that are being solved
SECONDS = 30.0
# activations are written when they have taken this many times as long to make as they take to write
WORTH = 20.0

Tensors = dict[str, Tensor]


class Journal:
    """The open block of one run. Accumulates: what `add` is given, until the block is committed.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path):
        self._folder = folder / FOLDER
        self._block = ""
        # of an earlier run: key -> facts, the file with the tensors, and checksums of all that is in it
        self._written: dict[str, tuple[dict[str, Any], Path, dict[str, str]]] = {}
        self._waiting: dict[str, tuple[Tensors, dict[str, Any]]] = {}
        self._last = self._behind = time.monotonic()
        self._cost = 0.0

    def open(self, block: str) -> None:
        """Begin, or go on with, `block`; what is left of others is deleted."""
        self._block, self._written, self._waiting = block, {}, {}
        self._last = time.monotonic()
        for path in sorted(self._folder.glob("0*.safetensors")):
            about = _about(path)
            if about["block"] == block:
                self._written |= {key: (facts, path, about["xxh3"]) for key, facts in about["steps"].items()}
            else:
                path.unlink()

    def get(self, key: str) -> tuple[Tensors, dict[str, Any]] | None:
        """What was added under `key` before the run was interrupted; None: it must be done.

        Raises FormatError where the file is damaged.
        """
        if key not in self._written:
            return None
        facts, path, sums = self._written[key]
        return _read(path, sums, f"{key}/"), facts

    def add(self, key: str, tensors: Tensors, facts: dict[str, Any]) -> None:
        """Keep the packed tensors of a step and its `facts`, which JSON can hold; from time to time write them."""
        self._waiting[key] = tensors, facts
        if time.monotonic() - self._last >= SECONDS:
            self.write()

    def write(self) -> None:
        """What waits."""
        if not self._waiting:
            return
        make_folder(self._folder)
        number = 1 + max((int(p.stem) for p in self._folder.glob("0*.safetensors")), default=-1)
        path = self._folder / f"{number:05d}.safetensors"
        tensors = {f"{key}/{name}": t for key, (own, _) in self._waiting.items() for name, t in own.items()}
        steps = {key: facts for key, (_, facts) in self._waiting.items()}
        self._save(path, tensors, {"block": self._block, "steps": steps})
        self._waiting = {}
        self._last = time.monotonic()

    def keep_flow(self, name: str, block: str, tensors: Tensors, facts: Any = None) -> None:
        """Activations of `block`, where it is worth the time to write them; FLOW, PROBE or FOLLOWED."""
        now = time.monotonic()
        if not self._due():
            return
        make_folder(self._folder)
        self._save(self._folder / f"{name}.safetensors", tensors, {"block": block, "facts": facts})
        self._behind = time.monotonic()
        self._cost = self._behind - now

    def keep_answers(self, module: str, groups: int, answers: Tensors, facts: Any) -> None:
        """What the first `groups` groups of an experts module have answered, with all that was added, likewise."""
        if self._due():
            self.write()
            self.keep_flow(ANSWERS, module, answers, {"groups": groups, "facts": facts})

    def answers(self, module: str) -> tuple[int, Tensors, Any]:
        """What `keep_answers` was given last, if it was for `module`; no groups, nothing and None otherwise."""
        found = self.flow(ANSWERS)
        if found is None or found[0] != module:
            return 0, {}, None
        return found[2]["groups"], found[1], found[2]["facts"]

    def _due(self) -> bool:
        """Whether so much was done since activations were kept last that it is worth the time to keep them."""
        return time.monotonic() - self._behind >= max(SECONDS, WORTH * self._cost)

    def flow(self, name: str) -> tuple[str, Tensors, Any] | None:
        """The last block whose activations were kept (ANSWERS: the module), they, and the facts."""
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        about = _about(path)
        return about["block"], _read(path, about["xxh3"], ""), about["facts"]

    def incomplete(self, key: str) -> FormatError:
        """That a step is not there whose answers are."""
        return _damaged(self._folder / f"{ANSWERS}.safetensors", f"{key} has answered, but is not there")

    def close(self) -> None:
        """The run has ended; nothing of this is wanted any more."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _save(self, path: Path, tensors: Tensors, about: dict[str, Any]) -> None:
        whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        text = json.dumps(about | {"xxh3": {name: fast_checksum(t) for name, t in whole.items()}})
        whole[ABOUT] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        metadata = {"format": "pt", "xxh3": fast_checksum(whole[ABOUT])}
        atomically(path, lambda temporary: save_file(whole, temporary, metadata=metadata))


def _about(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as f:
            text = f.get_tensor(ABOUT)
            if fast_checksum(text) != f.metadata()["xxh3"]:
                raise _damaged(path, f"{ABOUT}: its checksum differs")
    except (SafetensorError, OSError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e
    return json.loads(text.numpy().tobytes())


def _read(path: Path, sums: dict[str, str], prefix: str) -> Tensors:
    """The tensors whose names begin with `prefix`, without it."""
    found = {}
    try:
        with safe_open(path, framework="pt") as f:
            for name in [name for name in sums if name.startswith(prefix)]:
                found[name.removeprefix(prefix)] = tensor = f.get_tensor(name)
                if fast_checksum(tensor) != sums[name]:
                    raise _damaged(path, f"{name}: its checksum differs")
    except (SafetensorError, OSError) as e:
        raise _damaged(path, e) from e
    return found


def _damaged(path: Path, why: object) -> FormatError:
    return FormatError(f"{path}: {why}; delete {path.parent}, and the same command goes on from the last whole block")
