"""QMoE checkpoints as the published code writes them (IST-DASLab/qmoe): Switch Transformers with ternary experts.

    config.json
    noexp.pt                     everything but the experts: name -> tensor
    exp00.pt, exp01.pt, ...      one per module of experts, the encoder's first; per expert and matrix `wi`, `wo`:
        ....expert_J.wi.w_comp       int16 [codewords]       bit patterns of unsigned codewords, row after row
        ....expert_J.wi.row_off      int32 [rows + 1]        first codeword of each row
        ....expert_J.wi.ter_minmax   bfloat16 [2 * rows]     what symbols 1 and 2 of each row stand for
        ....expert_J.wi.weight       bfloat16 [0]
    sizes.pt                     ....expert_J.wi -> number of codewords

The codewords are those of the format `qmoe` and are not encoded again. The files are pickles, of which nothing but
tensors, dictionaries and numbers is accepted (torch.load with weights_only); tensors are read when they are asked for.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbit.errors import FormatError, Unsupported
from halfbit.events import Event, Imported
from halfbit.experts import ExpertStack
from halfbit.families import open_family
from halfbit.formats.qmoe import QMoE
from halfbit.nn import stored_names
from halfbit.reader import Entry, Folder, Hub, Reader
from halfbit.storing import put_experts
from halfbit.types import Packed
from halfbit.writer import Writer

REST, SIZES = "noexp.pt", "sizes.pt"
CODEC = QMoE()
DTYPES = {"w_comp": torch.int16, "row_off": torch.int32, "ter_minmax": torch.bfloat16, "weight": torch.bfloat16}
# the length field of a row in our layout
LONGEST_ROW = 65535
# files that are kept open
OPEN = 2
# what torch.load raises for files that are cut off, have other bits or are other pickles (found by trying, see tests);
# subclasses are meant, as UnicodeDecodeError, KeyError, OverflowError and RecursionError are
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


def matches(files: Folder | Hub) -> bool:
    """Whether this importer takes a folder with these files."""
    return not {REST, SIZES}.isdisjoint(files.names())


def open_checkpoint(source: str, revision: str | None, outliers: str | None) -> "Checkpoint":
    """The checkpoint; no expert is read yet."""
    if outliers is not None:
        raise Unsupported(f"--outliers {outliers}: a QMoE checkpoint has no outliers")
    return Checkpoint(Pickles(source, revision))


class Pickles(Reader):
    """A reader of `.pt` files that shows each packed matrix as the weight it stands for.

    Attributes:
        shapes: of the packed weights, which are not in the files; given once the model is built.
    """

    def __init__(self, source: str, revision: str | None):
        self.shapes: dict[str, tuple[int, int]] = {}
        self._open: OrderedDict[str, dict[str, Any]] = OrderedDict()
        super().__init__(source, revision)

    def content(self, file: str) -> dict[str, Any]:
        """What one file holds; tensors stay in the file until they are looked at."""
        if file not in self._open:
            while len(self._open) >= OPEN:
                self._open.popitem(last=False)
            self._open[file] = _unpickle(self.files, file)
        self._open.move_to_end(file)
        return self._open[file]

    def names(self) -> list[str]:
        return [name for name, file in self._shards.items() if file == REST or name.endswith(".weight")]

    def stored(self) -> list[str]:
        """Names of the tensors in the files."""
        return list(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name] if name in self.shapes else super().shape(name)

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(name)[start:stop]

    def tensor(self, name: str) -> Tensor:
        return self.content(self.file(name))[name]

    def _entry(self, name: str) -> Entry:
        tensor = self.tensor(name)
        return Entry(self.file(name), tensor.dtype, tuple(tensor.shape))

    def _list_tensors(self) -> dict[str, str]:
        files = sorted(name for name in self.files.names() if name.endswith(".pt"))
        found: dict[str, str] = {}
        for file in [REST, *(name for name in files if name not in (REST, SIZES))]:
            for name, value in self.content(file).items():
                if not isinstance(value, Tensor):
                    raise FormatError(f"{file}: {name}: expected a tensor, got {type(value).__name__}", tensor=name)
                if name in found:
                    raise FormatError(f"{file}: {name} is in {found[name]} too", tensor=name)
                found[name] = file
        return found


class Checkpoint:
    """See `Published`."""

    def __init__(self, reader: Pickles):
        self.reader, self.family = reader, open_family(reader)
        self.about = {"imported": "qmoe"}
        stacks = self.family.experts
        self._files = {path: f"exp{number:02d}.pt" for number, path in enumerate(stacks)}
        self._check_files()
        self.packed = {name for name in reader.names() if reader.file(name) != REST}
        self.matrices = len(self.packed)
        reader.shapes = {
            name: shape
            for stack in stacks.values()
            for projection, shape in stack.projections.items()
            for name in stack.parameters(projection)
        }
        self._sizes = reader.content(SIZES)
        names = {name.removesuffix(".weight") for name in self.packed}
        if odd := sorted(names.symmetric_difference(self._sizes)):
            there = "is not among the experts" if odd[0] in self._sizes else "is missing"
            raise FormatError(f"{SIZES}: {odd[0]} {there}", tensor=odd[0])

    def stored(self) -> list[str]:
        return self.reader.stored()

    def put(self, block: str | None, writer: Writer) -> Iterator[Event]:
        for stack in self.family.experts_of(block) if block is not None else ():
            packed: tuple[list[Packed], list[Packed]] = ([], [])
            for expert in range(stack.num_experts):
                for matrices, projection in zip(packed, stored_names(stack), strict=True):
                    name = stack.parameters(projection)[expert]
                    matrices.append(self._packed(name.removesuffix(".weight"), stack, projection))
                    yield Imported(name, matrices[-1].bits_per_weight)
            put_experts(stack, packed, writer)

    def notices(self, writer: Writer) -> Iterator[str]:
        return iter(())

    def _check_files(self) -> None:
        """Each module of experts must have its file, with all of its matrices and nothing else."""
        found: dict[str, set[str]] = {}
        for name in self.reader.stored():
            if (file := self.reader.file(name)) != REST:
                found.setdefault(file, set()).add(name)
        for path, file in self._files.items():
            stack = self.family.experts[path]
            matrices = [n.removesuffix(".weight") for p in stack.projections for n in stack.parameters(p)]
            expected = {f"{matrix}.{part}" for matrix in matrices for part in DTYPES}
            given = found.pop(file, set())
            if missing := sorted(expected - given):
                raise FormatError(
                    f"{file}: {missing[0]} is missing; download it again, or config.json belongs to another model",
                    tensor=missing[0],
                )
            if extra := sorted(given - expected):
                raise FormatError(f"{file}: {extra[0]} is no part of the experts at {path}", tensor=extra[0])
        if found:
            file, names = next(iter(found.items()))
            raise FormatError(
                f"{file}: holds {min(names)}, and the model of config.json has {len(self._files)} modules of experts, "
                f"{', '.join(self._files.values()) or 'no file of experts'}",
                tensor=min(names),
            )

    def _packed(self, matrix: str, stack: ExpertStack, projection: str) -> Packed:
        """One matrix with the published codewords. Raises FormatError that names file and tensor."""
        file, shape = self._files[stack.path], stack.projections[projection]
        codewords, offsets, levels = (self._part(file, matrix, part, shape) for part in list(DTYPES)[:3])
        lengths = offsets.to(torch.int64).diff()
        name = f"{matrix}.row_off"
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(codewords) or (lengths < 0).any():
            raise FormatError(
                f"{file}: {name}: offsets must rise from 0 to the {len(codewords)} codewords, got {int(offsets[0])} to "
                f"{int(offsets[-1])}{', and falling in between' if (lengths < 0).any() else ''}",
                tensor=name,
            )
        if (lengths > LONGEST_ROW).any():
            raise FormatError(f"{file}: {name}: a row of more than {LONGEST_ROW} codewords", tensor=name)
        if self._sizes[matrix] != len(codewords):
            raise FormatError(
                f"{SIZES}: {matrix}: says {self._sizes[matrix]!r:.40} codewords, {file} has {len(codewords)}",
                tensor=matrix,
            )
        tensors = {
            "codewords": codewords.view(torch.uint16),
            "row_lengths": lengths.to(torch.uint16),
            "levels": levels.view(-1, 2),
            "pivots": torch.empty(0, dtype=torch.int64),
        }
        packed = Packed(CODEC, shape, tensors)
        try:
            CODEC.check(packed)
        except FormatError as e:
            raise FormatError(f"{file}: {matrix}: {e}", tensor=matrix) from e
        return packed

    def _part(self, file: str, matrix: str, part: str, shape: tuple[int, int]) -> Tensor:
        name = f"{matrix}.{part}"
        tensor = self.reader.tensor(name)
        length = {"row_off": shape[0] + 1, "ter_minmax": 2 * shape[0]}.get(part, tensor.numel())
        if tensor.dtype != DTYPES[part] or tensor.shape != (length,):
            raise FormatError(
                f"{file}: {name}: expected {DTYPES[part]} [{length}] for {shape[0]} x {shape[1]} weights, got "
                f"{tensor.dtype} {list(tensor.shape)}",
                tensor=name,
            )
        return tensor.contiguous()


def _unpickle(files: Folder | Hub, file: str) -> dict[str, Any]:
    path = files.path(file)
    if path is None:
        raise FormatError(f"{files}: {file} is missing; download the checkpoint again")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except DAMAGED as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FormatError(
            f"{path}: not a file of tensors that torch.load(weights_only=True) accepts ({reason:.200}); nothing in it "
            "was run; download it again from a source you trust"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise FormatError(f"{path}: expected a dictionary by name, got {type(found).__name__}")
    for name, value in found.items():
        if isinstance(value, Tensor):
            _check_stored(value, name, path)
    return found


def _check_stored(tensor: Tensor, name: str, path: Path) -> None:
    """A pickle can describe tensors that lie nowhere, or are far larger than what is stored."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FormatError(f"{path}: {name}: is not a plain tensor with bytes in the file", tensor=name)
