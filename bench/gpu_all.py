"""Everything that is owed on a GPU, in one call: correctness first, then speed, in less than nine minutes.

Each step has a time budget and fails alone: what went wrong becomes a row and the rest runs. Formats are found by what
is registered with Triton kernels. Rows are written after every step (OUT/rows.json, OUT/rows.csv), printed at the end.

Products: many matrices of one shape, more bytes than the L2 cache holds on either side, are multiplied one after the
other in a CUDA graph; graphs of the rivals are replayed in turn, and the median of the replays counts. Bandwidth is
that of the compressed bytes a product reads, and its share of a device copy measured in the same run. The rival is
torch's F.linear in bfloat16 (cuBLAS); for the experts layer the fastest of transformers' implementations.

    python bench/gpu_all.py --out results              # on a GPU
    python bench/gpu_all.py --out results --interpret  # without: tiny shapes, interpreted, only to show that it works
    python bench/gpu_all.py --out results --only products --seconds 200
"""
# ruff: noqa: E402
# where the packages lie, and that Triton interprets, is said before they are imported

import argparse
import csv
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INTERPRET = "--interpret" in sys.argv
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"
# from a checkout that is not installed, too
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "bench")]

import torch
from torch import Tensor
from torch.nn.functional import linear

from halfbit import formats, native, nn, registry, triton_support
from halfbit.bench import matrices as matrices_of
from halfbit.formats._grouped_product import one_group
from halfbit.types import Codec, Packed

DEVICE = torch.device("cpu" if INTERPRET else "cuda")
COLUMNS = ["step", "what", "shape", "tokens", "dtype", "ok", "microseconds", "spread", "rival", "rival_microseconds"]
COLUMNS += ["ratio", "bytes", "bits", "gigabytes_per_second", "share_of_copy", "seconds", "note"]
PUBLISHED = [(768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (2080, 6144), (6144, 2080)]
# of each format: shapes, tokens and the configuration that the goals name
SPQR_SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 8192), (8192, 28672)]
GOALS: dict[str, list[tuple[dict[str, Any], list[tuple[int, int]], list[int]]]] = {
    "qmoe": [({}, [*PUBLISHED, (768, 2048)], [1, 16])],
    "runlength": [({}, [*PUBLISHED, (768, 2048), (4096, 4096)], [1, 16])],
    "spqr": [
        ({"bits": 3}, SPQR_SHAPES, [1, 4, 16]),
        ({"bits": 4}, SPQR_SHAPES[:2], [1, 16, 512]),
    ],
    "grouped": [({"bits": 4, "group": 128, "symmetric": True}, [(4096, 4096), (8192, 8192)], [1, 16]),
                ({"bits": 2, "group": 128}, [(4096, 4096)], [1])],
}  # fmt: skip
TINY = {"qmoe": [(48, 64)], "runlength": [(48, 64)], "spqr": [(48, 64)], "grouped": [(48, 64)]}
OUTLIERS = 0.01
REPLAYS = 25


