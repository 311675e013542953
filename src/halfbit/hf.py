"""transformers' own door: `AutoModelForCausalLM.from_pretrained(folder)` runs a folder that halfbit wrote.

Importing halfbit registers the quantizer "halfbit". `config.json` lists every packed module with its codec, shape and
stored tensors, so that the skeleton, the device map and the checkpoint agree before a byte is loaded.
"""

import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbit.errors import FormatError
from halfbit.experts import ExpertStack, find_experts
from halfbit.layout import Entry
from halfbit.linears import WEIGHT
from halfbit.manifest import MANIFEST, parse_manifest, skipped, verify_loading
from halfbit.nn import PackedEmbedding, PackedExperts, PackedLinear, PackedMatrix, stored_names
from halfbit.untrusted import short
from halfbit.writer import FORMAT_VERSION

METHOD = "halfbit"
# a model's bytes for each of its files' (tied, and in a wider dtype), and what buffers it may have beside
WIDEST, UNSTORED = 16, 1 << 28
# for what `cached_file` returns None
NOT_RAISED = ("gated_repo", "missing_entries", "connection_errors")
QUIETLY: Any = {f"_raise_exceptions_for_{what}": False for what in NOT_RAISED}


@register_quantization_config(METHOD)
class HalfbitConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed folder.

    Args:
        format: version of the layout.
        modules: module path -> projection -> {"codec": {...}, "shape": [experts, out, in],
            "tensors": {part: [dtype, shape]}}.
        tied: module path -> path of the packed module whose matrix it is.
        manifest: the folder has a manifest with checksums. What `save_pretrained` writes has none, and does not say so.
    """

    def __init__(
        self,
        format: int = FORMAT_VERSION,
        modules: dict[str, Any] | None = None,
        tied: dict[str, str] | None = None,
        manifest: bool = False,
        **_: Any,
    ):
        if format != FORMAT_VERSION:
            raise FormatError(
                f"config.json: expected halfbit format {FORMAT_VERSION}, got {short(format)}; update halfbit"
            )
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.format = format
        if not isinstance(modules or {}, dict):
            raise FormatError(f"config.json: quantization_config.modules must be an object, got {short(modules)}")
        self.modules = modules or {}
        if not isinstance(tied or {}, dict) or not all(isinstance(v, str) for v in (tied or {}).values()):
            raise FormatError(f"config.json: quantization_config.tied must map modules to modules, got {short(tied)}")
        self.tied = tied or {}
        self.manifest = manifest

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key != "manifest"}


@register_quantizer(METHOD)
class HalfbitQuantizer(HfQuantizer):
    """Puts packed modules in the places of experts modules, linear layers and embeddings before transformers loads the
    weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> nn.Module:
        stacks = find_experts(model)
        config: Any = self.quantization_config
        shards = [Path(file) for file in checkpoint_files or ()]
        _refuse_elsewhere(model.config, shards)
        self._verification = None
        if shards and not skipped():
            self._verification = _verify(config, model.config, shards)
        for path, projections in config.modules.items():
            if path in stacks:
                model.set_submodule(path, packed_experts(stacks[path], model.get_submodule(path), projections))
                # some models' rule for new weights reaches from the parent into the experts, which are gone; no other
                # parent may be skipped, for the same rule fills the buffers that no file has
                parent: Any = model.get_submodule(path.rpartition(".")[0])
                parent._is_hf_initialized = True
            else:
                model.set_submodule(path, packed_layer(path, _layer(model, path), projections))
        for path, owner in config.tied.items():
            matrix, original = _matrix(model, owner, path), _layer(model, path)
            _check_shape(path, matrix.entry, original)
            model.set_submodule(path, _wrap(original, matrix, tied=True))
        tied_keys: Any = getattr(model, "all_tied_weights_keys", {})
        for name in [n for n, to in tied_keys.items() if _is_packed(model, n) or _is_packed(model, to)]:
            # transformers would look for the weights themselves
            del tied_keys[name]
        if shards:
            _refuse_larger(model, shards)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> nn.Module:
        model.requires_grad_(False)
        try:
            _refuse_missing(model)
            _prepare(model)
        finally:
            # what differs from its checksum tells more than what is wrong with it
            verification, self._verification = self._verification, None
            if verification is not None:
                verification.result()
        _leave_a_parameter(model)
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


def _prepare(model: nn.Module) -> None:
    """Hand over what modules share; check all that is packed."""
    for name, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            try:
                for part, owner in module.entry.shared.items():
                    module.share(part, _matrix(model, owner, name))
                module.prepare()
            except FormatError as e:
                raise FormatError(f"{name}: {e}", tensor=name) from e


def _verify(config: Any, of_model: Any, shards: list[Path]) -> Future[None] | None:
    """Begin to compare the shards with what the manifest beside them says; None where there is none.

    It is done by a thread of its own, while transformers loads and the formats are checked: nothing computes with a
    model before its result is there. The result raises FormatError where a shard differs.
    """
    path = shards[0].parent / MANIFEST
    if not path.is_file():
        # of a hub repository only what was asked for is there
        commit, name = getattr(of_model, "_commit_hash", None), of_model.name_or_path
        found = cached_file(name, MANIFEST, revision=commit, **QUIETLY) if commit else None
        path = Path(found) if found else path
    if path.is_file():
        manifest = parse_manifest(path)
        if config.modules != manifest["packed"]:
            raise FormatError(f"config.json: its packed modules are not those of {path}; download both again")
        thread = ThreadPoolExecutor(1, "halfbit-verify")
        verification = thread.submit(verify_loading, manifest, shards)
        thread.shutdown(wait=False)
        return verification
    if config.manifest:
        raise FormatError(f"{path}: is missing, and with it all checksums; download it, or load with verify=False")
    return None


