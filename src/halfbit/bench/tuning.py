"""Launches of Triton kernels, tuned for a device when a user asks: `halfbit bench --tune`.

What a call launches is learned by running it once: each kernel asks for its configuration by an entry that names
shape, format and tokens. Then each entry's candidates are timed, in CUDA graphs over many matrices, so that neither
Python nor a cache is what is measured, and the fastest is kept in the user's file (`triton_support.py`).
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product as each

import torch
from torch import Tensor

from halfbit import formats, nn
from halfbit.bench import matrices
from halfbit.bench.matrices import Statistics
from halfbit.errors import Unsupported
from halfbit.triton_support import INTERPRETED, Launch, backend, remember, trying, why_not
from halfbit.types import Codec, Packed

Calls = Sequence[Callable[[], object]]

# by kernel; the first is its own default
CANDIDATES: dict[str, list[Launch]] = {
    "grid few": [{}, {"BLOCKS": 64}, {"BLOCKS": 16, "num_warps": 2}, {"BLOCKS": 64, "num_warps": 8}, {"ROWS": 32}],
    "grid many": [{}, {"BLOCKS": 4}, {"num_warps": 8}, {"ROWS": 128, "num_warps": 8}, {"ROWS": 32}],
    "grid experts": [{}, {"ROWS": 4}, {"ROWS": 16}, {"BLOCKS": 16, "num_warps": 2}, {"BLOCKS": 64, "num_warps": 8}],
    "qmoe": [{}, {"ROWS": 2}, {"ROWS": 8}, {"ROWS": 8, "num_warps": 2}, {"ROWS": 4, "CHUNK": 64}],
    "runlength": [{}, {"STEPS": 2}, {"STEPS": 4}, {"STEPS": 16}],
}
REPETITIONS = 15
# of matrices that take turns, where there is that much; more than a cache holds
TURNS_BYTES, MOST_TURNS = 256 << 20, 64
# experts that a token takes in a layer
TOP_K = 8


@dataclass(frozen=True)
class Tuned:
    """One entry: what was tried, microseconds of a call with each, and which was kept."""

    what: str
    entry: str
    candidates: list[Launch]
    microseconds: list[float]

    @property
    def best(self) -> Launch:
        return self.candidates[self.microseconds.index(min(self.microseconds))]


def device() -> torch.device:
    """Where kernels run. Raises Unsupported where none do."""
    if why_not():
        raise Unsupported(f"--tune: no Triton kernel runs here: {why_not()}")
    return torch.device("cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else "xpu")


def tune(what: str, calls: Calls, where: torch.device) -> Iterator[Tuned]:
    """Tune every launch of a call; `calls` are the same one with different matrices. Each result is kept at once."""
    with trying({}) as asked:
        calls[0]()
    for entry, kernel in asked.items():
        timed: list[tuple[Launch, float]] = []
        for candidate in CANDIDATES[kernel]:
            with trying({entry: candidate}):
                seconds = _seconds(calls, where)
            if seconds is not None:
                timed.append((candidate, 1e6 * seconds))
        found = Tuned(what, entry, *map(list, zip(*timed, strict=True)))
        remember(entry, found.best, where)
        yield found


def products(
    names: Sequence[str], shapes: Sequence[tuple[int, int]], tokens: Sequence[int], experts: int, of: Statistics
) -> Iterator[Tuned]:
    """Products of each format with matrices `(rows, columns)`; with several `experts` whole layers, too, whose matrices
    are `(2 * rows, columns)` and `(columns, rows)`."""
    where = device()
    for name, (rows, columns) in each(names, shapes):
        codec = matrices.codec_of(name)
        if not hasattr(backend(codec.name, torch.empty(0, device=where)), "plan"):
            raise Unsupported(f"--tune: {name} has no Triton kernels; leave it out of --formats")
        stacks = _held(codec, [(rows, columns)], experts, of, where)
        for count in tokens:
            x = torch.randn(experts * count, columns, device=where, dtype=torch.bfloat16)
            starts = torch.arange(experts + 1, device=where if experts > 1 else None) * count
            told = f"{name} {rows}x{columns}, {count} tokens"
            yield from tune(told, [partial(codec.product, x, starts, t, rows) for (t,) in stacks], where)
        if experts > 1:
            pairs = _held(codec, [(2 * rows, columns), (columns, rows)], experts, of, where)
            for count in tokens:
                told = f"{name}, layer {experts}x{rows}x{columns}, {count} tokens"
                calls = [_layer(codec, pair, rows, columns, experts, count, where) for pair in pairs]
                yield from tune(told, calls, where)


def _held(
    codec: Codec, shapes: list[tuple[int, int]], experts: int, of: Statistics, where: torch.device
) -> list[list[list[Tensor]]]:
    """Operands of stacks of these shapes, once for each turn: weights in memory of their own, tables shared."""
    stacks = []
    for rows, columns in shapes:
        one = matrices.packed(codec, rows, columns, of)
        stacks.append(formats.stack([one] * experts) if experts > 1 else one)
    turns = 1 if INTERPRETED else max(2, min(MOST_TURNS, TURNS_BYTES // sum(packed.nbytes for packed in stacks)))

    def moved(packed: Packed) -> list[Tensor]:
        return codec.runtime(
            Packed(codec, packed.shape, {n: t.to(where, copy=True) for n, t in packed.tensors.items()})
        )

    return [[moved(packed) for packed in stacks] for _ in range(turns)]


def _layer(
    codec: Codec, pair: list[list[Tensor]], rows: int, columns: int, experts: int, tokens: int, where: torch.device
) -> Callable[[], object]:  # fmt: skip
    hidden = torch.randn(tokens, columns, device=where, dtype=torch.bfloat16)
    index = torch.rand(tokens, experts, device=where).topk(min(TOP_K, experts)).indices
    weights = torch.full(index.shape, 1 / index.shape[1], device=where, dtype=torch.bfloat16)
    (up, down), config = pair, json.dumps(formats.to_config(codec))
    given = None, None, config, config, experts, [2 * rows, columns], "glu:silu", list[float]()
    return partial(nn.experts_op, hidden, index, weights, up, down, *given)


def _seconds(calls: Calls, where: torch.device) -> float | None:
    """Of one call, by the median; None for a launch that the device has no room for."""
    from triton.runtime.errors import OutOfResources

    try:
        run = _all(calls, where)
        times = []
        for _ in range(1 if INTERPRETED else REPETITIONS):
            started = time.perf_counter()
            run()
            if where.type != "cpu":
                getattr(torch, where.type).synchronize()
            times.append((time.perf_counter() - started) / len(calls))
        return statistics.median(times)
    except OutOfResources:
        return None


def _all(calls: Calls, where: torch.device) -> Callable[[], None]:
    """All calls one after the other, compiled; as one graph on CUDA."""

    def run() -> None:
        for call in calls:
            call()

    if where.type != "cuda":
        run()
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay
