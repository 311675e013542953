"""How long a run takes on this machine: rates measured once, and the arithmetic of the order of work.

Seconds on an idle machine. What is counted: forward passes of the blocks, products of the experts, Hessians, the
solver on the recipe's own rules (measured on random matrices of the real shapes, or smaller ones), encoding and
decoding, reading. Tuning is not predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch

from halfbit.blueprint import Blueprint
from halfbit.expert_groups import POOLED_TOKENS
from halfbit.grids.bilevel import Bilevel
from halfbit.grids.deadzone import Deadzone
from halfbit.machine import Rates, seconds
from halfbit.model_gate import PROMPT
from halfbit.outputs import MOST
from halfbit.parts import Matrices
from halfbit.plan_memory import (
    Load,
    heads,
    heard_tokens,
    inputs_of_linears,
    loads,
    needs_data,
    trial_tokens,
    vocabulary,
    width,
)
from halfbit.probe import ERROR_TOKENS, SPREADS
from halfbit.recipe import Recipe, Rule, Solving
from halfbit.solve.hessian import PANEL
from halfbit.solving import solve

# multiplications of the largest sample that is solved to see how fast that is
LARGEST = 6e9
# of a product with a symmetric matrix, what is multiplied
HALF = 0.6
# passes over the activations of a block beside its products, in units of `Rates.element`
PASSES = 30
# of float32 sums, what an expert's gathering, gating and adding up takes for each of its inputs and outputs
EXPERT_PASSES = 3
# CPU seconds that reading the tokenizer, the text and the checkpoint's header take
SETUP = 1.0
# tries of the search for a rate, of matrices for which the probe knows the spread
RESOLVED = 1.6


@dataclass(frozen=True)
class Spent:
    """CPU seconds of a phase, by what takes them."""

    phase: str
    by: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.by.values())


class Clock:
    """Seconds of single steps on one machine. Accumulates: what was measured for a rule and shape is kept."""

    def __init__(self, rates: Rates, solving: Solving, device: str):
        self.rates, self._solving, self._device = rates, solving, device
        self._solved: dict[tuple[object, int, int, int], float] = {}
        self._coded: dict[object, tuple[float, float]] = {}

    def products(self, multiplications: float) -> float:
        return 2 * multiplications / self.rates.flops

    def solver(self, rule: Rule, count: int, out: int, n: int) -> tuple[float, float, float]:
        """Solving, encoding and decoding `count` matrices `[out, n]` that are solved together."""
        key = rule.solver, rule.grid, rule.codec, rule.order, rule.bits
        small = self._smaller(count, out, n)
        found = self._sample(rule, key, *small)
        if small != (count, out, n):
            # one row takes as long as calling what is called for each column
            calls = self._sample(rule, key, 1, 1, small[2]) / small[2]
            rest = max(0.0, found - self._flops(rule, *small) - calls * small[2]) / prod(small)
            found = self._flops(rule, count, out, n) + rest * count * out * n + calls * n
        encode, decode = self._coded[key]
        return found, encode * count * out * n, decode * count * out * n

    def _smaller(self, count: int, out: int, n: int) -> tuple[int, int, int]:
        """The largest sample with the same number of matrices, if possible, that is soon solved."""

        def work(count: int, out: int, n: int) -> float:
            return count * n * n * (3 * n + 4 * out) + 300 * count * out * n

        while work(count, out, n) > LARGEST:
            if max(out, n) > 512:
                out, n = (max(out // 2, 1), n) if out >= n else (out, max(n // 2, 1))
            elif count > 1:
                count = (count + 1) // 2
            else:
                break
        return count, out, n

    def _flops(self, rule: Rule, count: int, out: int, n: int) -> float:
        """What grows faster than the number of weights: factoring, feeding back, judging."""
        if rule.solver == "rtn":
            return self.products(count * 2 * HALF * out * n * n)
        twice = 2 if rule.order == "sensitivity" else 1
        return count * twice * self.rates.factored(n) + self.products(count * (0.5 + 2 * HALF) * out * n * n)

    def _sample(self, rule: Rule, key: object, count: int, out: int, n: int) -> float:
        """Seconds of solving so many random matrices."""
        if (key, count, out, n) in self._solved:
            return self._solved[key, count, out, n]
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(count, out, n, generator=generator).to(self._device)
        x = torch.randn(2 * n, n, generator=generator).to(self._device)
        x *= 1 + 3 * torch.rand(n, generator=generator).to(self._device)
        h = (x.T @ x).expand(count, n, n).contiguous()
        found = []
        names = [f"sample {i}" for i in range(count)]

        def work() -> None:
            found[:] = solve(w, h, [rule] * count, self._solving, names, [])

        spent = seconds(work, self._device, 2)
        if key not in self._coded:
            assert rule.codec is not None
            codec, one = rule.codec, found[0]
            packed = codec.encode(one)
            encode = seconds(lambda: codec.encode(one), "cpu")
            decode = seconds(lambda: codec.decode(packed), "cpu")
            self._coded[key] = encode / (out * n), decode / (out * n)
        self._solved[key, count, out, n] = spent
        return spent


@dataclass(frozen=True, eq=False)
class Work:
    """One plan's arithmetic."""

    blueprint: Blueprint
    recipe: Recipe
    packed: list[Matrices]
    samples: int
    clock: Clock

    @cached_property
    def loads(self) -> list[Load]:
        """With what is held back, which runs along."""
        held = self.recipe.gates.held_back
        return loads(self.blueprint, self.samples + held, self.recipe.calibration.sequence_length)

    @property
    def element(self) -> float:
        return self.clock.rates.element

    def forward(self, block: str, load: Load, tokens: int) -> float:
        """So many tokens through a block without its experts."""
        shapes = [shape for _, shape, _ in self.blueprint.inside(block) if len(shape) == 2]
        d = width(self.blueprint)
        across = sum(shape[0] for shape in shapes)
        attention = 2 * self._attention_width() * load.length
        softmax = 6 * heads(self.blueprint) * load.length
        elements = PASSES * d + 6 * across + softmax
        return self.clock.products(tokens * (sum(map(prod, shapes)) + attention)) + tokens * elements * self.element

    def _attention_width(self) -> int:
        text = self.blueprint.config.get_text_config()
        each = getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
        return heads(self.blueprint) * each if each else width(self.blueprint)

    def experts(self, path: str, rows: float) -> float:
        """So many rows (tokens times experts of each) through experts of one module."""
        stack = self.blueprint.stacks[path]
        weights = sum(map(prod, stack.projections.values()))
        sides = sum(sum(shape) for shape in stack.projections.values())
        return self.clock.products(rows * weights) + rows * sides * EXPERT_PASSES * self.element

    def read(self, path: str) -> float:
        """The experts of a module, as float32: converted, put side by side."""
        stack = self.blueprint.stacks[path]
        return 2 * stack.num_experts * sum(map(prod, stack.projections.values())) * self.element

    def hessians(self, path: str, load: Load, *, crossed: bool) -> float:
        """Of both roles of a module's experts; `crossed`: also those with the original's inputs."""
        stack, times = self.blueprint.stacks[path], 2 if crossed else 1
        d, inner = stack.projections[stack.up[0]][1], stack.projections[stack.down][1]
        out = sum(stack.projections[p][0] for p in stack.up)
        rows = load.tokens * self.blueprint.per_token
        batch = self.recipe.solving.experts_per_batch
        groups = -(-stack.num_experts // batch)
        shrinks = self.recipe.coverage.undersampled == "shrink"
        pooled = min(POOLED_TOKENS, load.tokens) if shrinks else 0
        # symmetric sums of enough tokens are made by halves
        own = (HALF if rows >= PANEL * stack.num_experts else 1) + times - 1
        whole = (HALF if pooled >= PANEL else 1) + times - 1
        first = (own * rows + whole * groups * pooled) * d * d
        # the output projection's inputs have to be made, for the layer's tokens too
        second = (own * rows + whole * stack.num_experts * pooled) * inner * inner
        second += times * (rows + stack.num_experts * pooled) * d * out
        gathered = (rows + stack.num_experts * pooled) * (d + 4 * out) * self.element * times
        shrunk = 6 * stack.num_experts * (d * d + inner * inner) * self.element * times
        return self.clock.products(first + second) + gathered + shrunk

    def towards(self, path: str) -> float:
        """Least squares towards the original, in float64."""
        stack, total = self.blueprint.stacks[path], 0.0
        shapes = [
            (sum(stack.projections[p][0] for p in stack.up), stack.projections[stack.up[0]][1]),
            stack.projections[stack.down],
        ]
        for out, n in shapes:
            total += 2 * (n**3 / 3 + 2 * out * n * n) / self.clock.rates.double_flops + 12 * n * n * self.element
        return stack.num_experts * total

    def solved(self, m: Matrices, rules: Sequence[tuple[Rule, float]]) -> dict[str, float]:
        """Solving, encoding and decoding, each rule for its share of the matrices."""
        count = min(m.count, self.recipe.solving.experts_per_batch) if m.kind == "experts" else 1
        found = {"solver": 0.0, "encoding and decoding": 0.0}
        for rule, share in rules:
            solver, encode, decode = self.clock.solver(rule, count, *m.shape)
            found["solver"] += share * solver * m.count / count
            found["encoding and decoding"] += share * (encode + decode) * m.count / count
        return found

    # phases

    def solving(self) -> Spent:
        """The run itself."""
        by: dict[str, float] = {}

        def add(what: str, spent: float) -> None:
            by[what] = by.get(what, 0.0) + spent

        followed = self.recipe.solving.asymmetric
        data = needs_data(self.packed)
        length, back = self.recipe.calibration.sequence_length, self.recipe.gates.held_back
        held = {block: load for load in loads(self.blueprint, back, length) for block in load.blocks} if back else {}
        for load in self.loads:
            for block in load.blocks:
                here = [m for m in self.packed if m.block == block]
                linears = any(m.kind == "linear layers" for m in here)
                stacks = [p for p in self.blueprint.stacks if p.startswith(f"{block}.")]
                if data:
                    # to the experts' door, and through; the original likewise; for linear layers before and behind
                    passes = (1 + (0.7 if stacks else 0)) * (2 if followed else 1) + (1 if linears else 0)
                    add("forward passes", passes * self.forward(block, load, load.tokens))
                for path in stacks:
                    rows = load.tokens * self.blueprint.per_token
                    solved = any(m.path == path for m in here)
                    add("reading experts", self.read(path) * (2 if followed else 1) if data or solved else 0.0)
                    if data:
                        add("forward passes", self.experts(path, rows) * (2 if followed else 1))
                    if data and solved and back:
                        rows = held[block].tokens * self.blueprint.per_token
                        judged = min(MOST, rows) * self.blueprint.stacks[path].num_experts
                        # the samples through the original's experts, rows through both of each
                        add("gates", self.experts(path, rows) + 2 * self.experts(path, judged))
                        add("gates", self.read(path) if linears and not followed else 0.0)
                    if data and solved:
                        add("Hessians", self.hessians(path, load, crossed=followed))
                        add("least squares towards the original", self.towards(path) if followed else 0.0)
                if data and here and back:
                    # to the experts' door and through the original block, and through the compressed one
                    passes = 1 + (1.7 if stacks else 1)
                    add("gates", passes * self.forward(block, held[block], held[block].tokens))
                add("Hessians", self._of_linears(here, load) if data else 0.0)
                for m in here:
                    for what, spent in self.solved(m, chosen(m.rule)).items():
                        add(what, spent)
        for m in (m for m in self.packed if m.block is None):
            for what, spent in self.solved(m, chosen(m.rule)).items():
                add(what, spent)
        return Spent("solving", {k: v for k, v in by.items() if v})

    def judging(self) -> Spent | None:
        """What gates on the finished model take; None where there are none."""
        gates, length = self.recipe.gates, self.recipe.calibration.sequence_length
        if not (gates.model and gates.held_back and needs_data(self.packed)):
            return None
        heard = heard_tokens(self.blueprint, gates.held_back, length)
        samples = max(1, heard // length)
        steps = gates.written if gates.written else 0
        written = samples * (PROMPT + steps) if steps else 0
        original = compressed = 0.0
        for load in loads(self.blueprint, samples, min(length, heard)):
            for block in load.blocks:
                tokens = load.tokens + written
                forward = self.forward(block, load, tokens)
                original, compressed = original + forward, compressed + forward
                here = [m for m in self.packed if m.block == block]
                # every step decodes what it touches
                for path in (p for p in self.blueprint.stacks if p.startswith(f"{block}.")):
                    work = self.experts(path, tokens * self.blueprint.per_token)
                    original += work + self.read(path)
                    touched = min(1.0, samples * self.blueprint.per_token / self.blueprint.stacks[path].num_experts)
                    packed = sum(m.weights for m in here if m.path == path)
                    compressed += work + (2 + touched * steps) * packed * self.element
                dense = sum(m.weights for m in here if m.kind != "experts")
                compressed += (2 + steps) * dense * self.element
        head = self.clock.products((heard + written) * width(self.blueprint) * vocabulary(self.blueprint))
        return Spent("gates", {"the original": original + head, "the compressed model": compressed + head})

    def _of_linears(self, here: list[Matrices], load: Load) -> float:
        return sum(self.clock.products(HALF * load.tokens * n * n) for n in inputs_of_linears(here))

    def measuring(self) -> Spent | None:
        """The pass that measures what options cost; None where there are none."""
        roles = [m for m in self.packed if m.rule.options]
        if not roles:
            return None
        by: dict[str, float] = dict.fromkeys(
            ("forward passes", "trials", "Hessians", "solver", "encoding and decoding", "judging"), 0.0
        )
        done = 0
        for load in self.loads:
            few = trial_tokens(self.blueprint, roles, load)
            for block in load.blocks:
                here = [m for m in roles if m.block == block]
                stacks = [p for p in self.blueprint.stacks if p.startswith(f"{block}.")]
                linears = any(m.kind == "linear layers" for m in here)
                passes = (1.7 if stacks else 1) + linears
                by["forward passes"] += passes * self.forward(block, load, load.tokens)
                done += len(here)
                by["trials"] += (1.7 if stacks else 1) * (done + 1) * self.forward(block, load, few)
                for path in stacks:
                    by["forward passes"] += self.experts(path, load.tokens * self.blueprint.per_token) + self.read(path)
                    by["trials"] += (done + 1) * self.experts(path, few * self.blueprint.per_token)
                    roles_here = [m for m in here if m.path == path]
                    if roles_here:
                        by["Hessians"] += self.hessians(path, load, crossed=False) * len(roles_here) / 2
                by["Hessians"] += self._of_linears(here, load)
                for m in here:
                    tried = tries(m.rule)
                    for what, spent in self.solved(m, [(rule, 1.0) for rule in tried]).items():
                        by[what] += spent
                    if m.kind == "experts":
                        rows = min(ERROR_TOKENS, load.tokens * self.blueprint.per_token / m.count)
                        by["judging"] += 2 * len(tried) * self.experts(m.path, rows * m.count)
                    else:
                        by["judging"] += len(tried) * self.clock.products(prod(m.shape) * m.shape[1])
        return Spent("measuring options", {k: v for k, v in by.items() if v})


def tries(rule: Rule) -> list[Rule]:
    """What the probe solves a matrix with, one after the other."""
    found = []
    for option in rule.options:
        if isinstance(option.grid, Deadzone):
            found += [replace(option, grid=replace(option.grid, spread=spread)) for spread in SPREADS]
        elif isinstance(option.grid, Bilevel):
            found.append(replace(option, grid=replace(option.grid, fitting="min-max")))
        else:
            found.append(option)
    return found


def chosen(rule: Rule) -> list[tuple[Rule, float]]:
    """What a matrix is solved with in the run, and for which share of them: half of those with options take the one
    with the most bits below what is asked for, half the next."""
    if not rule.options:
        return [(rule, 1.0)]
    assert rule.bits is not None
    size = {i: _size(option) for i, option in enumerate(rule.options)}
    order = sorted(size, key=lambda i: size[i])
    above = next((k for k, i in enumerate(order) if size[i] > rule.bits), len(order) - 1)
    pair = [order[max(above - 1, 0)], order[above]]
    # the probe knows a spread; the search for the rate begins there
    share = RESOLVED / 2
    return [
        (replace(o, grid=replace(o.grid, spread=2.0)), share) if isinstance(o.grid, Deadzone) else (o, 0.5)
        for o in (rule.options[i] for i in pair)
    ]


def _size(rule: Rule) -> float:
    """Bits per weight, roughly."""
    return 1.3 if isinstance(rule.grid, Deadzone) else float(getattr(rule.grid, "bits", 2)) + 0.5
