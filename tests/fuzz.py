"""Mutates valid packed matrices and whole folders: every outcome is a HalfbitError or a correct result, never a crash.

    python tests/fuzz.py --mutations 2000 --seed 0                          # the extension as it is installed
    make fuzz                                                               # 20,000 under AddressSanitizer and UBSan
    python tests/fuzz.py --only 1234 --seed 0                               # one mutation again, to look at it

Four of five mutations are of a matrix in memory, with every codec and every set of instructions. What `check` accepts
must decode to the same finite weights as the plain torch reference, and multiply as those weights do; what only
`runtime` accepts (that is all a kernel may rely on) must multiply without touching foreign memory. The rest are of one
or two files of a compressed folder, in half of them with checksums made to fit, so that the rules of the formats are
all that protects: `verify`, `inspect`, `Reader` and `load` take it or say what is wrong, and a folder that loads with
its checksums computes what the intact one does. A mutation that takes a minute of the processor, or a gigabyte, fails.
"""

import argparse
import collections
import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import compressed
import conformance
import torch
from conftest import instructions
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging

import halfbit
from halfbit import formats, native
from halfbit.errors import FormatError, HalfbitError
from halfbit.folder import Problem
from halfbit.manifest import MANIFEST, header_checksum, tensor_entry, text_of
from halfbit.reader import METADATA, Reader
from halfbit.types import Packed
from halfbit.untrusted import header_bytes

ISAS = instructions()
INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)
INFINITY, NAN = float("inf"), float("nan")
# a changed scale may be anything
STATISTICS = ("scale", "zero", "scales", "zeros", "second", "scale_grid", "levels", "pivots", "outlier_values", "order")
# of the processor; on the clock of a busy machine ten times as many
SECONDS = 60
KIBIBYTES = 1 << 20
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    65535,
    2**31 - 1,
    2**31,
    2**63,
    2**70,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
)
OTHERS = (None, True, False, "", "x", "../x", "/etc/passwd", "os.system", [], {}, [[]], {"a": 1}, [1] * 100, "float32")


