"""What a compression will take, from config.json alone, before anything runs: bytes, memory, disk, time, and what fits.

`parts.py` counts bytes, `plan_memory.py` memory, `plan_time.py` time; here they are put together and compared with what
this machine has left. Where something does not fit, the options that change it are tried in turn, and the first that
makes it fit is named.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from halfbit.blueprint import Blueprint
from halfbit.compress import with_length
from halfbit.errors import RecipeError
from halfbit.machine import Room, measure, resident, room
from halfbit.parts import Matrices, Part, matrices, parts
from halfbit.plan_memory import ACTIVATIONS, WARM, Peak, judging, measuring, solving
from halfbit.plan_time import SETUP, Clock, Spent, Work
from halfbit.reader import Folder
from halfbit.recipe import Recipe

# share of what is free that a run should leave alone
SPARE = 0.05
# of each measured curve, in the hidden file of a run whose rules have options
CURVE = 1500

Limit = Literal["memory", "device memory", "disk"]


@dataclass(frozen=True)
class Verdict:
    """Whether one limit holds.

    Attributes:
        needed: bytes; `free`: bytes, None where nobody can tell.
        fits: False only where it is known not to.
        advice: an option that makes it fit, or that none of those tried does; None where nothing is needed.
    """

    limit: Limit
    needed: int
    free: int | None
    fits: bool
    advice: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is predicted.

    Attributes:
        source, recipe, device: as given; `model_type`: of the config.
        parameters: weights of the model.
        before, after: bytes of the source's weights, and of the whole folder.
        bits_per_packed_weight: of what the recipe compresses, everything that the format stores included.
        parts: bytes by part.
        memory: the fullest moment of each phase.
        disk: bytes by what lies on the disk at the fullest moment.
        time: CPU seconds by phase; empty where nothing was measured.
        verdicts: limits of this machine.
        assumptions: what the figures rest on.
    """

    source: str
    model_type: str
    recipe: str
    device: str
    parameters: int
    before: int
    after: int
    bits_per_packed_weight: float
    parts: list[Part]
    memory: list[Peak]
    disk: dict[str, int]
    time: list[Spent]
    verdicts: list[Verdict]
    assumptions: list[str]

    @property
    def host_bytes(self) -> int:
        """Peak of the host's memory."""
        return max(peak.host_bytes for peak in self.memory)

    @property
    def device_bytes(self) -> int:
        return max(peak.device_bytes for peak in self.memory)

    @property
    def seconds(self) -> float:
        return sum(spent.seconds for spent in self.time)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sums = {"host_bytes": self.host_bytes, "device_bytes": self.device_bytes, "seconds": self.seconds}
        return asdict(self) | (sums if self.time else sums | {"seconds": None})


def plan(
    source: str | Path,
    recipe: Recipe,
    *,
    out: str | Path = ".",
    device: str = "cpu",
    timed: bool = True,
    offload: bool = False,
    free: Room | None = None,
) -> Plan:
    """Predict what `compress` with the same arguments takes.

    Args:
        source: model folder, hub id, or a config.json; nothing but config.json is read (and how large files are),
            and of a local folder with weights some rows of experts.
        recipe: with its calibration and its budget.
        out: where the folder would be, for the free space there.
        device: "cpu" or "cuda".
        offload: activations lie in files, as far as memory does not hold them.
        timed: measure this machine, for some seconds, and predict times.
        free: what there is; None: what this machine has left now.

    Raises:
        RecipeError: no weight of the model matches a rule. And what `Blueprint.of` raises.
    """
    blueprint = Blueprint.of(source)
    base = resident() + WARM
    recipe = with_length(recipe, blueprint.family)
    packed = matrices(blueprint, recipe)
    if not packed:
        raise RecipeError(
            f"{source}: no weight matches a rule of recipe {recipe.name!r} ({', '.join(r.match for r in recipe.rules)})"
        )
    table = parts(blueprint, packed)
    before, after = sum(p.before for p in table), sum(p.after for p in table)
    peaks = _peaks(blueprint, recipe, packed, base, device)
    disk = _disk(blueprint, recipe, packed, before, after)
    if offload:
        disk["activations"] = max(p.bytes_of(ACTIVATIONS) for p in peaks)
        peaks = [p.without(ACTIVATIONS) for p in peaks]
    spent = _spent(blueprint, recipe, packed, device) if timed else []
    weights = sum(m.weights for m in packed)
    free = room(out, device) if free is None else free
    return Plan(
        source=str(source),
        model_type=blueprint.config.model_type,
        recipe=recipe.name,
        device=device,
        parameters=blueprint.parameters(),
        before=before,
        after=after,
        bits_per_packed_weight=sum(m.weights * m.bits for m in packed) / weights,
        parts=table,
        memory=peaks,
        disk=disk,
        time=spent,
        verdicts=list(_verdicts(blueprint, recipe, packed, base, device, offload, peaks, disk, free)),
        assumptions=list(_assumptions(blueprint, recipe, packed, offload)),
    )


