"""Tuning a group of experts to what the originals answer to the same tokens, before the next group is read.

Memory follows the group, so this serves models that cannot be tuned as a whole (`tune.py`). Least squares would be the
wrong aim: the nearest output to a target is a shrunk one, and what shrinks the outputs hurts a model more than noise
does (docs/LOG.md). With y an expert's outputs, t the original's, summed over tokens, what is made small is

    |y|^2 |t|^2 / <y, t>^2 - 1    noise against signal, whatever the size of y
    + (<y, t> / |t|^2 - 1)^2      and the size is that of t

Scales, levels and ternary codes learn (`tunable.py`); an expert that is no better on tokens that were held back stays
as the solver left it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbit import formats
from halfbit.activations import Routed
from halfbit.expert_groups import EXPERT_TOKENS, Group, SolvedGroup, Training
from halfbit.learner import Learner
from halfbit.recipe import Tuning
from halfbit.tunable import DENSITY_EVERY, TunableStack
from halfbit.types import Packed, Roles

# tokens of each expert in a step
BATCH = 256
# an expert with fewer tokens would learn them by heart
LEAST = 64
# the aim from which on steps are as large as the recipe says; below they shrink with the root
FAR = 0.15


@dataclass(frozen=True)
class Gain:
    """What came of it: the aim on held-back tokens, one number per expert that learned; how many are kept."""

    before: list[float]
    after: list[float]

    @property
    def kept(self) -> int:
        return sum(a < b for a, b in zip(self.after, self.before, strict=True))


@dataclass(frozen=True, eq=False)
class Pupil:
    """One expert of a group: its number there, rows of `Routed.hidden` to learn from and to judge by.

    Of each the router's weights, `[rows, 1]`.
    """

    number: int
    learned: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]


class Lessons:
    """What the originals of a group answer.

    Args:
        theirs: what the original model gives to the experts, where that is followed; see `expert_groups.solve`.
    """

    def __init__(self, group: Group, training: Training, routed: Routed, theirs: Tensor | None, held_back: float):
        self._group, self._routed, self._theirs = group, routed, theirs
        self.pupils: list[Pupil] = []
        for number, (rows, gates) in enumerate(zip(training.rows, training.gates, strict=True)):
            held = max(1, round(held_back * len(rows)))
            if len(rows) >= LEAST:
                self.pupils.append(Pupil(number, (rows[:-held], gates[:-held]), (rows[-held:], gates[-held:])))

    def sums(self, i: int, rows: Tensor, gates: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        """|y|^2, <y, t> and |t|^2 over some tokens of the `i`-th expert with other `weights`."""
        group, routed = self._group, self._routed
        x = routed.hidden[rows].to(group.up)
        with torch.no_grad():
            original = x if self._theirs is None else self._theirs[routed.places[rows]].to(group.up)
            t = group.output(i, original) * gates
        y = group.output(i, x, weights) * gates
        return torch.stack([y.square().sum(), (y * t).sum(), t.square().sum()])

    @torch.no_grad()
    def measure(self, stacks: list[TunableStack]) -> list[float]:
        """The aim on the held-back tokens of each pupil."""
        up, down = (stack.weights() for stack in stacks)
        found = []
        for pupil in self.pupils:
            weights = up[pupil.number](), down[pupil.number]()
            chunks = zip(*(part.split(EXPERT_TOKENS) for part in pupil.held), strict=True)
            sums = [self.sums(pupil.number, rows, gates, weights) for rows, gates in chunks]
            found.append(float(aim(torch.stack(sums).sum(0))))
        return found


def tune_group(
    group: Group, solved: SolvedGroup, packed: Roles, routed: Routed, theirs: Tensor | None, tuning: Tuning
) -> tuple[Roles, Gain | None]:
    """The group's packed matrices, input and output projections, tuned; None where nothing could learn.

    Args:
        group: the original weights.
        solved: what the solver decided; codes that may change begin at what it solved towards.
        packed: that, one matrix per expert and role.
        theirs: see `Lessons`.
    """
    assert solved.training is not None
    original = solved.aims if tuning.codes else (None, None)
    device = group.up.device
    stacks = [_stack(parts, weights, device) for parts, weights in zip(packed, original, strict=True)]
    parameters = [p for stack in stacks for p in stack.parameters()]
    lessons = Lessons(group, solved.training, routed, theirs, tuning.held_back)
    if not parameters or not lessons.pupils:
        return packed, None
    before = lessons.measure(stacks)
    near = min(1.0, math.sqrt(sum(before) / len(before) / FAR))
    learner = Learner(parameters, tuning.learning_rate * near, tuning.group_steps)
    for step in range(tuning.group_steps):
        learner.begin(step)
        up, down = (stack.weights() for stack in stacks)
        total = torch.zeros((), device=device)
        for pupil in lessons.pupils:
            some = draw(len(pupil.learned[0]), step, tuning.seed + group.experts[pupil.number])
            rows, gates = (part[some] for part in pupil.learned)
            total = total + aim(lessons.sums(pupil.number, rows, gates, (up[pupil.number](), down[pupil.number]())))
        total.backward()
        learner.end()
        if (step + 1) % DENSITY_EVERY == 0 or step + 1 == tuning.group_steps:
            for matrix in (m for stack in stacks for m in stack.tunable):
                matrix.keep_density()
    tuned = [stack.packed() for stack in stacks]
    after = lessons.measure([_stack(parts, None, device) for parts in tuned])
    better = {p.number for p, a, b in zip(lessons.pupils, after, before, strict=True) if a < b}
    up, down = (
        [new if e in better else old for e, (new, old) in enumerate(zip(*pair, strict=True))]
        for pair in zip(tuned, packed, strict=True)
    )
    return (up, down), Gain(before, after)


def summary(gains: list[Gain]) -> str:
    """Of all groups of a module."""
    before = [x for gain in gains for x in gain.before]
    after = [x for gain in gains for x in gain.after]
    return (
        f"noise against signal on held-back tokens {sum(before) / len(before):.4f} -> {sum(after) / len(after):.4f}, "
        f"{sum(gain.kept for gain in gains)} of {len(before)} experts kept"
    )


def aim(sums: Tensor) -> Tensor:
    """Of |y|^2, <y, t> and |t|^2; see above. 0 where the original answers nothing."""
    yy, yt, tt = sums
    gain = yt / tt.clamp(min=1e-30)
    return torch.where(tt > 0, yy / (gain * yt).clamp(min=1e-30) - 1 + (gain - 1).square(), 0.0)


def draw(count: int, step: int, seed: int) -> Tensor:
    """Which of `count` tokens make a step: an order drawn anew for each pass over them."""
    size = min(BATCH, count)
    number, place = divmod(step, count // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1_000_003 * number))
    return order[place * size :][:size]


def _stack(parts: list[Packed], original: Tensor | None, device: torch.device) -> TunableStack:
    return TunableStack(formats.stack(parts), len(parts), original).to(device)
