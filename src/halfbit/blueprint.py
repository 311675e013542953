"""A model known from its config.json alone: every weight it has, without a checkpoint.

transformers' model is built on the meta device, and its own weights stand for the checkpoint's tensors. Where each
expert is a module of its own, thousands of them would take minutes and gigabytes; there the model is built with two
experts and with three, and what differs is what there is once per expert.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from halfbit import registry, untrusted
from halfbit.errors import CheckpointError
from halfbit.experts import ExpertStack
from halfbit.families import family_of
from halfbit.family import Family, read_config
from halfbit.reader import AUXILIARY, Folder, Reader, open_files, read_json

# how many experts the small models are built with
FEW, MORE = 2, 3
# what names the experts of one token in transformers' configs
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")


class ConfigReader(Reader):
    """Stands for the checkpoint of which only config.json is there; its tensors are the model's own weights.

    Accumulates: `give` says which these are.

    Args:
        source: a folder, a file such as config.json, or a hub repository "owner/name", of which nothing else is read.
    """

    def __init__(self, source: str | Path, revision: str | None = None):
        self.source, self.revision = str(source), revision
        path = Path(source)
        if path.is_file():
            self.files = Folder(path.parent)
            self.config = untrusted.read_json(path)
            self._file = path
        else:
            self.files = open_files(source, revision)
            self.config = read_json(self.files, "config.json")
            self._file = super().path("config.json")
        self.quantization, self._block = self._quantization(False)
        self._weights: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    @property
    def block(self) -> tuple[int, int]:
        """Of an fp8 checkpoint: the rectangle that shares a scale."""
        return self._block

    def give(self, weights: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """Names, shapes and dtypes of the tensors."""
        self._weights = weights

    def names(self) -> list[str]:
        return list(self._weights)

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def file(self, name: str) -> str:
        return "model.safetensors"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._weights[name][1]

    def path(self, filename: str) -> Path:
        return self._file if filename == "config.json" else super().path(filename)

    def sizes(self, *patterns: str) -> list[int]:
        """Bytes of the files of a local folder that match; none where there is no folder."""
        if not isinstance(self.files, Folder) or self._file.name != "config.json":
            return []
        found = [self.files.root / n for n in self.files.names() if any(fnmatch(n, p) for p in patterns)]
        return [path.stat().st_size for path in found]

    def auxiliary_bytes(self) -> int:
        """Of tokenizer and other files, as far as they are there."""
        return sum(self.sizes(*AUXILIARY))


@dataclass(frozen=True, eq=False)
class Blueprint:
    """What a model is made of.

    Attributes:
        reader, config: as read.
        family: the model on the meta device; it may have fewer experts than there are.
        weights: (shape, dtype) of each weight outside the experts modules' matrices, tied ones once, by name.
        stacks: experts modules by path, with all of their experts.
        dtype: of the checkpoint's weights, once they are read.
        per_token: experts that a token takes.
    """

    reader: ConfigReader
    config: PreTrainedConfig
    family: Family
    weights: dict[str, tuple[tuple[int, ...], torch.dtype]]
    stacks: dict[str, ExpertStack]
    dtype: torch.dtype
    per_token: int

    @classmethod
    def of(cls, source: str | Path, revision: str | None = None) -> "Blueprint":
        """Raises as `Reader` and `open_family` do, and CheckpointError where the config makes no model."""
        reader = ConfigReader(source, revision)
        config = read_config(reader)
        module = registry.module("families", family_of(reader, config))
        field: str | None = getattr(module, "EXPERTS_FIELD", None)
        count = getattr(config, field, 0) if field else 0
        if field and count > MORE:
            family = module.open_family(reader, _with(config, field, FEW))
            other = module.open_family(reader, _with(config, field, MORE))
        else:
            family = other = module.open_family(reader, config)
        named = reader.config.get("dtype") or reader.config.get("torch_dtype") or "bfloat16"
        dtype = getattr(torch, named) if isinstance(named, str) else None
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{reader.source}: dtype {named!r} in config.json is none that torch knows")
        all_stacks = family.experts
        if family is not other:
            all_stacks = {path: replace(stack, num_experts=count) for path, stack in all_stacks.items()}
        tied = {n for n, to in family.model.all_tied_weights_keys.items() if n != to}
        floats = {n: p for n, p in family.model.state_dict().items() if n not in tied}
        reader.give({n: (tuple(p.shape), dtype if p.is_floating_point() else p.dtype) for n, p in floats.items()})
        streamed = {n for stack in family.experts.values() for n, _ in _matrices(stack)}
        theirs = dict(other.model.state_dict())
        weights = {}
        for n, p in floats.items():
            if n not in streamed:
                shape = tuple(a if a == b else count for a, b in zip(p.shape, theirs[n].shape, strict=True))
                weights[n] = shape, reader.dtype(n)
        text = config.get_text_config()
        per_token = next((k for n in PER_TOKEN if isinstance(k := getattr(text, n, None), int)), 1)
        return cls(reader, config, family, weights, all_stacks, dtype, per_token)

    def inside(self, path: str) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """The weights of one block, experts' matrices left out."""
        return self._by_block.get(path, [])

    @cached_property
    def _by_block(self) -> dict[str | None, list[tuple[str, tuple[int, ...], torch.dtype]]]:
        found: dict[str | None, list[tuple[str, tuple[int, ...], torch.dtype]]] = {}
        for name, weight in self.weights.items():
            found.setdefault(self.family.block_of(name), []).append((name, *weight))
        return found

    def outside(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """The weights of no block: embeddings, final norm, head."""
        return self._by_block.get(None, [])

    def parameters(self) -> int:
        """Weights of the whole model."""
        experts = sum(
            stack.num_experts * out * width
            for stack in self.stacks.values()
            for out, width in stack.projections.values()
        )
        return experts + sum(torch.Size(shape).numel() for shape, _ in self.weights.values())


def _matrices(stack: ExpertStack) -> Iterator[tuple[str, str]]:
    return ((name, p) for p in stack.projections for name in stack.parameters(p))


def _with(config: PreTrainedConfig, field: str, count: int) -> Any:
    other = deepcopy(config)
    setattr(other, field, count)
    return other
