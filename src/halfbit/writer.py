"""The run folder that becomes the model folder. Accumulates: tensors of the block in progress, then the manifest.

A block's tensors go to one safetensors file: written under a temporary name, fsynced, renamed, the folder fsynced. Only
then does the manifest name the block, so a run that dies continues after the last block it names. `config.json` and the
index come last of all: a folder that is not finished cannot be mistaken for a model.

    config.json  generation_config.json  tokenizer files      as in any model folder
    model.safetensors.index.json                              tensor -> file
    model-outer-00000.safetensors  model-block-00000.safetensors ...
    recipe.toml                                               every default filled in; not after an import
    allocation.json                                           where rules have options: what each matrix was given
    manifest.json                                             checksums, losses, coverage, bytes
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halfbit.errors import FormatError, OutputError
from halfbit.manifest import (
    MANIFEST,
    MANIFEST_FORMAT,
    header_checksum,
    read_manifest,
    tensor_entry,
    text_of,
)

FORMAT_VERSION = 1
INDEX = "model.safetensors.index.json"
ALLOCATION = "allocation.json"


class Writer:
    """Writes one run folder. `put` tensors, `commit` a block, `finish` once.

    Args:
        folder: the run folder; created, or continued when `fingerprint` equals the one that began it.
        fingerprint: what must not change between the parts of a run (model, recipe, text, version).
        about: facts for the manifest (source, recipe name, versions).
    """

    def __init__(self, folder: str | Path, fingerprint: str, about: dict[str, Any]):
        self.folder = Path(folder)
        self._tensors: dict[str, Tensor] = {}
        self._records: dict[str, dict[str, Any]] = {"packed": {}, "matrices": {}, "coverage": {}}
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder}: is a file; give a folder that is new, empty or holds this same run")
        if (self.folder / MANIFEST).is_file():
            self.manifest = read_manifest(self.folder)
            if self.manifest["fingerprint"] != fingerprint:
                raise OutputError(
                    f"{self.folder}: holds another run (recipe {self.manifest['about'].get('recipe')!r}, source "
                    f"{self.manifest['about'].get('source')!r}); the model, recipe, text or version differ. "
                    "Give another folder, or delete this one"
                )
        else:
            # hidden files may be ours: what a kill at the first write leaves, or a model that waits to be tuned
            if self.folder.exists() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
                raise OutputError(f"{self.folder}: is not empty and holds no halfbit run; give a new or empty folder")
            with _disk(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self.manifest = {
                "format": MANIFEST_FORMAT,
                "complete": False,
                "fingerprint": fingerprint,
                "about": about,
                "blocks": {},
                "tensors": {},
                "packed": {},
                "matrices": {},
                "coverage": {},
                "headers": {},
                "files": {},
            }
            self._write_manifest()

    @property
    def complete(self) -> bool:
        """Nothing is left to write; config.json is the last file."""
        return self.manifest["complete"] and (self.folder / "config.json").is_file()

    def has(self, block: str) -> bool:
        """True when `block` was committed, in this run or an earlier part of it."""
        return block in self.manifest["blocks"]

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep `tensor` for the block in progress; every name once."""
        if name in self._tensors or name in self.manifest["tensors"]:
            raise OutputError(f"{name}: would be written twice")
        self._tensors[name] = tensor.detach().cpu().contiguous()

    def record(self, kind: str, name: str, value: Any) -> None:
        """Facts of the block in progress: kind "packed", "matrices" or "coverage"."""
        self._records[kind][name] = value

    def commit(self, block: str, file: str) -> None:
        """Write the block's tensors to `file` and name the block in the manifest."""
        if self._tensors:
            target = self.folder / file
            self.atomically(target, lambda temporary: save_file(self._tensors, temporary, metadata={"format": "pt"}))
            for name, tensor in self._tensors.items():
                self.manifest["tensors"][name] = tensor_entry(file, tensor)
            self.manifest.setdefault("headers", {})[file] = header_checksum(target)
        self.manifest["blocks"][block] = {"file": file, "tensors": list(self._tensors)}
        for kind, values in self._records.items():
            self.manifest[kind].update(values)
            values.clear()
        self._tensors.clear()
        self._write_manifest()

    def read(self, block: str) -> dict[str, Tensor]:
        """The tensors of a committed block."""
        entry = self.manifest["blocks"][block]
        if not entry["tensors"]:
            return {}
        path = self.folder / entry["file"]
        try:
            with safe_open(path, framework="pt") as f:
                return {name: f.get_tensor(name) for name in entry["tensors"]}
        except (SafetensorError, FileNotFoundError) as e:
            raise FormatError(f"{path}: {e}; the run cannot continue, delete the folder and start again") from e

    def finish(self, config: dict[str, Any], auxiliary: list[Path], recipe: str | None = None) -> None:
        """Copy the tokenizer and other files, then write index and config: from here on it is a model."""
        names = [path.name for path in auxiliary]
        for path in auxiliary:
            self.atomically(self.folder / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))
        if recipe is not None:
            self._text("recipe.toml", recipe)
            names.append("recipe.toml")
        settings = json.dumps(config, indent=2, sort_keys=True) + "\n"
        tensors = self.manifest["tensors"]
        total = sum((self.folder / f).stat().st_size for f in {t["file"] for t in tensors.values()})
        index = {"metadata": {"total_size": total}, "weight_map": {n: t["file"] for n, t in sorted(tensors.items())}}
        self._text(INDEX, json.dumps(index, indent=2) + "\n")
        small = {name: (self.folder / name).read_bytes() for name in [*names, INDEX]}
        small["config.json"] = settings.encode()
        self.manifest["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in small.items()}
        self.manifest["complete"] = True
        self._write_manifest()
        self._text("config.json", settings)

    def _write_manifest(self) -> None:
        self._text(MANIFEST, text_of(self.manifest))

    def _text(self, name: str, text: str) -> None:
        self.atomically(self.folder / name, lambda temporary: temporary.write_text(text, "utf-8"))

    def atomically(self, target: Path, write: Callable[[Path], Any]) -> None:
        """Let `write` make a file that is there whole, on the disk, or not at all. Raises OutputError."""
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with _disk(target):
                write(temporary)
                _sync(temporary)
                temporary.replace(target)
                _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn what the file system says into an error that tells the next step."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space and run the same command again; it continues" if full else "check the path and rights"
        raise OutputError(f"{path}: {e.strerror or e}; {advice}") from e
    except SafetensorError as e:  # safetensors reports the operating system's error as text
        raise OutputError(f"{path}: could not be written: {e}; free some space and run the same command again") from e
