"""What a compressed folder holds, counted from its files, and whether it is whole.

`inspect` counts bytes and true bits by part; `verify` reads every byte and checks every rule.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from halfbit.errors import CheckpointError, FormatError, HalfbitError
from halfbit.gates import LEAST
from halfbit.layout import DTYPES, Entry, parse_tensor, stored_name
from halfbit.linears import WEIGHT
from halfbit.manifest import MANIFEST, Problem, read_manifest, verify_shard
from halfbit.untrusted import read_json, short
from halfbit.writer import ALLOCATION, INDEX

# first match wins; names as transformers gives them
PARTS = (
    ("experts", r"\.experts\."),
    ("shared experts", r"shared_expert"),
    ("attention", r"att(n|ention)"),
    ("router", r"\.(gate|router|classifier)\."),
    ("norms", r"norm|\.ln_"),
    ("embeddings", r"embed|shared\.weight|wte|wpe"),
    ("head", r"lm_head"),
    ("dense feed-forward", r"\.(mlp|ff|fc\d?|wi|wo|layer)\b"),
)


def part_of(name: str) -> str:
    """Which part of a model a stored tensor belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, name, re.IGNORECASE)), "other")


def inspect(folder: str | Path) -> dict[str, Any]:
    """Bytes and bits by part, losses and coverage per layer, all from the folder's files.

    Returns:
        "parts": part -> {"bytes", "weights", "bits_per_weight"}; "total_bytes" of all files; "packed": parts as above,
        of what is compressed alone; "bits_per_packed_weight", metadata included, and "packed_weights";
        "bits_per_weight" of the whole model; "layers": compressed module -> mean loss, bits and coverage;
        "allocation": {"rules", "projections"}, what was decided before solving, also while a run is under way: bits and
        formats of each projection, and the part of the predicted loss that is its own; None where nothing was decided.
        "gates": {"checks", "failed": [{unit, gate, where, value, limit, accepted}], "worst": {gate: {where, value,
        limit}}}.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    weights = {}
    for path, projection, entry in _entries(manifest):
        # the first part stands for all weights, so that they are counted once
        counts = [prod(entry.shape), *[0] * (len(entry.tensors) - 1)]
        names = [stored_name(path, projection, part) for part in entry.tensors]
        weights |= {n: c for n, c, part in zip(names, counts, entry.tensors, strict=True) if part not in entry.shared}
    parts: dict[str, dict[str, float]] = {}
    packed: dict[str, dict[str, float]] = {}
    for name, tensor in manifest["tensors"].items():
        nbytes = prod(tensor["shape"]) * DTYPES[tensor["dtype"]].itemsize
        for rows in (parts, packed) if name in weights else (parts,):
            row = rows.setdefault(part_of(name), {"bytes": 0, "weights": 0})
            row["bytes"] += nbytes
            row["weights"] += weights.get(name, prod(tensor["shape"]))
    for row in (*parts.values(), *packed.values()):
        row["bits_per_weight"] = 8 * row["bytes"] / max(row["weights"], 1)
    return {
        "folder": str(root),
        "complete": manifest["complete"],
        "about": manifest["about"],
        "total_bytes": sum(f.stat().st_size for f in root.iterdir() if f.is_file()),
        "parts": parts,
        "packed": packed,
        "packed_weights": sum(row["weights"] for row in packed.values()),
        "bits_per_packed_weight": _bits(packed),
        "bits_per_weight": _bits(parts),
        "layers": {path: _layer(manifest, path) for path in manifest["packed"]},
        "allocation": _allocation(root),
        "gates": _gates(manifest),
    }


def _gates(manifest: dict[str, Any]) -> dict[str, Any]:
    """What gates found: how many looked, which failed, and of each gate what came nearest to failing."""
    rows = [{"unit": unit, **row} for unit, found in manifest["gates"].items() for row in found]
    worst: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["gate"] not in worst or _strain(row) > _strain(worst[row["gate"]]):
            worst[row["gate"]] = row
    failed = [row for row in rows if not row["passed"]]
    return {"checks": len(rows), "failed": failed, "worst": worst}


def _strain(row: dict[str, Any]) -> float:
    """How near to failing, or how far beyond."""
    if row["value"] is None:
        return inf
    away = abs(row["value"] - row.get("original", 0.0))
    return away if row["gate"] not in LEAST else -away


def _bits(parts: dict[str, dict[str, float]]) -> float | None:
    weights = sum(row["weights"] for row in parts.values())
    return 8 * sum(row["bytes"] for row in parts.values()) / weights if weights else None


def _allocation(root: Path) -> dict[str, Any] | None:
    path = root / ALLOCATION
    if not path.is_file():
        return None
    try:
        told = read_json(path)
        whole = sum(rule["loss"] for rule in told["rules"])
        projections: dict[str, dict[str, Any]] = {}
        for name, (rule, option, bits, loss) in told["matrices"].items():
            # of an expert without its number
            path = re.sub(r"\.\d+(\.[^.]+)$", r"\1", name)
            row = projections.setdefault(path, {"bits": [], "share": 0.0, "formats": {}})
            row["bits"].append(float(bits))
            row["share"] += loss / whole if whole else 0.0
            of = told["rules"][rule]["options"][option]
            label = f"{of['name']} {of['bits']} bit" if "bits" in of else str(of["name"])
            row["formats"][label] = row["formats"].get(label, 0) + 1
        return {"rules": told["rules"], "projections": projections}
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, re.error) as e:
        raise FormatError(f"{path}: is damaged ({type(e).__name__}: {e}); delete the folder and compress again") from e


def _layer(manifest: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {}
    for name, fact in manifest["matrices"].items():
        if name.startswith(f"{path}."):
            found.setdefault(name.rpartition(".")[2], []).append(fact)
    projections = {
        projection: {
            "mean_loss": sum(f["loss"] for f in facts) / len(facts),
            "worst_loss": max(f["loss"] for f in facts),
            "bits_per_weight": sum(f["bits_per_weight"] for f in facts) / len(facts),
        }
        for projection, facts in found.items()
    }
    return {"projections": projections, "coverage": manifest["coverage"].get(path)}


def verify(folder: str | Path) -> Iterator[Problem | str]:
    """Check every file, every checksum and every structural rule of a compressed folder.

    Yields:
        the name of each tensor as it is found whole, or a Problem.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder; give one that halfbit compress wrote")
    try:
        manifest = read_manifest(root)
    except FormatError as e:
        yield Problem(MANIFEST, str(e))
        return
    if not manifest["complete"]:
        yield Problem(MANIFEST, f"{root}: the run that writes this folder has not finished; run compress again")
        return
    yield from _verify_lists(root, manifest)
    yield from _verify_sharing(manifest)
    # what lies in one file is checked while that is at hand, the rest at the end
    within: dict[frozenset[str], list[Placed]] = {}
    for placed in _placed(manifest):
        within.setdefault(frozenset(manifest["tensors"][n]["file"] for n in placed.stored.values()), []).append(placed)
    for file in sorted({entry["file"] for entry in manifest["tensors"].values()}):
        yield from verify_shard(root / file, manifest)
        yield from _verify_packed(root, [file], within.pop(frozenset([file]), []))
    for files, entries in within.items():
        yield from _verify_packed(root, sorted(files), entries)


