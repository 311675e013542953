"""What stops a run: facts about the calibration text, a block or the finished model against the limits of the recipe.

A gate is passed or failed; a failed one stops the run when its unit is committed, so that the work is kept. Started
again with the gate accepted the run goes on from there; every result is in the manifest, an accepted failure as such.

    text      share of distinct runs of tokens in the calibration text
    coverage  share of a module's experts that fewer tokens reach than the recipe's floor
    finite    experts and layers whose answers to held-back tokens are no finite numbers
    decoded   weights that decode to something else than was solved
    dead      size of an expert's or a layer's answers, in units of what the solver's losses let expect
    error     squared error of an expert's or a layer's answers to held-back tokens, relative to the original's; of
              those for which the solver had twice as many tokens as there are columns
    noise     the same, or its part that no scaling mends, in units of what the solver's losses let expect, where they
              say that something is left
    outlier   how far an expert's noise is from that of the module's other experts, a robust z-score; what the losses
              let expect is no outlier
    block     squared error of what a block adds to held-back tokens against what the original block adds, or its part
              that no scaling mends, in units of what the errors of its experts and layers let expect
    perplexity, divergence, regret, entropy, repetition: of the finished model, see `model_gate.py`
"""

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from halfbit.errors import GateError
from halfbit.events import Event, Gated, Noticed
from halfbit.experts import ExpertStack
from halfbit.flow import Flow
from halfbit.linears import WEIGHT, Linear
from halfbit.nn import stored_names
from halfbit.outputs import Judged
from halfbit.recipe import Gates
from halfbit.samples import Sample
from halfbit.writer import Writer

EVERY = "all"
# tokens of a run whose repetition counts
RUN = 8
# of the logarithm of errors: differences below a quarter are nothing to wonder about, however alike the others are
LEAST_SPREAD = 0.25
# with fewer experts a median says nothing
LEAST_EXPERTS = 5
# training tokens for each column from which on errors are judged: with 1.2, random experts at one bit had errors of 19
ENOUGH = 2
# share of the signal below which an answer is no longer told from noise; and noise that is nothing but noise
LEAST_KEPT, MOST_NOISE = 0.1, 1e6
# what is to be expected of a block, at least: where parts are nearly exact, tokens that take another expert count more
LEAST_WRONG = 0.05

# gates that want at least the limit
LEAST = ("text", "dead")

TEXT, MODEL = "calibration text", "model"
ADVICE = {
    "decoded": "tell us, it is a mistake of halfbit's, and try another format",
    "text": "give another calibration text",
    "coverage": "give more samples (--samples), or text that reaches more of the experts",
    "noise": "give more samples (--samples)",
    "outlier": "give more samples (--samples)",
}


@dataclass(frozen=True)
class Check:
    """What one gate said.

    Attributes:
        where: the worst expert, layer or module of the unit, or the unit.
        value: None: no finite number.
        limit: the most that passes; of `text` and `dead` the least.
        original: the same figure of the original model, where the limit is a distance from it.
    """

    gate: str
    where: str
    value: float | None
    limit: float
    passed: bool
    original: float | None = None
    accepted: bool = False

    @classmethod
    def most(cls, gate: str, where: str, value: float | None, limit: float, original: float | None = None) -> "Check":
        """Passed up to the limit."""
        if value is None or not math.isfinite(value):
            return cls(gate, where, None, limit, False, _short(original))
        away = value if original is None else abs(value - original)
        return cls(gate, where, _short(value), limit, away <= limit, _short(original))

    @classmethod
    def least(cls, gate: str, where: str, value: float, limit: float) -> "Check":
        """Passed from the limit on."""
        return cls(gate, where, _short(value), limit, value >= limit)

    def as_dict(self) -> dict[str, Any]:
        row = asdict(self)
        return {k: v for k, v in row.items() if not (k == "original" and v is None) and not (k == "accepted" and not v)}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


