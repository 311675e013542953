"""A compressed folder in another layout: the smallest bytes, or those that multiply fastest. No weight changes.

What the layouts are is in `formats/_layouts.py`; what has only one is copied. A block's file is read, compared with the
manifest's checksums, and written by the Writer, so a repack that dies goes on where it was.
"""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfbit import formats
from halfbit.errors import FormatError, OutputError, UnknownName
from halfbit.events import Began, BlockBegan, BlockDone, Event, Finished, Imported, Noticed
from halfbit.formats import separate
from halfbit.formats._layouts import LAYOUTS, TERNARY, codec_in
from halfbit.formats._levels import grid_of, params_of
from halfbit.formats.qmoe import QMoE
from halfbit.grids.ternary import Ternary
from halfbit.layout import Entry, stored_name
from halfbit.manifest import checksum, read_manifest
from halfbit.types import Packed, Solution
from halfbit.untrusted import read_json
from halfbit.writer import INDEX, RECORDS, Writer


def repack(source: str | Path, folder: str | Path, layout: str) -> Iterator[Event]:
    """Write the model of a finished folder into another, in a layout.

    Args:
        source: a folder that halfbit wrote.
        folder: new or empty, or one that holds an interrupted repack of the same source.
        layout: "compact" or "fast".

    Yields:
        events, the last of them `Finished`. Raises FormatError where the source is damaged or not finished.
    """
    root = Path(source)
    if layout not in LAYOUTS:
        raise UnknownName("layout", layout, list(LAYOUTS))
    if Path(folder).resolve() == root.resolve():
        raise OutputError(f"{folder}: is the source; give another folder")
    manifest = read_manifest(root)
    if not manifest["complete"]:
        raise FormatError(f"{root}: the run that writes this folder has not finished; run compress again")
    about = manifest["about"] | {"halfbit": version("halfbit"), "layout": layout}
    given = json.dumps(manifest, sort_keys=True)
    writer = Writer(folder, hashlib.sha256(f"{given} {sorted(about.items())}".encode()).hexdigest(), about)
    entries = _by_block(manifest)
    count = sum(entry.shape[0] for of_block in entries.values() for _, _, entry in of_block)
    done = [block for block in manifest["blocks"] if writer.has(block)]
    solved = sum(entry.shape[0] for block in done for _, _, entry in entries[block])
    yield Began(writer.folder, blocks=len(manifest["blocks"]), matrices=count, resumed=len(done), solved=solved)
    for number, (block, where) in enumerate(manifest["blocks"].items()):
        yield BlockBegan(block, number, resumed=block in done)
        if block not in done:
            yield from _block(root, manifest, where, entries[block], layout, writer)
            writer.commit(block, where["file"])
        yield BlockDone(block, number)
    if not writer.complete:
        _finish(root, manifest, writer)
    before, after = (sum(m["bits_per_weight"] for m in of["matrices"].values()) for of in (manifest, writer.manifest))
    yield Noticed(f"{layout}: {after / max(before, 1e-9):.3f} times the bytes of the compressed matrices")
    yield Finished(writer.folder)


def in_layout(matrix: Packed, layout: str) -> Packed:
    """One matrix, with the same decoded weights; unchanged where its format is no ternary one, or it has values that
    the other format cannot hold."""
    codec = matrix.codec
    target = codec_in(codec, layout)
    if target is codec or not isinstance(codec, TERNARY):
        return matrix
    if isinstance(codec, QMoE):
        solution = _of_values(codec.decode(matrix))
        if solution is None:
            return matrix
    else:
        params = params_of(matrix.tensors, codec.scale_bits, matrix.shape[0])
        solution = Solution(grid_of(codec.scale_bits), codec.codes(matrix), params, rotated=codec.rotated)
    found = target.encode(solution)
    assert torch.equal(found.codec.decode(found), codec.decode(matrix)), "a layout has changed a weight"
    return found


def _of_values(dense: Tensor) -> Solution | None:
    """Rows of 0.0 and two other values at most as ternary codes; None where a row has more."""
    there = dense != 0
    low = dense.masked_fill(~there, torch.inf).amin(1, keepdim=True)
    high = dense.masked_fill(~there, -torch.inf).amax(1, keepdim=True)
    codes = torch.where(there, torch.where(dense == high, 2, 1), 0).to(torch.uint8)
    levels = torch.cat([low, high], 1).nan_to_num(0, 0, 0).bfloat16()
    solution = Solution(Ternary(), codes, {"levels": levels[:, None]})
    return solution if torch.equal(solution.dense(), dense) else None


