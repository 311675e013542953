"""How fast products from compressed form are, and whether they are right: against torch's, in one run.

    for contestant in case:  its result is compared with float64 from its own decoded weights, first of all
    repeat:                  one call of each contestant, in turn, each with the next of many matrices

Weights are not in a core's caches: between two uses of a matrix `memory` bytes of others are read. Repetitions are
interleaved, so that a busy machine slows all contestants alike, and each in turn begins. Times are medians with the
range of the middle 80 %. The bandwidth of a product is the bytes of its weights in that time, told as a share of what a
sum over as much memory reaches with as many threads.

An outer call has one matrix, or that of several `experts`, as a layer of a Mixture-of-Experts has them: `tokens` each.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from halfbit.bench import llama, matrices
from halfbit.bench.matrices import Statistics
from halfbit.errors import Unsupported
from halfbit.types import Codec

TRAINED = Statistics()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# the largest product that is timed: a machine of 16 GB holds two such matrices in float64
LARGEST = 1 << 29
# repetitions of a product with so many tokens or more are fewer, five at least
MANY_TOKENS = 2000


class Contestant(Protocol):
    """A matrix, or several of one shape, in some form, in as many copies as are asked for."""

    what: str
    nbytes: int
    """Of the weights that one call reads."""
    bits: float
    """Per weight."""
    exact: bool
    """Whether its error must be within twice that of torch's product in the dtype of x."""

    def weights(self) -> Tensor:
        """What it multiplies by, float32 `[out, in]`; all its matrices are equal."""
        ...

    def hold(self, copies: int) -> None:
        """Have the weights so many times, each in memory of its own."""
        ...

    def calls(self, x: Tensor) -> list[Callable[[], Tensor]]:
        """One call for each copy: `x` `[experts * tokens, in]` -> `[experts * tokens, out]`."""
        ...


@dataclass
class Dense:
    """torch's product in one dtype, x in the same; one call for each expert."""

    matrix: Tensor
    dtype: torch.dtype
    experts: int
    exact: bool = False
    _held: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.what = {torch.bfloat16: "torch bf16", torch.float32: "torch fp32"}[self.dtype]
        self.matrix = self.matrix.to(self.dtype)
        self.nbytes = self.experts * self.matrix.numel() * self.dtype.itemsize
        self.bits = 8.0 * self.dtype.itemsize

    def weights(self) -> Tensor:
        return self.matrix.float()

    def hold(self, copies: int) -> None:
        self._held = [self.matrix.expand(self.experts, -1, -1).clone() for _ in range(copies)]

    def calls(self, x: Tensor) -> list[Callable[[], Tensor]]:
        parts = x.to(self.dtype).chunk(self.experts)
        return [lambda ws=held: _each(parts, ws) for held in self._held]


