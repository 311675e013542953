"""THE LOOP: a model, block by block, into a compressed folder. It yields events and prints nothing.

For each block (QMoE, arXiv 2310.16795, section 3.2, and the published code's order of work):

    load the block without its experts
    linear layers before the experts: Hessian of what each was given -> solve -> encode -> decode, and the decoded
        weight takes the weight's place
    run all samples to the experts' door and keep what each was given
    for each group of experts: weights from the shards -> Hessians of their tokens -> solve -> encode -> decode,
        and the decoded experts' outputs are added up for all tokens
    the linear layers behind the experts (shared experts) likewise
    run the block again with these outputs in the experts' place; the result feeds the next block
    commit the block: one file, then its lines in the manifest

An embedding is rounded before the first block runs, the output head is solved after the last. Device memory holds one
block without experts, one group of experts and the weights of its neighbours (`expert_pipeline.py`). A run that was
interrupted starts again with the same arguments; committed blocks are read back instead of solved, and of the block
that was open what the journal has (`journal.py`).
"""

import hashlib
import json
import shutil
import time
from collections.abc import Collection, Generator, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbit import heap, native
from halfbit.activations import Activations, room
from halfbit.allocation import CURVES, Settled, settle
from halfbit.cluster import hired
from halfbit.crew import Crew
from halfbit.errors import CalibrationError, RecipeError
from halfbit.events import Began, BlockBegan, BlockDone, Event, Finished, Noticed, Spent
from halfbit.expert_groups import run_through
from halfbit.expert_pipeline import solve_module
from halfbit.experts import ExpertStack
from halfbit.families import open_family
from halfbit.family import Family
from halfbit.flow import Flow, Seen
from halfbit.gates import MODEL, Gatekeeper, Reference
from halfbit.journal import FLOW, FOLLOWED, Journal
from halfbit.layout import Entry, stored_name
from halfbit.linear_groups import Chosen, choose, left_out, put_back, solve_group, solve_reached
from halfbit.linears import find_linears
from halfbit.model_gate import judge_model
from halfbit.pipeline import Profile
from halfbit.reader import Reader
from halfbit.recipe import Gates, Recipe, Rule, Tuning
from halfbit.samples import (
    Sample,
    fingerprint,
    load_tokenizer,
    longest,
    read_text,
    samples_of,
    tokenize,
    windows,
    with_noise,
)
from halfbit.storing import (
    fingerprint_of,
    folder_config,
    packed_tensors,
    put_outer,
)
from halfbit.tune import held_back, tune
from halfbit.types import Packed
from halfbit.writer import ALLOCATION, Writer, delete_run

# inside the folder, until the tuned model is there
UNTUNED = ".untuned"
# of the calibration samples one in so many is held back for gates, where the text has no more
SHARE_HELD = 8