def build(path: Path) -> ModuleType:
    """The extension, from this file."""
    spec = importlib.util.spec_from_file_location("fuzz._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- bytes and JSON


def mutate_bytes(data: bytearray, some: random.Random) -> bytearray:
    """A few bytes changed, lost or added; now and then many."""
    for _ in range(some.choice((1, 1, 1, 2, 4, 40))):
        at = some.randrange(len(data) + 1)
        match some.randrange(8) if at < len(data) else 7:
            case 0 | 1 | 2:
                data[at] ^= 1 << some.randrange(8)
            case 3:
                data[at] = some.choice((0, 1, 127, 128, 255))
            case 4:
                data[at : at + 8] = some.randbytes(len(data[at : at + 8]))
            case 5:
                del data[at : at + some.choice((1, 2, 8, 64))]
            case 6:
                del data[at:]
            case _:
                data[at:at] = some.choice((b"\0", b"[", b'{"a":' * 2000, some.randbytes(8)))
    return data


def mutate_tensors(header: dict[str, Any], data: bytes, some: random.Random) -> bytes:
    """The bytes of one tensor of a shard flipped, shifted, all alike, or those of another tensor; as many as before."""
    spans = [entry["data_offsets"] for name, entry in header.items() if name != METADATA]
    begin, end = some.choice([span for span in spans if span[0] < span[1]])
    tensor = bytearray(data[begin:end])
    match some.randrange(6):
        case 0:
            there = some.randrange(len(data) - len(tensor) + 1)
            tensor[:] = data[there : there + len(tensor)]
        case 1:
            by = some.randrange(len(tensor))
            tensor[:] = tensor[by:] + tensor[:by]
        case 2:
            tensor[:] = bytes([some.choice((0, 1, 127, 255))]) * len(tensor)
        case _:
            for _ in range(some.choice((1, 1, 2, 5, 50))):
                tensor[some.randrange(len(tensor))] ^= some.choice((*(1 << n for n in range(8)), 255))
    return data[:begin] + bytes(tensor) + data[end:]


def mutate_json(value: Any, some: random.Random) -> Any:
    """One value somewhere in it replaced, lost, or moved under another key."""
    places: list[tuple[Any, Any]] = []
    nodes = [value]
    while nodes:
        node = nodes.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        nodes += [node[k] for k in keys]
        # of a long list of tensors as many as of a short one
        places += some.sample([(node, k) for k in keys], min(len(keys), 12))
    node, key = some.choice(places)
    match some.randrange(6):
        case 0 if isinstance(node, dict):
            node[some.choice(("a", "name", "../x", str(key) + "x"))] = node.pop(key)
        case 1:
            del node[key]
        case 2 if type(node[key]) is int:
            node[key] += some.choice((-1, 1, 256, -node[key] * 2))
        case 3:
            node[key] = some.choice(OTHERS)
        case _:
            node[key] = some.choice(NUMBERS)
    return value


# --- matrices


class Matrices:
    """Small stacks of matrices in every format, and what is done with each that was changed."""

    def __init__(self) -> None:
        self.stacks: list[tuple[Packed, int]] = []
        single: dict[tuple[int, int], list[Packed]] = collections.defaultdict(list)
        for codec in conformance.codecs():
            for rows, columns, count in ((5, 37, 1), (33, 300, 2), (17, 64, 3)):
                made = [list(conformance.solutions_for(codec, rows, columns, n)) for n in range(count)]
                for kind in (0, -1):
                    parts = [codec.encode(solutions[kind]) for solutions in made]
                    self.stacks.append((codec.stack(parts), count))
                    single[rows, columns].append(parts[0])
        # neighbours of different formats, three at a time
        for parts in single.values():
            for first in range(1, len(parts) - 2, 3):
                mixed = formats.stack(parts[first : first + 3])
                if mixed.codec.name == "mixed":
                    self.stacks.append((mixed, 3))

    def mutate(self, some: random.Random) -> str:
        packed, count = some.choice(self.stacks)
        kind, name, changed = self._changed(packed, some)
        if native.extension is not None:
            native.extension.set_isa(some.choice(ISAS))
        tokens = torch.tensor([some.choice((0, 1, 3, 9, 40)) for _ in range(count)])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), tokens.cumsum(0)])
        x = torch.randn(int(starts[-1]), changed.shape[1])
        out = changed.shape[0] // count
        try:
            operands = changed.codec.runtime(changed)
            y = changed.codec.product(x, starts, operands, out)
        except (HalfbitError, ValueError) as error:
            # a ValueError is the kernel's own last look at what it is given
            y = None
            if isinstance(error, ValueError) and not _is_told(error):
                raise
        try:
            formats.check_stack(changed, count)
        except FormatError:
            return f"{packed.codec.name} {kind}: error"
        assert y is not None, "what `check` accepts, the product refuses"
        dense = changed.codec.decode(changed)
        assert dense.shape == changed.shape
        assert torch.isfinite(dense).all()
        # it takes a hundred times as long
        if some.random() < 0.25:
            with reference():
                assert torch.equal(changed.codec.decode(changed), dense), "decodes to what the reference does not"
        # statistics that were changed may be so large that their rounding errors are all there is
        if name.endswith(STATISTICS):
            return f"{packed.codec.name} {kind}: right"
        for number, matrix in enumerate(dense.view(count, out, -1)):
            those = slice(int(starts[number]), int(starts[number + 1]))
            exact, size = x[those].double() @ matrix.double().T, x[those].double().abs().sum(1) * matrix.abs().max()
            assert ((y[those].double() - exact).abs() <= 1e-4 * size[:, None]).all(), "the product is wrong"
        if count == 1 and changed.codec.name in ("grouped", "spqr"):
            rows = torch.tensor([out - 1, 0])
            assert torch.equal(changed.codec.lookup(rows, operands, changed.shape[1]), dense[rows])
        return f"{packed.codec.name} {kind}: right"

    @staticmethod
    def _changed(packed: Packed, some: random.Random) -> tuple[str, str, Packed]:
        tensors, shape = dict(packed.tensors), packed.shape
        name = some.choice([n for n, t in tensors.items() if t.numel()])
        tensor = tensors[name].clone().contiguous()
        match some.randrange(12):
            case 0:
                kind, tensors[name] = "cut", tensor[: some.randrange(len(tensor))].clone()
            case 1:
                kind, tensors[name] = (
                    "longer",
                    torch.cat([tensor, tensor])[: len(tensor) + some.randrange(1, 9)].clone(),
                )
            case 2:
                kind, tensors[name] = (
                    "retyped",
                    some.choice((tensor.flatten().view(torch.uint8), tensor.to(torch.int64))),
                )
            case 3:
                kind, other = "exchanged", some.choice(list(tensors))
                tensors[name], tensors[other] = tensors[other], tensor
            case 4:
                kind, sides = "resized", [*packed.shape]
                sides[some.randrange(2)] += some.choice((-16, -2, -1, 1, 2, 16, 256))
                shape = max(sides[0], 1), max(sides[1], 0)
            case 5:
                kind, flat = "shifted", tensor.flatten().view(torch.uint8)
                tensors[name] = flat.roll(some.choice((-4, -2, -1, 1, 2, 4))).view(tensor.dtype).view(tensor.shape)
            case 6 | 7 if tensor.dtype in INTEGERS:
                # sums stay: what one has more, another has less
                kind, flat = "moved", tensor.flatten().to(torch.int64)
                step = some.choice((1, 2, 16, 255, 1 << 16, 1 << 31))
                flat[some.randrange(len(flat))] += step
                flat[some.randrange(len(flat))] -= step
                tensors[name] = flat.to(tensor.dtype).view(tensor.shape)
            case _:
                kind, flat = "flipped", tensor.flatten().view(torch.uint8)
                for _ in range(some.choice((1, 1, 2, 5, 50))):
                    flat[some.randrange(len(flat))] ^= some.choice((*(1 << n for n in range(8)), 255))
                tensors[name] = flat.view(tensor.dtype).view(tensor.shape)
        return kind, name, Packed(packed.codec, shape, tensors)