def budgeted(source: str | Path, recipe: Recipe, bits: float | None, size: int | None) -> Recipe:
    """The recipe with bits per weight for those rules to which `compress` would give them, or those at which the whole
    folder has `size` bytes.

    Raises RecipeError where no weight has a rule whose rate can be chosen, or no rate makes it that size.
    """
    blueprint = Blueprint.of(source)
    packed = matrices(blueprint, recipe)
    takes = [m for m in packed if m.rule.takes("bits")]
    takes = [m for m in takes if m.kind == "experts"] or takes
    if not takes:
        raise RecipeError(f"recipe {recipe.name!r}: no weight of {source} has a rule whose rate can be chosen")
    if bits is None:
        assert size is not None
        rest = sum(p.after for p in parts(blueprint, packed)) - sum(m.nbytes for m in takes)
        weights = sum(m.weights for m in takes)
        bits = 8 * (size - rest) / weights
        if not 0.3 <= bits <= 16:
            raise RecipeError(
                f"a folder of {size:,} bytes leaves {bits:.3f} bits for each of the {weights:,} weights whose rate can "
                f"be chosen; what stays takes {rest:,} bytes"
            )
    return recipe.budgeted("bits", bits, [m.rule for m in takes])


def _peaks(blueprint: Blueprint, recipe: Recipe, packed: list[Matrices], base: int, device: str) -> list[Peak]:
    samples = recipe.calibration.samples
    given = (blueprint, recipe, packed, samples, base, device)
    first = measuring(*given)
    last = judging(blueprint, recipe, packed, base, device)
    return [*([first] if first else []), solving(*given), *([last] if last else [])]


def _disk(blueprint: Blueprint, recipe: Recipe, packed: list[Matrices], before: int, after: int) -> dict[str, int]:
    """But for activations."""
    found = {"compressed folder": after}
    options = sum(m.count for m in packed if m.rule.options)
    if options:
        found["measured curves, until the end"] = CURVE * options
    if recipe.tuning.steps:
        found["the untuned model, until the end"] = after
    if not isinstance(blueprint.reader.files, Folder):
        found["downloaded source, in the hub's cache"] = before
    return found


def _spent(blueprint: Blueprint, recipe: Recipe, packed: list[Matrices], device: str) -> list[Spent]:
    shards = blueprint.reader.files
    file = (
        next((shards.root / n for n in shards.names() if n.endswith(".safetensors")), None)
        if (isinstance(shards, Folder))
        else None
    )
    rates = measure(device, file)
    work = Work(blueprint, recipe, packed, recipe.calibration.samples, Clock(rates, recipe.solving, device))
    first = work.measuring()
    begin = Spent("starting", {"python, torch, transformers": rates.started, "text and checkpoint": SETUP})
    last = work.judging()
    return [begin, *([first] if first else []), work.solving(), *([last] if last else [])]


def _verdicts(
    blueprint: Blueprint,
    recipe: Recipe,
    packed: list[Matrices],
    base: int,
    device: str,
    offload: bool,
    peaks: list[Peak],
    disk: dict[str, int],
    free: Room,
) -> Iterator[Verdict]:
    host, on_device = max(p.host_bytes for p in peaks), max(p.device_bytes for p in peaks)

    def memory(limit: Limit, needed: int, there: int | None) -> Verdict:
        if _fits(needed, there):
            return Verdict(limit, needed, there, True)
        for advice, other, in_files in _smaller(recipe, offload):
            tried = _peaks(blueprint, other, packed, base, device)
            tried = [p.without(ACTIVATIONS) for p in tried] if in_files else tried
            less = max(p.host_bytes if limit == "memory" else p.device_bytes for p in tried)
            if _fits(less, there):
                return Verdict(limit, needed, there, False, f"{advice}: {_told(less)}")
        advice = "neither smaller groups of experts nor files nor fewer samples make it fit; use a machine with more"
        if limit == "device memory":
            advice += ", or --device cpu"
        return Verdict(limit, needed, there, False, advice)

    yield memory("memory", host, free.memory)
    if device != "cpu":
        yield memory("device memory", on_device, free.device)
    total = sum(disk.values())
    yield Verdict(
        "disk", total, free.disk, _fits(total, free.disk), _advice_for_disk(blueprint, packed, total, disk, free)
    )