def compress(
    source: str,
    folder: str | Path,
    recipe: Recipe,
    calibration: str | None = None,
    *,
    device: str = "cpu",
    revision: str | None = None,
    curves: str | Path | None = None,
    restart: bool = False,
    offload: str | Path | None = None,
    accept: Collection[str] = (),
    ray: str | None = None,
    workers: int = 0,
) -> Iterator[Event]:
    """Compress `source` into `folder` by `recipe`, and tune it where the recipe says so.

    Args:
        source: model folder or hub id.
        folder: new or empty folder, or one that holds an interrupted run of the same arguments.
        calibration: text file, .jsonl file or data set name; not needed when every rule rounds to nearest.
        device: "cpu" or "cuda"; several of one kind, "cuda:0,cuda:1", solve groups of experts side by side, and the
            blocks run on the first.
        curves: file of what was measured for rules with options, to be shared by several runs; None: of this run alone.
        restart: a run that `folder` holds, whatever it is of, is deleted first.
        offload: folder for the samples' activations, in files without a name, where they would not fit into memory.
        accept: failed gates that do not stop the run, see `Gatekeeper`.
        ray: address of a Ray cluster whose workers solve groups of experts, or "local"; see `cluster.hired`.
        workers: of the cluster; 0: one for each GPU, or without them one for each machine.

    Yields:
        events, the last of them `Finished`.

    Raises:
        GateError: something went wrong without a word, most likely. What was done is kept.
    """
    if restart:
        delete_run(Path(folder))
    how: Any = {"revision": revision, "curves": curves, "accept": accept}
    how["offload"] = None if offload is None else Path(offload)
    with hired(device, ray, workers) as crew:
        where = crew.devices[0]
        if recipe.tuning.steps == 0:
            writer, solved_on, held = yield from _compress(source, folder, recipe, calibration, crew, **how)
            yield from _finish(writer, Reader(source, revision), recipe, solved_on, held, where, accept)
            return
        reader, untuned = Reader(source, revision), Path(folder) / UNTUNED
        family = open_family(reader)
        recipe = with_length(recipe, family)
        # tuning wants all of the text
        documents, samples = calibration_samples(reader, family, recipe, calibration, every=True)
        watched = held_back(len(samples), recipe.tuning)  # now, and not after hours of solving
        writer = _writer(folder, reader, recipe, documents, samples, where)
        if not writer.complete:
            yield from _compress(source, untuned, recipe, calibration, crew, **how)
            yield from tune(reader, untuned, writer, samples, recipe.tuning, device=where)
        shutil.rmtree(untuned, ignore_errors=True)
        yield from _finish(writer, reader, recipe, samples[:-watched], samples[-watched:], where, accept)


def _finish(
    writer: Writer,
    reader: Reader,
    recipe: Recipe,
    text: list[Sample],
    held: list[Sample],
    device: str,
    accept: Collection[str],
) -> Iterator[Event]:
    """Gates look at the finished folder, unless they did before; see `judge_model`."""
    keeper = Gatekeeper(recipe.gates, writer, accept)
    keeper.open()
    if recipe.gates.model and MODEL not in writer.manifest["gates"]:
        if held:
            # what the blocks left behind would stand beside the whole compressed model
            heap.trim()
            dtype = _compute_dtype(reader, device)
            checks = judge_model(reader, writer.folder, text, held, recipe.gates, device, dtype)
            yield from keeper.judge(MODEL, checks)
        else:
            yield Noticed("no text is held back, so that no gate looks at the finished model")
    yield Finished(writer.folder)