def _refuse_elsewhere(of_model: Any, shards: list[Path]) -> None:
    """Raise where an index leads out of its folder, which transformers does not look at."""
    folder = Path(of_model.name_or_path)
    for path in shards if folder.is_dir() else ():
        if not path.is_relative_to(folder) or ".." in path.relative_to(folder).parts:
            raise FormatError(f"{folder}: its index names {short(str(path))}, which is elsewhere; download it again")


def _refuse_larger(model: nn.Module, shards: list[Path]) -> None:
    """Raise before transformers allocates and fills what no file can hold: sizes in config.json may be any."""
    held = sum(path.stat().st_size for path in shards)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    nbytes = sum(t.numel() * t.itemsize for t in tensors.values())
    if nbytes > WIDEST * held + UNSTORED:
        raise FormatError(
            f"config.json: describes a model of {nbytes:,} bytes, the files hold {held:,}; download all of them again"
        )


def _refuse_missing(model: Any) -> None:
    """Raise where a weight came from no file: transformers only warns, and fills in random numbers.

    What it loads carries a mark; what lies on the disk (offloaded) is still on the meta device.
    """
    allowed = [*model.all_tied_weights_keys, *(model._keys_to_ignore_on_load_missing or ())]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if getattr(tensor, "_is_hf_initialized", False) or tensor.device.type == "meta":
            continue
        if not any(re.search(pattern, name) for pattern in allowed):
            raise FormatError(f"{name}: no file of this folder has this weight; halfbit verify tells more", tensor=name)


def _leave_a_parameter(model: nn.Module) -> None:
    """Where nothing but packed weights is left, transformers finds no parameter that tells a model's device and dtype:
    the first packed layer gives one."""
    # from the innermost model on, whose parameter is one of the outer model too
    for part in reversed([m for m in model.modules() if isinstance(m, PreTrainedModel)]):
        if any(p.is_floating_point() for p in part.parameters()):
            continue
        layer = next((m for m in part.modules() if isinstance(m, PackedLinear | PackedEmbedding)), None)
        # a hook that offloads would look for the parameter among the weights
        if layer is not None and not getattr(getattr(layer, "_hf_hook", None), "offload", False):
            layer.stand_in()


def _layer(model: nn.Module, path: str) -> nn.Module:
    """The linear layer or embedding at `path`."""
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear | nn.Embedding):
        raise FormatError(
            f"config.json: {path} is no experts module, linear layer or embedding of {type(model).__name__}",
            tensor=path,
        )
    return found


def _matrix(model: nn.Module, owner: str, asked_by: str) -> PackedMatrix:
    """The matrix of the packed layer at `owner`."""
    try:
        found = model.get_submodule(owner)
    except AttributeError:
        found = None
    if not isinstance(found, PackedLinear | PackedEmbedding):
        raise FormatError(f"config.json: {asked_by} shares with {owner}, which is no packed layer", tensor=asked_by)
    return found.matrix


def _is_packed(model: nn.Module, weight: str) -> bool:
    try:
        return isinstance(model.get_submodule(weight.rpartition(".")[0]), PackedLinear | PackedEmbedding)
    except AttributeError:
        return False


def packed_layer(path: str, original: nn.Module, projections: Any) -> nn.Module:
    """PackedLinear or PackedEmbedding on the meta device, to be loaded, from one module's entry in the config."""
    if not isinstance(projections, dict) or set(projections) != {WEIGHT}:
        raise FormatError(f"config.json: {path}: expected the projection {WEIGHT}", tensor=path)
    entry = Entry.parse(projections[WEIGHT], f"config.json: {path}.{WEIGHT}")
    _check_shape(path, entry, original)
    with torch.device("meta"):
        return _wrap(original, PackedMatrix(entry))


def _check_shape(path: str, entry: Entry, original: nn.Module) -> None:
    expected = (1, *original.get_parameter(WEIGHT).shape)
    if entry.shape != expected:
        raise FormatError(
            f"config.json: {path}: expected the shape {list(expected)} of this model, got {list(entry.shape)}",
            tensor=path,
        )


def _wrap(original: nn.Module, matrix: PackedMatrix, *, tied: bool = False) -> nn.Module:
    dtype = original.get_parameter(WEIGHT).dtype
    if isinstance(original, nn.Embedding):
        return PackedEmbedding(matrix, dtype, original.padding_idx, tied=tied)
    assert isinstance(original, nn.Linear)
    return PackedLinear(matrix, original.bias, dtype, tied=tied)


def packed_experts(stack: ExpertStack, original: nn.Module, projections: Any) -> PackedExperts:
    """PackedExperts on the meta device, to be loaded, from one module's entry in the config."""
    up, down = stored_names(stack)
    if not isinstance(projections, dict) or set(projections) != {up, down}:
        raise FormatError(f"config.json: {stack.path}: expected the projections {up} and {down}", tensor=stack.path)
    outs = {up: sum(stack.projections[p][0] for p in stack.up), down: stack.projections[down][0]}
    ins = {up: stack.projections[stack.up[0]][1], down: stack.projections[down][1]}
    matrices = {}
    for projection, config in projections.items():
        entry = Entry.parse(config, f"config.json: {stack.path}.{projection}")
        expected = (stack.num_experts, outs[projection], ins[projection])
        if entry.shape != expected:
            raise FormatError(
                f"config.json: {stack.path}.{projection}: expected the shape {list(expected)} of this model, got "
                f"{list(entry.shape)}",
                tensor=f"{stack.path}.{projection}",
            )
        with torch.device("meta"):
            matrices[projection] = PackedMatrix(entry)
    return PackedExperts(stack, original, matrices)
