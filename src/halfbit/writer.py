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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halfbit.errors import FormatError, OutputError
from halfbit.layout import Entry, name_of, parse_tensor

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
ALLOCATION = "allocation.json"
# what the manifest says of every matrix
FACTS = ("loss", "bits_per_weight", "tokens")


def checksum(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes as they lie in the file (row major, little endian)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder written here. Raises FormatError when there is none or it is of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FormatError(f"{folder}: no {MANIFEST}; this is not a folder that halfbit compress wrote")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise FormatError(f"{path}: not valid JSON ({e}); compress the model again") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_VERSION:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise FormatError(f"{path}: expected format {FORMAT_VERSION}, got {got!r}; use the halfbit that wrote it")
    try:
        _check_manifest(manifest)
    except FormatError as e:
        raise FormatError(f"{path}: {e}; compress the model again", tensor=e.tensor) from e
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Everything that readers of a manifest rely on."""
    for key in ("about", "blocks", "tensors", "packed", "matrices", "coverage", "files"):
        if not isinstance(manifest.get(key), dict):
            raise FormatError(f"expected an object {key!r}, got {manifest.get(key)!r}")
    if not isinstance(manifest.get("complete"), bool) or not isinstance(manifest.get("fingerprint"), str):
        raise FormatError("expected complete (true or false) and fingerprint (text)")
    for name, entry in manifest["tensors"].items():
        if not isinstance(entry, dict) or not {"file", "dtype", "shape", "sha256"} <= set(entry):
            raise FormatError(f"{name}: expected file, dtype, shape and sha256, got {entry!r}", tensor=name)
        parse_tensor([entry["dtype"], entry["shape"]], name)
        # a name from a downloaded file must not lead out of the folder
        if not isinstance(entry["file"], str) or Path(entry["file"]).name != entry["file"]:
            raise FormatError(f"{name}: {entry['file']!r} is not a plain file name", tensor=name)
    for path, projections in manifest["packed"].items():
        if not isinstance(projections, dict):
            raise FormatError(f"{path}: expected an object of projections, got {projections!r}", tensor=path)
        for projection, config in projections.items():
            Entry.parse(config, f"{path}.{projection}")
    for name, fact in manifest["matrices"].items():
        if not isinstance(fact, dict) or not all(isinstance(fact.get(k), float | int) for k in FACTS):
            raise FormatError(f"{name}: expected {', '.join(FACTS)}, got {fact!r}", tensor=name)


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
                "format": FORMAT_VERSION,
                "complete": False,
                "fingerprint": fingerprint,
                "about": about,
                "blocks": {},
                "tensors": {},
                "packed": {},
                "matrices": {},
                "coverage": {},
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
                self.manifest["tensors"][name] = {
                    "file": file,
                    "dtype": name_of(tensor.dtype),
                    "shape": list(tensor.shape),
                    "sha256": checksum(tensor),
                }
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
        self._text(MANIFEST, json.dumps(self.manifest, indent=1) + "\n")

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