def _compress(
    source: str,
    folder: str | Path,
    recipe: Recipe,
    calibration: str | None,
    crew: Crew,
    *,
    revision: str | None,
    curves: str | Path | None,
    offload: Path | None,
    accept: Collection[str],
) -> Generator[Event, None, tuple[Writer, list[Sample], list[Sample]]]:
    """As `compress`, without tuning, gates on the finished model and `Finished`.

    Returns:
        the writer, the samples that were solved on, and those that were held back.
    """
    device = crew.devices[0]
    reader = Reader(source, revision)
    family = open_family(reader)
    claims, dtype = family.claims(), _compute_dtype(reader, device)
    pairs = {path: _rules(recipe, stack) for path, stack in family.experts.items()}
    linears = choose(recipe, family)
    if not any(pairs.values()) and not linears:
        raise RecipeError(
            f"{source}: no weight matches a rule of recipe {recipe.name!r} "
            f"({', '.join(r.match for r in recipe.rules)}); "
            f"this model has {f'experts at {next(iter(pairs))}' if pairs else 'no experts modules'} and linear layers "
            f"such as {', '.join(list(find_linears(family.model, family.experts, claims.tied))[:3])}"
        )
    packed_stacks = [family.experts[path] for path, pair in pairs.items() if pair]
    compressed = packed_tensors(claims, packed_stacks, [linear for linear, _ in linears.values()])
    documents: list[str] = []
    samples: list[Sample] = []
    in_use = [rule for pair in pairs.values() if pair for rule in pair] + [rule for _, rule in linears.values()]
    if any(rule.solver != "rtn" for rule in in_use):
        recipe = with_length(recipe, family)
        documents, samples = calibration_samples(reader, family, recipe, calibration)
    writer = _writer(folder, reader, recipe, documents, samples, device)
    solved_on, held = ([s for s in samples if s.held == back] for back in (False, True))
    keeper = Gatekeeper(recipe.gates, writer, accept)
    keeper.open()
    if writer.complete:
        return writer, solved_on, held
    yield from keeper.text(samples)
    rules: dict[str, tuple[list[Rule], list[Rule]] | None] = {}
    measured = writer.folder / CURVES if curves is None else Path(curves)

    def identify() -> str:
        """Of what is measured, whatever bits are asked for, tuned or not."""
        anyhow = replace(recipe, name="", tuning=Tuning(), gates=Gates())
        anyhow = replace(anyhow, rules=tuple(replace(r, bits=1.0) if r.options else r for r in recipe.rules))
        return _digest(_made_of(reader, anyhow, [], solved_on, device))

    for event in settle(family, recipe, pairs, linears, solved_on, writer, device, dtype, offload, measured, identify):
        if isinstance(event, Settled):
            rules, linears = event.experts, event.linears
        else:
            yield event
    blocks = [block for part in family.stacks() for block in part.blocks]
    yield Began(
        writer.folder,
        blocks=len(blocks),
        matrices=sum(2 * stack.num_experts for stack in packed_stacks) + len(linears),
        resumed=sum(map(writer.has, blocks)),
        solved=len(writer.manifest["matrices"]),
    )
    begun_with, threads = writer.manifest["about"]["threads"], torch.get_num_threads()
    if begun_with != threads and not native.same_sums():
        yield Noticed(
            f"this run was begun with {begun_with} threads and goes on with {threads}: sums are rounded in "
            "another order, so the result will not be bit-identical to one made in one go"
        )
    for rule in recipe.rules:
        if rule.packs and not any(rule is used for used in in_use):
            yield Noticed(f"rule {rule.match!r} is the first match of no matrix that can be compressed")
    yield from map(Noticed, left_out(recipe, family, linears))

    profile, began = Profile(), time.monotonic()
    # of the last block that need not run again, for the activations behind it were kept
    behind, found = _kept(writer, blocks) if samples else (-1, {})
    # of the compressed model, and of the original where it is followed
    encoded: Activations | None = None
    encoded_there: Activations | None = None
    followed = recipe.solving.asymmetric and any(rule.solver != "rtn" for pair in pairs.values() for rule in pair or ())
    if samples:
        family.load_outer(device, dtype)
    outside = {path: pair for path, pair in linears.items() if family.block_of(path) is None}
    embeddings = {path: pair for path, pair in outside.items() if pair[0].kind == "embedding"}
    yield from _outside("embedding", embeddings, None, family, recipe, writer, keeper, device)
    for part in family.stacks():
        flow = Flow(part, samples, encoded, device, offload) if samples else None
        original = Flow(part, samples, encoded_there, device, offload) if samples and followed else None
        # behind the last block of this part: what was kept then is what its end gave
        passed = behind > blocks.index(part.blocks[-1])
        for name, of_part in (("flow", flow), ("original", original)):
            if of_part and behind >= blocks.index(part.blocks[0]):
                of_part.restore(found[f"encoded {name}" if passed else name])
        if not passed:
            found = {}
        for block in part.blocks:
            number = blocks.index(block)
            if number <= behind:
                yield BlockBegan(block, number, resumed=True)
                yield BlockDone(block, number)
                continue
            done = writer.has(block)
            # without a flow nobody looks at what is done
            stored = writer.read(block) if done and flow else None
            if not done:
                writer.journal.open(block)
            yield BlockBegan(block, number, resumed=done)
            module = family.load_block(block, device, dtype) if flow else None
            pending = {path: pair for path, pair in linears.items() if family.block_of(path) == block}
            if done and stored is not None:
                put_back(family, pending, writer, stored)
            pending = {} if done else pending
            stacks = family.experts_of(block)
            packed = [stack for stack in stacks if not done and rules[stack.path]]
            judged = [linear for linear, _ in pending.values()]
            reference = Reference.of(flow) if flow is not None and (packed or judged) else None
            theirs: dict[str, Tensor] = {}
            # the original's experts can answer to what is held back while they are solved, which saves reading them
            # once more; but not where layers before them are compressed
            late = None if reference is None or original or judged else reference.flow
            if module is not None:
                early = None if reference is None or late is not None else reference.flow
                with profile("following the original"):
                    theirs = _follow(original, early, family, block, module, recipe, device, writer.journal, offload)
            for number_of_stack, stack in enumerate(stacks):
                doors = stacks[number_of_stack:]
                with profile("linear layers"):
                    yield from solve_reached(family, pending, flow, block, module, doors, recipe, writer, device)
                pair = rules[stack.path]
                with profile("running blocks"):
                    routed = flow.capture(block, module, stack) if flow and module is not None else None
                    unseen = late.capture(block, module, stack) if late and module is not None else None
                if pair and not done:
                    given = theirs.pop(stack.path, None)
                    yield from solve_module(family, stack, pair, recipe, routed, given, unseen, writer, crew, profile)
                    del given
                elif routed is not None:
                    back = _stored(stack, writer, stored) if stored is not None and pair else None
                    with profile("running experts"):
                        both = [r for r in (routed, unseen) if r is not None]
                        run_through(family, stack, both, recipe.solving.experts_per_batch, device, back)
                        del both
                if flow and routed is not None:
                    flow.give(stack, routed)
                if late and unseen is not None:
                    late.give(stack, unseen)
                del routed, unseen  # or they would live through the next block
            with profile("linear layers"):
                yield from solve_reached(family, pending, flow, block, module, (), recipe, writer, device)
            for path in pending:
                yield Noticed(f"{path}: never runs on the calibration text; stored as it was")
            if not done:
                kept = packed_tensors(claims, (), [linear for linear, _ in pending.values()])
                for name in claims.tensors_of(block):
                    if name not in compressed or name in kept:
                        writer.put(name, reader.tensor(name))
                ran = [linear for linear in judged if linear.path not in pending]
                added = None
                if reference is not None and flow is not None and module is not None:
                    with profile("gates"):
                        if late:
                            late.advance(block, module)
                        added = reference.added(flow.after(block, module))
                keeper.unit(block, packed, ran, added)
                with profile("writing"):
                    writer.commit(block, f"model-block-{number:05d}.safetensors")
                yield from keeper.settle(block)
            if flow and module is not None:
                if block != blocks[-1] or len(outside) > len(embeddings):
                    with profile("running blocks"):
                        flow.advance(block, module)
                    now = {
                        "flow": flow,
                        "original": original,
                        "encoded flow": encoded,
                        "encoded original": encoded_there,
                    }
                    rows = {name: _rows(of) for name, of in now.items() if of is not None}
                    with profile("writing"):
                        writer.journal.keep_flow(FLOW, block, rows)
                family.unload_block(block)
            yield BlockDone(block, number)
        if part is family.stacks()[-1]:
            heads = {path: pair for path, pair in outside.items() if path not in embeddings}
            yield from _outside("head", heads, flow, family, recipe, writer, keeper, device)
        if part is not family.stacks()[-1]:
            encoded, encoded_there = (
                None if f is None else f.activations if passed else f.end() for f in (flow, original)
            )

    plain = [n for n, claim in claims.tensors.items() if claim.block is None and n not in compressed]
    put_outer(reader, plain, writer)
    tied = {twin: path for path, (linear, _) in linears.items() for twin in linear.twins}
    auxiliary = [reader.path(n) for n in reader.auxiliary_files()]
    auxiliary += [path for path in [writer.folder / ALLOCATION] if path.is_file()]
    writer.finish(folder_config(reader, writer, tied), auxiliary, recipe.to_toml())
    (writer.folder / CURVES).unlink(missing_ok=True)
    yield Spent(time.monotonic() - began, profile.seconds)
    return writer, solved_on, held