def _by_block(manifest: dict[str, Any]) -> dict[str, list[tuple[str, str, Entry]]]:
    """The packed projections whose own tensors are in each block: module path, projection, entry."""
    block_of = {name: block for block, entry in manifest["blocks"].items() for name in entry["tensors"]}
    found: dict[str, list[tuple[str, str, Entry]]] = {block: [] for block in manifest["blocks"]}
    for path, projections in manifest["packed"].items():
        for projection, config in projections.items():
            entry = Entry.parse(config, f"{path}.{projection}")
            own = {
                block_of.get(stored_name(path, projection, part)) for part in entry.tensors if part not in entry.shared
            }
            block = own.pop() if len(own) == 1 else None
            if block is None:
                raise FormatError(f"{path}.{projection}: its tensors are not in one block of the manifest")
            found[block].append((path, projection, entry))
    return found


def _block(
    root: Path,
    manifest: dict[str, Any],
    where: dict[str, Any],
    entries: list[tuple[str, str, Entry]],
    layout: str,
    writer: Writer,
) -> Iterator[Event]:
    """Hand one block to the writer."""
    tensors = _read(root / where["file"], where["tensors"], manifest) if where["tensors"] else {}
    kinds = [kind for kind in RECORDS if kind != "packed"]
    # those of later blocks too: each is written over when its block comes
    records = {k: {n: v for n, v in manifest.get(k, {}).items() if n not in writer.recorded(k)} for k in kinds}
    packed: dict[str, dict[str, Any]] = {}
    for path, projection, entry in entries:
        own = {part: stored_name(path, projection, part) for part in entry.tensors if part not in entry.shared}
        config = manifest["packed"][path][projection]
        if not entry.shared and any(isinstance(c, TERNARY) for c in _codecs(entry)):
            whole = entry.packed({part: tensors.pop(name) for part, name in own.items()})
            matrices = [whole.codec.part(whole, e, entry.shape[0]) for e in range(entry.shape[0])]
            matrices = [in_layout(m, layout) for m in separate(matrices)]
            for number, matrix in enumerate(matrices):
                name = _matrix(path, projection, number, entry, manifest)
                if name is not None:
                    fact = manifest["matrices"][name] | {"bits_per_weight": matrix.bits_per_weight}
                    records["matrices"][name] = fact
                yield Imported(name or f"{path}.{projection}", matrix.bits_per_weight)
            whole = formats.stack(matrices)
            for part, tensor in whole.tensors.items():
                writer.put(stored_name(path, projection, part), tensor)
            config = Entry.of(whole, entry.shape[0]).to_config()
        else:
            yield Imported(f"{path}.{projection}", 8 * sum(tensors[n].nbytes for n in own.values()) / _weights(entry))
        packed.setdefault(path, {})[projection] = config
    for name, tensor in tensors.items():
        writer.put(name, tensor)
    for path, projections in packed.items():
        writer.record("packed", path, projections)
    for kind, facts in records.items():
        for name, value in facts.items():
            writer.record(kind, name, value)


def _codecs(entry: Entry) -> tuple[Any, ...]:
    return getattr(entry.codec, "codecs", (entry.codec,))


def _weights(entry: Entry) -> int:
    experts, out, columns = entry.shape
    return experts * out * columns


def _matrix(path: str, projection: str, number: int, entry: Entry, manifest: dict[str, Any]) -> str | None:
    """What the manifest calls a matrix; None: nothing is told of it."""
    names = (f"{path}.{number}.{projection}", f"{path}.{projection}", path)
    return next((n for n in names if n in manifest["matrices"] and (entry.shape[0] == 1 or n == names[0])), None)


def _read(path: Path, names: list[str], manifest: dict[str, Any]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as e:
        raise FormatError(f"{path}: {e}; the source is damaged, download it again") from e
    for name, tensor in tensors.items():
        if checksum(tensor) != manifest["tensors"][name]["sha256"]:
            raise FormatError(f"{path}: {name} differs from what was written; download it again", tensor=name)
    return tensors


def _finish(root: Path, manifest: dict[str, Any], writer: Writer) -> None:
    config = read_json(root / "config.json")
    config["quantization_config"]["modules"] = writer.manifest["packed"]
    for name, expected in manifest["files"].items():
        path = root / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise FormatError(f"{path}: is missing or differs from what was written; download it again")
    written = {INDEX, "config.json", "recipe.toml"}
    recipe = (root / "recipe.toml").read_text("utf-8") if "recipe.toml" in manifest["files"] else None
    writer.finish(config, [root / name for name in manifest["files"] if name not in written], recipe)
