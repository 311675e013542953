"""The experts of one module on their way from the shards to the writer, group by group; see `pipeline.py`.

One thread reads a group, one for each worker solves the groups before it (`crew.py`), and the loop encodes the one
before those, keeps it in the journal and adds up what its decoded experts answer. The sums are kept there from time to
time, too, so that a run that goes on neither reads nor runs the groups before.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from halfbit import heap
from halfbit.activations import Routed
from halfbit.crew import Crew, Finished, Given, Rules, finish
from halfbit.errors import Unsupported
from halfbit.events import Event, Noticed, Solved
from halfbit.expert_groups import Group, SolvedGroup, batches, judge, max_tokens
from halfbit.experts import ExpertStack
from halfbit.family import Family
from halfbit.nn import stored_names
from halfbit.pipeline import Profile, ahead, spread
from halfbit.recipe import Recipe
from halfbit.storing import keep_experts, kept_experts, put_experts
from halfbit.tune_group import Gain, summary
from halfbit.types import Roles
from halfbit.writer import Writer


@dataclass(frozen=True, eq=False)
class Decided:
    """A group with what was decided about it: `solved`, or `finished` too, now or before the run was interrupted."""

    group: Group
    rules: Rules
    key: str
    kept: bool
    solved: SolvedGroup | Finished


def solve_module(
    family: Family,
    stack: ExpertStack,
    rules: Rules,
    recipe: Recipe,
    routed: Routed | None,
    theirs: Tensor | None,
    unseen: Routed | None,
    writer: Writer,
    crew: Crew,
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

    given = Given(recipe, routed, theirs)
    shared = crew.begin(given)
    groups = batches(stack, recipe.solving.experts_per_batch)
    packed: Roles = ([], [])
    tokens: list[int] = []
    gains: list[Gain] = []

    def key(experts: range) -> str:
        return f"{stack.path}.{experts.start}"

    def note(experts: range, roles: Roles, facts: dict[str, Any]) -> Iterator[Event]:
        """What is known of a group that is packed."""
        yield from map(Noticed, facts["notices"])
        tokens.extend(facts["tokens"])
        gains.extend([] if facts["gain"] is None else [Gain(**facts["gain"])])
        for role, of_role, all_of_role, losses in zip(stored_names(stack), roles, packed, facts["losses"], strict=True):
            all_of_role.extend(of_role)
            for e, encoded, loss, n in zip(experts, of_role, losses, facts["tokens"], strict=True):
                fact = {"loss": loss, "bits_per_weight": encoded.bits_per_weight, "tokens": n}
                writer.record("matrices", f"{stack.path}.{e}.{role}", fact)
                yield Solved(f"{stack.path}.{e}.{role}", loss, encoded.bits_per_weight, n)

    # groups before an interruption whose answers were kept
    answering = {name: r.outputs for name, r in (("routed", routed), ("unseen", unseen)) if r is not None}
    behind, answers, judged = writer.journal.answers(stack.path)
    for name, outputs in answering.items() if behind else ():
        outputs.copy_(answers[name])
    del answers
    judged = judged or {}
    for experts in groups[:behind]:
        kept = kept_experts(writer.journal, key(experts))
        if kept is None:
            raise writer.journal.incomplete(key(experts))
        yield from note(experts, *kept)
    for name, facts in judged.items():
        writer.record("outputs", name, facts)

    def read() -> Generator[Group, None, None]:
        for number, experts in enumerate(groups[behind:]):
            with profile("reading"):
                group = Group.read(family, stack, experts, crew.devices[number % len(crew.devices)])
            yield group

    def decide(worker: int, group: Group) -> Decided:
        own = slice(group.experts.start, group.experts.stop)
        of_group = rules[0][own], rules[1][own]
        kept = kept_experts(writer.journal, key(group.experts))
        if kept is not None:
            return Decided(group, of_group, key(group.experts), True, kept)
        with profile("solving"):
            return Decided(group, of_group, key(group.experts), False, crew.solve(worker, group, of_group, shared))

    weights = ahead(read(), profile, "waiting for weights")
    with closing(spread(weights, decide, len(crew.devices), profile, "waiting for the solver")) as decided:
        for number, one in enumerate(decided, behind + 1):
            (group_packed, facts), decoded = _finished(one, given, writer, profile)
            with profile("gates"):
                if unseen is not None:
                    one.group.run(unseen)
            yield from note(one.group.experts, group_packed, facts)
            with profile("running experts"):
                decoded = decoded or one.group.decoded(*group_packed)
                if routed is not None:
                    decoded.run(routed)
            with profile("gates"):
                for name, found in judge(one.group, decoded, routed, facts["wrong"]).items():
                    judged[name] = found.as_dict()
                    writer.record("outputs", name, judged[name])
            with profile("writing"):
                writer.journal.keep_answers(stack.path, number, answering, judged)
            del one, decoded
            heap.trim()
    put_experts(stack, packed, writer)
    if gains:
        yield Noticed(f"{stack.path}: tuned group by group; {summary(gains)}")
    if routed is not None:
        writer.record("coverage", stack.path, _coverage(recipe, routed, tokens))


def _finished(one: Decided, given: Given, writer: Writer, profile: Profile) -> tuple[Finished, Group | None]:
    """Encoded, and in the journal; and what it decodes to, where that is known."""
    found, decoded = one.solved, None
    if isinstance(found, SolvedGroup):
        found, decoded = finish(one.group, one.rules, found, given, profile)
    if not one.kept:
        with profile("writing"):
            keep_experts(writer.journal, one.key, *found)
    return found, decoded


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