def _verify_lists(root: Path, manifest: dict[str, Any]) -> Iterator[Problem]:
    """config.json, the index and the folder must say what the manifest says."""
    try:
        config, index = read_json(root / "config.json"), read_json(root / INDEX)
        packed, weight_map = config["quantization_config"]["modules"], index["weight_map"]
    except (OSError, FormatError, KeyError, TypeError) as e:
        yield Problem("config.json", f"{root}: config.json or {INDEX} is missing or damaged: {e!r}")
        return
    if packed != manifest["packed"]:
        yield Problem("config.json", "config.json: its packed modules are not those of the manifest")
    tied = config["quantization_config"].get("tied") or {}
    if not isinstance(tied, dict):
        yield Problem("config.json", f"config.json: quantization_config.tied must be an object, got {short(tied)}")
        tied = {}
    for path, owner in tied.items():
        if WEIGHT not in (manifest["packed"].get(owner, {}) if isinstance(owner, str) else {}):
            yield Problem(path, f"config.json: {path} is tied to {short(owner)}, which is no packed layer")
        if path in manifest["packed"]:
            yield Problem(path, f"config.json: {path} is packed, and tied to {short(owner)} as well")
    if weight_map != {n: t["file"] for n, t in manifest["tensors"].items()}:
        yield Problem(INDEX, f"{INDEX}: its weight map is not that of the manifest")
    for name, expected in manifest["files"].items():
        path = root / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            yield Problem(name, f"{name}: is missing or differs from what was written")
    listed = {t["file"] for t in manifest["tensors"].values()}
    for path in sorted(root.glob("*.safetensors")):
        if path.name not in listed:
            yield Problem(path.name, f"{path.name}: is not listed in the manifest; a loader may read it by mistake")