class Gatekeeper:
    """Holds what is found against the recipe's limits, and tells the manifest.

    Args:
        accept: names of gates, or of experts, layers, blocks, whose failures do not stop the run; or `EVERY`.
    """

    def __init__(self, gates: Gates, writer: Writer, accept: Collection[str] = ()):
        self._gates, self._writer, self._accept = gates, writer, frozenset(accept)

    def open(self) -> None:
        """Raise GateError again where an earlier part of the run failed, unless that is accepted now."""
        for unit in list(self._writer.manifest.get("gates", {})):
            self._stop(unit)

    def judge(self, unit: str, checks: Iterable[Check]) -> Iterator[Event]:
        """What is found of the text or of the finished model; it is written at once. Raises GateError."""
        self._writer.amend("gates", unit, [check.as_dict() for check in checks])
        yield from self.settle(unit)

    def settle(self, unit: str) -> Iterator[Event]:
        """Tell what was found of a unit that is committed.

        Raises:
            GateError: a check failed that is not accepted.
        """
        rows = self._writer.manifest["gates"].get(unit, [])
        yield Gated(unit, len(rows), sum(not row["passed"] for row in rows))
        yield from map(Noticed, self._stop(unit))

    def text(self, samples: list[Sample]) -> Iterator[Event]:
        """Of the calibration text, once."""
        if samples and TEXT not in self._writer.manifest.get("gates", {}):
            yield from self.judge(TEXT, [Check.least("text", TEXT, distinct(samples), self._gates.text)])

    def unit(
        self,
        unit: str,
        stacks: Iterable[ExpertStack],
        linears: Iterable[Linear],
        added: Judged | None = None,
    ) -> None:
        """Judge a block, or what lies outside, before it is committed: by what the writer was told of its experts and
        layers.

        Args:
            added: what the block adds, where held-back tokens ran through it.
        """
        matrices, outputs = self._writer.recorded("matrices"), self._writer.recorded("outputs")
        facts: dict[str, Fact] = {}
        outliers: list[Check] = []
        covers: list[Check] = []
        # of each part that the block adds
        parts: list[float] = []
        for stack in stacks:
            names = [f"{stack.path}.{e}" for e in range(stack.num_experts)]
            own = {n: Fact.of(outputs[n], [matrices[f"{n}.{p}"] for p in stored_names(stack)]) for n in names}
            widths = [stack.projections[p][1] for p in (stack.up[0], stack.down)]
            own = {n: replace(fact, width=max(widths)) for n, fact in own.items()}
            facts |= own
            counts = [outputs[name]["tokens"] or 0 for name in names]
            parts += _alike(own.values(), counts)
            outliers += self._among(own)
            cover = self._writer.recorded("coverage").get(stack.path)
            if cover is not None:
                share = len(cover["below_floor"]) / stack.num_experts
                covers.append(Check.most("coverage", stack.path, share, self._gates.coverage))
        for linear in linears:
            width = linear.shape[1]
            facts[linear.path] = replace(
                Fact.of(outputs[linear.path], [matrices[f"{linear.path}.{WEIGHT}"]]), width=width
            )
            parts += _alike([facts[linear.path]], [1])
        # what names an expert or a layer first
        checks = [*self._each(facts), *outliers, *covers]
        if added is not None:
            checks.append(Check.most("block", unit, _beyond(added, parts), self._gates.block))
        self._writer.record("gates", unit, [check.as_dict() for check in checks])

    def _each(self, facts: dict[str, "Fact"]) -> list[Check]:
        """The worst of all by each gate."""
        if not facts:
            return []
        gates = self._gates
        broken = [name for name, fact in facts.items() if fact.error is None]
        checks = [Check.most("finite", (broken or list(facts))[0], float(len(broken)), 0.0)]
        worst = max(facts, key=lambda name: facts[name].wrong)
        checks.append(Check.most("decoded", worst, float(facts[worst].wrong), 0.0))
        finite = {name: fact for name, fact in facts.items() if fact.error is not None}
        sizes = {name: fact.size for name, fact in finite.items()}
        if sizes:
            least = min(sizes, key=lambda name: sizes[name])
            checks.append(Check.least("dead", least, sizes[least], gates.dead))
        for gate, values, limit in (
            (
                "error",
                {n: (fact.error or 0.0) / fact.by_heart for n, fact in finite.items() if fact.learned},
                gates.error,
            ),
            ("noise", {n: fact.noise / fact.by_heart for n, fact in finite.items() if fact.known}, gates.noise),
        ):
            if values:
                worst = max(values, key=lambda name: values[name])
                checks.append(Check.most(gate, worst, values[worst], limit))
        return checks

    def _among(self, facts: dict[str, "Fact"]) -> list[Check]:
        """The outlier among the experts of one module."""
        logs = {name: math.log(max(fact.noise, 1e-12)) for name, fact in facts.items() if fact.known}
        if len(logs) < LEAST_EXPERTS:
            return []
        # as far as its losses let expect no expert is an outlier, however much better the others are
        median = max(statistics.median(logs.values()), 0.0)
        spread = max(1.4826 * statistics.median(abs(x - median) for x in logs.values()), LEAST_SPREAD)
        worst = max(logs, key=lambda name: logs[name])
        return [Check.most("outlier", worst, (logs[worst] - median) / spread, self._gates.outlier)]

    def _stop(self, unit: str) -> list[str]:
        """Mark what is accepted, and raise for the first failure that is not; what was accepted is told."""
        rows = self._writer.manifest["gates"].get(unit, [])
        told = []
        changed = []
        failed = None
        for row in rows:
            check = Check(**row)
            if not check.passed and not check.accepted and self._accepts(check, unit):
                check = replace(check, accepted=True)
                told.append(f"accepted: {says(check)}")
            if not check.passed and not check.accepted and failed is None:
                failed = check
            changed.append(check.as_dict())
        if changed != rows:
            self._writer.amend("gates", unit, changed)
        if failed is not None:
            more = sum(not row["passed"] and not row.get("accepted") for row in changed) - 1
            raise GateError(
                f"{unit}: {says(failed)}{f'; {more} more failed, see halfbit inspect' if more else ''}. What was done "
                f"is kept in {self._writer.folder}. The same command with --accept {failed.gate} (or --accept "
                f"{EVERY}) goes on from there; otherwise {ADVICE.get(failed.gate, 'allow more bits')}, with a new "
                f"folder, or change gates.{failed.gate} in the recipe",
                gate=failed.gate,
                where=failed.where,
                value=failed.value,
                limit=failed.limit,
            )
        return told

    def _accepts(self, check: Check, unit: str) -> bool:
        return bool(self._accept & {EVERY, check.gate, check.where, unit})


