"""A model without its weights, and the weights of one part of it at a time.

A `Family` builds transformers' own model on the meta device, finds blocks and experts in it, claims every tensor of
the checkpoint, and then loads what is asked for: what lies outside the blocks, one block, some experts of one module.
Experts are never loaded with their block, they are streamed. What is loaded equals what `from_pretrained` loads.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from halfbit.blocks import Stack
from halfbit.claims import Claims, claim
from halfbit.errors import CheckpointError, NonFinite, Unsupported
from halfbit.experts import ExpertStack, find_experts
from halfbit.reader import Reader
from halfbit.untrusted import STUMBLES, check_counts


class Family:
    """The common part of all families. Accumulates: its model holds the parts that are loaded.

    Args:
        reader: the checkpoint.
        config: its transformers config.

    Attributes:
        reader: the checkpoint.
        config: its transformers config, untouched.
        model: transformers' model; on the meta device but for what is loaded.
        experts: the experts modules by path.
    """

    builder: ClassVar[Any]
    """What builds the model: AutoModelForCausalLM or AutoModelForSeq2SeqLM."""

    def __init__(self, reader: Reader, config: PreTrainedConfig):
        self.reader, self.config = reader, config
        self.model: Any = build(self.builder, config, torch.float32)
        self.experts: dict[str, ExpertStack] = find_experts(self.model)
        self._stacks = self.find_stacks()
        self._built: dict[torch.dtype, tuple[dict[str, torch.dtype], dict[str, Tensor]]] = {}
        for path in self.experts:
            if self.block_of(path) is None:
                raise Unsupported(f"{path}: experts outside the blocks; this model needs a family of its own")

    # what a family says

    def find_stacks(self) -> list[Stack]:
        """The chains of blocks, in the order in which they run."""
        raise NotImplementedError(f"{type(self).__name__} must say where its blocks are")

    def pinned(self) -> frozenset[str]:
        """Weights inside blocks that other blocks need; they are loaded with the outer part."""
        return frozenset()

    # structure

    def stacks(self) -> list[Stack]:
        """The chains of blocks, in the order in which they run."""
        return self._stacks

    def block_of(self, path: str) -> str | None:
        """The block that a module or weight lies in; None: outside."""
        return next((b for s in self._stacks for b in s.blocks if path == b or path.startswith(f"{b}.")), None)

    def experts_of(self, block: str) -> list[ExpertStack]:
        """The experts modules of one block."""
        return [s for p, s in self.experts.items() if p.startswith(f"{block}.")]

    def claims(self) -> Claims:
        """Who takes each tensor of the checkpoint; decided on the first call.

        Raises:
            UnclaimedWeight: a checkpoint tensor that nobody takes.
            CheckpointError: a weight of the model that no tensor gives, or a shape that does not fit.
        """
        return self._claims

    @cached_property
    def _claims(self) -> Claims:
        blocks = [b for s in self._stacks for b in s.blocks]
        return claim(self.model, self.reader, blocks, self.experts, self.pinned())

    # loading

    def load_outer(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load everything outside the blocks: embeddings, final norm, head."""
        pinned = self.pinned()
        self._load([n for n in self._weights() if self.block_of(n) is None or n in pinned], device, dtype)
        self._load_buffers([n for n in self._buffers(dtype) if self.block_of(n) is None], device, dtype)

    def load_block(
        self, path: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """Load one block but for its experts, which stay on the meta device; returns its module."""
        left_out = self.pinned() | {n for stack in self.experts_of(path) for n in stack.streamed()}
        inside = f"{path}."
        self._load([n for n in self._weights() if n.startswith(inside) and n not in left_out], device, dtype)
        self._load_buffers([n for n in self._buffers(dtype) if n.startswith(inside)], device, dtype)
        return self.model.get_submodule(path)

    def unload_block(self, path: str) -> None:
        """Put one block back on the meta device."""
        pinned, inside = self.pinned(), f"{path}."
        for name in self._weights():
            if name.startswith(inside) and name not in pinned:
                self._place(name, torch.empty_like(self.model.get_parameter_or_buffer(name), device="meta"))

    def expert_weights(self, stack: ExpertStack, projection: str, start: int, stop: int) -> Tensor:
        """[stop - start, out, in] of experts `start` to `stop`, in the checkpoint's dtype; no others are read."""
        if not 0 <= start < stop <= stack.num_experts:
            raise IndexError(f"{stack.path}.{projection}: experts {start}:{stop} of {stack.num_experts}")
        names = stack.parameters(projection)
        if stack.members:
            return torch.stack([self._read(name) for name in names[start:stop]])
        weights = self._read_some(names[0], start, stop)
        return weights.transpose(1, 2) if stack.transposed else weights

    def expert_biases(self, stack: ExpertStack, start: int, stop: int) -> dict[str, Tensor]:
        """[stop - start, out] by projection, in the checkpoint's dtype, where the experts have biases."""
        names = {p: stack.bias_parameter(p) for p in stack.projections}
        return {p: self._read_some(name, start, stop) for p, name in names.items() if name is not None}

    def weight(self, name: str) -> Tensor:
        """One weight of the model, from the checkpoint, in the checkpoint's dtype."""
        return self._read(name)

    def replace(self, name: str, value: Tensor) -> None:
        """Let a weight of the model have other values, where it is loaded."""
        weight = self.model.get_parameter_or_buffer(name)
        if weight.device.type != "meta":
            weight.data.copy_(value)

    def correct(self, path: str, correction: Tensor) -> None:
        """Let a layer of the model add `correction` to what it answers from now on."""
        self.model.get_submodule(path).register_forward_hook(lambda _module, _given, y: y + correction.to(y))

    # inside

    def _weights(self) -> list[str]:
        """Names of the model's weights and saved buffers."""
        claims = self.claims()
        return [*claims.sources, *(n for n in claims.tied if n not in claims.sources)]

    def _load(self, names: Iterable[str], device: torch.device | str, dtype: torch.dtype) -> None:
        claims, dtypes = self.claims(), self._dtypes(dtype)
        # a tied weight is loaded where the weight is that it is tied to
        wanted = {n for n in names if n not in claims.tied}
        twins: dict[str, list[str]] = {}
        for twin, name in claims.tied.items():
            twins.setdefault(name, []).append(twin)
        while wanted:
            source = claims.sources[min(wanted)]
            for name, value in source.read(self.reader.tensor, self.model).items():
                if name in wanted:
                    # a copy even where nothing changes: what the reader gives lies in the file
                    loaded = check_finite(name, value).to(device=device, dtype=dtypes[name], copy=True)
                    placed = self._place(name, loaded)
                    for twin in twins.get(name, []):
                        self._place(twin, placed)
            wanted -= {n for n, s in claims.sources.items() if s is source}

    def _load_buffers(self, names: Iterable[str], device: torch.device | str, dtype: torch.dtype) -> None:
        for name in names:
            self._place(name, self._buffers(dtype)[name].to(device))

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

    def _dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Dtype of every weight under a model dtype: some are float32 always, some are integers."""
        return self._plan(dtype)[0]

    def _buffers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Unsaved buffers under a model dtype, such as rotary frequencies."""
        return self._plan(dtype)[1]

    def _plan(self, dtype: torch.dtype) -> tuple[dict[str, torch.dtype], dict[str, Tensor]]:
        if dtype not in self._built:
            model = build(self.builder, self.config, dtype)
            always = set(model._keep_in_fp32_modules_strict or ())
            always |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
            patterns = [re.compile(p.replace("*", ".*")) for p in always]
            dtypes = {
                name: torch.float32 if any(p.search(name) for p in patterns) else t.dtype
                for name, t in model.state_dict().items()
            }
            self._built[dtype] = dtypes, dict(model.named_non_persistent_buffers())
        return self._built[dtype]

    def _read(self, name: str) -> Tensor:
        """One weight of the model in the checkpoint's dtype."""
        return check_finite(name, self.claims().sources[name].read(self.reader.tensor, self.model)[name])

    def _read_some(self, name: str, start: int, stop: int) -> Tensor:
        """`_read(name)[start:stop]` along the experts, reading no more than these where the conversion allows it."""
        source = self.claims().sources[name]
        experts = self.model.get_parameter_or_buffer(name).shape[0]
        if source.converter is None:
            part = self.reader.slice(source.first, start, stop)
        elif all(len(names) == experts for names in source.names.values()):
            some = {p: [self.reader.tensor(n) for n in names[start:stop]] for p, names in source.names.items()}
            part = source.convert(some, self.model)[name]
        else:
            part = source.read(self.reader.tensor, self.model)[name][start:stop]
        return check_finite(f"{name}[{start}:{stop}]", part)


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; raises NonFinite where it holds NaN or infinity."""
    # a sum over finite float16, bfloat16 or float32 cannot overflow float64, and takes no second tensor
    if tensor.is_floating_point() and not tensor.sum(dtype=torch.float64).isfinite():
        bad = int((~tensor.isfinite()).sum())
        raise NonFinite(
            f"{name}: {bad} of {tensor.numel()} weights are NaN or infinite; the checkpoint is damaged, download it "
            "again",
            tensor=name,
        )
    return tensor


def read_config(reader: Reader) -> PreTrainedConfig:
    """transformers' config of a checkpoint, without its quantization, which the reader undoes."""
    if "model_type" not in reader.config:
        raise CheckpointError(f"{reader.files}/config.json: no model_type; give a folder saved by `save_pretrained`")
    check_counts(reader.config, f"{reader.files}/config.json")
    try:
        config = AutoConfig.from_pretrained(reader.path("config.json"), trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise Unsupported(
            f"{reader.files}: transformers does not know model_type {reader.config['model_type']!r}; a newer version "
            "may. Code that comes with a checkpoint is never run"
        ) from error
    except STUMBLES as error:
        raise CheckpointError(
            f"{reader.files}: transformers cannot make a config of config.json ({error}); take the one that belongs to "
            "the weights"
        ) from error
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
    return config


def build(builder: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model on the meta device, in eval mode; unsaved buffers (rotary frequencies) are on the CPU."""
    config = deepcopy(config)
    for part in (config, config.get_text_config()):
        # recorders stand in for blocks: there is nothing to collect outputs from
        for flag in ("output_router_logits", "output_hidden_states", "output_attentions", "use_cache"):
            if getattr(part, flag, False):
                setattr(part, flag, False)
    try:
        with torch.device("meta"):
            model = builder.from_config(config, trust_remote_code=False, dtype=dtype)
    except ValueError as error:
        raise Unsupported(f"{config.model_type}: transformers cannot build it for text generation: {error}") from error
    except STUMBLES as error:
        raise CheckpointError(
            f"{config.name_or_path}: transformers cannot build a model of this config ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}); give a complete config.json"
        ) from error
    model.requires_grad_(False).eval()
    # as `from_pretrained` does: all else is marked as initialised, then the model's own rule fills what is left
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = torch.zeros_like(buffer, device="cpu")
    model.initialize_weights()
    return model