def _each(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    if len(parts) == 1:
        return linear(parts[0], weights[0])
    return torch.cat([linear(part, w) for part, w in zip(parts, weights, strict=True)])


@dataclass
class Compressed:
    """A format's product; all experts in one call."""

    what: str
    codec: Codec
    rows: int
    columns: int
    experts: int
    statistics: Statistics
    exact: bool = True
    _held: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        started = time.perf_counter()
        one = matrices.packed(self.codec, self.rows, self.columns, self.statistics)
        self.encode_seconds = time.perf_counter() - started
        self._one = one
        self._packed = one if self.experts == 1 else self.codec.stack([one] * self.experts)
        self.nbytes, self.bits = self._packed.nbytes, self._packed.bits_per_weight

    def weights(self) -> Tensor:
        return self.codec.decode(self._one)

    def hold(self, copies: int) -> None:
        first, second = self.codec.runtime(self._packed), self.codec.runtime(self._packed)
        # what is the same tensor each time is one for the whole model: a dictionary, tables
        own = set(map(id, self._packed.tensors.values()))
        one_for_all = {id(a) for a, b in zip(first, second, strict=True) if a is b and id(a) not in own}
        self._held = [[t if id(t) in one_for_all else t.clone() for t in first] for _ in range(copies)]

    def calls(self, x: Tensor) -> list[Callable[[], Tensor]]:
        starts = torch.arange(self.experts + 1) * (x.shape[0] // self.experts)
        return [lambda ts=held: self.codec.product(x, starts, ts, self.rows) for held in self._held]


@dataclass(frozen=True)
class Case:
    """One measurement. `dtype` is that of x for all but torch's contestants."""

    rows: int
    columns: int
    experts: int
    tokens: int
    threads: int
    dtype: str

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.columns}"


@dataclass(frozen=True)
class Measured:
    """One contestant in one case.

    Attributes:
        error: largest difference from float64, in units of the largest value; allowed: the most that passes, None: any.
        seconds: of each repetition; empty where the result was wrong.
    """

    what: str
    nbytes: int
    bits: float
    error: float
    allowed: float | None
    seconds: list[float]

    @property
    def correct(self) -> bool:
        return self.allowed is None or self.error <= self.allowed

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def range(self) -> tuple[float, float]:
        """The middle 80 %."""
        low, *_, high = statistics.quantiles(self.seconds, n=10) if len(self.seconds) > 1 else self.seconds * 2
        return low, high


@dataclass(frozen=True)
class Result:
    """All contestants of one case; `read`: bytes each second of a sum; `copies`: matrices of each in turn."""

    case: Case
    copies: int
    read: float
    products: list[Measured]

    def speedup(self, of: Measured) -> float | None:
        """Over the better of torch's products."""
        torchs = [p.median for p in self.products if p.what.startswith("torch") and p.seconds]
        return min(torchs) / of.median if torchs and of.seconds else None

    def as_dict(self) -> dict[str, Any]:
        case = {k: getattr(self.case, k) for k in ("shape", "experts", "tokens", "threads", "dtype")}
        found = case | {"matrices": self.copies, "read_bytes_per_second": self.read, "products": []}
        for p in self.products:
            row: dict[str, Any] = {"what": p.what, "bytes": p.nbytes, "bits_per_weight": p.bits}
            row |= {"error": p.error, "allowed_error": p.allowed, "correct": p.correct, "seconds": None}
            if p.seconds:
                low, high = p.range
                row["seconds"] = {"median": p.median, "p10": low, "p90": high, "best": min(p.seconds)}
                row["seconds"]["repetitions"] = len(p.seconds)
                row["bytes_per_second"] = p.nbytes / p.median
                row["share_of_read"] = p.nbytes / p.median / self.read
                row["speedup_over_torch"] = self.speedup(p)
                others = [o for o in self.products if o.seconds and o.what != p.what]
                row["speedup_over"] = {o.what: o.median / p.median for o in others}
            found["products"].append(row)
        return found


def parse_shape(text: str) -> tuple[int, int]:
    """ "4096x11008" -> (rows, columns). Raises Unsupported."""
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) > 0 and int(columns) > 0):
        raise Unsupported(f"--shapes: expected ROWSxCOLUMNS such as 2080x6144, got {text!r}")
    if int(rows) * int(columns) > LARGEST:
        raise Unsupported(f"--shapes: {text} has more than {LARGEST:,} weights; give a smaller one")
    return int(rows), int(columns)