def _kept(writer: Writer, blocks: list[str]) -> tuple[int, dict[str, Tensor]]:
    """Number of the last block whose activations an interrupted run kept, and they; -1 where there are none."""
    found = writer.journal.flow(FLOW)
    if found is None or found[0] not in blocks or not writer.has(found[0]):
        return -1, {}
    return blocks.index(found[0]), found[1]


def _rows(of: Flow | Activations) -> Tensor:
    return of.activations.buffer if isinstance(of, Flow) else of.buffer


def _outside(
    name: str,
    chosen: Chosen,
    flow: Flow | None,
    family: Family,
    recipe: Recipe,
    writer: Writer,
    keeper: Gatekeeper,
    device: str,
) -> Iterator[Event]:
    """Solve and commit the embedding or the output head; a head without a flow is rounded to nearest."""
    unit = f"outer {name}"
    if writer.has(unit):
        put_back(family, chosen, writer, writer.read(unit))
        return
    for path, (_, rule) in chosen.items():
        solved = flow is not None and rule.solver != "rtn"
        seen = flow.observe_head(path, family.model.get_submodule(path)) if flow and solved else Seen([path], None)
        yield from solve_group(family, seen, chosen, recipe, writer, device)
    if chosen:
        keeper.unit(unit, (), [linear for linear, _ in chosen.values()])
        writer.commit(unit, f"model-outer-{name}.safetensors")
        yield from keeper.settle(unit)


