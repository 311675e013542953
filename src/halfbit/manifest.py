"""The manifest of a compressed folder: what every byte of its files must be, and whether it is.

    tensors   name -> file, dtype, shape, XXH3 (128 bits) and SHA-256 of its bytes
    gates     unit -> what each gate found: value, limit, passed; original, accepted where there is such
    headers   shard -> SHA-256 of its header, length and padding included
    files     any other file -> SHA-256
    sha256    of the manifest itself, up to this last line

XXH3 is what loading a folder checks: eight times as fast as SHA-256, as fast as memory is read (docs/LOG.md). Neither
is a signature: whoever can write the folder can write the manifest. Manifests of format 1 have SHA-256 of tensors and
files alone.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfbit.errors import FormatError
from halfbit.layout import Entry, name_of, parse_tensor
from halfbit.reader import DTYPES
from halfbit.untrusted import header_bytes, is_plain, json_bytes, parse_json, read_into, short

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 2
READABLE = (1, 2)
# what the manifest says of every matrix
FACTS = ("loss", "bits_per_weight", "tokens")
# the last line, behind a comma
OWN = ',\n "sha256": "{}"\n}}\n'
# a sum of facts must stay a float
LARGEST_FACT = 2**53
# bytes that are read at a time: they stay in the second-level cache between being read and being summed
CHUNK = 1 << 18


def checksum(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes as they lie in the file (row major, little endian)."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def fast_checksum(tensor: Tensor) -> str:
    """XXH3, 128 bits, of the same bytes."""
    return xxhash.xxh3_128_hexdigest(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_entry(file: str, tensor: Tensor) -> dict[str, Any]:
    """What the manifest says of a tensor."""
    about = {"file": file, "dtype": name_of(tensor.dtype), "shape": list(tensor.shape)}
    return about | {"xxh3": fast_checksum(tensor), "sha256": checksum(tensor)}


def header_checksum(path: Path) -> str:
    """SHA-256 of a shard's header. Raises FormatError where there is none."""
    return hashlib.sha256(header_bytes(path)).hexdigest()


# --- the file


def text_of(manifest: dict[str, Any]) -> str:
    """The manifest as it is written, its own checksum in the last line."""
    text = json.dumps(manifest, indent=1).removesuffix("\n}")
    return text + OWN.format(hashlib.sha256(text.encode()).hexdigest())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder written here. Raises FormatError where there is none, it is damaged or a later one."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FormatError(f"{folder}: no {MANIFEST}; this is not a folder that halfbit compress wrote")
    return parse_manifest(path)


def parse_manifest(path: Path) -> dict[str, Any]:
    """As `read_manifest`, of the file itself."""
    content = json_bytes(path)
    manifest = parse_json(content, path)
    if manifest.get("format") not in READABLE:
        expected = " or ".join(map(str, READABLE))
        raise FormatError(
            f"{path}: expected format {expected}, got {short(manifest.get('format'))}; use the halfbit that wrote it"
        )
    own = manifest.pop("sha256", None)
    if manifest["format"] != 1:
        behind = OWN.format(own).encode()
        text = content.removesuffix(behind)
        if len(text) == len(content) or hashlib.sha256(text).hexdigest() != own:
            raise FormatError(f"{path}: differs from what was written; download it, or compress the model, again")
    try:
        _check(manifest)
    except FormatError as e:
        raise FormatError(f"{path}: {e}; compress the model again", tensor=e.tensor) from e
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """Everything that readers of a manifest rely on."""
    for key in ("about", "blocks", "tensors", "packed", "matrices", "coverage", "files"):
        if not isinstance(manifest.get(key), dict):
            raise FormatError(f"expected an object {key!r}, got {short(manifest.get(key))}")
    if not isinstance(manifest.get("complete"), bool) or not isinstance(manifest.get("fingerprint"), str):
        raise FormatError("expected complete (true or false) and fingerprint (text)")
    sums = ("xxh3", "sha256") if manifest["format"] != 1 else ("sha256",)
    for name, entry in manifest["tensors"].items():
        if not isinstance(entry, dict) or not {"file", "dtype", "shape", *sums} <= set(entry):
            raise FormatError(
                f"{name}: expected file, dtype, shape, {', '.join(sums)}, got {short(entry)}", tensor=name
            )
        parse_tensor([entry["dtype"], entry["shape"]], name)
        if not is_plain(entry["file"]):
            raise FormatError(f"{name}: {short(entry['file'])} is not a plain file name", tensor=name)
    for path, projections in manifest["packed"].items():
        if not isinstance(projections, dict):
            raise FormatError(f"{path}: expected an object of projections, got {short(projections)}", tensor=path)
        for projection, config in projections.items():
            Entry.parse(config, f"{path}.{projection}")
    for name, fact in manifest["matrices"].items():
        if not isinstance(fact, dict) or not all(_is_number(fact.get(k)) for k in FACTS):
            raise FormatError(f"{name}: expected {', '.join(FACTS)}, got {short(fact)}", tensor=name)
    for kind in ("files", "headers") if manifest["format"] != 1 else ("files",):
        files = manifest.get(kind)
        if not isinstance(files, dict) or not all(is_plain(n) and isinstance(v, str) for n, v in files.items()):
            raise FormatError(f"expected {kind}, plain file names with their SHA-256, got {short(files)}")
    for block, entry in manifest["blocks"].items():
        _check_block(block, entry, manifest["tensors"])
    _check_gates(manifest)
    for path, cover in manifest["coverage"].items():
        counts = [cover.get(k) for k in ("trained", "below_floor")] if isinstance(cover, dict) else [None]
        if not counts[0] or not all(isinstance(c, list) and all(type(n) is int for n in c) for c in counts):
            raise FormatError(f"{path}: expected trained and below_floor, got {short(cover)}", tensor=path)


