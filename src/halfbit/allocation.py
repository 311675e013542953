"""From a recipe whose rules have options to one rule for every matrix: probe the model once, then spend the bits.

What was measured is kept in a file, so that a run that goes on, or one that wants another size, does not measure again;
what was decided is told in `allocation.json`, before anything is solved.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from halfbit import formats
from halfbit.disk import atomically
from halfbit.errors import CalibrationError, RecipeError
from halfbit.events import Event
from halfbit.experts import ExpertStack
from halfbit.families import open_family
from halfbit.family import Family
from halfbit.linear_groups import Chosen
from halfbit.nn import stored_names
from halfbit.probe import Pair, Probe
from halfbit.recipe import Recipe, Rule
from halfbit.samples import Sample
from halfbit.solve.allocate import Choice, Curve, allocate, hull
from halfbit.writer import ALLOCATION, Writer

CURVES = ".curves.json"


@dataclass(frozen=True, eq=False)
class Settled:
    """One rule per matrix, none of them with options.

    Attributes:
        experts: by module, of every expert's input and output projection; None: the module stays as it is.
        linears: as `choose` gave them.
    """

    experts: dict[str, tuple[list[Rule], list[Rule]] | None]
    linears: Chosen


def settle(
    family: Family,
    recipe: Recipe,
    pairs: Mapping[str, Pair | None],
    linears: Chosen,
    samples: list[Sample],
    writer: Writer,
    device: str,
    dtype: torch.dtype,
    offload: Path | None,
    file: Path,
    identify: Callable[[], str],
) -> Iterator[Event | Settled]:
    """The last thing it yields is the `Settled`.

    Args:
        family: for its structure; the pass through the original has one of its own, whose parts it leaves loaded.
        offload: see `activations.room`.
        file: of the curves; read where it is there, else measured and written.
        identify: tells what they are measured on (model, text, options); asked only where there are options.

    Raises:
        CalibrationError: the file was measured on something else.
        RecipeError: bits that the options of a rule cannot give; says which they can.
    """
    chosen: dict[str, Rule] = {}
    if any(rule.options for pair in pairs.values() if pair for rule in pair) or any(
        r.options for _, r in linears.values()
    ):
        identity = identify()
        curves = _read(file, identity)
        if curves is None:
            probe = Probe(open_family(family.reader), recipe, pairs, linears, samples, device, dtype, offload)
            yield from probe.run(writer.journal)
            curves = probe.curves
            rows = {name: [c.weights, [list(astuple(x)) for x in c.choices]] for name, c in curves.items()}
            text = json.dumps({"measured_on": identity, "curves": rows})
            atomically(file, lambda temporary: temporary.write_text(text, "utf-8"))
        by_rule = _by_rule(family, pairs, linears)
        spent = {rule: _spend(rule, {name: curves[name] for name in names}) for rule, names in by_rule.items()}
        told = json.dumps(_told(spent)) + "\n"
        atomically(writer.folder / ALLOCATION, lambda temporary: temporary.write_text(told, "utf-8"))
        for rule, choices in spent.items():
            chosen |= {name: rule.at(c.option, c.bits, c.spread) for name, c in choices.items()}
    experts = {
        path: None if pair is None else _of_stack(family.experts[path], pair, chosen) for path, pair in pairs.items()
    }
    yield Settled(experts, {path: (linear, chosen.get(path, rule)) for path, (linear, rule) in linears.items()})


def _of_stack(stack: ExpertStack, pair: Pair, chosen: Mapping[str, Rule]) -> tuple[list[Rule], list[Rule]]:
    up, down = (
        [chosen.get(name, rule) for name in _names(stack, projection)]
        for rule, projection in zip(pair, stored_names(stack), strict=True)
    )
    return up, down


def _names(stack: ExpertStack, projection: str) -> list[str]:
    return [f"{stack.path}.{e}.{projection}" for e in range(stack.num_experts)]


def _by_rule(family: Family, pairs: Mapping[str, Pair | None], linears: Chosen) -> dict[Rule, list[str]]:
    """The matrices of each rule with options, in the model's order."""
    found: dict[Rule, list[str]] = {}
    for path, pair in pairs.items():
        stack = family.experts[path]
        for rule, projection in zip(pair or (), stored_names(stack), strict=bool(pair)):
            if rule.options:
                found.setdefault(rule, []).extend(_names(stack, projection))
    for path, (_, rule) in linears.items():
        if rule.options:
            found.setdefault(rule, []).append(path)
    return found


def _spend(rule: Rule, curves: Mapping[str, Curve]) -> dict[str, Choice]:
    assert rule.bits is not None
    weights = sum(c.weights for c in curves.values())
    least = sum(c.weights * min(choice.bits for choice in c.choices) for c in curves.values()) / weights
    if rule.bits < least:
        most = sum(c.weights * hull(c.choices)[-1].bits for c in curves.values()) / weights
        raise RecipeError(
            f"rule {rule.match!r}: {rule.bits:g} bits per weight are less than its options take; possible are "
            f"{least:.3f} to {most:.3f}"
        )
    return dict(zip(curves, allocate(list(curves.values()), rule.bits * weights), strict=True))


def _told(spent: Mapping[Rule, Mapping[str, Choice]]) -> dict[str, Any]:
    """{"rules": [{match, bits, loss, options}], "matrices": {name: [rule, option, bits, loss]}}, as predicted."""
    rules, matrices = [], {}
    for number, (rule, choices) in enumerate(spent.items()):
        options = [formats.to_config(option.codec) for option in rule.options if option.codec is not None]
        loss = sum(c.loss for c in choices.values())
        rules.append({"match": rule.match, "bits": rule.bits, "loss": loss, "options": options})
        for name, c in choices.items():
            matrices[name] = [number, c.option, round(c.bits, 4), float(f"{c.loss:.4g}")]
    return {"rules": rules, "matrices": matrices}


def _read(path: Path, identity: str) -> dict[str, Curve] | None:
    """What was measured before. Raises CalibrationError where that was something else, or the file is none of ours."""
    if not path.is_file():
        return None
    advice = "give another file, or delete this one to measure again"
    try:
        found = json.loads(path.read_text("utf-8"))
        measured_on, rows = found["measured_on"], found["curves"]
        curves = {
            name: Curve(weights, tuple(Choice(*row) for row in choices)) for name, (weights, choices) in rows.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CalibrationError(f"{path}: holds no measured curves ({type(e).__name__}: {e}); {advice}") from e
    if measured_on != identity:
        raise CalibrationError(f"{path}: was measured on another model, text or set of options; {advice}")
    return curves
