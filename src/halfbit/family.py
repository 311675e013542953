"""A model without its weights, and the weights of one part of it at a time.

A `Family` builds transformers' own model on the meta device, finds blocks and experts in it, claims every tensor of the
checkpoint, and then loads what is asked for: what lies outside the blocks, one block, some experts of one stack. Experts are
never loaded with their block: they are streamed. What is loaded equals what `from_pretrained` loads, in the same dtype.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from halfbit.blocks import Stack
from halfbit.claims import Claims, claim
from halfbit.errors import CheckpointError, NonFinite, Unsupported
from halfbit.experts import ExpertStack, find_experts
from halfbit.reader import Reader


class Family:
    """The common part of all families. Accumulates: its model holds the parts that are loaded.

    Args:
        reader: the checkpoint.
        config: its transformers config.
        dtype: floating-point dtype of what is loaded, as `from_pretrained(dtype=...)` takes it.

    Attributes:
        reader: the checkpoint.
        config: its transformers config, untouched.
        model: transformers' model; on the meta device but for what is loaded.
        experts: the experts modules by path.
    """

    # class that builds the model: AutoModelForCausalLM, AutoModelForSeq2SeqLM
    builder: Any

    def __init__(self, reader: Reader, config: PreTrainedConfig, dtype: torch.dtype = torch.float32):
        self.reader, self.config, self.dtype = reader, config, dtype
        self.model = build(self.builder, config, dtype)
        self.experts = find_experts(self.model)
        self._stacks = self.find_stacks()
        stray = [p for p in self.experts if self.block_of(p) is None]
        if stray:
            raise Unsupported(f"{stray[0]}: experts outside the blocks; it needs a family of its own in families/")

    # what a family says

    def find_stacks(self) -> list[Stack]:
        """The chains of blocks, in the order in which they run."""
        raise NotImplementedError(f"{type(self).__name__} must say where its blocks are")

    def pinned(self) -> set[str]:
        """Weights inside blocks that other blocks need; they are loaded with the outer part."""
        return set()

    # structure

    def stacks(self) -> list[Stack]:
        """The chains of blocks, in the order in which they run."""
        return self._stacks

    def blocks(self) -> list[str]:
        """Paths of all blocks, in the order in which they run."""
        return [b for s in self._stacks for b in s.blocks]

    def block_of(self, path: str) -> str | None:
        """The block that a module or weight lies in; None: outside."""
        return next((b for b in self.blocks() if path == b or path.startswith(f"{b}.")), None)

    def experts_of(self, block: str) -> list[ExpertStack]:
        """The experts modules of one block."""
        return [s for p, s in self.experts.items() if p.startswith(f"{block}.")]

    @cached_property
    def claims(self) -> Claims:
        """Who takes each tensor of the checkpoint; raises where one is left over or missing."""
        return claim(self.model, self.reader, self.blocks(), self.experts, self.pinned())

    # loading

    def load_outer(self, device: torch.device | str = "cpu") -> None:
        """Load everything outside the blocks: embeddings, final norm, head."""
        pinned = self.pinned()
        self._load([n for n in self._weights() if self.block_of(n) is None or n in pinned], device)
        for path, module in self.model.named_modules():
            if self.block_of(path) is None:
                _move_buffers(module, device)

    def load_block(self, path: str, device: torch.device | str = "cpu") -> nn.Module:
        """Load one block but for its experts, which stay on the meta device; returns its module."""
        block = self.model.get_submodule(path)
        streamed = {n for s in self.experts_of(path) for n in s.all_parameters()} | self.pinned()
        self._load([n for n in self._weights() if n.startswith(f"{path}.") and n not in streamed], device)
        for module in block.modules():
            _move_buffers(module, device)
        return block

    def unload_block(self, path: str) -> None:
        """Put one block back on the meta device."""
        pinned = self.pinned()
        for name, tensor in [*self.model.get_submodule(path).state_dict(keep_vars=True).items()]:
            if f"{path}.{name}" not in pinned:
                self._place(f"{path}.{name}", torch.empty_like(tensor, device="meta"))

    def expert_weights(self, stack: ExpertStack, projection: str, start: int, stop: int) -> Tensor:
        """[stop - start, out, in] of experts `start` to `stop` in the checkpoint's dtype, read from their shards alone."""
        if not 0 <= start <= stop <= stack.num_experts:
            raise IndexError(f"{stack.path}.{projection}: experts {start}:{stop} of {stack.num_experts}")
        names = stack.parameters(projection)
        if stack.members:
            weights = torch.stack([self._read(n) for n in names[start:stop]])
        else:
            weights = self._read_some(names[0], start, stop)
        return weights.transpose(1, 2) if stack.transposed else weights

    def expert_biases(self, stack: ExpertStack, start: int, stop: int) -> dict[str, Tensor]:
        """[stop - start, out] by projection, where the experts have biases."""
        biases = {}
        for projection in stack.biases:
            names = stack.bias_parameters(projection)
            members = stack.members
            biases[projection] = (
                torch.stack([self._read(n) for n in names[start:stop]]) if members else self._read_some(names[0], start, stop)
            )
        return biases

    # inside

    def _weights(self) -> list[str]:
        """Names of weights and saved buffers of the model as it was built."""
        return [*self.claims.sources, *self.claims.tied]

    def _load(self, names: Iterable[str], device: torch.device | str) -> None:
        wanted = set(names)
        done: set[str] = set()
        also: dict[str, list[str]] = {}
        for name, first in self.claims.tied.items():
            also.setdefault(first, []).append(name)
        for name in sorted(wanted - set(self.claims.tied)):
            if name in done:
                continue
            made = self.claims.sources[name].convert_with(self.reader.tensor, self.model)
            for made_name, value in made.items():
                if made_name not in wanted or made_name in self.claims.tied:
                    continue
                check_finite(made_name, value)
                kept = self.model.get_parameter_or_buffer(made_name)
                tensor = value.to(device=device, dtype=self._dtype(made_name, kept))
                placed = self._place(made_name, tensor)
                for other in also.get(made_name, []):
                    self._place(other, placed)
                done.add(made_name)

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._parameters:
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            module._parameters[leaf] = tensor
        elif leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            raise CheckpointError(f"{name}: {type(module).__name__} has no such weight", tensor=name)
        return tensor

    def _dtype(self, name: str, built: Tensor) -> torch.dtype:
        """Dtype of a loaded weight: float32 where the model insists on it, else as the model was built."""
        insists = set(self.model._keep_in_fp32_modules_strict or ())
        if self.dtype == torch.float16:
            insists |= set(self.model._keep_in_fp32_modules or ())
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in insists):
            return torch.float32
        return built.dtype

    def _read(self, name: str) -> Tensor:
        """One weight of the model in the checkpoint's dtype."""
        value = self.claims.sources[name].convert_with(self.reader.tensor, self.model)[name]
        return check_finite(name, value)

    def _read_some(self, name: str, start: int, stop: int) -> Tensor:
        """`_read(name)[start:stop]` along the experts, converting no more than these where the conversion allows it."""
        source = self.claims.sources[name]
        shape = tuple(self.model.get_parameter_or_buffer(name).shape)
        if source.converter is None:
            tensor = next(iter(source.names.values()))[0]
            return check_finite(f"{name}[{start}:{stop}]", self.reader.slice(tensor, start, stop))
        if all(len(names) == shape[0] for names in source.names.values()):
            some = {p: [self.reader.tensor(n) for n in names[start:stop]] for p, names in source.names.items()}
            if stop == start:
                return torch.empty(0, *shape[1:], dtype=self.reader.dtype(next(iter(source.names.values()))[0]))
            return check_finite(f"{name}[{start}:{stop}]", source.convert(some, self.model)[name])
        return check_finite(f"{name}[{start}:{stop}]", self._read(name)[start:stop])


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; raises NonFinite where it holds NaN or infinity."""
    # a sum is finite only if every term is, and needs no second tensor; a finite tensor whose sum overflows is looked at twice
    if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
        bad = int((~torch.isfinite(tensor.to(torch.float32))).sum())
        if bad:
            raise NonFinite(
                f"{name}: {bad} of {tensor.numel()} weights are NaN or infinite; the checkpoint is damaged, download it again",
                tensor=name,
            )
    return tensor


def read_config(reader: Reader) -> PreTrainedConfig:
    """transformers' config of a checkpoint, without its quantization, which the reader undoes."""
    if "model_type" not in reader.config:
        raise CheckpointError(f"{reader.files}/config.json: no model_type; give a folder saved by `save_pretrained`")
    try:
        config = AutoConfig.from_pretrained(reader.path("config.json").parent, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise Unsupported(
            f"{reader.files}: transformers does not know model_type {reader.config['model_type']!r}; a newer transformers may. "
            "Code that comes with a checkpoint is never run"
        ) from error
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def build(builder: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model on the meta device, in eval mode, with its unsaved buffers (rotary frequencies) initialised."""
    config = deepcopy(config)
    # recorders stand in for blocks: there is nothing to collect outputs from
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for flag in ("output_router_logits", "output_hidden_states", "output_attentions", "use_cache"):
            if getattr(part, flag, False):
                setattr(part, flag, False)
    try:
        with torch.device("meta"):
            model = builder.from_config(config, trust_remote_code=False, dtype=dtype)
    except ValueError as error:
        raise Unsupported(f"{type(config).__name__}: transformers cannot build it for text generation: {error}") from error
    model.requires_grad_(False).eval()
    # as `from_pretrained` does: all else is marked as initialised, then the model's own rule fills what is left
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for name, buffer in [*model.named_non_persistent_buffers()]:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = torch.zeros_like(buffer, device="cpu")
    model.initialize_weights()
    return model


def _move_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Unsaved buffers of one module; saved ones are loaded like weights."""
    for leaf in module._non_persistent_buffers_set:
        if module._buffers[leaf] is not None:
            module._buffers[leaf] = module._buffers[leaf].to(device)


