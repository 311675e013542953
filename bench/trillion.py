"""Switch c2048 (1.6 trillion weights) on this machine: a few experts at full size through `compress`, the rest by
arithmetic that is printed.

A checkpoint is written with the sizes of google/switch-c-2048, but with one encoder and one decoder layer, and with few
experts, and compressed by recipe `qmoe` like any other: every line of a real run is in it, from reading shards to
renaming files. Functions are timed from outside. Seconds that follow the weights are multiplied by the number of
experts, seconds that follow the tokens by the tokens of 160 K samples, Hessians by their multiplications, since a part
of them are of tokens that stand for the layer. (QMoE, arXiv 2310.16795, table 7: 16.0 hours on an A6000.)

The solver's rate (factoring and error feedback; experts that are solved together are `--experts`) is compared with that
of a large float32 product, measured in the same process before and after.

    python bench/trillion.py                                              # about 3 minutes on one core
    python bench/trillion.py --device cuda --experts 64 --tokens 8192     # and --tf32
    python bench/trillion.py --solver                                     # nothing but the solver's rate, in seconds
"""

import argparse
import json
import math
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import generate
import record
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, SwitchTransformersConfig

from halfbit import expert_groups, recipe
from halfbit.activations import Routed
from halfbit.compress import compress
from halfbit.expert_groups import POOLED_TOKENS, Group
from halfbit.flow import Flow
from halfbit.formats.qmoe import QMoE
from halfbit.gates import EVERY
from halfbit.journal import Journal
from halfbit.plan_memory import DECODER, ENCODER
from halfbit.solve import gptq
from halfbit.solve.hessian import Hessian
from halfbit.writer import Writer

CONFIG = Path(__file__).parent.parent / "examples" / "configs" / "switch-c-2048.json"
SAMPLES, LENGTH = 160_000, 512
# side of the product that the solver is compared with
SIDE = 3072
WORDS = [f"w{i}" for i in range(900)]


