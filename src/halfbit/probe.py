"""What each matrix costs the model at each size: one pass of the original over the calibration text.

Every matrix whose rule has options is solved with each of them (ternary at several spreads), and the error in its
output is measured on its own tokens, an expert's with the router's weights. Equal errors do not hurt equally: at the
first layer one can cost five times what it costs at the next. So there is a trial for the matrices of each role (the
input projections of one experts module; one linear layer): they alone are compressed, near the size that is asked for,
and some samples run to the end. Their KL divergence from the original is what the role's errors cost together, and
each matrix's share in it is its share in the errors.

Memory follows one block, one group of experts, the samples' activations, and those of the trials (`TRIAL_BYTES`).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbit.activations import Activations, Routed
from halfbit.errors import RecipeError
from halfbit.events import Event, Probed
from halfbit.expert_groups import Group, Training, batches, hessians, run_through
from halfbit.experts import ExpertStack
from halfbit.family import Family
from halfbit.flow import Flow
from halfbit.grids.bilevel import Bilevel
from halfbit.grids.deadzone import Deadzone
from halfbit.journal import PROBE, Journal
from halfbit.linear_groups import Chosen
from halfbit.nn import stored_names
from halfbit.recipe import Recipe, Rule
from halfbit.samples import Sample
from halfbit.solve.allocate import Choice, Curve
from halfbit.solving import solve

# spreads at which ternary is tried: some 1.55 to 0.25 bits
SPREADS = (1.5, 1.9, 2.4, 3.0, 3.9, 5.2, 7.5)
# sizes between two of them, by interpolation
STEPS = 6
# tokens on which an expert's error is measured
ERROR_TOKENS = 256
# an expert that the text hardly reaches counts as if it had this share of the mean expert's tokens
RARE = 0.1
# tokens of a trial, and bytes of the activations of all trials
TRIAL_TOKENS = 4096
TRIAL_BYTES = 4 << 30

Pair = tuple[Rule, Rule]


@dataclass(eq=False)
class Role:
    """Matrices that a trial compresses together. Accumulates while their block is probed.

    Attributes:
        curves: by matrix; losses are squared errors until the trial has run.
        error: of the choices that the trial takes.
    """

    weights: int
    curves: dict[str, list[Choice]] = field(default_factory=dict)
    error: float = 0.0

    def facts(self) -> list[Any]:
        """All of it, for JSON."""
        return [self.weights, self.error, {m: [astuple(c) for c in choices] for m, choices in self.curves.items()}]

    @classmethod
    def of(cls, facts: list[Any]) -> "Role":
        weights, error, curves = facts
        return cls(weights, {matrix: [Choice(*row) for row in rows] for matrix, rows in curves.items()}, error)


class Probe:
    """The pass. Accumulates: `curves` are there when `run` has ended.

    Args:
        rules: of the input and output projections of each experts module; those with options are probed.
        linears: the same for linear layers.
        offload: see `activations.room`; trials stay in memory.
    """

    def __init__(
        self,
        family: Family,
        recipe: Recipe,
        rules: Mapping[str, Pair | None],
        linears: Chosen,
        samples: list[Sample],
        device: str,
        dtype: torch.dtype,
        offload: Path | None = None,
    ):
        self._family, self._recipe, self._device, self._dtype = family, recipe, device, dtype
        self._offload = offload
        self._rules = {path: pair for path, pair in rules.items() if pair and any(rule.options for rule in pair)}
        self._linears = {path: pair for path, pair in linears.items() if pair[1].options}
        for path in self._linears:
            if family.block_of(path) is None:
                raise RecipeError(
                    f"{path}: lies outside the blocks, where options cannot be tried; give it a grid and a codec"
                )
        self._matrices = len(self._linears)
        for path, pair in self._rules.items():
            self._matrices += sum(bool(rule.options) for rule in pair) * family.experts[path].num_experts
        self._samples, self._few = samples, _few(samples, self._trials(), family.config.get_text_config().hidden_size)
        self._roles: dict[str, Role] = {}
        self.curves: dict[str, Curve] = {}

    def _trials(self) -> int:
        return len(self._linears) + sum(bool(rule.options) for pair in self._rules.values() for rule in pair)

    def run(self, journal: Journal) -> Iterator[Event]:
        """Yields a `Probed` for every group of matrices. Goes on behind what the journal has: blocks, and in the open
        one linear layers and groups of experts."""
        family = self._family
        family.load_outer(self._device, self._dtype)
        blocks = [block for part in family.stacks() for block in part.blocks]
        behind, kept = self._resume(journal, blocks)
        encoded: Activations | None = None
        heard: dict[str, Activations] = {}
        for part in family.stacks():
            passed = behind > blocks.index(part.blocks[-1])
            base = Flow(part, self._samples, encoded, self._device, self._offload)
            # "" is the original
            names = ["", *self._roles]
            if behind >= blocks.index(part.blocks[0]):
                where = "heard" if passed else "flow"
                base.restore(kept[f"{where} of all"])
                names = [name for name in names if f"{where} {name}" in kept]
            trials = {n: Flow(part, self._few, heard.get(n, heard.get("")), self._device) for n in names}
            if behind >= blocks.index(part.blocks[0]):
                for name, flow in trials.items():
                    flow.restore(kept[f"{where} {name}"])
            for block in part.blocks:
                if blocks.index(block) <= behind:
                    continue
                journal.open(f"probe of {block}")
                yield from self._block(block, base, trials, journal)
                now = {"flow of all": base.activations} | {f"flow {n}": f.activations for n, f in trials.items()}
                now |= {f"heard {name}": states for name, states in heard.items()}
                now |= {} if encoded is None else {"heard of all": encoded}
                journal.keep_flow(PROBE, block, {n: a.buffer for n, a in now.items()}, self._facts())
            if part is family.stacks()[-1]:
                self._finish(trials)
            else:
                encoded = base.activations if passed else base.end()
                heard = {name: flow.activations if passed else flow.end() for name, flow in trials.items()}

    def _facts(self) -> dict[str, Any]:
        """The roles, for JSON."""
        return {name: role.facts() for name, role in self._roles.items()}

    def _resume(self, journal: Journal, blocks: list[str]) -> tuple[int, dict[str, Tensor]]:
        """Number of the last block that need not run again, and the activations behind it; -1 where there are none."""
        found = journal.flow(PROBE)
        if found is None:
            return -1, {}
        block, tensors, facts = found
        self._roles = {name: Role.of(role) for name, role in facts.items()}
        return blocks.index(block), tensors

    def _block(self, block: str, base: Flow, trials: dict[str, Flow], journal: Journal) -> Iterator[Event]:
        family = self._family
        module = family.load_block(block, self._device, self._dtype)
        pending = {path: pair for path, pair in self._linears.items() if family.block_of(path) == block}
        # weights that a trial has in the places of the original's
        swapped: dict[str, tuple[str, Tensor]] = {}
        stacks = family.experts_of(block)
        for number in range(len(stacks) + 1):
            for seen in base.observe(block, module, pending, stacks[number:]) if pending else ():
                assert seen.hessian is not None
                for path in seen.paths:
                    linear, rule = pending.pop(path)
                    kept = journal.get(path)
                    if kept is None:
                        w = family.weight(linear.name).to(self._device, torch.float32)[None]
                        trial = self._linear(path, rule, w, seen.hessian.sum.to(self._device))
                        journal.add(path, {"trial": trial}, {"role": self._roles[path].facts()})
                    else:
                        trial, self._roles[path] = kept[0]["trial"].to(self._device), Role.of(kept[1]["role"])
                    swapped[path] = linear.name, trial
                    trials[path] = trials[""].copy()
                yield self._progress()
            if number == len(stacks):
                break
            stack = stacks[number]
            routed = base.capture(block, module, stack)
            given = {}
            for name, flow in trials.items():
                with self._swapped(swapped.get(name)):
                    given[name] = flow.capture(block, module, stack)
            if stack.path in self._rules:
                roles = self._open(stack)
                for name in roles:
                    if name is not None:
                        trials[name] = trials[""].copy()
                        given[name] = trials[name].capture(block, module, stack)
                yield from self._module(stack, roles, routed, given, journal)
            else:
                size = self._recipe.solving.experts_per_batch
                run_through(family, stack, [routed, *given.values()], size, self._device)
            base.give(stack, routed)
            for name, one in given.items():
                trials[name].give(stack, one)
        base.advance(block, module)
        for name, flow in trials.items():
            with self._swapped(swapped.get(name)):
                flow.advance(block, module)
        family.unload_block(block)

    def _progress(self) -> Probed:
        return Probed(sum(len(role.curves) for role in self._roles.values()), self._matrices)

    @contextmanager
    def _swapped(self, weight: tuple[str, Tensor] | None) -> Iterator[None]:
        if weight is None:
            yield
            return
        name, value = weight
        original = self._family.model.get_parameter_or_buffer(name).clone()
        self._family.replace(name, value)
        try:
            yield
        finally:
            self._family.replace(name, original)

    def _linear(self, path: str, rule: Rule, w: Tensor, h: Tensor) -> Tensor:
        """Probes one layer; the weight for its trial."""
        role = self._roles[path] = Role(w[0].numel())
        trial = w[0]
        for choice, dense in self._solved(rule, w, h, [path]):
            delta = (dense[0] - w[0]).to(w)
            error = float((delta @ h[0].to(delta) * delta).sum())
            bits = choice[0].bits + self._recipe.solving.added_bits(rule, w.shape[2])
            if _take(role, path, replace(choice[0], bits=bits, loss=error), rule):
                trial = dense[0]
        return trial.to(self._dtype)

    def _open(self, stack: ExpertStack) -> list[str | None]:
        """Names of the trials of both roles; None: no options."""
        pair = self._rules[stack.path]
        up = sum(stack.projections[p][0] for p in stack.up) * stack.projections[stack.up[0]][1]
        names: list[str | None] = []
        for rule, projection, weights in zip(
            pair, stored_names(stack), (up, math.prod(stack.projections[stack.down])), strict=True
        ):
            name = f"{stack.path}.{projection}" if rule.options else None
            if name is not None:
                self._roles[name] = Role(weights)
            names.append(name)
        return names

    def _module(
        self, stack: ExpertStack, names: list[str | None], routed: Routed, given: Mapping[str, Routed], journal: Journal
    ) -> Iterator[Event]:
        """Probes the experts of a module, group by group."""
        everybody = {"of all": routed.outputs} | {f"of {name}": one.outputs for name, one in given.items()}
        behind, answers, facts = journal.answers(f"probe of {stack.path}")
        if behind:
            for name, outputs in everybody.items():
                outputs.copy_(answers[name])
            self._roles |= {name: Role.of(role) for name, role in facts.items()}
        groups = batches(stack, self._recipe.solving.experts_per_batch)
        for number, experts in enumerate(groups[behind:], behind + 1):
            self._experts(stack, experts, names, routed, given)
            own = {name: self._roles[name].facts() for name in names if name is not None}
            journal.keep_answers(f"probe of {stack.path}", number, everybody, own)
            yield self._progress()

    def _experts(
        self, stack: ExpertStack, experts: range, roles: list[str | None], routed: Routed, given: Mapping[str, Routed]
    ) -> None:
        """Probes a group of experts, and runs it for everybody who is at its door."""
        group = Group.read(self._family, stack, experts, self._device)
        training = Training.of(group, self._recipe, routed)
        judges = [_tokens(routed, e) for e in experts]
        trials = dict.fromkeys(given, group)
        for name, projection, which in zip(roles, stored_names(stack), ("up", "down"), strict=True):
            if name is None:
                continue
            rule = self._rules[stack.path][which == "down"]
            w = getattr(group, which)

            alike = which == "up"

            def view(i: int, rows: Tensor, alike: bool = alike) -> Tensor:
                x = routed.hidden[rows].to(group.up)
                return x if alike else group.hidden(i, x)

            h = hessians(training, self._recipe.coverage, view, alike=alike)
            wide = training.row_widths(group, view, self._recipe.solving) if alike else None
            names = [f"{n}.{projection}" for n in group.names]
            compressed = w.clone()
            for choices, dense in self._solved(rule, w, h, names, wide):
                other = replace(group, **{which: dense.to(w)})
                added = self._recipe.solving.added_bits(rule, w.shape[2])
                for i, (choice, judge) in enumerate(zip(choices, judges, strict=True)):
                    error = _error(group, other, i, routed, judge)
                    if _take(self._roles[name], names[i], replace(choice, bits=choice.bits + added, loss=error), rule):
                        compressed[i] = dense[i]
            trials[name] = replace(group, **{which: compressed})
        group.run(routed)
        for name, one in given.items():
            trials[name].run(one)

    def _solved(
        self, rule: Rule, w: Tensor, h: Tensor, names: list[str], widths: Tensor | None = None
    ) -> Iterator[tuple[list[Choice], Tensor]]:
        """Each option at each size: one choice per matrix, its loss not known yet, and the decoded matrices.

        Statistics of small groups are found the quick way, which costs SpQR some of its advantage here.
        """
        for number, option in enumerate(rule.options):
            grid = option.grid
            tries: list[tuple[float | None, Rule]] = [(None, option)]
            if isinstance(grid, Deadzone):
                # at the rate that the spread gives
                tries = [(spread, replace(option, grid=replace(grid, spread=spread))) for spread in SPREADS]
            elif isinstance(grid, Bilevel):
                tries = [(None, replace(option, grid=replace(grid, fitting="min-max")))]
            for spread, tried in tries:
                # notices are for the real run
                found = solve(w, h, [tried] * len(names), self._recipe.solving, names, [], widths=widths)
                assert option.codec is not None
                bits = [option.codec.encode(s).bits_per_weight for s in found]
                dense = torch.stack([s.dense() for s in found]).to(w.device)
                yield [Choice(b, math.nan, number, spread) for b in bits], dense

    @torch.no_grad()
    def _finish(self, trials: dict[str, Flow]) -> None:
        """From errors to losses."""
        original = trials.pop("")
        for name, flow in trials.items():
            total, count = 0.0, 0
            for reference, logits in zip(original.logits(), flow.logits(), strict=True):
                p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
                total += F.kl_div(q, p, log_target=True, reduction="sum").item()
                count += len(p)
            role = self._roles[name]
            # rounding may make a divergence of nothing a little less
            each = max(total / count, 1e-9) / role.error if role.error > 0 else 0.0
            for matrix, choices in role.curves.items():
                losses = [replace(c, loss=c.loss * each) for c in choices]
                self.curves[matrix] = Curve(role.weights, tuple(between(losses)))


def _take(role: Role, matrix: str, choice: Choice, rule: Rule) -> bool:
    """Note a choice; True where it is the one that the trial takes so far: the nearest to what is asked for."""
    wanted = rule.bits or 0.0
    known = role.curves.setdefault(matrix, [])
    nearest = min(known, key=lambda c: abs(c.bits - wanted), default=None)
    known.append(choice)
    if nearest is not None and abs(nearest.bits - wanted) <= abs(choice.bits - wanted):
        return False
    role.error += choice.loss - (0.0 if nearest is None else nearest.loss)
    return True


def between(choices: list[Choice]) -> list[Choice]:
    """The same and, between neighbouring spreads, what lies on the line of bits and the logarithm of the loss."""
    found = list(choices)
    ternary = sorted(
        ((c.spread, c) for c in choices if c.spread is not None), key=lambda pair: (pair[1].option, pair[0])
    )
    for (wide, a), (wider, b) in pairwise(ternary):
        # a loss of 0 has no logarithm, and wants no more bits
        if a.option != b.option or min(a.loss, b.loss) <= 0:
            continue
        for step in range(1, STEPS):
            t = step / STEPS
            bits, loss = a.bits + t * (b.bits - a.bits), a.loss ** (1 - t) * b.loss**t
            found.append(Choice(bits, loss, a.option, wide ** (1 - t) * wider**t))
    return found


def _few(samples: list[Sample], trials: int, width: int) -> list[Sample]:
    """Samples for the trials, evenly spread."""
    tokens = min(TRIAL_TOKENS, TRIAL_BYTES // (4 * width * max(trials, 1)))
    longest = max(len(s.ids) + (0 if s.decoder_ids is None else len(s.decoder_ids)) for s in samples)
    count = min(len(samples), max(1, tokens // longest))
    return [samples[i * len(samples) // count] for i in range(count)]


def _tokens(routed: Routed, expert: int) -> tuple[Tensor, Tensor, float]:
    """Rows on which an expert's error is measured, what the router weighs them with, and what each stands for."""
    rows, weights = routed.tokens_of(expert)
    kept = routed.keep[rows]
    rows, weights = rows[kept], weights[kept]
    mean = routed.index.numel() / routed.num_experts
    if len(rows) == 0:
        # what the layer's other tokens would be to it
        rows = torch.linspace(0, len(routed.hidden) - 1, min(ERROR_TOKENS, len(routed.hidden))).long()
        weights = routed.weights.float().mean().expand(len(rows))
        return rows, weights, RARE * mean / len(rows)
    chosen = torch.linspace(0, len(rows) - 1, min(ERROR_TOKENS, len(rows))).long()
    return rows[chosen], weights[chosen], max(len(rows), RARE * mean) / len(chosen)


def _error(group: Group, other: Group, i: int, routed: Routed, judge: tuple[Tensor, Tensor, float]) -> float:
    """Squared error of what the `i`-th expert adds to the layer's output, over all of its tokens."""
    rows, weights, stands_for = judge
    x = routed.hidden[rows].to(group.up)
    difference = (other.output(i, x) - group.output(i, x)) * weights.to(x)[:, None]
    return stands_for * float(difference.square().sum())
