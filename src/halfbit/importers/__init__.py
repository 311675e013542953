"""Checkpoints that the published implementations wrote, as halfbit folders. One file per format; nothing is solved.

What is packed is taken over without a change to any weight and written in halfbit's own layout; everything else is
copied as it is. One block is in memory at a time, and an interrupted import continues as a run does.
"""

import hashlib
from collections.abc import Iterator, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from halfbit import registry
from halfbit.claims import Claims
from halfbit.errors import Unsupported
from halfbit.events import Began, BlockBegan, BlockDone, Event, Finished, Noticed
from halfbit.family import Family
from halfbit.reader import Reader, open_files
from halfbit.storing import fingerprint_of, folder_config, put_outer
from halfbit.writer import Writer


class Published(Protocol):
    """An opened checkpoint, as the function `open_checkpoint` of each importer gives it.

    Attributes:
        reader: shows every packed weight under the name and with the shape of the weight that it stands for.
        family: the model, built on this reader.
        about: for the manifest.
        packed: names of the reader's tensors that are packed.
        matrices: how many `put` will hand over in all.
    """

    reader: Reader
    family: Family
    about: dict[str, Any]
    packed: Set[str]
    matrices: int

    def stored(self) -> list[str]:
        """Names of the tensors that really lie in the files."""
        ...

    def put(self, block: str | None, writer: Writer) -> Iterator[Event]:
        """Hand what is packed in a block, or outside the blocks, to the writer. Raises FormatError on damage."""
        ...

    def notices(self, writer: Writer) -> Iterator[str]:
        """What a user should know of the finished import."""
        ...


def import_checkpoint(
    source: str, folder: str | Path, *, outliers: str | None = None, revision: str | None = None
) -> Iterator[Event]:
    """Write a published checkpoint as a halfbit folder.

    Args:
        source: folder or hub id of a checkpoint of `spqr_quant` or of the QMoE code.
        folder: new or empty folder, or one that holds an interrupted import of the same source.
        outliers: SpQR only; "add" (the default): an outlier is added to the weight under it, as the published kernel
            does; "replace": it takes the weight's place, as the published quantizer meant it.
        revision: branch, tag or commit of a hub repository.

    Yields:
        events, the last of them `Finished`.
    """
    published = _open(source, revision, outliers)
    reader, family = published.reader, published.family
    claims = family.claims()
    about = {"halfbit": version("halfbit"), "source": Path(source).name, **published.about}
    writer = Writer(folder, _fingerprint(published, about), about)
    blocks = [block for part in family.stacks() for block in part.blocks]
    yield Began(
        writer.folder,
        blocks=len(blocks),
        matrices=published.matrices,
        resumed=sum(map(writer.has, blocks)),
        solved=sum(p["shape"][0] for module in writer.manifest["packed"].values() for p in module.values()),
    )
    if writer.complete:
        yield Finished(writer.folder)
        return
    kept = _kept(claims, published.packed)
    for number, block in enumerate(blocks):
        done = writer.has(block)
        yield BlockBegan(block, number, resumed=done)
        if not done:
            yield from published.put(block, writer)
            for name in kept.get(block, []):
                writer.put(name, reader.tensor(name))
            writer.commit(block, f"model-block-{number:05d}.safetensors")
        yield BlockDone(block, number)
    if any(family.block_of(name) is None for name in published.packed) and not writer.has("outer packed"):
        yield from published.put(None, writer)
        writer.commit("outer packed", "model-outer-packed.safetensors")
    put_outer(reader, kept.get(None, []), writer)
    auxiliary = [reader.path(name) for name in reader.auxiliary_files()]
    writer.finish(_config(published, writer, kept), auxiliary)
    yield from map(Noticed, published.notices(writer))
    yield Finished(writer.folder)


def _open(source: str, revision: str | None, outliers: str | None) -> Published:
    files = open_files(source, revision)
    for name in registry.names("importers"):
        module = registry.module("importers", name)
        if module.matches(files):
            return module.open_checkpoint(source, revision, outliers)
    raise Unsupported(
        f"{source}: not a checkpoint of {' or '.join(registry.names('importers'))}: config.json names no quant_method "
        "'spqr', and there is no noexp.pt; `halfbit compress` takes plain models"
    )


def _kept(claims: Claims, packed: Set[str]) -> dict[str | None, list[str]]:
    """Names of the tensors that stay as they are, by block; None: outside the blocks.

    A copy of a tied weight is left out: in a .pt file the copies share their bytes, in safetensors they would not.
    """
    kept: dict[str | None, list[str]] = {}
    for name, claim in claims.tensors.items():
        if name not in packed and claim.kind != "tied":
            kept.setdefault(claim.block, []).append(name)
    return kept


def _config(published: Published, writer: Writer, kept: dict[str | None, list[str]]) -> dict[str, Any]:
    """config.json, with what the published converters leave empty filled in."""
    reader = published.reader
    config = folder_config(reader, writer, tied={})
    if not config.get("architectures"):
        config["architectures"] = [type(published.family.model).__name__]
    dtypes = {reader.dtype(name) for names in kept.values() for name in names}
    dtypes = {str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.is_floating_point}
    if not config.get("dtype") and not config.get("torch_dtype") and len(dtypes) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = dtypes.pop()
    return config


def _fingerprint(published: Published, about: dict[str, Any]) -> str:
    source = fingerprint_of(published.reader, published.stored())
    return hashlib.sha256(f"{source} {sorted(about.items())}".encode()).hexdigest()
