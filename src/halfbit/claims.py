"""Which weight of the model each tensor of the checkpoint becomes, decided once, before anything is read.

transformers renames and converts checkpoints while it loads them: one tensor per expert into one 3-D parameter, old
names into new ones. The same rules (`get_model_conversion_mapping`, `rename_source_key`) are applied here to the names,
and the conversions to meta tensors of the checkpoint's shapes. What comes out is compared with the model, name by name
and shape by shape: a tensor that nobody takes, a weight that nobody gives and a shape that does not fit are errors.
"""

import re
from collections.abc import Callable, Mapping, Set
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from halfbit.errors import CheckpointError, UnclaimedWeight
from halfbit.experts import ExpertStack
from halfbit.reader import Reader


@dataclass(frozen=True, eq=False)
class Source:
    """Where one weight of the model, or several that are stored as one, come from.

    Attributes:
        target: name of the (first) weight in the model.
        names: checkpoint tensors by the converter's source pattern, experts in order.
        converter: transformers' rule that makes the weight of them; None: it is the tensor itself.
    """

    target: str
    names: Mapping[str, tuple[str, ...]]
    converter: WeightConverter | None = None

    @property
    def first(self) -> str:
        """The first checkpoint tensor; the only one where there is no converter."""
        return next(iter(self.names.values()))[0]

    def convert(self, tensors: Mapping[str, list[Tensor]], model: PreTrainedModel) -> dict[str, Tensor]:
        """Weights by name in the model, from the tensors by pattern."""
        if self.converter is None:
            return {self.target: next(iter(tensors.values()))[0]}
        # the rule collects tensors in itself
        rule = deepcopy(self.converter)
        for pattern, found in tensors.items():
            rule.collected_tensors[pattern] = list(found)  # pyright: ignore[reportArgumentType] (tensors are taken too)
        made = rule.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def read(self, tensor: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Weights by name in the model, from a function that reads a checkpoint tensor."""
        return self.convert({p: [tensor(n) for n in names] for p, names in self.names.items()}, model)


@dataclass(frozen=True)
class Claim:
    """Who takes a checkpoint tensor.

    Attributes:
        kind: "outer", "block", "experts", "tied" (a copy of another weight) or "ignored" (by the model's own rule).
        where: the weight's name in the model; for experts "path.projection"; for ignored the rule.
        block: path of the block that it is loaded or streamed with.
        experts: path of the experts module.
        expert: number of the expert, where the tensor holds one.
    """

    kind: Literal["outer", "block", "experts", "tied", "ignored"]
    where: str
    block: str | None = None
    experts: str | None = None
    expert: int | None = None


@dataclass(frozen=True, eq=False)
class Claims:
    """The whole checkpoint, claimed.

    Attributes:
        tensors: one claim per checkpoint tensor.
        sources: source by name of each weight of the model.
        tied: name of a weight of the model -> name of the weight that is loaded in its place.
        shards: the file of each checkpoint tensor.
    """

    tensors: Mapping[str, Claim]
    sources: Mapping[str, Source]
    tied: Mapping[str, str]
    shards: Mapping[str, str]

    def tensors_of(self, block: str) -> list[str]:
        """Names of the checkpoint tensors of one block, experts included."""
        return [n for n, c in self.tensors.items() if c.block == block]

    def experts_module(self, tensor: str) -> str | None:
        """Path of the experts module that a checkpoint tensor belongs to."""
        return self.tensors[tensor].experts

    def outer_shards(self) -> list[list[str]]:
        """Names of the checkpoint tensors outside the blocks, by the file they are in; ignored ones are left out."""
        groups: dict[str, list[str]] = {}
        for name, found in self.tensors.items():
            if found.kind in ("outer", "tied"):
                groups.setdefault(self.shards[name], []).append(name)
        return list(groups.values())

    def ignored(self) -> list[str]:
        """Names of the checkpoint tensors that the model's own rules leave out."""
        return [n for n, c in self.tensors.items() if c.kind == "ignored"]


def claim(
    model: PreTrainedModel,
    reader: Reader,
    blocks: list[str],
    experts: Mapping[str, ExpertStack],
    pinned: Set[str] = frozenset(),
) -> Claims:
    """Decide for every checkpoint tensor who takes it.

    Args:
        model: the model as it was built; its weights may be anywhere.
        reader: the checkpoint.
        blocks: paths of all blocks.
        experts: the experts modules by path.
        pinned: weights inside blocks that are loaded with the outer part.

    Raises:
        UnclaimedWeight: a checkpoint tensor that nobody takes.
        CheckpointError: a weight of the model that no tensor gives, or a shape that does not fit.
    """
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    grouped, homeless = _group(model, reader, shapes)
    sources: dict[str, Source] = {}
    for source in grouped:
        for name, shape in _shapes(source, model, reader).items():
            if name in shapes and shape != shapes[name]:
                raise CheckpointError(
                    f"{name}: expected {list(shapes[name])} by config.json, got {list(shape)} from {_some(source)}; "
                    "config.json and weights belong to different models",
                    tensor=name,
                )
            sources[name] = source
    ignored = _ignored(model, reader, homeless)
    tied = _tied(model, reader, sources)
    for name in shapes:
        if name not in sources and name not in tied:
            raise CheckpointError(
                f"{name} {list(shapes[name])}: no tensor of {reader.files} gives this weight; the checkpoint is "
                "incomplete, or config.json belongs to another model",
                tensor=name,
            )
    streamed = {n: (stack, p) for stack in experts.values() for n, p in stack.streamed().items()}
    tensors: dict[str, Claim] = {}
    for name, source in sources.items():
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        for i, tensor in ((i, t) for names in source.names.values() for i, t in enumerate(names)):
            if name in streamed:
                stack, projection = streamed[name]
                expert = _expert(stack, name, i, source)
                tensors[tensor] = Claim("experts", f"{stack.path}.{projection}", block, stack.path, expert)
            elif name in tied:
                tensors[tensor] = Claim("tied", tied[name])
            elif block is None or name in pinned:
                tensors[tensor] = Claim("outer", name)
            else:
                tensors[tensor] = Claim("block", name, block)
    tensors.update(ignored)
    # in the checkpoint's order, so that what is written from this is the same every time
    return Claims({n: tensors[n] for n in reader.names()}, sources, tied, {n: reader.file(n) for n in reader.names()})


def _expert(stack: ExpertStack, name: str, position: int, source: Source) -> int | None:
    """Number of the expert that a tensor holds; None: all of them."""
    if stack.members:
        return next(e for e, member in enumerate(stack.members) if name.startswith(f"{stack.path}.{member}."))
    per_expert = all(len(names) == stack.num_experts for names in source.names.values())
    return position if source.converter is not None and per_expert else None


def _group(
    model: PreTrainedModel, reader: Reader, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[Source], dict[str, str]]:
    """Checkpoint tensors grouped by the weight they make, and those without one with the name they would have."""
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, known = model.base_model_prefix, dict.fromkeys(shapes, True)
    grouped: dict[str, dict[str, list[str]]] = {}
    chosen: dict[str, WeightConverter | None] = {}
    homeless: dict[str, str] = {}
    # transformers collects tensors in this order, which is the order of the experts
    for name in sorted(reader.names(), key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=known)
        if renamed not in known:
            homeless[name] = renamed
            continue
        group = grouped.setdefault(renamed, {})
        if group and (pattern is None or chosen[renamed] is None):
            other = next(iter(group.values()))[0]
            raise CheckpointError(
                f"{name} and {other}: both give the weight {renamed}; remove the one that is left over", tensor=name
            )
        chosen[renamed] = by_pattern[pattern] if pattern is not None else None
        group.setdefault(pattern or name, []).append(name)
    sources = [Source(n, {p: tuple(names) for p, names in g.items()}, chosen[n]) for n, g in grouped.items()]
    return sources, homeless


def _shapes(source: Source, model: PreTrainedModel, reader: Reader) -> dict[str, tuple[int, ...]]:
    """Shapes of what a source makes, by running its conversion on meta tensors."""
    for names in source.names.values():
        missing = _gap(names)
        if missing is not None:
            raise CheckpointError(
                f"{missing}: missing, though {names[-1]} is there, and {source.target} is made of both; the checkpoint "
                "is incomplete, download it again",
                tensor=missing,
            )
    try:
        made = source.read(lambda n: torch.empty(reader.shape(n), dtype=reader.dtype(n), device="meta"), model)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{source.target}: cannot be made of {_some(source)} ({error}); the checkpoint is incomplete, or "
            "config.json belongs to another model",
            tensor=source.target,
        ) from error
    return {name: tuple(t.shape) for name, t in made.items()}


def _gap(names: tuple[str, ...]) -> str | None:
    """The first name missing from names that count 0, 1, 2, ... in one place."""
    first, last = names[0].split("."), names[-1].split(".")
    differing = [i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b]
    if len(first) != len(last) or len(differing) != 1 or not last[differing[0]].isdigit():
        return None
    place, there = differing[0], set(names)
    counted = (".".join([*last[:place], str(i), *last[place + 1 :]]) for i in range(int(last[place])))
    return next((n for n in counted if n not in there), None)


def _some(source: Source) -> str:
    names = [n for names in source.names.values() for n in names]
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} tensors)"