def _check_block(block: str, entry: Any, tensors: dict[str, Any]) -> None:
    match entry:
        case {"file": str(file), "tensors": list(names)}:
            if is_plain(file) and all(isinstance(n, str) and n in tensors for n in names):
                return
    raise FormatError(f"{block}: expected a file and names of tensors, got {short(entry)}")


def _check_gates(manifest: dict[str, Any]) -> None:
    """Folders of before have none, and get empty ones."""
    for kind in ("outputs", "gates"):
        if not isinstance(manifest.setdefault(kind, {}), dict):
            raise FormatError(f"expected an object {kind!r}, got {short(manifest[kind])}")
    for name, judged in manifest["outputs"].items():
        match judged:
            case {"error": error, "energy": energy, "tokens": tokens, "wrong": wrong}:
                if all(value is None or _is_number(value) for value in (error, energy, tokens, wrong)):
                    continue
        raise FormatError(f"{name}: expected error, energy, tokens and wrong, got {short(judged)}", tensor=name)
    for unit, rows in manifest["gates"].items():
        if not isinstance(rows, list) or not all(_is_check(row) for row in rows):
            raise FormatError(f"{unit}: expected a list of what gates found, got {short(rows)}", tensor=unit)


def _is_check(row: Any) -> bool:
    match row:
        case {"gate": str(), "where": str(), "value": value, "limit": limit, "passed": bool()}:
            rest = {k: v for k, v in row.items() if k not in ("gate", "where", "value", "limit", "passed")}
            original, accepted = rest.pop("original", 0.0), rest.pop("accepted", False)
            return (
                (value is None or _is_number(value))
                and _is_number(limit)
                and _is_number(original)
                and isinstance(accepted, bool)
                and not rest
            )
    return False


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST_FACT)


# --- what the files are


@dataclass(frozen=True)
class Problem:
    """What is wrong, and with which tensor or file."""

    where: str
    message: str


def verify_shard(path: Path, manifest: dict[str, Any], *, fast: bool = False) -> Iterator[Problem | str]:
    """Whether a shard is what the manifest says, byte for byte.

    Its bytes are read, not mapped: a file that is replaced meanwhile would end the process (SIGBUS).

    Args:
        fast: by XXH3 alone where the manifest has it.

    Yields:
        the name of each tensor that is whole, or a Problem.
    """
    names = [name for name, entry in manifest["tensors"].items() if entry["file"] == path.name]
    try:
        head = header_bytes(path)
        # whether the header describes the file: names, dtypes and shapes, and that nothing overlaps or is left over
        with safe_open(path, framework="pt") as f:
            present = set(f.keys())
        header = parse_json(head[8:], path)
        chunk = memoryview(bytearray(CHUNK))
        with path.open("rb", buffering=0) as file:
            # from the beginning to the end, which disks like
            for name in sorted(names, key=lambda n: header[n]["data_offsets"] if n in present else []):
                if name in present:
                    file.seek(len(head) + header[name]["data_offsets"][0])
                    yield _verify_tensor(name, file, chunk, header[name], manifest["tensors"][name], fast)
                else:
                    yield Problem(name, f"{path.name}: tensor {name} is missing")
        for extra in sorted(present.difference(names)):
            yield Problem(extra, f"{path.name}: tensor {extra} is not in the manifest")
        if manifest.get("headers", {}).get(path.name, own := hashlib.sha256(head).hexdigest()) != own:
            yield Problem(path.name, f"{path.name}: its header differs from what was written; the file is damaged")
    except (SafetensorError, FormatError, OSError) as e:
        yield Problem(path.name, f"{path.name}: cannot be read as safetensors ({e})")


def _verify_tensor(
    name: str, file: RawIOBase, chunk: memoryview, found: dict[str, Any], entry: dict[str, Any], fast: bool
) -> Problem | str:
    """The bytes that come next in the file are those of the tensor; `chunk` holds some of them at a time."""
    got = [name_of(DTYPES[found["dtype"]]) if found["dtype"] in DTYPES else found["dtype"], found["shape"]]
    if got != [entry["dtype"], entry["shape"]]:
        return Problem(name, f"{name}: expected {entry['dtype']} {entry['shape']}, got {got[0]} {got[1]}")
    digests: dict[str, Any] = {"xxh3": xxhash.xxh3_128()} if "xxh3" in entry else {}
    if not (fast and digests):
        digests["sha256"] = hashlib.sha256()
    begin, end = found["data_offsets"]
    for rest in range(end - begin, 0, -CHUNK):
        read_into(file, piece := chunk[:rest])
        for digest in digests.values():
            digest.update(piece)
    if all(digest.hexdigest() == entry[kind] for kind, digest in digests.items()):
        return name
    return Problem(name, f"{name}: checksum differs from the manifest's; the file {entry['file']} is damaged")


_skipped: ContextVar[bool] = ContextVar("halfbit_unverified", default=False)


@contextmanager
def unverified() -> Iterator[None]:
    """Folders that are loaded inside are not compared with their checksums. The rules of the formats are still checked,
    so that damage gives wrong weights at worst."""
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def verify_loading(manifest: dict[str, Any], shards: list[Path]) -> None:
    """Raise FormatError for the first tensor of the shards that is not what the manifest says."""
    listed = {entry["file"] for entry in manifest["tensors"].values()}
    for path in shards:
        if path.name not in listed:
            raise FormatError(f"{path.name}: is not listed in the manifest; delete it, or download the folder again")
        for found in verify_shard(path, manifest, fast=True):
            if isinstance(found, Problem):
                raise FormatError(f"{found.message}; download it, or compress the model, again", tensor=found.where)


def skipped() -> bool:
    """Whether `unverified` is in force."""
    return _skipped.get()
