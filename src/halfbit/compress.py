"""THE LOOP: a model, block by block, into a compressed folder. It yields events and prints nothing.

For each block (QMoE, arXiv 2310.16795, section 3.2, and the published code's order of work):

    load the block without its experts; run all samples to the experts' door and keep what each was given
    for each group of experts: weights from the shards -> Hessians of their tokens -> solve -> encode -> decode,
        and the decoded experts' outputs are added up for all tokens
    run the block again with these outputs in the experts' place; the result feeds the next block
    commit the block: one file, then its lines in the manifest

Device memory holds one block without experts and one group of experts. A run that was interrupted starts again with the
same arguments; committed blocks are read back instead of solved.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbit import formats
from halfbit.activations import Activations, Routed
from halfbit.claims import Claims
from halfbit.errors import CalibrationError, RecipeError
from halfbit.events import Began, BlockBegan, BlockDone, Event, Finished, Noticed, Solved
from halfbit.expert_groups import Group, max_tokens, solve
from halfbit.experts import ExpertStack
from halfbit.families import open_family
from halfbit.family import Family
from halfbit.flow import Flow
from halfbit.nn import stored_name, stored_names
from halfbit.reader import Reader
from halfbit.recipe import Recipe, Rule
from halfbit.samples import Sample, fingerprint, load_tokenizer, longest, read_text, samples_of, tokenize, windows
from halfbit.types import Packed
from halfbit.writer import FORMAT_VERSION, Writer

ROLES = ("up", "down")
# of the files that hold what lies outside the blocks
SHARD_BYTES = 2 << 30


def compress(
    source: str,
    folder: str | Path,
    recipe: Recipe,
    calibration: str | None = None,
    *,
    device: str = "cpu",
    revision: str | None = None,
) -> Iterator[Event]:
    """Compress `source` into `folder` by `recipe`.

    Args:
        source: model folder or hub id.
        folder: new or empty folder, or one that holds an interrupted run of the same arguments.
        calibration: text file, .jsonl file or data set name; not needed when every rule rounds to nearest.
        device: "cpu" or "cuda".

    Yields:
        events, the last of them `Finished`.
    """
    reader = Reader(source, revision)
    family = open_family(reader)
    claims, dtype = family.claims(), _compute_dtype(reader, device)
    rules = {path: _rules(recipe, stack) for path, stack in family.experts.items()}
    if not any(rules.values()):
        raise RecipeError(
            f"{source}: no weight matches a rule of recipe {recipe.name!r} "
            f"({', '.join(r.match for r in recipe.rules)}); "
            f"this model has {f'experts at {next(iter(rules))}' if rules else 'no experts modules'}"
        )
    compressed = _compressed(claims, [family.experts[path] for path, pair in rules.items() if pair])
    documents: list[str] = []
    samples: list[Sample] = []
    if any(rule.solver != "rtn" for pair in rules.values() if pair for rule in pair):
        if recipe.calibration.sequence_length == 0:
            recipe = recipe.calibrated(sequence_length=longest(family.config))
        documents, samples = _samples(reader, family, recipe, calibration)
    about = {
        "halfbit": version("halfbit"),
        "source": Path(source).name,
        "recipe": recipe.name,
        "calibration": fingerprint(documents) if documents else None,
    }
    writer = Writer(folder, _fingerprint(reader, recipe, documents, device), about)
    blocks = [block for part in family.stacks() for block in part.blocks]
    yield Began(
        writer.folder,
        blocks=len(blocks),
        matrices=sum(2 * family.experts[path].num_experts for path, pair in rules.items() if pair),
        resumed=sum(map(writer.has, blocks)),
    )

    encoded: Activations | None = None
    if samples:
        family.load_outer(device, dtype)
    for part in family.stacks():
        flow = Flow(part, samples, encoded, device) if samples else None
        for block in part.blocks:
            number = blocks.index(block)
            stored = writer.read(block) if writer.has(block) else None
            yield BlockBegan(block, number, resumed=stored is not None)
            module = family.load_block(block, device, dtype) if flow else None
            for path, stack in family.experts.items():
                if path.startswith(f"{block}."):
                    routed = flow.capture(block, module, stack) if flow and module is not None else None
                    yield from _experts(family, stack, rules[path], recipe, routed, writer, stored, device, flow)
            if stored is None:
                for name in claims.tensors_of(block):
                    if name not in compressed:
                        writer.put(name, reader.tensor(name))
                writer.commit(block, f"model-block-{number:05d}.safetensors")
            if flow and module is not None:
                if block != blocks[-1]:
                    flow.advance(block, module)
                family.unload_block(block)
            yield BlockDone(block, number)
        encoded = flow.end() if flow and part is not family.stacks()[-1] else None

    for number, names in enumerate(_shards(reader, [n for n, claim in claims.tensors.items() if claim.block is None])):
        if not writer.has(f"outer {number}"):
            for name in names:
                writer.put(name, reader.tensor(name))
            writer.commit(f"outer {number}", f"model-outer-{number:05d}.safetensors")
    writer.finish(_config(reader, writer), [reader.path(n) for n in reader.auxiliary_files()], recipe.to_toml())
    yield Finished(writer.folder)


def _experts(
    family: Family,
    stack: ExpertStack,
    rules: tuple[Rule, Rule] | None,
    recipe: Recipe,
    routed: Routed | None,
    writer: Writer,
    stored: dict[str, Tensor] | None,
    device: str,
    flow: Flow | None,
) -> Iterator[Event]:
    """Solve (or read back) the experts of one module, group by group, and hand their outputs to the flow."""
    outputs = torch.zeros_like(routed.hidden) if routed else None
    packed: dict[str, list[Packed]] = {role: [] for role in ROLES}
    kept = {role: _stored(stack, role, writer, stored) for role in ROLES} if stored is not None and rules else None
    tokens: list[int] = []
    module = family.model.get_submodule(stack.path)
    if kept is not None and routed is None:
        return
    step = recipe.solving.experts_per_batch
    for start in range(0, stack.num_experts, step):
        experts = range(start, min(start + step, stack.num_experts))
        if routed is None and not rules:
            return
        group = Group.read(family, stack, module, experts, device)
        if kept is not None:
            group = _decoded(group, {role: [_rows(kept[role], stack, e) for e in experts] for role in ROLES})
        elif rules:
            solved = solve(group, rules, recipe, routed)
            yield from map(Noticed, solved.notices)
            tokens += solved.tokens
            fresh: dict[str, list[Packed]] = {}
            for role, rule, solutions in zip(ROLES, rules, (solved.up, solved.down), strict=True):
                assert rule.codec is not None
                fresh[role] = [rule.codec.encode(s) for s in solutions]
                for name, solution, p, n in zip(group.names, solutions, fresh[role], solved.tokens, strict=True):
                    matrix = f"{name}.{stored_names(stack)[ROLES.index(role)]}"
                    fact = {"loss": solution.loss, "bits_per_weight": p.bits_per_weight, "tokens": n}
                    writer.record("matrices", matrix, fact)
                    yield Solved(matrix, solution.loss, p.bits_per_weight, n)
                packed[role] += fresh[role]
            group = _decoded(group, fresh)
        if routed is not None and outputs is not None:
            group.add_outputs(routed, outputs)
    if kept is None and rules:
        _write(stack, packed, writer)
        if routed is not None:
            writer.record("coverage", stack.path, _coverage(recipe, routed, tokens))
    if flow and routed is not None and outputs is not None:
        flow.give(stack, routed, outputs)


def _compressed(claims: Claims, stacks: Iterable[ExpertStack]) -> set[str]:
    """Checkpoint tensors whose weights are stored in packed form (biases of experts are not)."""
    weights = [name for stack in stacks for projection in stack.projections for name in stack.parameters(projection)]
    return {tensor for name in weights for names in claims.sources[name].names.values() for tensor in names}


def _shards(reader: Reader, names: list[str]) -> list[list[str]]:
    """Names in order, cut where a file would pass SHARD_BYTES."""
    shards: list[list[str]] = []
    size = SHARD_BYTES
    for name in names:
        nbytes = prod(reader.shape(name)) * reader.dtype(name).itemsize
        if size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _decoded(group: Group, packed: dict[str, list[Packed]]) -> Group:
    """The group with the weights that inference will see."""
    dense = {
        role: torch.stack([p.codec.decode(p) for p in matrices]).to(group.up.device)
        for role, matrices in packed.items()
    }
    return replace(group, up=dense["up"], down=dense["down"])


def _write(stack: ExpertStack, packed: dict[str, list[Packed]], writer: Writer) -> None:
    entry = {}
    for role, projection in zip(ROLES, stored_names(stack), strict=True):
        first = packed[role][0]
        whole = first.codec.concatenate(packed[role])
        for part, tensor in whole.tensors.items():
            writer.put(stored_name(stack.path, projection, part), tensor)
        entry[projection] = {
            "codec": formats.to_config(whole.codec),
            "shape": [stack.num_experts, *first.shape],
            "tensors": {k: [str(t.dtype).removeprefix("torch."), list(t.shape)] for k, t in whole.tensors.items()},
        }
    writer.record("packed", stack.path, entry)


def _stored(stack: ExpertStack, role: str, writer: Writer, tensors: dict[str, Tensor] | None) -> Packed:
    """A committed projection of all experts, as the tall matrix that lies in the file."""
    assert tensors is not None
    projection = stored_names(stack)[ROLES.index(role)]
    entry = writer.manifest["packed"][stack.path][projection]
    experts, out, columns = entry["shape"]
    parts = {k: tensors[stored_name(stack.path, projection, k)] for k in entry["tensors"]}
    return Packed(formats.from_config(entry["codec"]), (experts * out, columns), parts)


def _rows(whole: Packed, stack: ExpertStack, expert: int) -> Packed:
    out = whole.shape[0] // stack.num_experts
    return whole.codec.rows(whole, expert * out, (expert + 1) * out)


def _coverage(recipe: Recipe, routed: Routed, tokens: list[int]) -> dict[str, Any]:
    """The coverage table of one experts module."""
    return {
        "routed": [len(routed.tokens_of(e)[0]) for e in range(routed.num_experts)],
        "trained": tokens,
        "cap": max_tokens(recipe.coverage, routed),
        "floor": recipe.coverage.floor,
        "below_floor": [e for e, n in enumerate(tokens) if n < recipe.coverage.floor],
        "undersampled": recipe.coverage.undersampled,
    }


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


def _samples(reader: Reader, family: Family, recipe: Recipe, source: str | None) -> tuple[list[str], list[Sample]]:
    """The calibration text, and the samples that the recipe wants of it."""
    if source is None:
        raise CalibrationError(
            "this recipe looks at data: give --calibration FILE (text or .jsonl) or a data set name; "
            "text like what the model will meet serves best"
        )
    c, documents = recipe.calibration, read_text(source)
    tokenizer = load_tokenizer(reader.source, reader.revision)
    rows = windows(tokenize(tokenizer, documents), c.samples, c.sequence_length, c.seed, origin=source)
    found = samples_of(rows, tokenizer, family.config, seed=c.seed, corruption=c.corruption, origin=source)
    return documents, found if c.mask_special else [s.unmasked() for s in found]


def _compute_dtype(reader: Reader, device: str) -> torch.dtype:
    """float32 on a CPU, where half precision is slow and less exact; the model's own dtype elsewhere, as QMoE."""
    named = reader.config.get("dtype") or reader.config.get("torch_dtype") or "bfloat16"
    return torch.float32 if device == "cpu" else getattr(torch, named)


def _fingerprint(reader: Reader, recipe: Recipe, documents: list[str], device: str) -> str:
    """What must be the same when a run continues."""
    digest = hashlib.sha256(reader.path("config.json").read_bytes())
    for name in reader.names():
        digest.update(f"{name} {reader.shape(name)} {reader.dtype(name)}\n".encode())
    digest.update(f"{recipe.to_toml()}{fingerprint(documents)}{device}{version('halfbit')}".encode())
    return digest.hexdigest()


def _config(reader: Reader, writer: Writer) -> dict[str, Any]:
    config = json.loads(reader.path("config.json").read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "halfbit",
        "format": FORMAT_VERSION,
        "modules": writer.manifest["packed"],
    }
    return config
