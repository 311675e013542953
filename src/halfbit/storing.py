"""What a run hands to the writer, whether it solved the weights or found them packed: matrices, what stays, config."""

import hashlib
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from halfbit import formats
from halfbit.claims import Claims
from halfbit.experts import ExpertStack
from halfbit.journal import Journal
from halfbit.layout import Entry, stored_name
from halfbit.linears import WEIGHT, Linear
from halfbit.manifest import checksum
from halfbit.nn import stored_names
from halfbit.reader import Reader
from halfbit.types import Packed, Roles
from halfbit.writer import FORMAT_VERSION, Writer

# of the files that hold what lies outside the blocks
SHARD_BYTES = 2 << 30


def packed_tensors(claims: Claims, stacks: Iterable[ExpertStack], linears: Iterable[Linear]) -> set[str]:
    """Checkpoint tensors whose weights are stored in packed form (biases are not)."""
    weights = [name for stack in stacks for projection in stack.projections for name in stack.parameters(projection)]
    for linear in linears:
        # a checkpoint may hold a tied weight under both names
        twins = (f"{twin}.{WEIGHT}" for twin in linear.twins)
        weights += [linear.name, *(name for name in twins if name in claims.sources)]
    return {tensor for name in weights for names in claims.sources[name].names.values() for tensor in names}


def put_linear(path: str, packed: Packed, orders: dict[str, Tensor], writer: Writer) -> int:
    """The packed weight of a linear layer and its entry in the config; the number of bytes that are its own.

    Args:
        orders: column orders by the layer that stores them. One that is among them is not stored again, and the entry
            names its owner; any other is added.
    """
    order = packed.tensors.get("order")
    owner = None
    if order is not None and order.numel():
        owner = next((other for other, stored in orders.items() if torch.equal(order, stored)), None)
        if owner is None:
            orders[path] = order
    shared = {} if owner is None else {"order": owner}
    nbytes = 0
    for part, tensor in packed.stored.items():
        if part not in shared:
            writer.put(stored_name(path, WEIGHT, part), tensor)
            nbytes += tensor.numel() * tensor.element_size()
    writer.record("packed", path, {WEIGHT: Entry.of(packed, 1, shared).to_config()})
    return nbytes


def keep_linear(journal: Journal, path: str, packed: Packed, facts: dict[str, Any]) -> None:
    """A linear layer that is decided, until its block is written."""
    journal.add(path, packed.stored, facts | {"entry": Entry.of(packed, 1).to_config()})


def kept_linear(journal: Journal, path: str) -> tuple[Packed, dict[str, Any]] | None:
    """What `keep_linear` was given for `path` before the run was interrupted."""
    found = journal.get(path)
    if found is None:
        return None
    tensors, facts = found
    entry = Entry.parse(facts["entry"], path)
    return entry.packed({part: tensors[part] for part in entry.tensors}), facts


def put_experts(stack: ExpertStack, packed: tuple[list[Packed], list[Packed]], writer: Writer) -> None:
    """The matrices of all experts of a module, of any codecs, one above another, and their entry in the config.

    Empties the lists of `packed`, so that a module is in memory once.
    """
    entry = {}
    for matrices, projection in zip(packed, stored_names(stack), strict=True):
        whole = formats.stack(matrices)
        matrices.clear()
        for part, tensor in whole.stored.items():
            writer.put(stored_name(stack.path, projection, part), tensor)
        entry[projection] = Entry.of(whole, stack.num_experts).to_config()
    writer.record("packed", stack.path, entry)


def keep_experts(journal: Journal, key: str, roles: Roles, facts: dict[str, Any]) -> None:
    """A group of experts that is decided, until its module is written."""
    tensors, entries = {}, []
    for number, matrices in enumerate(roles):
        whole = formats.stack(matrices)
        tensors |= {f"{number}/{part}": tensor for part, tensor in whole.stored.items()}
        entries.append(Entry.of(whole, len(matrices)).to_config())
    journal.add(key, tensors, facts | {"entries": entries})


def kept_experts(journal: Journal, key: str) -> tuple[Roles, dict[str, Any]] | None:
    """What `keep_experts` was given under `key` before the run was interrupted."""
    found = journal.get(key)
    if found is None:
        return None
    tensors, facts = found
    roles = []
    for number, config in enumerate(facts["entries"]):
        entry = Entry.parse(config, key)
        whole = entry.packed({part: tensors[f"{number}/{part}"] for part in entry.tensors})
        roles.append([whole.part(e, entry.shape[0]) for e in range(entry.shape[0])])
    return (roles[0], roles[1]), facts


def put_outer(reader: Reader, names: list[str], writer: Writer) -> None:
    """Tensors outside the blocks as they are, in files of at most SHARD_BYTES."""
    for number, shard in enumerate(_shards(reader, names)):
        if not writer.has(f"outer {number}"):
            for name in shard:
                writer.put(name, reader.tensor(name))
            writer.commit(f"outer {number}", f"model-outer-{number:05d}.safetensors")


def _shards(reader: Reader, names: list[str]) -> list[list[str]]:
    """Names in order, cut where a file would pass SHARD_BYTES."""
    shards: list[list[str]] = []
    size = SHARD_BYTES
    for name in names:
        nbytes = prod(reader.shape(name)) * reader.dtype(name).itemsize
        if size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def folder_config(reader: Reader, writer: Writer, tied: Mapping[str, str]) -> dict[str, Any]:
    """config.json of the source with what is packed in the folder; `tied` as in `HalfbitConfig`."""
    config = dict(reader.config)
    config["quantization_config"] = {
        "quant_method": "halfbit",
        "format": FORMAT_VERSION,
        "modules": writer.manifest["packed"],
        "tied": dict(tied),
        "manifest": True,
    }
    return config


def fingerprint_of(reader: Reader, names: Iterable[str]) -> str:
    """Which source it is: its config, and names, shapes and first rows of its tensors.

    Of a hub repository the commit stands for the weights; of a folder the first row of every tensor, since reading
    terabytes twice would double the time of a run.
    """
    digest = hashlib.sha256(reader.path("config.json").read_bytes())
    digest.update(f"{reader.revision}\n".encode())
    for name in names:
        shape = reader.shape(name)
        digest.update(f"{name} {shape} {reader.dtype(name)}\n".encode())
        if reader.revision is None:
            digest.update(checksum(reader.slice(name, 0, 1) if shape else reader.tensor(name)).encode())
    return digest.hexdigest()