def _is_told(error: ValueError) -> bool:
    return any(word in str(error) for word in ("fit together", "must", "expected", "are not those"))


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Plain torch in the place of the kernels."""
    native.extension, kept = None, native.extension
    try:
        yield
    finally:
        native.extension = kept


# --- folders


class Folders:
    """Compressed folders of tiny models, one of which has one file changed at a time."""

    def __init__(self, root: Path, names: list[tuple[str, str]]):
        self.intact: list[tuple[Path, Any, torch.Tensor]] = []
        for number, (name, rules) in enumerate(names):
            source = compressed.add_tokenizer(compressed.SOURCES[name](root / f"source{number}"))
            folder = root / f"folder{number}"
            compressed.run(source, folder, compressed.EVERYTHING.get(rules, rules))
            ids = compressed.inputs(self._load(folder))
            self.intact.append((folder, ids, self._logits(self._load(folder), ids)))

    @staticmethod
    def _load(folder: Path, verify: bool = True) -> Any:
        if native.extension is not None:
            # whatever the matrices were multiplied with
            native.extension.set_isa("best")
        return halfbit.load(str(folder), verify=verify)

    @staticmethod
    def _logits(model: Any, ids: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**ids, use_cache=False).logits

    def mutate(self, some: random.Random) -> str:
        folder, ids, logits = some.choice(self.intact)
        intact = {p: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "README.md"}
        changed = some.sample(list(intact), some.choice((1, 1, 1, 2)))
        fitting = some.random() < 0.5
        try:
            kind = " and ".join(f"{path.suffix} {self._change(path, intact, some)}" for path in changed)
            if fitting:
                for path in changed:
                    self._fit(folder, path)
            of_config = any(path.name == "config.json" for path in changed)
            verify = not fitting or some.random() < 0.5
            outcome = self._look(folder, ids, None if fitting or of_config else logits, verify, of_config)
        finally:
            for path, content in intact.items():
                path.unlink(missing_ok=True)
                path.write_bytes(content)
        return f"{kind if len(changed) == 1 else 'two files'}{' with sums' if fitting else ''}: {outcome}"

    @staticmethod
    def _change(path: Path, intact: dict[Path, bytes], some: random.Random) -> str:
        content = intact[path]
        if path.suffix == ".json" and some.random() < 0.6:
            path.write_text(json.dumps(mutate_json(json.loads(content), some), indent=1) + "\n")
            return "JSON"
        if path.suffix == ".safetensors" and (which := some.randrange(8)) < 6:
            if which == 0:
                path.write_bytes(some.choice([c for p, c in intact.items() if p.suffix == ".safetensors"]))
                return "of another"
            end = len(header_bytes(path))
            if which < 3:
                text = json.dumps(mutate_json(json.loads(content[8:end]), some)).encode()
                path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
                return "header"
            path.write_bytes(content[:end] + mutate_tensors(json.loads(content[8:end]), content[end:], some))
            return "tensors"
        path.write_bytes(mutate_bytes(bytearray(content), some))
        return "bytes"

    @staticmethod
    def _fit(folder: Path, path: Path) -> None:
        """Let the manifest say what the file is now, as far as it can be read."""
        with contextlib.suppress(HalfbitError, ValueError, SafetensorError, KeyError, TypeError, AttributeError):
            manifest = json.loads((folder / MANIFEST).read_bytes())
            manifest.pop("sha256", None)
            if path.name in manifest["files"]:
                manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            if path.name == "config.json":
                manifest["packed"] = json.loads(path.read_bytes())["quantization_config"]["modules"]
            if path.suffix == ".safetensors":
                manifest["headers"][path.name] = header_checksum(path)
                for name, tensor in load_file(path).items():
                    manifest["tensors"][name] = tensor_entry(path.name, tensor)
            (folder / MANIFEST).write_text(text_of(manifest))

    def _look(self, folder: Path, ids: Any, logits: torch.Tensor | None, verify: bool, of_config: bool) -> str:
        """What all that reads a folder says of it; with `logits`, those are what it must compute if it loads."""
        found = 0
        for look in (halfbit.verify, _inspected, _tensors):
            try:
                found += sum(isinstance(p, Problem) for p in look(folder))
            except HalfbitError:
                found += 1
        try:
            model = self._load(folder, verify=verify)
        except HalfbitError:
            return "error"
        try:
            after = self._logits(model, ids)
        except (IndexError, RuntimeError, ValueError, TypeError):
            # what transformers makes of numbers in config.json that are no matter of ours
            assert of_config
            return "no product"
        if logits is not None:
            assert torch.equal(after, logits), "loads with its checksums and computes something else"
        return "found" if found else "right"


def _inspected(folder: Path) -> list[Problem]:
    json.dumps(halfbit.inspect(folder))
    return []


def _tensors(folder: Path) -> Iterator[torch.Tensor]:
    """Every tensor, as a checkpoint to be compressed is read."""
    reader = Reader(folder, packed_ok=True)
    return (reader.tensor(name) for name in reader.names())


def run(mutations: int, seed: int, *, folders: bool, only: int | None = None) -> collections.Counter[str]:
    """Outcomes and how often each was; raises what no mutation may lead to, with the mutation's number on stderr."""
    outcomes: collections.Counter[str] = collections.Counter()
    # says where it was, and then ends the process as the signal does
    faulthandler.register(signal.SIGPROF, chain=True)
    names = [("llama", "spqr"), ("qwen2-moe", "qmoe"), ("mixtral", "runlength"), ("opt", "grouped")] if folders else []
    with tempfile.TemporaryDirectory() as root:
        targets: list[Callable[[random.Random], str]] = [Matrices().mutate] * 4
        if folders:
            targets.append(Folders(Path(root), names).mutate)
        for number in [only] if only is not None else range(mutations):
            some = random.Random(f"{seed} {number}")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            torch.manual_seed(number)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            faulthandler.dump_traceback_later(10 * SECONDS, exit=True)
            try:
                outcomes[targets[number % len(targets)](some)] += 1
            except BaseException:
                print(f"mutation {number} of seed {seed}", file=sys.stderr)
                raise
            finally:
                faulthandler.cancel_dump_traceback_later()
                signal.setitimer(signal.ITIMER_PROF, 0)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < KIBIBYTES, f"mutation {number} of seed {seed} took {grown} KiB"
            if number % 1000 == 999:
                print(f"{number + 1}: {outcomes.total()} right or typed errors", file=sys.stderr, flush=True)
    return outcomes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this mutation alone")
    parser.add_argument("--extension", type=Path, help="another build of halfbit._C")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    faulthandler.enable()
    if given.extension is not None:
        native.extension = build(given.extension)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for said, times in sorted(run(given.mutations, given.seed, folders=True, only=given.only).items()):
        print(f"{times:7} {said}")
