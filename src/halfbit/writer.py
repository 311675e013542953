"""The run folder that becomes the model folder. Accumulates: tensors of the block in progress, then the manifest.

A block's tensors go to one safetensors file: written under a temporary name, fsynced, renamed, the folder fsynced. Only
then does the manifest name the block, so a run that dies continues after the last block it names, and in the next one
with what `journal.py` has kept of it. `config.json` and the index come last of all: a folder that is not finished
cannot be mistaken for a model.

    config.json  generation_config.json  tokenizer files      as in any model folder
    model.safetensors.index.json                              tensor -> file
    model-outer-00000.safetensors  model-block-00000.safetensors ...
    recipe.toml                                               every default filled in; not after an import
    allocation.json                                           where rules have options: what each matrix was given
    manifest.json                                             checksums, losses, coverage, bytes
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halfbit.disk import atomically, file_errors, make_folder, sync
from halfbit.errors import FormatError, OutputError
from halfbit.journal import Journal
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
# kinds of facts that are told while a block is in progress
RECORDS = ("packed", "matrices", "coverage", "outputs", "gates")


class Writer:
    """Writes one run folder. `put` tensors, `commit` a block, `finish` once.

    Args:
        folder: the run folder; created, or continued when `fingerprint` equals the one that began it.
        fingerprint: what must not change between the parts of a run (model, recipe, text, version).
        about: facts for the manifest (source, recipe name, versions); `made_of`: the parts of the fingerprint.
    """

    def __init__(self, folder: str | Path, fingerprint: str, about: dict[str, Any]):
        self.folder = Path(folder)
        self._tensors: dict[str, Tensor] = {}
        self._records: dict[str, dict[str, Any]] = {kind: {} for kind in RECORDS}
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder}: is a file; give a folder that is new, empty or holds this same run")
        if (self.folder / MANIFEST).is_file():
            self.manifest = read_manifest(self.folder)
            if self.manifest["fingerprint"] != fingerprint:
                raise OutputError(
                    f"{self.folder}: holds another run (recipe {self.manifest['about'].get('recipe')!r}, source "
                    f"{self.manifest['about'].get('source')!r}); {_differing(self.manifest['about'], about)}. "
                    "Give another folder, or --restart to delete this run"
                )
        else:
            # hidden files may be ours: what a kill at the first write leaves, or a model that waits to be tuned
            if self.folder.exists() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
                raise OutputError(f"{self.folder}: is not empty and holds no halfbit run; give a new or empty folder")
            make_folder(self.folder)
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
                "outputs": {},
                "gates": {},
                "headers": {},
                "files": {},
            }
            self._write_manifest()
        self.journal = Journal(self.folder)
        if self.complete:
            self.journal.close()

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
        """Facts of the block in progress, of one of `RECORDS`."""
        self._records[kind][name] = value

    def recorded(self, kind: str) -> dict[str, Any]:
        """The facts of one kind, of the block in progress and of all before it."""
        return self.manifest.get(kind, {}) | self._records[kind]

    def amend(self, kind: str, name: str, value: Any) -> None:
        """A fact of no block, or one of a committed block that has changed: it is written at once."""
        self.manifest.setdefault(kind, {})[name] = value
        self._write_manifest()

    def commit(self, block: str, file: str) -> None:
        """Write the block's tensors to `file` and name the block in the manifest."""
        if self._tensors:
            target = self.folder / file
            atomically(target, lambda temporary: save_file(self._tensors, temporary, metadata={"format": "pt"}))
            for name, tensor in self._tensors.items():
                self.manifest["tensors"][name] = tensor_entry(file, tensor)
            self.manifest.setdefault("headers", {})[file] = header_checksum(target)
        self.manifest["blocks"][block] = {"file": file, "tensors": list(self._tensors)}
        for kind, values in self._records.items():
            self.manifest.setdefault(kind, {}).update(values)
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
            atomically(self.folder / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))
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
        self.journal.close()

    def _write_manifest(self) -> None:
        self._text(MANIFEST, text_of(self.manifest))

    def _text(self, name: str, text: str) -> None:
        atomically(self.folder / name, lambda temporary: temporary.write_text(text, "utf-8"))


def _differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What two runs were not both made of."""
    old, new = there.get("made_of"), here.get("made_of")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return "the model, recipe, text or version differ"
    names = [name for name in new if old.get(name) != new[name]]
    return f"{' and '.join(names)} {'differ' if len(names) > 1 else 'differs'}"


def delete_run(folder: Path) -> None:
    """The run in a folder, whatever it is of; files that runs do not write stay. No run: nothing is done."""
    if not (folder / MANIFEST).is_file():
        return
    ours = [INDEX, ALLOCATION, "config.json", "recipe.toml", *read_manifest(folder)["files"]]
    with file_errors(folder):
        for path in [*(folder / name for name in ours), *folder.glob("model-*.safetensors")]:
            path.unlink(missing_ok=True)
        for path in folder.glob(".*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        # last: without it the folder holds no run
        (folder / MANIFEST).unlink()
        sync(folder)
