"""The experts of one module on their way from the shards to the writer, group by group; see `pipeline.py`.

One thread reads a group, one solves the group before it, and the loop encodes the one before that, keeps it in the
journal and adds up what its decoded experts answer. Groups do not depend on each other.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from halfbit import heap
from halfbit.activations import Routed
from halfbit.errors import Unsupported
from halfbit.events import Event, Noticed, Solved
from halfbit.expert_groups import Group, SolvedGroup, batches, differing, judge, max_tokens, solve
from halfbit.experts import ExpertStack
from halfbit.family import Family
from halfbit.nn import stored_names
from halfbit.pipeline import Profile, ahead
from halfbit.recipe import Recipe, Rule
from halfbit.storing import keep_experts, kept_experts, put_experts
from halfbit.tune_group import Gain, summary, tune_group
from halfbit.types import Packed, Roles, Solution
from halfbit.writer import Writer

Rules = tuple[list[Rule], list[Rule]]


@dataclass(frozen=True, eq=False)
class Decided:
    """A group with what was decided about it: now, `solved`, or before the run was interrupted, `kept`."""

    group: Group
    rules: Rules
    key: str
    solved: SolvedGroup | None
    kept: tuple[Roles, dict[str, Any]] | None


def solve_module(
    family: Family,
    stack: ExpertStack,
    rules: Rules,
    recipe: Recipe,
    routed: Routed | None,
    theirs: Tensor | None,
    unseen: Routed | None,
    writer: Writer,
    device: str,
    profile: Profile,
) -> Iterator[Event]:
    """Solve and write the experts of one module; their outputs go to `routed`, those of the original to `unseen`.

    Args:
        rules: of the input and the output projection, one per expert.
        theirs: what the original gives to the module, where it is followed.
    """
    if routed is not None and theirs is not None and len(theirs) != routed.called:
        raise Unsupported(
            f"{stack.path}: is called with {routed.called} rows where the original is called with {len(theirs)}, so "
            "rows cannot be compared; set [solving] asymmetric = false"
        )

    def read() -> Generator[Group, None, None]:
        for experts in batches(stack, recipe.solving.experts_per_batch):
            with profile("reading"):
                group = Group.read(family, stack, experts, device)
            yield group

    def decide() -> Generator[Decided, None, None]:
        with closing(ahead(read(), profile, "solver waits for weights")) as groups:
            for group in groups:
                own = slice(group.experts.start, group.experts.stop)
                of_group, key = (rules[0][own], rules[1][own]), f"{stack.path}.{own.start}"
                kept, solved = kept_experts(writer.journal, key), None
                if kept is None:
                    with profile("solving"):
                        solved = solve(group, of_group, recipe, routed, theirs)
                yield Decided(group, of_group, key, solved, kept)

    packed: Roles = ([], [])
    tokens: list[int] = []
    gains: list[Gain] = []
    with closing(ahead(decide(), profile, "waiting for the solver")) as decided:
        for one in decided:
            group_packed, facts = one.kept or _finish(one, recipe, routed, theirs, writer, profile)
            with profile("gates"):
                if unseen is not None:
                    one.group.run(unseen)
            yield from map(Noticed, facts["notices"])
            tokens += facts["tokens"]
            gains += [] if facts["gain"] is None else [Gain(**facts["gain"])]
            for role, losses in enumerate(facts["losses"]):
                packed[role].extend(group_packed[role])
                names, of_role = one.group.names, stored_names(stack)[role]
                for name, encoded, loss, n in zip(names, group_packed[role], losses, facts["tokens"], strict=True):
                    fact = {"loss": loss, "bits_per_weight": encoded.bits_per_weight, "tokens": n}
                    writer.record("matrices", f"{name}.{of_role}", fact)
                    yield Solved(f"{name}.{of_role}", loss, encoded.bits_per_weight, n)
            with profile("running experts"):
                decoded = one.group.decoded(*group_packed)
                if routed is not None:
                    decoded.run(routed)
            with profile("gates"):
                for name, judged in judge(one.group, decoded, routed, facts["wrong"]).items():
                    writer.record("outputs", name, judged.as_dict())
            del one, decoded
            heap.trim()
    put_experts(stack, packed, writer)
    if gains:
        yield Noticed(f"{stack.path}: tuned group by group; {summary(gains)}")
    if routed is not None:
        writer.record("coverage", stack.path, _coverage(recipe, routed, tokens))


def _finish(
    one: Decided, recipe: Recipe, routed: Routed | None, theirs: Tensor | None, writer: Writer, profile: Profile
) -> tuple[Roles, dict[str, Any]]:
    """A solved group encoded, tuned where the recipe says so, and kept in the journal; the facts go with it."""
    solved, gain = one.solved, None
    assert solved is not None
    with profile("encoding"):
        packed = _encoded(one.rules, solved)
    with profile("gates"):
        wrong = differing(solved, one.group.decoded(*packed))
    if recipe.tuning.group_steps and routed is not None and solved.training is not None:
        with profile("tuning groups"):
            packed, gain = tune_group(one.group, solved, packed, routed, theirs, recipe.tuning)
    facts = {
        "notices": solved.notices,
        "tokens": solved.tokens,
        "losses": [[s.loss for s in solutions] for solutions in (solved.up, solved.down)],
        "gain": None if gain is None else asdict(gain),
        "wrong": wrong,
    }
    with profile("writing"):
        keep_experts(writer.journal, one.key, packed, facts)
    return packed, facts


def _encoded(rules: Rules, solved: SolvedGroup) -> Roles:
    def role(rules: list[Rule], solutions: list[Solution]) -> list[Packed]:
        codecs = [rule.codec for rule in rules if rule.codec is not None]
        return [codec.encode(solution) for codec, solution in zip(codecs, solutions, strict=True)]

    return role(rules[0], solved.up), role(rules[1], solved.down)


def _coverage(recipe: Recipe, routed: Routed, tokens: list[int]) -> dict[str, Any]:
    """The coverage table of one experts module."""
    return {
        "routed": [int((~routed.held[routed.tokens_of(e)[0]]).sum()) for e in range(routed.num_experts)],
        "trained": tokens,
        "cap": max_tokens(recipe.coverage, routed),
        "floor": recipe.coverage.floor,
        "below_floor": [e for e, n in enumerate(tokens) if n < recipe.coverage.floor],
        "undersampled": recipe.coverage.undersampled,
    }