def _verify_sharing(manifest: dict[str, Any]) -> Iterator[Problem]:
    """Every tensor of every entry is in a file; what is another module's is that module's own."""
    entries = {(path, projection): entry for path, projection, entry in _entries(manifest)}
    for (path, projection), entry in entries.items():
        where = f"{path}.{projection}"
        for part, owner in entry.shared.items():
            if (owner, projection) not in entries:
                yield Problem(where, f"{where}: {part} is that of {owner}, which is no packed module")
            elif part in entries[owner, projection].shared:
                yield Problem(where, f"{where}: {part} is that of {owner}, which has none of its own")
        for part, name in entry.stored(path, projection).items():
            listed = manifest["tensors"].get(name)
            if listed is None:
                yield Problem(where, f"{where}: {name} is in no file of the manifest")
            elif parse_tensor([listed["dtype"], listed["shape"]], name) != entry.tensors[part]:
                yield Problem(where, f"{where}: {name} is stored as {listed['dtype']} {listed['shape']}, not as said")


@dataclass(frozen=True)
class Placed:
    """An entry whose tensors are all in the manifest."""

    where: str
    entry: Entry
    stored: dict[str, str]


def _placed(manifest: dict[str, Any]) -> Iterator[Placed]:
    for path, projection, entry in _entries(manifest):
        stored = entry.stored(path, projection)
        if all(name in manifest["tensors"] for name in stored.values()):
            yield Placed(f"{path}.{projection}", entry, stored)


def _verify_packed(root: Path, files: list[str], entries: list[Placed]) -> Iterator[Problem]:
    """The rules of each entry's codec."""
    if not all((root / file).is_file() for file in files):
        return  # named already
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(root / file, framework="pt")) for file in files]
        except (SafetensorError, OSError):
            return  # named already
        holder = {name: f for f in opened for name in f.keys()}  # noqa: SIM118 - no mapping
        for placed in entries:
            if not all(name in holder for name in placed.stored.values()):
                continue  # named as missing
            try:
                tensors = {part: holder[name].get_tensor(name) for part, name in placed.stored.items()}
                placed.entry.check(placed.entry.packed(tensors))
            except HalfbitError as e:
                yield Problem(placed.where, f"{placed.where}: {e}")


def _entries(manifest: dict[str, Any]) -> Iterator[tuple[str, str, Entry]]:
    """Module path, projection and entry of everything packed."""
    for path, projections in manifest["packed"].items():
        for projection, config in projections.items():
            yield path, projection, Entry.parse(config, f"{path}.{projection}")
