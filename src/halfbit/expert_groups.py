"""A group of experts: their weights, the Hessians of the tokens that the router sends them, and their outputs.

What a rarely used expert is solved with is the recipe's `coverage`. The pooled Hessian that it shrinks towards is that
of tokens spread over the whole layer; for the output projection these tokens go through the expert's own input
projection, since the neurons of two experts have nothing to do with each other.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from halfbit.activations import Routed
from halfbit.errors import CoverageError
from halfbit.experts import ExpertStack
from halfbit.family import Family
from halfbit.flow import Flow
from halfbit.outputs import Judged, rows_of, unlike
from halfbit.recipe import Coverage, Recipe, Rule, Solving
from halfbit.solve.drift import towards
from halfbit.solve.hessian import Hessian, shrink
from halfbit.solve.rows import slopes, widths
from halfbit.solving import solve as solve_matrices
from halfbit.types import Packed, Roles, Solution, corrections

Rules = Sequence[Rule]
# what a projection of the i-th expert is given for rows of `Routed.hidden`
View = Callable[[int, Tensor], Tensor]

# tokens that go through one expert at a time
EXPERT_TOKENS = 8192
# tokens of the layer that stand for all of them in a pooled Hessian
POOLED_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Group:
    """Some neighbouring experts of one module, float32 on the device.

    Attributes:
        names: one per expert, "module.path.17".
        up, down: `[experts, out, in]`.
        up_bias, down_bias: `[experts, out]` or None.
        gate: between the two; post: after the second (a norm), or None.
    """

    experts: range
    names: list[str]
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    gate: Callable[[Tensor], Tensor]
    post: Callable[[Tensor], Tensor] | None

    @classmethod
    def read(cls, family: Family, stack: ExpertStack, experts: range, device: str) -> "Group":
        """Weights by expert, straight from the shards."""

        def weights(projections: tuple[str, ...]) -> Tensor:
            parts = [family.expert_weights(stack, p, experts.start, experts.stop) for p in projections]
            return torch.cat([p.to(device, torch.float32) for p in parts], dim=1)

        def biases(projections: tuple[str, ...]) -> Tensor | None:
            parts = [found[p].to(device, torch.float32) for p in projections if p in found]
            return torch.cat(parts, dim=1) if parts else None

        module = family.model.get_submodule(stack.path)
        found = family.expert_biases(stack, experts.start, experts.stop)
        return cls(
            experts=experts,
            names=[f"{stack.path}.{e}" for e in experts],
            up=weights(stack.up),
            down=weights((stack.down,)),
            up_bias=biases(stack.up),
            down_bias=biases((stack.down,)),
            gate=stack.gate(module),
            post=None if stack.post_norm is None else _on(module.get_submodule(stack.post_norm), device),
        )

    def hidden(self, i: int, x: Tensor, up: Tensor | None = None) -> Tensor:
        """What the `i`-th expert's output projection is given for tokens `x` `[tokens, in]`; with `up` for its own."""
        return self.gate(self.before_gate(i, x, up))

    def before_gate(self, i: int, x: Tensor, up: Tensor | None = None) -> Tensor:
        """What its gate is given."""
        y = x @ (self.up[i] if up is None else up).T
        return y if self.up_bias is None else y + self.up_bias[i]

    def output(self, i: int, x: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The `i`-th expert's output for tokens `x`; with `weights`, input and output projection, for its own."""
        up, down = weights or (self.up[i], self.down[i])
        y = self.hidden(i, x, up) @ down.T
        y = y if self.down_bias is None else y + self.down_bias[i]
        return y if self.post is None else self.post(y)

    def decoded(self, up: list[Packed], down: list[Packed]) -> "Group":
        """The group with the weights that inference will see, one packed matrix per expert and role."""

        def dense(matrices: list[Packed]) -> Tensor:
            return torch.stack([p.codec.decode(p) for p in matrices]).to(self.up.device)

        return replace(self, up=dense(up), down=dense(down)).corrected(corrections(up), corrections(down))

    def corrected(self, up: Tensor | None, down: Tensor | None = None) -> "Group":
        """The group with corrections `[experts, out]` added to what its biases are."""

        def bias(own: Tensor | None, more: Tensor | None) -> Tensor | None:
            return own if more is None else more.to(self.up) if own is None else own + more.to(own)

        return replace(self, up_bias=bias(self.up_bias, up), down_bias=bias(self.down_bias, down))

    def run(self, routed: Routed) -> None:
        """Add every expert's weighted outputs for all of its tokens to `routed.outputs`."""
        for i, expert in enumerate(self.experts):
            rows, weights = routed.tokens_of(expert)
            for chunk, weight in zip(rows.split(EXPERT_TOKENS), weights.split(EXPERT_TOKENS), strict=True):
                y = self.output(i, routed.hidden[chunk].to(self.up)) * weight.to(self.up)[:, None]
                routed.outputs.index_add_(0, chunk, y.to(routed.outputs))


def _on(module: nn.Module, device: str) -> nn.Module:
    """The module itself where it is on the device, else a copy that is."""
    there = all(p.device == torch.empty(0, device=device).device for p in module.parameters())
    return module if there else deepcopy(module).to(device)


def through(flow: Flow, family: Family, block: str, module: nn.Module, size: int, device: str) -> None:
    """All samples of the flow through a block with the original's experts, `size` of them on the device at a time."""
    for stack in family.experts_of(block):
        routed = flow.capture(block, module, stack)
        run_through(family, stack, [routed], size, device)
        flow.give(stack, routed)
    flow.advance(block, module)


def batches(stack: ExpertStack, size: int) -> list[range]:
    """The experts of a module, at most `size` at a time."""
    return [range(i, min(i + size, stack.num_experts)) for i in range(0, stack.num_experts, size)]


def run_through(
    family: Family,
    stack: ExpertStack,
    given: Sequence[Routed],
    size: int,
    device: str,
    stored: list[Packed] | None = None,
) -> None:
    """The outputs of experts that are not to be solved, read once for all that are `given` to them: as they were, or
    as `stored`, the two tall matrices, says."""
    for experts in batches(stack, size):
        group = Group.read(family, stack, experts, device)
        if stored is not None:
            group = group.decoded(*([w.part(e, stack.num_experts) for e in experts] for w in stored))
        for routed in given:
            group.run(routed)


@dataclass(frozen=True, eq=False)
class SolvedGroup:
    """What was decided.

    Attributes:
        up, down: solutions, one per expert, on the CPU.
        aims: `[experts, out, in]` of both roles, what was solved towards.
        training: what it was solved on, if anything.
        notices: what a user should know.
    """

    up: list[Solution]
    down: list[Solution]
    aims: tuple[Tensor, Tensor]
    training: "Training | None"
    notices: list[str]

    @property
    def tokens(self) -> list[int]:
        """Training tokens per expert."""
        return self.training.tokens if self.training else [0] * len(self.up)


def differing(solved: SolvedGroup, decoded: Group) -> list[int]:
    """By expert, how many weights decode to something else than was solved."""
    pairs = zip(solved.up, decoded.up, solved.down, decoded.down, strict=True)
    return [unlike(up, w_up) + unlike(down, w_down) for up, w_up, down, w_down in pairs]


def judge(group: Group, decoded: Group, routed: Routed | None, wrong: list[int]) -> dict[str, Judged]:
    """The experts of a group by name: what the `decoded` ones answer to held-back tokens, against the originals.

    `wrong` is what `differing` found.
    """
    found = {}
    for i, expert in enumerate(group.experts):
        rows, own = (None, 0) if routed is None else rows_of(expert, routed)
        if routed is None or rows is None or not len(rows):
            # each matrix counts as much as the other
            sizes = [w.norm().clamp(min=1e-30) for w in (group.up[i], group.down[i])]
            y, z = (
                torch.cat([(w / size).flatten() for w, size in zip((g.up[i], g.down[i]), sizes, strict=True)])
                for g in (group, decoded)
            )
            found[group.names[i]] = Judged.of(y, z, None, wrong[i])
        else:
            x = routed.hidden[rows].to(group.up)
            found[group.names[i]] = Judged.of(group.output(i, x), decoded.output(i, x), own, wrong[i])
    return found


def max_tokens(coverage: Coverage, routed: Routed) -> int:
    """Cap of training tokens per expert (QMoE: four times the mean)."""
    training = int((~routed.held).sum()) * routed.index.shape[1]
    return max(1, int(coverage.max_tokens * training / routed.num_experts))


def solve(
    group: Group, rules: tuple[Rules, Rules], recipe: Recipe, routed: Routed | None, theirs: Tensor | None = None
) -> SolvedGroup:
    """Solve the group's input projections, then its output projections; `rules` has one of each for every expert.

    Args:
        routed: None when every rule rounds to nearest: then no Hessian is needed and the loss is under the identity.
        theirs: what the original model gives to the experts, to solve towards what it computes from that; every row
            that the module is called with, see `Routed.places`.
    """
    notices: list[str] = []
    if routed is None:
        eye = [torch.eye(w.shape[2], device=w.device).expand(w.shape[0], -1, -1) for w in (group.up, group.down)]
        up = solve_matrices(group.up, eye[0], rules[0], recipe.solving, group.names, notices)
        down = solve_matrices(group.down, eye[1], rules[1], recipe.solving, group.names, notices)
        return SolvedGroup(up, down, (group.up, group.down), None, notices)

    training = Training.of(group, recipe, routed)
    _check_coverage(recipe.coverage, group.names, training.tokens, notices)
    beside = recipe.solving.beside_correction
    rules = [beside(r, group.up.shape[2]) for r in rules[0]], [beside(r, group.down.shape[2]) for r in rules[1]]

    def role(
        w: Tensor, rules: Rules, view: View, original: View, wide: Tensor | None = None, *, alike: bool = False
    ) -> tuple[list[Solution], Tensor]:
        h = hessians(training, recipe.coverage, view, alike=alike)
        if theirs is not None:
            cross = hessians(training, recipe.coverage, view, original, alike=alike)
            w = towards(w, h, cross, recipe.solving.damping)
        return solve_matrices(w, h, rules, recipe.solving, group.names, notices, widths=wide), w

    def ours(_expert: int, rows: Tensor) -> Tensor:
        return routed.hidden[rows].to(group.up)

    def original(_expert: int, rows: Tensor) -> Tensor:
        assert theirs is not None
        return theirs[routed.places[rows]].to(group.up)

    up, aim_up = role(group.up, rules[0], ours, original, training.row_widths(group, ours, recipe.solving), alike=True)
    seen = group
    if recipe.solving.true_sequential or theirs is not None:
        seen = replace(group, up=torch.stack([s.dense() for s in up]).to(group.up))
        if recipe.solving.mean_correction:
            seen = seen.corrected(off(group, seen, "up", training, recipe, routed, theirs))
    down, aim_down = role(
        group.down,
        rules[1],
        lambda i, rows: seen.hidden(i, ours(i, rows)),
        lambda i, rows: group.hidden(i, original(i, rows)),
    )
    return SolvedGroup(up, down, (aim_up, aim_down), training, notices)


def correct(
    group: Group,
    packed: Roles,
    decoded: Group,
    training: "Training",
    recipe: Recipe,
    routed: Routed,
    theirs: Tensor | None,
) -> tuple[Roles, Group]:
    """The matrices with their corrections, and the decoded group with them.

    Args:
        group: the originals.
        decoded: what `packed`, without corrections yet, decodes to.
    """
    up = off(group, decoded, "up", training, recipe, routed, theirs)
    decoded = decoded.corrected(up)
    down = off(group, decoded, "down", training, recipe, routed, theirs)
    with_up, with_down = (
        [replace(p, correction=c[None].cpu()) for p, c in zip(matrices, found, strict=True)]
        for matrices, found in zip(packed, (up, down), strict=True)
    )
    return (with_up, with_down), decoded.corrected(None, down)


def off(
    group: Group,
    other: Group,
    role: Literal["up", "down"],
    training: "Training",
    recipe: Recipe,
    routed: Routed,
    theirs: Tensor | None,
) -> Tensor:
    """bfloat16 `[experts, out]`: what the projection's answers in `other` lack on the mean over an expert's tokens.

    The originals answer to `theirs`, where that is followed. Drawn to zero where tokens are few, as Hessians are to the
    pooled one; an expert without tokens has zeros. (Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.2.)
    """

    def given(of: Group, i: int, rows: Tensor, source: Tensor | None) -> Tensor:
        x = (routed.hidden[rows] if source is None else source[routed.places[rows]]).to(group.up)
        return x if role == "up" else of.hidden(i, x)

    w, q = getattr(group, role).double(), getattr(other, role).double()
    found = torch.zeros(w.shape[:2], dtype=torch.float64, device=w.device)
    for i, rows in enumerate(training.rows):
        share = recipe.coverage.known(len(rows))
        wanted = training.mean(i, lambda chunk, i=i: given(group, i, chunk, theirs))
        answered = training.mean(i, lambda chunk, i=i: given(other, i, chunk, None))
        if len(rows):
            found[i] = share * (w[i] @ wanted - q[i] @ answered)
    return found.to(torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Training:
    """What the experts of a group are solved on.

    Attributes:
        rows: of `Routed.hidden`, one tensor per expert.
        gates: `[rows, 1]`, what the router weighs an expert's answers with; one tensor per expert.
        weights: what a row counts for, `[rows, 1]` with a mean square of 1; one tensor per expert.
        pooled: rows that stand for the whole layer.
    """

    rows: list[Tensor]
    gates: list[Tensor]
    weights: list[Tensor]
    pooled: Tensor

    @classmethod
    def of(cls, group: Group, recipe: Recipe, routed: Routed) -> "Training":
        rows, gates, weights = [], [], []
        for expert in group.experts:
            taken, given = routed.tokens_of(expert)
            kept = routed.keep[taken].nonzero().squeeze(1)[: max_tokens(recipe.coverage, routed)]
            rows.append(taken[kept])
            gates.append(given[kept].to(group.up)[:, None])
            counts = gates[-1] if recipe.solving.router_weights else torch.ones_like(gates[-1])
            weights.append(counts / counts.square().mean().sqrt().clamp(min=1e-30))
        return cls(rows, gates, weights, _spread(routed.keep))

    @property
    def tokens(self) -> list[int]:
        return [len(rows) for rows in self.rows]

    def mean(self, i: int, view: Callable[[Tensor], Tensor]) -> Tensor:
        """float64 `[in]`, of what `view` gives for the rows of the `i`-th expert, as much as each counts."""
        total = torch.zeros((), dtype=torch.float64, device=self.weights[i].device)
        for chunk, weights in zip(self.rows[i].split(EXPERT_TOKENS), self.weights[i].split(EXPERT_TOKENS), strict=True):
            total = total + (view(chunk).double() * weights.double().square()).sum(0)
        return total / max(len(self.rows[i]), 1)

    def row_widths(self, group: Group, view: View, solving: Solving) -> Tensor | None:
        """`[experts, out]`, of the grids of the input projections' rows, see `solve/rows.py`; None: all are alike.

        An expert without tokens has rows that are alike.
        """
        if solving.output_weights == 0:
            return None
        slope, square = torch.zeros(2, *group.up.shape[:2], dtype=torch.float64, device=group.up.device)
        for i, (rows, weights) in enumerate(zip(self.rows, self.weights, strict=True)):
            for chunk, weight in zip(rows.split(EXPERT_TOKENS), weights.split(EXPERT_TOKENS), strict=True):
                y = group.before_gate(i, view(i, chunk))
                slope[i] += (slopes(y, group.gate, group.down[i]) * weight).square().sum(0)
                own = y if group.up_bias is None else y - group.up_bias[i]
                square[i] += (own * weight).square().sum(0)
        return widths(slope * square, solving.output_weights)


def _spread(keep: Tensor) -> Tensor:
    """At most POOLED_TOKENS rows that may train, evenly spread over the layer's."""
    rows = keep.nonzero().squeeze(1)
    return rows[torch.linspace(0, max(len(rows) - 1, 0), min(POOLED_TOKENS, len(rows))).long()]


def _check_coverage(coverage: Coverage, names: list[str], tokens: list[int], notices: list[str]) -> None:
    for name, n in zip(names, tokens, strict=True):
        if n >= coverage.floor:
            continue
        if coverage.undersampled == "fail":
            raise CoverageError(
                f"{name}: got {n} calibration tokens, the recipe wants at least {coverage.floor}; give more samples, "
                'or set [coverage] undersampled = "shrink"',
                tensor=name,
                tokens=n,
            )
        notices.append(f"{name}: {n} calibration tokens, below {coverage.floor}: {coverage.undersampled}")


def hessians(
    training: Training, coverage: Coverage, view: View, other: View | None = None, *, alike: bool = False
) -> Tensor:
    """`[experts, in, in]`: of each expert's own tokens, moved or replaced as the recipe's coverage says.

    Args:
        other: for sums of other x^T in place of x x^T.
        alike: all experts are given the same for the same row, so that the pooled sum is made once.
    """
    first = view(0, training.pooled[:1])
    width, device = first.shape[1], first.device

    def add(to: Hessian, i: int, rows: Tensor, weights: Tensor | None = None) -> None:
        x, y = view(i, rows), None if other is None else other(i, rows)
        if weights is not None:
            x, y = x * weights, None if y is None else y * weights
        to.add(x, i, y)

    own = Hessian(len(training.rows), width, device=device)
    for i, rows in enumerate(training.rows):
        for chunk, weights in zip(rows.split(EXPERT_TOKENS), training.weights[i].split(EXPERT_TOKENS), strict=True):
            add(own, i, chunk, weights)
    if coverage.undersampled == "shrink":
        everyone = Hessian(1 if alike else len(training.rows), width, device=device)
        for i in range(len(everyone.tokens)):
            add(everyone, i, training.pooled)
        return shrink(own.sum, own.tokens, everyone.sum, len(training.pooled), coverage.shrink_tokens)
    h = own.sum
    for i, n in enumerate(training.tokens):
        if n < coverage.floor:
            h[i] = torch.eye(width, device=h.device)
    return h