def _follow(
    original: Flow | None,
    early: Flow | None,
    family: Family,
    block: str,
    module: nn.Module,
    recipe: Recipe,
    device: str,
    journal: Journal,
    offload: Path | None,
) -> dict[str, Tensor]:
    """The original model's samples, and those held back from the compressed one (`early`), through a block of which
    nothing is compressed yet; or what the journal has of that.

    Returns:
        what the original gives to each experts module, `[rows, width]` on the CPU, also rows that no expert takes.
    """
    flows = {name: flow for name, flow in (("original", original), ("early", early)) if flow is not None}
    kept = journal.flow(FOLLOWED)
    if kept is not None and kept[0] == block:
        for name, flow in flows.items():
            flow.restore(kept[1].pop(name))
        return {path: room(len(rows), rows.shape[1], rows.dtype, offload).copy_(rows) for path, rows in kept[1].items()}
    given = {}
    for stack in family.experts_of(block) if flows else ():
        routed = [flow.capture(block, module, stack, every=flow is original) for flow in flows.values()]
        if original is not None:
            given[stack.path] = routed[0].hidden
        run_through(family, stack, routed, recipe.solving.experts_per_batch, device)
        for flow, of_flow in zip(flows.values(), routed, strict=True):
            flow.give(stack, of_flow)
    for flow in flows.values():
        flow.advance(block, module)
    if flows:
        journal.keep_flow(FOLLOWED, block, given | {name: _rows(flow) for name, flow in flows.items()})
    return given


def _stored(stack: ExpertStack, writer: Writer, tensors: dict[str, Tensor]) -> list[Packed]:
    """What an earlier run wrote of a module: input and output projection, as the tall matrices that lie in the file."""
    found = []
    for projection, config in writer.manifest["packed"][stack.path].items():
        entry = Entry.parse(config, f"{stack.path}.{projection}")
        found.append(entry.packed({part: tensors[stored_name(stack.path, projection, part)] for part in entry.tensors}))
    return found


