"""Who solves groups of experts: devices of this process here, workers of a Ray cluster in `cluster.py`.

What a group comes to follows from the group and from what its module was given alone. Who solves it, and when, changes
nothing; answers are added up by the loop, in the order of the groups.
"""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from halfbit.activations import Routed
from halfbit.expert_groups import Group, SolvedGroup, correct, differing, solve
from halfbit.pipeline import Profile
from halfbit.recipe import Recipe, Rule
from halfbit.tune_group import tune_group
from halfbit.types import Packed, Roles, Solution

# of the input and of the output projection, one per expert
Rules = tuple[list[Rule], list[Rule]]
# the packed matrices of a group, and facts about them that JSON can hold
Finished = tuple[Roles, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Given:
    """What the groups of one module are solved with.

    Attributes:
        routed: what the module is given; None when every rule rounds to nearest.
        theirs: what the original gives to the module, where it is followed; see `expert_groups.solve`.
    """

    recipe: Recipe
    routed: Routed | None
    theirs: Tensor | None


class Crew(Protocol):
    """Workers, each of which solves one group at a time.

    Attributes:
        devices: where the groups of each worker are read to; blocks run on the first.
    """

    devices: list[str]

    def begin(self, given: Given) -> Any:
        """The same in the form in which workers take it, for one module."""
        ...

    def solve(self, worker: int, group: Group, rules: Rules, given: Any) -> SolvedGroup | Finished:
        """Solved, or finished too; `given` is what `begin` returned. Each worker is called by one thread."""
        ...


class Devices:
    """Devices of this process. A group is finished by the loop, while the device is busy with the next."""

    def __init__(self, devices: list[str]):
        self.devices = devices

    def begin(self, given: Given) -> Given:
        return given

    def solve(self, worker: int, group: Group, rules: Rules, given: Given) -> SolvedGroup:
        return solve(group, rules, given.recipe, given.routed, given.theirs)


def finish(
    group: Group, rules: Rules, solved: SolvedGroup, given: Given, profile: Profile
) -> tuple[Finished, Group | None]:
    """A solved group encoded, tuned and corrected where the recipe says so; and what it decodes to, unless tuning
    changed it."""
    gain = None
    with profile("encoding"):
        packed = _encoded(rules, solved)
    with profile("gates"):
        decoded = group.decoded(*packed)
        wrong = differing(solved, decoded)
    if given.recipe.tuning.group_steps and given.routed is not None and solved.training is not None:
        with profile("tuning groups"):
            packed, gain = tune_group(group, solved, packed, given.routed, given.theirs, given.recipe.tuning)
    if given.recipe.solving.mean_correction and given.routed is not None and solved.training is not None:
        with profile("correcting means"):
            decoded = decoded if gain is None else group.decoded(*packed)
            packed, decoded = correct(group, packed, decoded, solved.training, given.recipe, given.routed, given.theirs)
    elif gain is not None:
        decoded = None
    facts = {
        "notices": solved.notices,
        "tokens": solved.tokens,
        "losses": [[s.loss for s in solutions] for solutions in (solved.up, solved.down)],
        "gain": None if gain is None else asdict(gain),
        "wrong": wrong,
    }
    return (packed, facts), decoded


def _encoded(rules: Rules, solved: SolvedGroup) -> Roles:
    def role(rules: list[Rule], solutions: list[Solution]) -> list[Packed]:
        codecs = [rule.codec for rule in rules if rule.codec is not None]
        return [codec.encode(solution) for codec, solution in zip(codecs, solutions, strict=True)]

    return role(rules[0], solved.up), role(rules[1], solved.down)