def _fits(needed: int, free: int | None) -> bool:
    return free is None or needed <= (1 - SPARE) * free


def _smaller(recipe: Recipe, offload: bool) -> Iterator[tuple[str, Recipe, bool]]:
    """Recipes that take less memory, by what to write for them, those that cost the result nothing first; whether
    activations lie in files."""
    solving, samples = recipe.solving, recipe.calibration.samples
    groups = [solving.experts_per_batch]
    while groups[-1] > 1:
        groups.append(groups[-1] // 2)
    for batch in groups[1:]:
        yield (
            f"[solving] experts_per_batch = {batch} in the recipe",
            replace(recipe, solving=replace(solving, experts_per_batch=batch)),
            offload,
        )
    if not offload:
        for batch in dict.fromkeys((groups[0], groups[-1])):
            more = f" and [solving] experts_per_batch = {batch} in the recipe" if batch != groups[0] else ""
            yield f"--offload DIR{more}", replace(recipe, solving=replace(solving, experts_per_batch=batch)), True
    if recipe.gates.model:
        # nothing else needs the logits of whole samples
        yield "[gates] model = false in the recipe", recipe.gated(model=False), offload
    fewer = samples // 2
    while fewer >= 8:
        for batch in dict.fromkeys((groups[0], groups[-1])):
            smaller = replace(recipe, solving=replace(solving, experts_per_batch=batch)).calibrated(samples=fewer)
            more = f" and [solving] experts_per_batch = {batch} in the recipe" if batch != groups[0] else ""
            yield f"--samples {fewer}{more}", smaller, offload
        fewer //= 2


def _advice_for_disk(
    blueprint: Blueprint, packed: list[Matrices], total: int, disk: dict[str, int], free: Room
) -> str | None:
    if _fits(total, free.disk):
        return None
    assert free.disk is not None
    other = total - disk["compressed folder"]
    room_left = int((1 - SPARE) * free.disk) - other
    takes = [m for m in packed if m.rule.takes("bits")]
    fixed = disk["compressed folder"] - sum(m.nbytes for m in takes)
    weights = sum(m.weights for m in takes)
    # of ternary, or of a grid of two bits with its statistics
    least = 0.3 if any(_ternary(m) for m in takes) else 2.5
    if takes and 8 * (room_left - fixed) / weights >= least:
        return f"--size {_told(room_left).replace(' ', '')}"
    if "downloaded source, in the hub's cache" in disk:
        return "put the hub's cache on another disk (HF_HOME), or give OUT on another disk"
    return "give OUT on a disk with more room, or a recipe with fewer bits (runlength --bits 0.5)"


def _ternary(m: Matrices) -> bool:
    return any(type(o.grid).__name__ == "Deadzone" for o in m.rule.options or (m.rule,))


def _assumptions(blueprint: Blueprint, recipe: Recipe, packed: list[Matrices], offload: bool) -> Iterator[str]:
    c = recipe.calibration
    held = f" and {recipe.gates.held_back} held back" if recipe.gates.held_back else ""
    yield (
        f"{c.samples} samples{held} of {c.sequence_length} tokens, experts_per_batch {recipe.solving.experts_per_batch}"
    )
    for told in dict.fromkeys(m.assumes for m in packed if m.assumes):
        names = {m.path.rpartition(".")[2] for m in packed if m.assumes == told}
        shapes = sorted({f"{m.shape[0]} x {m.shape[1]}" for m in packed if m.assumes == told})
        yield f"{told} ({', '.join(sorted(names))}, {', '.join(shapes[:3])}{', ...' if len(shapes) > 3 else ''})"
    if recipe.tuning.steps or recipe.tuning.group_steps:
        yield "tuning is not predicted: neither its time nor its memory"
    yield f"activations in {'files' if offload else 'memory'}; a copy of them that the journal keeps is not counted"
    if not blueprint.reader.sizes("*.safetensors"):
        yield "weights as transformers saves them; tokenizer and other files are not counted unless they lie beside it"


def _told(nbytes: int) -> str:
    """ "12.3 GB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