@dataclass
class Clock:
    """Seconds by phase, what a phase calls in another phase left out. Accumulates, in all threads.

    Of a CPU with one thread its own processor seconds, so that whatever else runs there counts for little; otherwise
    those of the wall clock.
    """

    device: str
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    _inside: threading.local = field(default_factory=threading.local)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        alone = self.device == "cpu" and torch.get_num_threads() == 1
        return time.thread_time() if alone else time.perf_counter()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin, outer = self.now(), getattr(self._inside, "others", 0.0)
            self._inside.others = 0.0
            try:
                return function(*args, **kwargs)
            finally:
                passed = self.now() - begin
                with self._lock:
                    self.seconds[phase] = self.seconds.get(phase, 0.0) + passed - self._inside.others
                    self.calls[phase] = self.calls.get(phase, 0) + 1
                self._inside.others = outer + passed

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, the functions of PHASES are timed."""
        before = [(owner, name, vars(owner)[name]) for owner, name, _ in PHASES]
        for (owner, name, phase), (_, _, function) in zip(PHASES, before, strict=True):
            plain = function.__func__ if isinstance(function, classmethod) else function
            timed = self.timed(phase, plain)
            setattr(owner, name, classmethod(timed) if isinstance(function, classmethod) else timed)
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


# who does what; what follows the tokens is in TOKENS
PHASES: list[tuple[Any, str, str]] = [
    (Group, "read", "reading experts"),
    (expert_groups, "hessians", "inputs of experts"),
    (Hessian, "add", "Hessians"),
    (gptq, "prepare", "factoring"),
    (gptq, "solve", "error feedback"),
    (gptq, "measured", "judging"),
    (QMoE, "encode", "encoding"),
    (QMoE, "decode", "decoding"),
    (Group, "run", "running experts"),
    (Flow, "__init__", "dense parts"),
    (Flow, "capture", "dense parts"),
    (Flow, "advance", "dense parts"),
    (Routed, "close", "dense parts"),
    (Journal, "add", "storing"),
    (Writer, "put", "storing"),
    (Writer, "commit", "storing"),
]
TOKENS = {"inputs of experts", "running experts", "dense parts"}


@dataclass(frozen=True)
class Shape:
    """Of one projection of all experts, `[out, n]`."""

    out: int
    n: int

    @property
    def feedback(self) -> float:
        """Multiplications and additions; likewise below."""
        return float(self.out * self.n**2)

    @property
    def factor(self) -> float:
        return self.n**3 / 3

    def hessian(self, tokens: float) -> float:
        return tokens * self.n**2


def checkpoint(folder: Path, experts: int, config: dict[str, Any]) -> None:
    """One encoder and one decoder layer, bfloat16, a shard per expert and one for the rest; a tokenizer of words."""
    config |= {"num_layers": 1, "num_decoder_layers": 1, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    # nobody is turned away for want of experts
    config |= {"num_experts": experts, "expert_capacity": LENGTH, "vocab_size": 1024}
    made = SwitchTransformersConfig(**config)
    made.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(made)
    tied = {n for n, to in model.all_tied_weights_keys.items() if n != to}
    generator = torch.Generator().manual_seed(0)
    places, rest = {}, {}
    for number, (name, weight) in enumerate((n, w) for n, w in model.state_dict().items() if n not in tied):
        tensor = generate.tensor(name, tuple(weight.shape), 1, generator)
        if ".experts." not in name:
            rest[name] = tensor
            continue
        file = f"model-{number:05d}.safetensors"
        save_file({name: tensor}, folder / file, metadata={"format": "pt"})
        places[name] = file
    save_file(rest, folder / "model-rest.safetensors", metadata={"format": "pt"})
    places |= dict.fromkeys(rest, "model-rest.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    names = ["<pad>", "</s>", *WORDS, *(f"<extra_id_{i}>" for i in range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)


def rate(device: str, dtype: torch.dtype) -> float:
    """Multiplications and additions each second of a large product, the best of three."""
    a, clock = torch.randn(SIDE, SIDE, device=device).to(dtype), Clock(device)
    best = math.inf
    for _ in range(3):
        begin = clock.now()
        torch.mm(a, a)
        best = min(best, clock.now() - begin)
    return 2 * SIDE**3 / best


def rates(device: str) -> dict[str, float]:
    return {"float32": rate(device, torch.float32), "float64": rate(device, torch.float64)}


def run(options: argparse.Namespace, config: dict[str, Any], folder: Path) -> tuple[Clock, float, list[int]]:
    """Compress; wall seconds, and the tokens of the encoder and of the decoder that each expert is given on average."""
    experts = options.experts * options.groups
    checkpoint(folder / "source", experts, dict(config))
    samples = max(1, math.ceil(options.tokens * experts / (ENCODER * LENGTH)))
    words = random.Random(0).choices(WORDS, k=samples * LENGTH + 1)
    (folder / "text.txt").write_text(" ".join(words), "utf-8")
    chosen = recipe.load("qmoe")
    chosen = replace(chosen, solving=replace(chosen.solving, experts_per_batch=options.experts))
    chosen = chosen.calibrated(samples=samples, sequence_length=LENGTH)
    clock, tokens = Clock(options.device), []

    def close(routed: Routed, *, plain: Callable[[Routed], Routed] = Routed.close) -> Routed:
        found = plain(routed)
        tokens.append(found.index.numel() // experts)
        return found

    Routed.close = close  # pyright: ignore[reportAttributeAccessIssue]
    with clock.watching():
        begin = clock.now()
        source, text = str(folder / "source"), str(folder / "text.txt")
        # random experts on hardly any tokens fail at their gates, which run all the same
        for _ in compress(source, folder / "out", chosen, text, device=options.device, accept=(EVERY,)):
            pass
        wall = clock.now() - begin
    return clock, wall, tokens


@dataclass(frozen=True)
class Share:
    """What one phase of the whole model takes.

    Attributes:
        ran: seconds of the run.
        times: by which they are multiplied.
        because: how many there are of what, in the model and in the run.
    """

    ran: float
    times: float
    because: str

    @property
    def seconds(self) -> float:
        return self.ran * self.times


def extrapolate(
    clock: Clock, tokens: list[int], config: dict[str, Any], options: argparse.Namespace
) -> dict[str, Share]:
    """Every phase of the whole model."""
    up, down = Shape(config["d_ff"], config["d_model"]), Shape(config["d_model"], config["d_ff"])
    ran, groups = options.experts * options.groups, options.groups
    layers, experts = config["num_layers"], config["num_experts"]
    whole = [int(SAMPLES * LENGTH * share / experts) for share in (ENCODER, DECODER)]

    def hessians(each: int, count: int, groups: float) -> float:
        """Of one layer: the pooled one of the input projections is made once for a group."""
        first = count * up.hessian(each) + groups * up.hessian(POOLED_TOKENS)
        return first + count * down.hessian(each + POOLED_TOKENS)

    share = {
        "tokens": (layers * sum(whole) * experts, sum(tokens) * ran),
        "tokens, with 1024 of the layer for each expert": (
            layers * sum(t + POOLED_TOKENS for t in whole) * experts,
            sum(t + POOLED_TOKENS for t in tokens) * ran,
        ),
        "multiplications": (
            layers * sum(hessians(t, experts, experts / options.experts) for t in whole),
            sum(hessians(t, ran, groups) for t in tokens),
        ),
        "experts": (2 * layers * experts, 2 * ran),
    }
    found = {}
    for phase, seconds in clock.seconds.items():
        follows = {"Hessians": "multiplications", "inputs of experts": "tokens, with 1024 of the layer for each expert"}
        of = follows.get(phase, "tokens" if phase in TOKENS else "experts")
        most, some = share[of]
        found[phase] = Share(seconds, most / some, f"{most:.4g} {of}, {some:.4g} here")
    return found


@dataclass(frozen=True)
class Solver:
    """How fast factoring and error feedback are.

    Attributes:
        seconds: of both.
        feedback, factor: multiplications and additions, both float32 at the recipe's damping.
        peak: those of a large product each second, by dtype.
    """

    seconds: float
    feedback: float
    factor: float
    peak: dict[str, float]

    @property
    def share(self) -> float:
        """Of the float32 rate."""
        return (self.feedback + self.factor) / self.seconds / self.peak["float32"]


def solver(clock: Clock, config: dict[str, Any], options: argparse.Namespace, peak: dict[str, float]) -> Solver:
    shapes = Shape(config["d_ff"], config["d_model"]), Shape(config["d_model"], config["d_ff"])
    count = 2 * options.experts * options.groups
    return Solver(
        clock.seconds["factoring"] + clock.seconds["error feedback"],
        count * sum(s.feedback for s in shapes),
        count * sum(s.factor for s in shapes),
        peak,
    )


def alone(config: dict[str, Any], options: argparse.Namespace) -> dict[str, Solver]:
    """The solver of the recipe on random matrices, nothing around it, by shape; the best of three, as of the rate."""
    random_, clock = torch.Generator().manual_seed(0), Clock(options.device)
    chosen, count, found = recipe.load("qmoe"), options.experts, {}
    (grid,) = {rule.grid for rule in chosen.rules if rule.grid is not None}
    for out, n in ((config["d_ff"], config["d_model"]), (config["d_model"], config["d_ff"])):
        shape = Shape(out, n)
        w = (0.02 * torch.randn(count, out, n, generator=random_)).to(options.device)
        x = torch.randn(POOLED_TOKENS, n, generator=random_)
        hessian = (x.T @ x).expand(count, -1, -1).contiguous().to(options.device)
        peak, seconds = rate(options.device, torch.float32), math.inf
        for _ in range(3):
            begin = clock.now()
            gptq.solve(
                gptq.prepare(
                    w,
                    hessian,
                    names=[str(e) for e in range(count)],
                    damping=chosen.solving.damping,
                    order="identity",
                    fallback="raise",
                    on_repair=print,
                ),
                grid,
                None,
            )
            seconds = min(seconds, clock.now() - begin)
            peak = max(peak, rate(options.device, torch.float32))
        found[f"{out}x{n}"] = Solver(seconds, count * shape.feedback, count * shape.factor, {"float32": peak})
    return found


def show(found: dict[str, Share], fast: Solver, wall: float, tokens: list[int], precision: str) -> None:
    print(f"{'phase':20} {'here, s':>10} {'times':>12} {'c2048, h':>10}  because")
    for phase, part in found.items():
        print(f"{phase:20} {part.ran:10.3f} {part.times:12.1f} {part.seconds / 3600:10.2f}  {part.because}")
    total, rest = sum(part.seconds for part in found.values()), wall - sum(part.ran for part in found.values())
    print(
        f"{'in all':20} {wall:10.3f} {'':12} {total / 3600:10.2f}  without {rest:.1f} s of start, embedding, the rest"
    )
    print(f"tokens of an expert here: {tokens[0]} in the encoder, {tokens[1]} in the decoder")
    rates = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in fast.peak.items())
    print(f"products of {SIDE} x {SIDE}: {rates} Gflop/s ({precision})")
    print(
        f"solver: {fast.feedback / 1e9:.1f} Gflop of error feedback and {fast.factor / 1e9:.1f} of factoring, both in "
        f"float32, in {fast.seconds:.3f} s: "
        f"{(fast.feedback + fast.factor) / fast.seconds / 1e9:.1f} Gflop/s, "
        f"{fast.share:.3f} of the float32 rate"
    )


def rows(found: dict[str, Share], fast: Solver, options: argparse.Namespace, precision: str) -> list[dict[str, object]]:
    """Of bench/results.csv: hours of the whole model as seconds, and the solver's share of the float32 rate."""
    threads = torch.get_num_threads() if options.device == "cpu" else ""
    about: dict[str, object] = {"shape": "c2048", "tokens": options.tokens, "threads": threads}
    ran = f"{options.device}, {precision}, {options.groups} groups of {options.experts} experts in each of 2 layers"
    shares = [
        about
        | {"what": phase, "seconds": f"{part.seconds:.0f}", "note": f"{part.ran:.3f} s here, {part.because}; {ran}"}
        for phase, part in found.items()
    ]
    return [*shares, solver_row(fast, about, ran)]