def _tied(model: PreTrainedModel, reader: Reader, sources: Mapping[str, Source]) -> dict[str, str]:
    """Weights that are another weight under a second name, as `PreTrainedModel.tie_weights` decides it."""
    groups: dict[str, list[str]] = {}
    for name, canonical in model.all_tied_weights_keys.items():
        groups.setdefault(canonical, [canonical]).append(name)
    tied = {}
    for names in groups.values():
        # the canonical name first; a checkpoint may hold the weight under one of the others
        present = [n for n in names if n in sources]
        for name in names:
            if not present or name == present[0]:
                continue
            # two names with two values: config.json is wrong, and both are kept
            if name not in sources or _equal(reader, sources[present[0]], sources[name]):
                tied[name] = present[0]
    return tied


def _equal(reader: Reader, a: Source, b: Source) -> bool:
    """Whether two plain tensors are the same; read in pieces, as they are embeddings."""
    if a.converter is not None or b.converter is not None or reader.shape(a.first) != reader.shape(b.first):
        return False
    rows, piece = reader.shape(a.first)[0], 4096
    return all(
        torch.equal(reader.slice(a.first, i, min(i + piece, rows)), reader.slice(b.first, i, min(i + piece, rows)))
        for i in range(0, rows, piece)
    )


def _ignored(model: PreTrainedModel, reader: Reader, homeless: Mapping[str, str]) -> dict[str, Claim]:
    """Tensors that the model's own rules leave out, such as DeepSeek-V3's extra layer that predicts two tokens."""
    rules = sorted(model._keys_to_ignore_on_load_unexpected or ())
    # what `from_pretrained` adds to the rules: buffers that older versions saved
    buffers = [n for n, _ in model.named_buffers()]
    rules += [r"rotary_emb\.inv_freq"] if any(n.endswith("rotary_emb.inv_freq") for n in buffers) else []
    rules += [r"(^|\.)position_ids$"] if any(n.endswith("position_ids") for n in buffers) else []
    claims = {}
    for name, renamed in homeless.items():
        rule = next((r for r in rules if re.search(r, renamed)), None)
        if rule is None:
            raise UnclaimedWeight(
                f"{name} {list(reader.shape(name))}: no module of {type(model).__name__} takes this tensor, and it "
                "would be lost; use the config.json that belongs to these weights, or a newer transformers",
                tensor=name,
            )
        claims[name] = Claim("ignored", rule)
    return claims