def _rules(recipe: Recipe, stack: ExpertStack) -> tuple[Rule, Rule] | None:
    """The rules of a module's input and output projections; None when it stays as it is."""
    found = [recipe.rule(f"{stack.path}.{p}") for p in (*stack.up, stack.down)]
    first, last = found[0], found[-1]
    if all(rule is None for rule in found):
        return None
    if first is None or last is None or any(rule is not first for rule in found[:-1]):
        raise RecipeError(
            f"{stack.path}: the rules cover only a part of this experts module, or treat gate and up differently; "
            f"use globs that cover all of {', '.join((*stack.up, stack.down))}"
        )
    return first, last


def _writer(
    folder: str | Path, reader: Reader, recipe: Recipe, documents: list[str], samples: list[Sample], device: str
) -> Writer:
    about = {
        "halfbit": version("halfbit"),
        "source": Path(reader.source).name,
        "recipe": recipe.name,
        "calibration": fingerprint(documents) if documents else None,
        "threads": torch.get_num_threads(),
        "made_of": (parts := _made_of(reader, recipe, documents, samples, device)),
    }
    return Writer(folder, _digest(parts), about)


def with_length(recipe: Recipe, family: Family) -> Recipe:
    """The recipe with the length of samples filled in where it is automatic."""
    if recipe.calibration.sequence_length:
        return recipe
    return recipe.calibrated(sequence_length=longest(family.config))


def calibration_samples(
    reader: Reader, family: Family, recipe: Recipe, source: str | None, *, every: bool = False
) -> tuple[list[str], list[Sample]]:
    """The calibration text, and the samples that the recipe wants of it, noise included, or every sample as it is."""
    if source is None:
        raise CalibrationError(
            "this recipe looks at data: give --calibration FILE (text or .jsonl) or a data set name; "
            "text like what the model will meet serves best"
        )
    c = recipe.calibration
    # a token is hardly ever longer than 16 characters; a draw of windows wants the whole text
    some, extra = c.seed < 0 and not every, recipe.gates.held_back
    documents = read_text(source, (c.samples + extra) * c.sequence_length * 16 if some else None)
    tokenizer = load_tokenizer(reader.source, reader.revision)
    tokens = tokenize(tokenizer, documents)
    have = len(tokens) // c.sequence_length
    count = max(1, have) if every else max(c.samples, min(c.samples + extra, have))
    rows = windows(tokens, count, c.sequence_length, c.seed, origin=source)
    found = samples_of(rows, tokenizer, family.config, seed=c.seed, corruption=c.corruption, origin=source)
    found = found if c.mask_special else [s.unmasked() for s in found]
    if every:
        return documents, found
    # of a text that has no more samples than are asked for, some of those
    held = extra if extra <= count - c.samples else min(extra, max(count - c.samples, count // SHARE_HELD))
    solved = with_noise(found[: count - held], c.noise, family.config.get_text_config().vocab_size, max(c.seed, 0))
    return documents, [*solved, *(s.held_back() for s in found[count - held :])]


def _compute_dtype(reader: Reader, device: str) -> torch.dtype:
    """float32 on a CPU, where half precision is slow and less exact; the model's own dtype elsewhere, as QMoE."""
    named = reader.config.get("dtype") or reader.config.get("torch_dtype") or "bfloat16"
    return torch.float32 if torch.device(device).type == "cpu" else getattr(torch, named)


def _made_of(
    reader: Reader, recipe: Recipe, documents: list[str], samples: list[Sample], device: str
) -> dict[str, str]:
    """What must be the same when a run continues."""
    tokens = hashlib.sha256(fingerprint(documents).encode())
    for sample in samples:
        for ids in (sample.ids, sample.labels):
            tokens.update(b"" if ids is None else ids.numpy().tobytes())
    return {
        "model": fingerprint_of(reader, reader.names()),
        "recipe": hashlib.sha256(recipe.to_toml().encode()).hexdigest(),
        "calibration text": tokens.hexdigest(),
        "device": torch.device(device).type,
        "version of halfbit": version("halfbit"),
    }


def _digest(parts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