def says(check: Check) -> str:
    """One line: which gate, where, what was measured, what would have passed."""
    value = "no finite number" if check.value is None else f"{check.value:.4g}"
    against = "" if check.original is None else f" where the original has {check.original:.4g}"
    how = "least" if check.gate in LEAST else "most" if check.original is None else "farthest"
    return f"gate {check.gate}: {check.where}: {MEANS[check.gate]} {value}{against}, {how} {check.limit:g} allowed"


MEANS = {
    "text": f"share of distinct runs of {RUN} tokens",
    "coverage": "share of experts that too few tokens reach",
    "finite": "experts and layers whose answers are not finite:",
    "decoded": "weights that decode to something else than was solved:",
    "error": "error of its answers to held-back tokens, 1 being none at all:",
    "noise": "error of its answers to held-back tokens, in units of what the solver expected:",
    "outlier": "error against the other experts of the module, as a robust z-score:",
    "dead": "size of its answers, in units of what the solver expected:",
    "block": "error of what it adds to held-back tokens, in units of what those of its parts let expect:",
    "perplexity": "perplexity on held-back text, in units of the original's:",
    "divergence": "KL divergence from the original on held-back text, in nats:",
    "regret": "by how much the original would rather have written something else, in nats per token:",
    "entropy": "entropy of the next token while it writes, in nats:",
    "repetition": "share of what it writes that ends a run of tokens for the second time:",
}