def run(
    shapes: Sequence[tuple[int, int]],
    formats: Sequence[str],
    *,
    tokens: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    experts: int = 1,
    against: Sequence[str] = ("torch",),
    dtype: str = "float32",
    of: Statistics = TRAINED,
    repetitions: int = 50,
    memory: int = 512 << 20,
) -> Iterator[Result]:
    """Measure every combination, one result after another.

    Args:
        shapes: (rows, columns) of one matrix.
        formats: names as in `matrices.py`.
        tokens: rows of x for each expert.
        threads: torch's and ours; empty: as many as torch has now.
        experts: matrices of one call.
        against: "torch" (bfloat16 and float32), "llama.cpp" (its types of 1 to 5 bits).
        dtype: of x, for all but torch's contestants.
        of: what the random weights are like.
        repetitions: of each contestant; fewer for many tokens.
        memory: bytes that are read between two uses of a matrix.

    Raises:
        UnknownName, Unsupported: before anything is measured.
    """
    codecs = {name: matrices.codec_of(name) for name in dict.fromkeys(formats)}
    for other in against:
        if other not in ("torch", "llama.cpp"):
            raise Unsupported(f"--against: expected torch, llama.cpp, got {other!r}")
    if "llama.cpp" in against:
        llama.library()
        for rows, columns in shapes:
            llama.check_shape(rows, columns)
    if dtype not in DTYPES:
        raise Unsupported(f"--dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    before = torch.get_num_threads()
    try:
        for rows, columns in shapes:
            contestants: list[Contestant] = []
            if "torch" in against:
                plain = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
                contestants += [Dense(plain, kind, experts) for kind in (torch.bfloat16, torch.float32)]
            contestants += [Compressed(name, codec, rows, columns, experts, of) for name, codec in codecs.items()]
            if "llama.cpp" in against:
                contestants += [llama.Llama(name, rows, columns, experts, of) for name in llama.TYPES]
            copies = max(2, -(-memory // sum(c.nbytes for c in contestants)))
            for contestant in contestants:
                contestant.hold(copies)
            for n in threads or [before]:
                torch.set_num_threads(n)
                read = read_speed(memory)
                for t in tokens:
                    yield _measure(Case(rows, columns, experts, t, n, dtype), contestants, copies, read, repetitions)
    finally:
        torch.set_num_threads(before)


def read_speed(memory: int) -> float:
    """Bytes each second of a sum over so many bytes, the best of five."""
    numbers = torch.ones(max(memory // 4, 1))
    return max(4 * len(numbers) / _seconds(numbers.sum) for _ in range(5))


def _measure(case: Case, contestants: Sequence[Contestant], copies: int, read: float, repetitions: int) -> Result:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(case.experts * case.tokens, case.columns, generator=random).to(DTYPES[case.dtype])
    calls = {c.what: c.calls(x) for c in contestants}
    checked = {c.what: errors(c, x, calls[c.what][0]()) for c in contestants}
    timed = [c.what for c in contestants if Measured("", 0, 0, *checked[c.what], []).correct]
    times: dict[str, list[float]] = {c.what: [] for c in contestants}
    repetitions = max(5, min(repetitions, MANY_TOKENS // max(case.tokens, 1)))
    # the first round touches the pages
    for i in range(-copies, repetitions):
        first = i % max(len(timed), 1)
        for what in timed[first:] + timed[:first]:
            seconds = _seconds(calls[what][i % copies])
            if i >= 0:
                times[what].append(seconds)
    found = [Measured(c.what, c.nbytes, c.bits, *checked[c.what], times[c.what]) for c in contestants]
    return Result(case, copies, read, found)


def errors(contestant: Contestant, x: Tensor, y: Tensor) -> tuple[float, float | None]:
    """The largest error of `y` against float64, and the largest that is allowed, in units of the largest exact value:
    twice that of torch's product in the dtype of x, and two of its roundings."""
    w = contestant.weights()
    worst = plain = largest = 0.0
    # some rows at a time: float64 takes four times the memory of bfloat16
    for rows in torch.arange(len(w)).split(1024):
        exact = x.double() @ w[rows].double().T
        largest = max(largest, _largest(exact))
        worst = max(worst, _largest(y[:, rows].double() - exact))
        if contestant.exact:
            plain = max(plain, _largest(linear(x, w[rows].to(x.dtype)).double() - exact))
    scale = largest or 1.0
    allowed = 2 * plain / scale + 2 * torch.finfo(x.dtype).eps if contestant.exact else None
    return worst / scale, allowed


def _largest(t: Tensor) -> float:
    """NaN is infinite."""
    return float(t.abs().nan_to_num(float("inf"), float("inf")).max()) if t.numel() else 0.0


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
