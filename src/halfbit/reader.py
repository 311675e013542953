"""Lazy tensors of any Hugging Face folder or hub repository, from safetensors files only.

A `Reader` opens config and index, and reads a tensor when it is asked for, straight from the shard that holds it; a
slice along the first dimension reads no more than the slice. From the hub, headers are read with range requests and a
shard is downloaded when a tensor of it is asked for. Nothing is unpickled.

Weights that a checkpoint stores quantized (MXFP4, FP8 with block scales) appear as one tensor under the name of the
weight, dequantized to bfloat16 on reading; their parts (`X_blocks`, `X_scales`, `X_scale_inv`) do not appear.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfbit import dequantize
from halfbit.errors import CheckpointError, FormatError, Unsupported
from halfbit.untrusted import header_bytes, is_plain, json_bytes, parse_json, read_into, short

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
METADATA = "__metadata__"

# what a compressed folder needs beside config.json and weights; no *.py: code of a checkpoint is never run
AUXILIARY = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip

# dtype names of the safetensors header, https://huggingface.co/docs/safetensors/index#format
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors header."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Mxfp4:
    """A weight stored as blocks and scales."""

    blocks: str
    scales: str


@dataclass(frozen=True)
class Fp8:
    """A weight stored as float8 and one scale per rectangle."""

    weight: str
    scale: str
    block: tuple[int, int]


class Folder:
    """The files of a local folder."""

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def names(self) -> list[str]:
        return sorted(p.name for p in self.root.iterdir() if p.is_file())

    def path(self, filename: str) -> Path | None:
        path = self.root / filename
        return path if path.is_file() else None

    def header(self, filename: str) -> dict[str, tuple[str, list[int]]]:
        path = self.path(filename)
        if path is None:
            raise CheckpointError(f"{self}: shard {filename} is missing; download it again")
        return read_header(path)


class Hub:
    """The files of a hub repository, each fetched when it is first needed, all from one commit."""

    def __init__(self, repository: str, revision: str | None):
        self.repository, self.revision = repository, revision
        config = self.path("config.json")
        # the cache keeps files under snapshots/<commit>; a branch that moves during a run must not mix two commits
        if config is not None and re.fullmatch(r"[0-9a-f]{40}", config.parent.name):
            self.revision = config.parent.name

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision or 'main'}"

    def names(self) -> list[str]:
        try:
            return sorted(huggingface_hub.list_repo_files(self.repository, revision=self.revision))
        except (HfHubHTTPError, OSError) as error:
            raise self._unreachable(error) from error

    def path(self, filename: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(self.repository, filename, revision=self.revision))
        except LocalEntryNotFoundError as error:
            raise self._unreachable(error) from error
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise CheckpointError(
                f"{self.repository}: neither a folder nor a hub repository ({error}); give the path of a folder with "
                "config.json, or owner/name"
            ) from error
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HfHubHTTPError, OSError) as error:
            raise self._unreachable(error) from error

    def header(self, filename: str) -> dict[str, tuple[str, list[int]]]:
        try:
            metadata = huggingface_hub.parse_safetensors_file_metadata(
                self.repository, filename, revision=self.revision
            )
        except SafetensorsParsingError as error:
            raise FormatError(f"{self}/{filename}: not a safetensors file: {error}") from error
        except EntryNotFoundError as error:
            raise CheckpointError(f"{self}: shard {filename} is missing; the repository is incomplete") from error
        except (HfHubHTTPError, OSError) as error:
            raise self._unreachable(error) from error
        return {name: (info.dtype, info.shape) for name, info in metadata.tensors.items()}

    def _unreachable(self, error: Exception) -> CheckpointError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return CheckpointError(
            f"{self}: cannot be read from the hub ({type(error).__name__}: {reason}); check the name, the revision, "
            "the network and `hf auth login`, or give the path of a downloaded folder"
        )


class Reader:
    """Tensors of a checkpoint by name, read when asked for. Accumulates: headers of the shards that were looked at.

    Args:
        source: a folder, or a hub repository "owner/name".
        revision: branch, tag or commit of a hub repository.
        packed_ok: open a folder that halfbit compressed too; its packed tensors appear as they are stored.

    Attributes:
        source: as given.
        revision: as given; of a hub repository the commit that was found.
        config: config.json as a dictionary.
        quantization: how the source stores its weights: None, "mxfp4", "fp8" or "halfbit".
    """

    def __init__(self, source: str | Path, revision: str | None = None, *, packed_ok: bool = False):
        self.source = str(source)
        self.files: Folder | Hub = open_files(source, revision)
        self.revision = self.files.revision if isinstance(self.files, Hub) else revision
        self.config = read_json(self.files, "config.json")
        self._local: dict[str, tuple[Path, dict[str, tuple[int, int]]]] = {}
        self._headers: dict[str, dict[str, Entry]] = {}
        self._shards = self._list_tensors()
        self.quantization, self._block = self._quantization(packed_ok)
        self._virtual = self._dequantized()

    # what there is

    def names(self) -> list[str]:
        """Names of the weights, in the order of the index."""
        shown = {_parts(v)[0]: name for name, v in self._virtual.items()}
        hidden = {_parts(v)[1] for v in self._virtual.values()}
        return [shown.get(n, n) for n in self._shards if n not in hidden]

    def __contains__(self, name: str) -> bool:
        return name in self._virtual or name in self._shards

    def file(self, name: str) -> str:
        """Name of the shard that holds a tensor (of a dequantized weight: its first part)."""
        virtual = self._virtual.get(name)
        return self._shard(_parts(virtual)[0] if virtual else name)

    def shape(self, name: str) -> tuple[int, ...]:
        match self._virtual.get(name):
            case Mxfp4(blocks, _):
                experts, rows, groups, width = self._entry(blocks).shape
                return experts, 2 * groups * width, rows
            case Fp8(weight, _, _):
                return self._entry(weight).shape
            case _:
                return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._virtual else self._entry(name).dtype

    # what is in it

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, in the checkpoint's dtype (bfloat16 where it was dequantized)."""
        match self._virtual.get(name):
            case Mxfp4(blocks, scales):
                return dequantize.mxfp4(self._raw(blocks), self._raw(scales))
            case Fp8(weight, scale, block):
                return dequantize.fp8(self._raw(weight), self._raw(scale), block)
            case _:
                return self._raw(name)

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor(name)[start:stop]`, reading no more than that."""
        length = (self.shape(name) or (0,))[0]
        if not 0 <= start <= stop <= length:
            raise IndexError(f"{name}: slice {start}:{stop} of {length}")
        match self._virtual.get(name):
            case Mxfp4(blocks, scales):
                return dequantize.mxfp4(self._raw(blocks, start, stop), self._raw(scales, start, stop))
            case Fp8(weight, scale, block) if len(self._entry(weight).shape) == 2:
                # whole rectangles are read, then cut
                first, last = start // block[0], -(-stop // block[0])
                top = first * block[0]
                rows = self._raw(weight, top, min(last * block[0], length))
                return dequantize.fp8(rows, self._raw(scale, first, last), block)[start - top : stop - top]
            case Fp8(weight, scale, block):
                return dequantize.fp8(self._raw(weight, start, stop), self._raw(scale, start, stop), block)
            case _:
                return self._raw(name, start, stop)

    # other files

    def path(self, filename: str) -> Path:
        """Local path of another file of the checkpoint, such as tokenizer.json (downloaded if need be)."""
        found = self.files.path(filename)
        if found is None:
            raise CheckpointError(f"{self.files}: {filename} is missing; download the checkpoint again")
        return found

    def auxiliary_files(self) -> list[str]:
        """Names of tokenizer, generation and licence files: what a copy of the model needs beside its weights."""
        return [n for n in self.files.names() if any(fnmatch(n, pattern) for pattern in AUXILIARY)]

    # inside

    def _list_tensors(self) -> dict[str, str]:
        """Tensor name -> shard name, from the index where there is one."""
        if self.files.path(INDEX) is None:
            names = [SINGLE] if isinstance(self.files, Folder) and self.files.path(SINGLE) else self.files.names()
            if SINGLE not in names:
                raise CheckpointError(_no_safetensors(str(self.files), names))
            self._headers[SINGLE] = self._header(SINGLE)
            return dict.fromkeys(self._headers[SINGLE], SINGLE)
        shards = read_json(self.files, INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise FormatError(f"{self.files}/{INDEX}: expected a `weight_map` of tensor names to file names")
        for shard in sorted(set(shards.values())):
            # a name from a downloaded file must not lead out of the folder
            if not is_plain(shard):
                raise FormatError(f"{self.files}/{INDEX}: {shard!r} is not a plain file name")
            if isinstance(self.files, Folder) and self.files.path(shard) is None:
                raise CheckpointError(
                    f"{self.files}: shard {shard} is listed in {INDEX} but missing; download it again"
                )
        return shards

    def _quantization(self, packed_ok: bool) -> tuple[str | None, tuple[int, int]]:
        inner = self.config.get("text_config")
        found = self.config.get("quantization_config")
        if found is None and isinstance(inner, dict):
            found = inner.get("quantization_config")
        if found is None:
            return None, (1, 1)
        if not isinstance(found, dict):
            raise FormatError(f"{self.files}: quantization_config must be an object, got {short(found)}")
        method = found.get("quant_method")
        if method == "halfbit" and packed_ok:
            return method, (1, 1)
        if method == "halfbit":
            raise Unsupported(
                f"{self.files}: already compressed by halfbit; compress the original model, or open this one with "
                "`halfbit.load`"
            )
        if method == "mxfp4":
            return method, (1, 1)
        if method == "fp8":
            block = found.get("weight_block_size")
            if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
                raise Unsupported(
                    f"{self.files}: fp8 weights without block scales (weight_block_size {block!r}); use a bfloat16 "
                    "version of the model"
                )
            return method, (block[0], block[1])
        if method == "spqr":
            raise Unsupported(
                f"{self.files}: already compressed, in the published SpQR format; `halfbit import` takes it over"
            )
        raise Unsupported(
            f"{self.files}: weights are quantized with {method!r}; halfbit starts from plain weights, mxfp4 or fp8 "
            "with block scales, so use the original version of the model"
        )

    def _dequantized(self) -> dict[str, Mxfp4 | Fp8]:
        virtual: dict[str, Mxfp4 | Fp8] = {}
        if self.quantization == "mxfp4":
            for blocks in self._shards:
                name = blocks.removesuffix("_blocks")
                if name == blocks:
                    continue
                pair = Mxfp4(blocks, f"{name}_scales")
                if pair.scales not in self._shards:
                    raise CheckpointError(f"{blocks}: its {pair.scales} is missing; download again", tensor=blocks)
                shape, scales = self._entry(pair.blocks).shape, self._entry(pair.scales).shape
                if len(shape) != 4 or shape[3] != 16 or scales != shape[:3]:
                    raise FormatError(
                        f"{name}: mxfp4 blocks must be [experts, out, groups, 16] and scales [experts, out, groups], "
                        f"got {list(shape)} and {list(scales)}",
                        tensor=name,
                    )
                virtual[name] = pair
        if self.quantization == "fp8":
            for scale in self._shards:
                name = scale.removesuffix("_scale_inv")
                if name == scale:
                    continue
                if name not in self._shards:
                    raise CheckpointError(f"{scale}: its weight {name} is missing; download again", tensor=scale)
                shape, scales = self._entry(name).shape, self._entry(scale).shape
                expected = (*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], self._block, strict=True)))
                if len(shape) not in (2, 3) or scales != expected:
                    raise FormatError(
                        f"{scale}: expected one scale per {self._block[0]} x {self._block[1]} weights, "
                        f"{list(expected)}, got {list(scales)}",
                        tensor=scale,
                    )
                virtual[name] = Fp8(name, scale, self._block)
        return virtual

    def _shard(self, name: str) -> str:
        if name not in self._shards:
            raise CheckpointError(f"{self.files}: no tensor named {name}", tensor=name)
        return self._shards[name]

    def _entry(self, name: str) -> Entry:
        shard = self._shard(name)
        if shard not in self._headers:
            self._headers[shard] = self._header(shard)
        if name not in self._headers[shard]:
            raise CheckpointError(
                f"{self.files}: {name} is listed in {INDEX} but not in its shard {shard}; download both again",
                tensor=name,
            )
        return self._headers[shard][name]

    def _header(self, shard: str) -> dict[str, Entry]:
        entries = {}
        for name, (dtype, shape) in self.files.header(shard).items():
            if dtype not in DTYPES:
                raise Unsupported(f"{self.files}/{shard}: {name} has dtype {dtype}; known: {', '.join(DTYPES)}")
            entries[name] = Entry(shard, DTYPES[dtype], tuple(shape))
        return entries

    def _raw(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor, or all of it, in memory of its own: mapped shards would count as ours."""
        entry = self._entry(name)
        shape = (
            entry.shape
            if start is None
            else (len(range(*slice(start, stop).indices(entry.shape[0]))), *entry.shape[1:])
        )
        row = entry.dtype.itemsize * prod(entry.shape[1:])
        path, spans = self._fetched(entry.file)
        begin, end = spans.get(name, (0, -1))
        # of a hub repository, the header was read apart from the file
        if end - begin != entry.dtype.itemsize * prod(entry.shape):
            raise FormatError(f"{path}: {name} is not as its header said; download it again", tensor=name)
        rows = torch.empty(shape, dtype=entry.dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(begin + (start or 0) * row)
            try:
                if rows.numel():
                    read_into(file, rows.view(-1).view(torch.uint8).numpy().data)
            except FormatError as error:
                raise FormatError(f"{path}: {name}: {error}; download it again", tensor=name) from error
        return rows

    def _fetched(self, shard: str) -> tuple[Path, dict[str, tuple[int, int]]]:
        """Where a shard lies, and where each tensor begins and ends in it."""
        if shard not in self._local:
            path = self.path(shard)
            try:
                # its own check of the header: that tensors are as long as their shapes, and lie one after another
                with safe_open(path, framework="pt", device="cpu"):
                    pass
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{path}: not a readable safetensors file ({error}); download it again") from error
            head = header_bytes(path)
            entries = parse_json(head[8:], f"{path}: the header")
            offsets = {n: e["data_offsets"] for n, e in entries.items() if n != METADATA}
            self._local[shard] = path, {n: (len(head) + a, len(head) + b) for n, (a, b) in offsets.items()}
        return self._local[shard]


def read_json(files: Folder | Hub, filename: str) -> dict[str, Any]:
    """The object in a JSON file such as config.json."""
    path = files.path(filename)
    if path is None:
        raise CheckpointError(f"{files}: {filename} is missing; give a folder saved by `save_pretrained`")
    return parse_json(json_bytes(path), path)


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype name, shape) of a safetensors file; checks that the file is as long as its header says."""
    length, found = path.stat().st_size, header_bytes(path)
    entries, end = {}, 0
    for name, entry in parse_json(found[8:], f"{path}: the header").items():
        if name == METADATA:
            continue
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(), int(stop)]} if all(
                type(n) is int and n >= 0 for n in shape
            ):
                entries[name] = dtype, shape
                end = max(end, stop)
            case _:
                raise FormatError(f"{path}: the header is not a safetensors header ({name}); download it again")
    if len(found) + end != length:
        raise FormatError(f"{path}: truncated: expected {len(found) + end} bytes, got {length}; download it again")
    return entries


def _parts(virtual: Mxfp4 | Fp8) -> tuple[str, str]:
    return (virtual.blocks, virtual.scales) if isinstance(virtual, Mxfp4) else (virtual.weight, virtual.scale)


def open_files(source: str | Path, revision: str | None) -> Folder | Hub:
    """The files of a folder or hub repository; nothing is read yet."""
    path = Path(source)
    if path.is_dir():
        return Folder(path)
    # owner/name or a bare name is a hub repository; anything else was meant as a path
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)):
        raise CheckpointError(
            f"{source}: no such folder; give a folder with config.json, or a hub repository owner/name"
        )
    return Hub(str(source), revision)


def _no_safetensors(where: str, names: list[str]) -> str:
    pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth"))]
    if "noexp.pt" in pickled:
        return f"{where}: already compressed, in the published QMoE format; `halfbit import` takes it over"
    if pickled:
        return (
            f"{where}: only pickled weights ({pickled[0]}), which halfbit never opens; convert them once with "
            "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)`, or use a revision with "
            "safetensors"
        )
    other = [n for n in names if n.endswith((".safetensors", ".gguf", ".h5"))]
    found = f"; found {', '.join(other[:4])}" if other else ""
    return f"{where}: neither {SINGLE} nor {INDEX}{found}; give a folder saved by `save_pretrained`"
