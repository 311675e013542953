"""transformers' own door: `AutoModelForCausalLM.from_pretrained(folder)` runs a folder that halfbit wrote.

Importing halfbit registers the quantizer "halfbit". `config.json` lists every packed module with its codec, shape and
stored tensors, so that the skeleton, the device map and the checkpoint agree before a byte is loaded.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbit import formats
from halfbit.errors import FormatError
from halfbit.experts import ExpertStack, find_experts
from halfbit.nn import PackedExperts, PackedMatrix, stored_names
from halfbit.writer import FORMAT_VERSION

METHOD = "halfbit"


@register_quantization_config(METHOD)
class HalfbitConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed folder.

    Args:
        format: version of the layout.
        modules: module path -> projection -> {"codec": {...}, "shape": [experts, out, in],
            "tensors": {part: [dtype, shape]}}.
    """

    def __init__(self, format: int = FORMAT_VERSION, modules: dict[str, Any] | None = None, **_: Any):
        if format != FORMAT_VERSION:
            raise FormatError(f"config.json: expected halfbit format {FORMAT_VERSION}, got {format!r}; update halfbit")
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.format = format
        self.modules = modules or {}


@register_quantizer(METHOD)
class HalfbitQuantizer(HfQuantizer):
    """Puts PackedExperts in the place of experts modules before transformers loads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        stacks = find_experts(model)
        config: Any = self.quantization_config
        for path, projections in config.modules.items():
            if path not in stacks:
                raise FormatError(f"config.json: packed module {path} is no experts module of {type(model).__name__}")
            model.set_submodule(path, packed_experts(stacks[path], model.get_submodule(path), projections))
            # some models' rule for new weights reaches from the parent into the experts, which are gone
            model.get_submodule(path.rpartition(".")[0])._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, PackedMatrix):
                try:
                    module.prepare()
                except FormatError as e:
                    raise FormatError(f"{name}: {e}", tensor=name) from e
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def packed_experts(stack: ExpertStack, original: nn.Module, projections: dict[str, Any]) -> PackedExperts:
    """PackedExperts on the meta device, to be loaded, from one module's entry in the config."""
    if set(projections) != set(stored_names(stack)):
        raise FormatError(
            f"config.json: {stack.path}: expected projections {', '.join(stored_names(stack))}, "
            f"got {', '.join(projections)}"
        )
    matrices = {}
    with torch.device("meta"):
        for projection, entry in projections.items():
            parts = {k: (getattr(torch, dtype), list(shape)) for k, (dtype, shape) in entry["tensors"].items()}
            experts, out, columns = entry["shape"]
            matrices[projection] = PackedMatrix(formats.from_config(entry["codec"]), (experts, out, columns), parts)
    return PackedExperts(stack, original, matrices)