def solver_row(fast: Solver, about: dict[str, object], ran: str) -> dict[str, object]:
    note = f"inverse of its share {fast.share:.3f} of the product of {SIDE}; {ran}"
    return about | {
        "what": "solver",
        "seconds": f"{fast.seconds:.3f}",
        "ratio_to_fp32": f"{1 / fast.share:.3f}",
        "note": note,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--experts", type=int, default=2, help="solved together")
    parser.add_argument("--groups", type=int, default=1, help="of experts in each of the two layers")
    parser.add_argument("--tokens", type=int, default=512, help="of each expert in the encoder")
    parser.add_argument("--tf32", action="store_true", help="products in TF32, Hessians included")
    parser.add_argument("--solver", action="store_true", help="its rate alone, on random matrices")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    parser.add_argument("--record", action="store_true", help="append rows to bench/results.csv")
    parser.add_argument("--folder", type=Path, help="for the checkpoint and what becomes of it [a temporary one]")
    options = parser.parse_args()
    if options.experts * options.groups < 2:
        parser.error("a router chooses among two experts at least; give --experts 2 or --groups 2")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    config = json.loads(CONFIG.read_text("utf-8"))
    if options.solver:
        told = alone(config, options)
        for shape, fast in told.items():
            print(f"{shape}: {fast.seconds:.3f} s, {fast.share:.3f} of {fast.peak['float32'] / 1e9:.1f} Gflop/s")
        if options.record:
            threads = torch.get_num_threads() if options.device == "cpu" else ""
            record.append(
                "trillion",
                [
                    solver_row(
                        fast, {"shape": s, "threads": threads}, f"{options.device}, {options.experts} experts alone"
                    )
                    for s, fast in told.items()
                ],
            )
        return
    peak = rates(options.device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        clock, wall, tokens = run(options, config, Path(folder))
    after = rates(options.device)
    peak = {name: max(first, after[name]) for name, first in peak.items()}
    found, fast = extrapolate(clock, tokens, config, options), solver(clock, config, options, peak)
    precision = "float32 as TF32" if options.tf32 else "float32"
    show(found, fast, wall, tokens, precision)
    if options.json:
        phases = {phase: asdict(part) | {"seconds": part.seconds} for phase, part in found.items()}
        figures = {"phases": phases, "solver": asdict(fast) | {"share": fast.share}, "wall": wall, "tokens": tokens}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    if options.record:
        record.append("trillion", rows(found, fast, options, precision))


if __name__ == "__main__":
    main()