@dataclass(frozen=True)
class Fact:
    """What is known of an expert or a layer: how it answers, and the solver's loss of each matrix, on so many tokens.

    `width` is that of the widest matrix, in columns; `error` is None where an answer is no finite number.
    """

    error: float | None
    energy: float
    losses: tuple[float, ...]
    tokens: float
    width: int = 1
    wrong: int = 0

    @classmethod
    def of(cls, judged: dict[str, Any], matrices: list[dict[str, Any]]) -> "Fact":
        error, energy = judged["error"], judged["energy"]
        losses, tokens = tuple(float(fact["loss"]) for fact in matrices), min(float(f["tokens"]) for f in matrices)
        if judged["tokens"] is None:
            # judged by its weights: losses tell of them where no tokens were solved on
            losses, tokens = losses if tokens == 0 else (), math.inf
        if error is None or energy is None:
            return cls(None, 0.0, losses, tokens, wrong=judged["wrong"])
        return cls(error, energy, losses, tokens, wrong=judged["wrong"])

    @property
    def noise(self) -> float:
        """With k = (1 - l) (1 - l) what the losses l leave of the signal, the larger of: the error |z - y|^2 / |y|^2
        in units of 1 - k; the noise against the signal, |y|^2 |z|^2 / <y, z>^2 - 1, in units of 1 / k - 1.

        With few bits answers are small, right or wrong, and so are errors; the second tells them apart.
        """
        error = self.error or 0.0
        if not self.losses:
            return 0.0
        kept = max(self.kept, LEAST_KEPT)
        return max(error / max(1 - kept, 1e-9), noise_of(error, self.energy) / max(1 / kept - 1, 1e-9))

    @property
    def kept(self) -> float:
        """What the solver says that is left of the signal, as a share."""
        return math.prod(1 - min(loss, 1.0) for loss in self.losses)

    @property
    def learned(self) -> bool:
        """Whether it was solved on tokens enough; else its error may be anything."""
        return self.error is not None and self.tokens >= ENOUGH * self.width

    @property
    def known(self) -> bool:
        """Whether the losses tell what to expect, too, and not that nothing is left."""
        return self.learned and self.kept >= LEAST_KEPT

    @property
    def by_heart(self) -> float:
        """How many times the error is to be expected where the solver learned few tokens, of many columns, by heart."""
        return (1 + self.width / max(self.tokens, 1.0)) ** 2

    @property
    def size(self) -> float:
        """The energy in units of what the losses let expect."""
        return 1.0 if self.kept <= 0 else self.energy / self.kept


def noise_of(error: float, energy: float) -> float:
    """|y|^2 |z|^2 / <y, z>^2 - 1 of answers z that should be y, from the figures of `Judged`."""
    dot = (1 + energy - error) / 2
    return min(max(energy / dot**2 - 1, 0.0), MOST_NOISE) if dot > 0 else MOST_NOISE


def _alike(facts: Iterable[Fact], counts: Sequence[int]) -> list[float]:
    """How much of a part's answers is as it should be, <y, z>^2 / |y|^2 |z|^2, experts weighed by their held-back
    tokens; nothing of a part that no such token reaches."""
    rows = [(n, f.error, f.energy) for f, n in zip(facts, counts, strict=True) if n and f.error is not None]
    if not rows:
        return []
    total = sum(n for n, _, _ in rows)
    return [1 / (1 + noise_of(sum(n * e for n, e, _ in rows) / total, sum(n * e for n, _, e in rows) / total))]


def _beyond(added: Judged, parts: list[float]) -> float | None:
    """The larger of error and noise of what a block adds, in units of what is to be expected where so much of the
    answers of each of its `parts` is right."""
    if added.error is None or added.energy is None:
        return None
    wrong = max(1 - math.prod(parts), LEAST_WRONG)
    return max(added.error / wrong, noise_of(added.error, added.energy) * (1 - min(wrong, 1 - LEAST_KEPT)) / wrong)


def distinct(samples: list[Sample]) -> float:
    """Share of the runs of `RUN` tokens that are the first of their kind."""
    runs: set[bytes] = set()
    total = 0
    for sample in samples:
        if len(sample.ids) < RUN:
            continue
        windows = sample.ids.unfold(0, RUN, 1).contiguous().numpy()
        total += len(windows)
        runs.update(row.tobytes() for row in windows)
    return len(runs) / total if total else 1.0


@dataclass(frozen=True, eq=False)
class Reference:
    """What a block makes of held-back rows before anything in it is compressed.

    Attributes:
        flow: the samples that are held back, to be sent through the original block.
        before: `[rows, width]`, what the block is given.
    """

    flow: Flow
    before: Tensor

    @classmethod
    def of(cls, flow: Flow) -> "Reference | None":
        """None where nothing is held back."""
        before = flow.held_rows
        return None if before is None else cls(flow.held_back(), before)

    def added(self, after: Tensor) -> Judged:
        """What the block as it is now adds to the same rows, `after - before`, against what the original block adds."""
        return Judged.of(self.flow.activations.buffer - self.before, after - self.before, None)