@dataclass
class Report:
    """The rows so far. Accumulates; written to the folder after every step."""

    out: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    copy: float = float("nan")

    def add(self, step: str, what: str, **facts: Any) -> None:
        row = {"step": step, "what": what, "ok": True} | facts
        self.rows.append(row)
        print("  " + ", ".join(f"{k} {_short(v)}" for k, v in row.items() if k != "step"), flush=True)

    def write(self) -> None:
        (self.out / "rows.json").write_text(json.dumps(self.rows, indent=1, default=str), "utf-8")
        with (self.out / "rows.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows(self.rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class OverTime(RuntimeError):
    """A step took longer than it may."""


@contextmanager
def guarded(report: Report, step: str, what: str) -> Iterator[None]:
    """Whatever goes wrong within becomes a row: this script must reach its end."""
    try:
        yield
    except BaseException as error:  # the one place where everything is caught, to be reported
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        report.add(step, what, ok=False, note=f"{type(error).__name__} at {where}: {str(error)[:400]}")
        if isinstance(error, OverTime):
            raise


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OverTime after so many seconds."""

    def over(*_: Any) -> None:
        raise OverTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- measuring


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All calls, one after the other."""

    def run() -> None:
        for call in calls:
            call()

    return run


def replayed(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All calls as one CUDA graph; interpreted, they are just called."""
    if INTERPRET:
        return in_turn(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def timed(kinds: Mapping[str, tuple[Callable[[], object], int]], repetitions: int = REPLAYS) -> dict[str, list[float]]:
    """Microseconds of one call of each kind, in turn; a kind is a function and how many calls it makes."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    warm = 0 if INTERPRET else 2
    for repetition in range(1 if INTERPRET else repetitions + warm):
        for name, (run, calls) in kinds.items():
            if INTERPRET:
                begin = time.perf_counter()
                run()
                spent = 1e6 * (time.perf_counter() - begin)
            else:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                run()
                last.record()
                last.synchronize()
                spent = 1e3 * first.elapsed_time(last)
            if repetition >= warm:
                times[name].append(spent / calls)
    return times


def compared(report: Report, times: dict[str, list[float]], ours: str, rivals: list[str]) -> dict[str, Any]:
    """Median, spread, and the fastest of the rivals."""
    median = {name: statistics.median(t) for name, t in times.items()}
    rival = min(rivals, key=median.__getitem__)
    low, high = min(times[ours]), max(times[ours])
    return {
        "microseconds": median[ours],
        "spread": f"{low:.2f}-{high:.2f}",
        "rival": rival,
        "rival_microseconds": median[rival],
        "ratio": median[rival] / median[ours],
    }


def bandwidth(report: Report, nbytes: int, microseconds: float) -> dict[str, float]:
    found = nbytes / microseconds / 1e3
    return {"bytes": nbytes, "gigabytes_per_second": found, "share_of_copy": found / report.copy}


# --- matrices


def random_operands(codec: Codec, rows: int, columns: int, matrices: int = 1) -> tuple[list[Tensor], int]:
    """Operands of a random matrix of a grid format, made on the device, and the bytes that a product reads.

    Encoding 235 million weights on a CPU would take longer than all that is measured here."""
    from halfbit.formats import _grid_triton as grid

    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        told = torch.iinfo(dtype)
        return torch.randint(told.min, told.max, shape, dtype=dtype, device=DEVICE)

    blocks = -(-columns // 32)
    if codec.name == "spqr":
        tiles, groups = -(-rows // 16), columns // codec.group  # type: ignore[attr-defined]
        second = torch.tensor([0.01, -1.0, 0.5, -2.0], dtype=torch.float16, device=DEVICE)
        each = torch.poisson(torch.full((matrices * tiles * 16,), OUTLIERS * columns, device=DEVICE))
        offsets = torch.nn.functional.pad(each.long().cumsum(0), (1, 0)).int()
        count = int(offsets[-1])
        found = [
            integers(matrices, tiles, blocks, codec.bits, 16),  # type: ignore[attr-defined]
            torch.randint(64, (matrices, tiles, groups, 16), dtype=torch.uint8, device=DEVICE),
            second.expand(matrices, -(-rows // codec.supergroup), groups, 4).contiguous(),  # type: ignore[attr-defined]
            offsets,
            torch.randint(columns, (count,), device=DEVICE).to(torch.int16),
            torch.randn(count, device=DEVICE).half(),
            torch.randperm(columns, device=DEVICE).int()[None],
        ]
    else:
        groups = -(-columns // codec.group)  # type: ignore[attr-defined]
        scale = (torch.rand(matrices * rows, groups, device=DEVICE) + 0.5).mul(0.01).bfloat16().view(torch.int16)
        if not codec.symmetric:  # type: ignore[attr-defined]
            scale = (scale.int() & 0xFFFF) | torch.randint(4, scale.shape, dtype=torch.int32, device=DEVICE) << 16
        nothing = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        found = [
            integers(matrices * rows, blocks * codec.bits),  # type: ignore[attr-defined]
            scale,
            torch.empty(0, 0, dtype=torch.bfloat16, device=DEVICE),
            nothing,
            nothing.short(),
            torch.zeros(1, dtype=torch.bfloat16, device=DEVICE),
            torch.empty(0, columns, dtype=torch.int32, device=DEVICE),
        ]
    extent = rows if codec.name == "spqr" else matrices * rows
    found.append(torch.empty(extent, columns, 0, device=DEVICE))
    assert len(found) == len(grid.Operands._fields)
    return found, sum(t.numel() * t.element_size() for t in found)


def operands_of(codec: Codec, rows: int, columns: int, matrices: int = 1) -> tuple[list[Tensor], int, Tensor | None]:
    """Operands on the device, the bytes that a product reads, and the decoded matrix where it is known."""
    if codec.name in ("spqr", "grouped"):
        return *random_operands(codec, rows, columns, matrices), None
    one = matrices_of.packed(codec, rows, columns, matrices_of.Statistics(outliers=OUTLIERS))
    packed = codec.stack([one] * matrices) if matrices > 1 else one
    moved = Packed(codec, packed.shape, {name: t.to(DEVICE) for name, t in packed.tensors.items()})
    w = codec.decode(one).to(DEVICE) if matrices == 1 else None
    return codec.runtime(moved), packed.nbytes, w


def copies(codec: Codec, tensors: list[Tensor], count: int) -> list[list[Tensor]]:
    """The same operands in memory of their own, but for the dictionary, which all matrices of a model share."""
    shared = {id(t) for t in tensors if codec.name == "qmoe" and t.numel() == 65536}
    return [[t if id(t) in shared else t.clone() for t in tensors] for _ in range(count)]


# --- steps


def environment(report: Report) -> None:
    facts = {"python": platform.python_version(), "torch": torch.__version__, "halfbit extension": native.isa()}
    import triton

    facts["triton"] = triton.__version__
    if not INTERPRET:
        told = torch.cuda.get_device_properties(0)
        facts |= {"device": told.name, "multiprocessors": told.multi_processor_count, "L2": told.L2_cache_size}
    report.add("environment", json.dumps(facts), note=triton_support.why_not() or "kernels run")
    size = 1 << (20 if INTERPRET else 30)
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    median = statistics.median(timed({"copy": (lambda: target.copy_(source), 1)})["copy"])
    # bytes read and written
    report.copy = 2 * size / median / 1e3
    report.add("environment", "copy", microseconds=median, gigabytes_per_second=report.copy)


def correctness(report: Report) -> None:
    """Every codec of the conformance tests that has kernels, small and odd, then each check of a real device."""
    import conformance  # pyright: ignore[reportMissingImports]

    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    try:
        for codec in _one_each(conformance.codecs()) if INTERPRET else conformance.codecs():
            if triton_support.has_kernels(codec.name):
                with guarded(report, "correctness", repr(codec)):
                    begin = time.perf_counter()
                    told = _correct(codec)
                    report.add("correctness", repr(codec), seconds=time.perf_counter() - begin, note=told)
    finally:
        torch.use_deterministic_algorithms(False)


def _one_each(codecs: list[Codec]) -> list[Codec]:
    return list({codec.name: codec for codec in reversed(codecs)}.values())


def _correct(codec: Codec) -> str:
    import conformance  # pyright: ignore[reportMissingImports]

    rows, columns = (21, 70) if INTERPRET else (333, 518)
    *_, solution = conformance.solutions_for(codec, rows, columns)
    one = codec.encode(solution)
    packed = codec.stack([one, one, one])
    w = solution.dense().to(DEVICE)
    device_packed, device_one = (
        Packed(codec, p.shape, {n: t.to(DEVICE) for n, t in p.tensors.items()}) for p in (packed, one)
    )
    several, single = codec.runtime(device_packed), codec.runtime(device_one)
    worst = 0.0
    for dtype in (torch.bfloat16,) if INTERPRET else (torch.float32, torch.bfloat16, torch.float16):
        for tokens in (0, 2, 17) if INTERPRET else (0, 1, 2, 3, 4, 5, 17, 33, 200):
            x = torch.randn(tokens, 2 * columns, device=DEVICE).to(dtype)[:, ::2]
            worst = max(worst, _excess(codec.product(x, one_group(tokens), single, rows), x, w))
        starts = torch.tensor([0, 3, 3, 8], device=DEVICE)
        x = torch.randn(9, columns, device=DEVICE).to(dtype)
        worst = max(worst, _excess(codec.product(x, starts, several, rows)[:8], x[:8], w))
    if not worst <= 1:
        raise AssertionError(f"error {worst:.3g} of what is allowed")
    told = f"error at most {worst:.2f} of what is allowed"
    config = json.dumps(formats.to_config(codec))
    if not INTERPRET:
        x = torch.randn(3, columns, device=DEVICE, dtype=torch.bfloat16)
        plain = nn.linear_op(x, single, config, rows)
        y = torch.empty_like(plain)
        run = replayed([lambda: y.copy_(nn.linear_op(x, single, config, rows))])
        y.fill_(torch.nan)
        run()
        torch.cuda.synchronize()
        assert torch.equal(y, plain), "a CUDA graph gives other results"
        compiled = torch.compile(lambda x: nn.linear_op(x * 1, single, config, rows) + 0, fullgraph=True)
        assert torch.equal(compiled(x), plain), "torch.compile gives other results"
        torch.library.opcheck(nn.linear_op, (x, single, config, rows), test_utils=("test_schema", "test_faketensor"))
        told += "; CUDA graph, torch.compile(fullgraph), opcheck"
    return told


def _excess(y: Tensor, x: Tensor, w: Tensor) -> float:
    """The largest error against float64, as a share of what the 2x rule allows; NaN where a result was not written."""
    if not y.numel():
        return 0.0
    exact = x.double() @ w.double().T
    plain = (x @ w.to(x.dtype).T).double()
    allowed = 2 * (plain - exact).abs().max() + 2 * torch.finfo(x.dtype).eps * exact.abs().max()
    return float(((y.double() - exact).abs() / allowed).amax().nan_to_num(float("inf")))


def tuning_step(report: Report) -> None:
    """Launches of grid kernels at the goals' shapes: the fastest are remembered for the steps below, and copied to the
    results, from where they can be shipped as `launches.json`."""
    for options, (rows, columns), tokens in TUNED:
        codec = registry.module("formats", "spqr").CODEC(**options)
        with guarded(report, "tuning", f"{codec!r} {rows}x{columns}, {tokens} tokens"):
            _tuned(report, codec, *((48, 64) if INTERPRET else (rows, columns)), tokens)
    if triton_support.user_file().is_file():
        (report.out / "launches.json").write_text(triton_support.user_file().read_text("utf-8"), "utf-8")


def _tuned(report: Report, codec: Codec, rows: int, columns: int, tokens: int) -> None:
    operands, nbytes = random_operands(codec, rows, columns)
    every = copies(codec, operands, 2 if INTERPRET else max(4, min(64, (1 << 28) // nbytes)))
    x, starts = torch.randn(tokens, columns, device=DEVICE, dtype=torch.bfloat16), one_group(tokens)
    asked: list[Any] = []
    chosen, launch = {}, triton_support.launch

    def choose(kernel: str, key: Any, default: dict[str, int], device: torch.device) -> dict[str, int]:
        asked[:] = [kernel, key, default]
        own = default | chosen
        # whole steps of the loop
        return own | {"per_split": -(-own["per_split"] // own["BLOCKS"]) * own["BLOCKS"]}

    triton_support.launch = choose
    kinds, found = {}, {}
    try:
        for number, candidate in enumerate(CANDIDATES["few" if tokens <= 4 else "many"][: 2 if INTERPRET else None]):
            chosen = candidate
            with guarded(report, "tuning", str(candidate)):
                kinds[str(number)] = replayed([partial(codec.product, x, starts, t, rows) for t in every]), len(every)
                if INTERPRET:
                    codec.product(x, starts, operands, rows)
                found[str(number)] = choose(asked[0], asked[1], asked[2], DEVICE)
        chosen = {}
        times = timed(kinds, 10)
    finally:
        triton_support.launch = launch
    median = {name: statistics.median(t) for name, t in times.items()}
    best = min(median, key=median.__getitem__)
    if not INTERPRET:
        triton_support.remember(asked[0], asked[1], found[best], DEVICE)
    told = f"{found[best]}; " + ", ".join(f"{found[name]}: {m:.2f} us" for name, m in median.items())
    report.add("tuning", repr(codec), shape=f"{rows}x{columns}", tokens=tokens, microseconds=median[best], note=told)


def products_step(report: Report) -> None:
    for name, cases in GOALS.items():
        if not triton_support.has_kernels(name):
            report.add("products", name, ok=False, note="no Triton kernels are registered for this format")
            continue
        for options, shapes, tokens in cases:
            codec = registry.module("formats", name).CODEC(**options)
            for rows, columns in TINY[name] if INTERPRET else shapes:
                with guarded(report, "products", f"{codec!r} {rows}x{columns}"):
                    _products(report, codec, rows, columns, tokens)


def _products(report: Report, codec: Codec, rows: int, columns: int, tokens: list[int]) -> None:
    operands, nbytes, w = operands_of(codec, rows, columns)
    cache = 1 << 20 if INTERPRET else 4 * torch.cuda.get_device_properties(0).L2_cache_size
    count = 2 if INTERPRET else max(4, min(512, -(-cache // nbytes)))
    ours = copies(codec, operands, count)
    dense_count = 2 if INTERPRET else max(4, -(-cache // (2 * rows * columns)))
    dense = [torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16) for _ in range(dense_count)]
    for number in tokens:
        x = torch.randn(number, columns, device=DEVICE, dtype=torch.bfloat16)
        starts = one_group(number)
        if w is not None:
            excess = _excess(codec.product(x, starts, operands, rows), x, w)
            if not excess <= 1:
                raise AssertionError(f"wrong result: error {excess:.3g} of what is allowed; nothing was timed")
        elif number <= 16:
            # by another kernel, which has little but the unpacking of words in common with that for few tokens
            times = 4 if number == 16 else 33
            many = codec.product(x.repeat(times, 1), one_group(times * number), operands, rows)
            few = codec.product(x, starts, operands, rows).double()
            off = float((many[:number].double() - few).abs().max() / few.abs().max())
            if not off <= 0.02:
                raise AssertionError(f"wrong result: kernels for few and many tokens differ by {off:.3g}")
        kinds = {
            "ours": (replayed([partial(codec.product, x, starts, t, rows) for t in ours]), count),
            "cuBLAS bf16": (replayed([partial(linear, x, d) for d in dense]), dense_count),
        }
        told = compared(report, timed(kinds), "ours", ["cuBLAS bf16"])
        told |= bandwidth(report, nbytes, told["microseconds"]) | {"bits": 8 * nbytes / (rows * columns)}
        report.add("products", repr(codec), shape=f"{rows}x{columns}", tokens=number, dtype="bfloat16", **told)
        del kinds


def experts_step(report: Report) -> None:
    """Qwen3-30B-A3B's layer: 128 experts of 768 x 2048, eight per token."""
    experts, width, neurons, top = (2, 32, 16, 1) if INTERPRET else (128, 2048, 768, 8)
    rivals = _rivals(report, experts, width, neurons, top)
    choices = [("qmoe", {}), ("runlength", {}), ("spqr", {"bits": 3}), ("spqr", {"bits": 4})]
    choices.append(("grouped", {"bits": 4, "group": 32, "symmetric": True}))
    for name, options in choices:
        codec = registry.module("formats", name).CODEC(**options)
        if not triton_support.has_kernels(name):
            continue
        with guarded(report, "experts", repr(codec)):
            up, up_bytes, _ = operands_of(codec, 2 * neurons, width, experts)
            down, down_bytes, _ = operands_of(codec, width, neurons, experts)
            config = json.dumps(formats.to_config(codec))
            for tokens in (2,) if INTERPRET else (1, 4, 16):
                hidden = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
                # every call takes other experts, so that none is in the cache
                routes = [_route(tokens, experts, top, number) for number in range(1 if INTERPRET else 24)]

                given = up, down, None, None, config, config, experts, [2 * neurons, width], "glu:silu", []
                kinds = {"ours": (replayed([partial(nn.experts_op, hidden, *r, *given) for r in routes]), len(routes))}
                for rival, call in rivals.items():
                    with guarded(report, "experts", f"rival {rival}, {tokens} tokens"):
                        calls = [partial(call, hidden, *route) for route in routes]
                        # what waits for the device cannot be in a graph
                        run = in_turn(calls) if rival == "eager" else replayed(calls)
                        kinds[rival] = (run, len(routes))
                others = [name for name in kinds if name != "ours"]
                told = compared(report, timed(kinds, 8), "ours", others) if others else {}
                used = len({int(e) for e in routes[0][0].flatten()})
                told |= bandwidth(report, (up_bytes + down_bytes) * used // experts, told.get("microseconds", 1.0))
                shape = f"{experts}x{neurons}x{width}"
                report.add("experts", repr(codec), shape=shape, tokens=tokens, dtype="bfloat16", **told)


def _route(tokens: int, experts: int, top: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=random)[:top] for _ in range(tokens)])
    return index.to(DEVICE), torch.full((tokens, top), 1 / top, device=DEVICE, dtype=torch.bfloat16)


def _rivals(report: Report, experts: int, width: int, neurons: int, top: int) -> dict[str, Callable[..., Tensor]]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    found: dict[str, Callable[..., Tensor]] = {}
    for name in ("eager", "batched_mm", "grouped_mm"):
        with guarded(report, "experts", f"rival {name}"):
            config = Qwen3MoeConfig(
                hidden_size=width, moe_intermediate_size=neurons, num_experts=experts, num_experts_per_tok=top
            )
            config._experts_implementation = name
            module = Qwen3MoeExperts(config).to(DEVICE, torch.bfloat16)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            module.requires_grad_(False)
            module(torch.zeros(1, width, device=DEVICE, dtype=torch.bfloat16), *_route(1, experts, top, 0))
            found[name] = module
    return found


def command(report: Report, step: str, what: str, arguments: list[str], seconds: float) -> str:
    """Run a command of this repository; a row with its time, or with the end of what it printed."""
    begin = time.perf_counter()
    # commands are not interpreted: they only show that they are called rightly
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        timeout=seconds,
        capture_output=True,
        text=True,
        check=False,
    )
    told = {"seconds": time.perf_counter() - begin, "ok": done.returncode == 0}
    report.add(
        step, what, **told, note=(done.stdout[-1500:] if told["ok"] else done.stdout[-300:] + done.stderr[-900:])
    )
    return done.stdout


def compress_step(report: Report) -> None:
    """Issues 2 to 5: the same model compressed on the CPU and on the device; the solver at Switch c2048's sizes."""
    model, text = ROOT / "examples" / "tiny-moe", ROOT / "examples" / "tiny-moe" / "calibration.txt"
    device = "cpu" if INTERPRET else "cuda"
    with tempfile.TemporaryDirectory() as root:
        for recipe in ("rtn-ternary",) if INTERPRET else ("qmoe", "spqr-3bit", "halfbit"):
            with guarded(report, "compress", recipe):
                for where in dict.fromkeys(("cpu", device)):
                    given = ["compress", str(model), f"{root}/{recipe}-{where}", "--recipe", recipe, "--device", where]
                    given += ["--calibration", str(text), "--samples", "4" if INTERPRET else "64", "--json"]
                    command(report, "compress", f"{recipe} on {where}", ["-m", "halfbit.cli", *given], 70)
                report.add("compress", f"{recipe}: {device} against cpu", note=_same(Path(root), recipe, device))
    if not INTERPRET:
        with guarded(report, "compress", "bench/trillion.py"):
            given = ["bench/trillion.py", "--device", "cuda", "--experts", "16", "--tokens", "4096", "--dry-run"]
            command(report, "compress", "bench/trillion.py on cuda", given, 120)


def _same(root: Path, recipe: str, device: str) -> str:
    """How near the device's result is to the CPU's: equal bytes of packed tensors, and losses."""
    losses = []
    for where in ("cpu", device):
        manifest = json.loads((root / f"{recipe}-{where}" / "manifest.json").read_text("utf-8"))
        losses.append({name: row["loss"] for name, row in manifest["matrices"].items()})
    ratio = [b / a for a, b in zip(losses[0].values(), losses[1].values(), strict=True) if a]
    return f"{len(ratio)} matrices, losses {min(ratio):.5f} to {max(ratio):.5f} of the CPU's"


GENERATE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
import halfbit
folder, device, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device).eval()
ids = torch.randint(5, 200, (1, 32), device=device)
def run(n, **more):
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, **more)
    if device != 'cpu': torch.cuda.synchronize()
    return time.perf_counter() - begin
told = {}
for name, more in (('eager', {}), ('static cache, compiled', {'cache_implementation': 'static'})):
    try:
        run(tokens, **more)
        told[name] = tokens / min(run(tokens, **more) for _ in range(2))
    except (RuntimeError, ValueError, TypeError) as error:  # torch.compile, CUDA, a cache that a model cannot have
        told[name] = f'{type(error).__name__}: {str(error)[:200]}'
if device != 'cpu': told['GiB'] = torch.cuda.max_memory_allocated() / 2**30
print(json.dumps(told))
"""


def generation_step(report: Report) -> None:
    """Tokens each second at batch 1: a random Qwen3-MoE of 128 experts, and what rounding to nearest makes of it."""
    size = ["--gigabytes", "0.01", "--experts", "4", "--width", "64", "--expert-width", "64"] if INTERPRET else [
        "--gigabytes", "2.5", "--experts", "128", "--per-token", "8", "--width", "1024", "--expert-width", "512",
    ]  # fmt: skip
    device, tokens = ("cpu", 4) if INTERPRET else ("cuda", 64)
    with tempfile.TemporaryDirectory() as root:
        command(report, "generation", "bench/generate.py", ["bench/generate.py", f"{root}/original", *size], 60)
        folders = {"original": f"{root}/original"}
        for recipe in ("rtn-ternary",) if INTERPRET else ("rtn-ternary", "rtn-3-g128"):
            with guarded(report, "generation", recipe):
                given = ["compress", f"{root}/original", f"{root}/{recipe}", "--recipe", recipe, "--device", device]
                given += ["--calibration", str(ROOT / "examples" / "tiny-moe" / "calibration.txt")]
                given += ["--samples", "2", "--sequence-length", "128", "--json"]
                command(report, "generation", f"compress by {recipe}", ["-m", "halfbit.cli", *given], 90)
                folders[recipe] = f"{root}/{recipe}"
        original: dict[str, Any] = {}
        for name, folder in folders.items():
            with guarded(report, "generation", name):
                told = json.loads(
                    command(report, "generation", name, ["-c", GENERATE, folder, device, str(tokens)], 80)
                )
                original = original or told
                for kind, rate in told.items():
                    if isinstance(rate, float) and kind != "GiB" and isinstance(original.get(kind), float):
                        report.add(
                            "generation", f"{name}, {kind}", ratio=rate / original[kind], note=f"{rate:.1f} tokens/s"
                        )


# the first is the kernels' own default
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "few": [{}, {"BLOCKS": 64}, {"BLOCKS": 16, "num_warps": 2}, {"BLOCKS": 64, "num_warps": 8}, {"ROWS": 32}],
    "many": [{}, {"BLOCKS": 4}, {"num_warps": 8}, {"ROWS": 128, "num_warps": 8}, {"ROWS": 32}],
}
TUNED = [
    ({"bits": 3}, (4096, 4096), 1),
    ({"bits": 3}, (8192, 28672), 1),
    ({"bits": 3}, (4096, 4096), 16),
    ({"bits": 4}, (4096, 4096), 16),
]

# seconds of each step; all of it stays below nine minutes
STEPS: dict[str, tuple[Callable[[Report], None], float]] = {
    "environment": (environment, 30),
    "correctness": (correctness, 100),
    "tuning": (tuning_step, 50),
    "products": (products_step, 110),
    "experts": (experts_step, 60),
    "generation": (generation_step, 95),
    "compress": (compress_step, 85),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.json and rows.csv")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes without a GPU")
    parser.add_argument("--only", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--seconds", type=float, help="of each step, in place of its own budget")
    options = parser.parse_args()
    if not INTERPRET and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --interpret shows that this script works")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    report = Report(options.out)
    for name, (step, budget) in STEPS.items():
        if name in options.only or name == "environment":
            begin = time.perf_counter()
            print(f"{name}:", flush=True)
            # what went over time is a row already
            with suppress(OverTime), guarded(report, name, "the whole step"), at_most(options.seconds or budget):
                step(report)
            report.add(name, "done", seconds=time.perf_counter() - begin)
            report.write()
            if not INTERPRET:
                torch.cuda.empty_cache()
    print(
        f"\n{'step':12} {'what':44} {'shape':>13} {'tokens':>6} {'us':>9} {'rival us':>9} {'ratio':>6} {'GB/s':>7} ok"
    )
    for row in report.rows:
        cells = [row.get(k, "") for k in ("microseconds", "rival_microseconds", "ratio", "gigabytes_per_second")]
        numbers = [f"{cell:.2f}" if isinstance(cell, float) else "" for cell in cells]
        verdict = "yes" if row["ok"] else f"NO: {row.get('note', '')[:120]}"
        what = f"{row['step']:12} {row['what'][:44]:44} {row.get('shape', ''):>13} {row.get('tokens', ''):>6}"
        print(f"{what} {numbers[0]:>9} {numbers[1]:>9} {numbers[2]:>6} {numbers[3]:>7} {verdict}")


if __name__ == "__main__":
    main()
