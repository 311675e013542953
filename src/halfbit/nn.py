"""Modules that run from compressed weights, and the one custom op a Mixture-of-Experts layer is.

`PackedMatrix` holds what a codec stored; `PackedExperts`, `PackedLinear` and `PackedEmbedding` take the places of
transformers' experts module, linear layer and embedding. Nothing is expanded beyond what the codec's product expands.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from halfbit import formats
from halfbit.errors import FormatError
from halfbit.experts import ExpertStack
from halfbit.formats._eager import eager
from halfbit.formats._grouped_product import one_group
from halfbit.formats.mixed import Mixed
from halfbit.layout import Entry, packed_name
from halfbit.linears import WEIGHT
from halfbit.routing import by_expert, weighted_sum
from halfbit.triton_support import backend, runs_on
from halfbit.types import CORRECTION, Codec, Packed

Product = Callable[[Tensor, Tensor], Tensor]


class PackedMatrix(nn.Module):
    """A stack of matrices `[experts, out, in]` in compressed form; the codec's parts are its buffers.

    `prepare` derives what the kernels need (offsets) once the buffers are loaded; nothing derived is saved.
    """

    def __init__(self, entry: Entry):
        super().__init__()
        self.entry, self.codec, self.shape = entry, entry.codec, entry.shape
        # as text, which is what a traced op can carry
        self.codec_config = json.dumps(formats.to_config(entry.codec))
        self._derived: list[str] = []
        for name, (dtype, size) in entry.tensors.items():
            # what belongs to another module is saved there, and handed over by `share`
            ours = name not in entry.shared
            self.register_buffer(name, torch.empty(size if ours else 0, dtype=dtype), persistent=ours)

    def share(self, part: str, owner: "PackedMatrix") -> None:
        """Take over a tensor that is stored with `owner`. Raises FormatError where it is not what the entry says."""
        tensor, (dtype, size) = getattr(owner, part, None), self.entry.tensors[part]
        if part in owner.entry.shared:
            raise FormatError(f"{part} is shared with a module that has none of its own", tensor=part)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or list(tensor.shape) != size:
            raise FormatError(f"{part} is shared with a module that has no such tensor {dtype} {size}", tensor=part)
        setattr(self, part, tensor)

    def packed(self) -> Packed:
        return self.entry.packed({n: getattr(self, n) for n in self.entry.tensors})

    def prepare(self) -> "PackedMatrix":
        """Check the stored tensors and derive the kernels' operands. Raises FormatError on damage."""
        for name in self.entry.tensors:
            if getattr(self, name).numel() == 0:
                # an empty slice of a file shares its address with the next tensor, which torch.save refuses
                setattr(self, name, torch.empty_like(getattr(self, name)))
        self.entry.check(self.packed())
        self._derive()
        return self

    def _derive(self) -> None:
        for name in self._derived:
            if name not in self.entry.tensors:
                delattr(self, name)
        self._derived.clear()
        for number, tensor in enumerate(self.codec.runtime(self.packed())):
            same = next((n for n in self.entry.tensors if getattr(self, n) is tensor), None)
            if same is None:
                same = f"runtime_{number}"
                self.register_buffer(same, tensor, persistent=False)
            self._derived.append(same)

    def added(self, bias: Tensor | None) -> Tensor | None:
        """What is added to products: the bias of the module, if any, and the correction that is stored here, if any."""
        if CORRECTION not in self.entry.tensors:
            return bias
        correction = self.get_buffer(CORRECTION)
        return correction if bias is None else bias + correction.to(bias.dtype).view_as(bias)

    def operands(self) -> list[Tensor]:
        """What the codec's product takes."""
        if not self._derived:
            raise FormatError("PackedMatrix: weights are not loaded yet; call prepare() after loading them")
        return [getattr(self, n) for n in self._derived]

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        return self.codec.product(x, starts, self.operands(), self.shape[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedMatrix":
        # model.half() or .to(bfloat16) must move the tensors but never change a stored bit
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        before = self._device()
        super()._apply(keep_dtype, recurse)
        after = self._device()
        # operands are arranged for the kernels of the device
        if self._derived and after.type != "meta" and runs_on(before) != runs_on(after):
            self._derive()
        return self

    def _device(self) -> torch.device:
        return next(iter(self.buffers())).device

    def extra_repr(self) -> str:
        return f"{self.codec!r}, experts={self.shape[0]}, out={self.shape[1]}, in={self.shape[2]}"


# --- gates: what happens between the two products, by name so that a traced op can carry it


def _glu(name: str) -> Callable[..., Tensor]:
    act = ACT2FN[name]

    def gate(x: Tensor, *_: float) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return act(first) * second

    return gate


def _plain(name: str) -> Callable[..., Tensor]:
    act = ACT2FN[name]
    return lambda x, *_: act(x)


def _clamped_swiglu(x: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss: gate and up interleaved, clamped, (up + 1) * gate * sigmoid(alpha * gate)."""
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


# gelu_new is gelu_pytorch_tanh in other words
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "sigmoid", "tanh")
GATES: dict[str, Callable[..., Tensor]] = {
    **{f"glu:{name}": _glu(name) for name in _ACTIVATIONS},
    **{f"plain:{name}": _plain(name) for name in _ACTIVATIONS},
    "clamped-swiglu": _clamped_swiglu,
}


def _named(name: str, numbers: list[float], x: Tensor) -> Tensor:
    return GATES[name](x, *numbers)


def name_gate(gate: Callable[[Tensor], Tensor], module: nn.Module) -> tuple[str, list[float]] | None:
    """Which of GATES a module's own gate is, found by comparing values; None when it is another one."""
    # transformers replaces modules with "meta" as the default device, where values cannot be compared
    far = torch.logspace(0, 4, 30, device="cpu")
    near = torch.linspace(-9, 9, 60, device="cpu")
    order = torch.randperm(120, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    # far values too: a gate may clamp what lies beyond some limit
    probe = torch.cat([near, far, -far])[order].view(4, 30)
    arguments = [float(getattr(module, k)) for k in ("alpha", "limit") if getattr(module, k, None) is not None]
    with torch.no_grad():
        expected = gate(probe)
        for name, candidate in GATES.items():
            if name == "clamped-swiglu" and len(arguments) != 2:
                continue
            found = candidate(probe, *arguments)
            # not equal to the bit: vectorised functions round differently by the layout of their input
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
                return name, arguments
    return None


class OwnGate:
    """The gate of an experts module, with what it reads of that module and without the weights. Can be pickled, which a
    bound method under another name cannot."""

    def __init__(self, stack: ExpertStack, original: nn.Module):
        self._stack = stack
        # a copy in which every weight is None
        self._holder = deepcopy(original, {id(p): None for p in original.parameters()})

    def __call__(self, x: Tensor) -> Tensor:
        return self._stack.gate(self._holder)(x)


# --- the layer


def experts_forward(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    num_experts: int,
    up: Product,
    down: Product,
    gate: Callable[[Tensor], Tensor],
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    post: Callable[[Tensor], Tensor] | None = None,
    waiting: bool = True,
) -> Tensor:
    """A Mixture-of-Experts layer over grouped products: sort tokens by expert, multiply, gate, multiply, weigh, sum.

    Args:
        hidden: `[tokens, width]`.
        index, weights: `[tokens, top_k]`; an index outside [0, num_experts) takes no expert.
        up, down: grouped products `(x sorted by expert, starts) -> y`.
        up_bias, down_bias: `[experts, features]`.
        waiting: hand `starts` to the products on the CPU, for which a device is waited for; False: leave it there.

    Returns:
        `[tokens, width]` in the dtype of `hidden`; expert outputs are summed in float32.
    """
    places = by_expert(index, num_experts, waiting=waiting)
    x = up(hidden[places.token], places.starts)
    # of what no expert takes there is no bias either
    own = places.expert if waiting else places.expert.clamp(max=num_experts - 1)
    if up_bias is not None:
        x = x + up_bias[own].to(x.dtype)
    y = down(gate(x).contiguous(), places.starts)
    if down_bias is not None:
        y = y + down_bias[own].to(y.dtype)
    if post is not None:
        y = post(y)
    return weighted_sum(y, places, weights).to(hidden.dtype)


@cache
def _codec(text: str) -> Codec:
    return formats.from_config(json.loads(text))


# tokens up to which the layer is two launches
FUSED_TOKENS = 32


@cache
def _fused() -> ModuleType:
    # triton may not be there
    return import_module("halfbit.formats._triton_experts")


def _members(codec: Codec, operands: list[Tensor], out_features: int, hidden: Tensor) -> list[Any] | None:
    """What the layer in two launches takes of a projection, see `_triton_experts.Member`; None where it cannot."""
    parts: list[tuple[Codec, list[Tensor], Tensor | None]] = [(codec, operands, None)]
    if isinstance(codec, Mixed):
        own = operands[0].unbind(0)
        parts = [*zip(codec.codecs, codec.separated(operands), own, strict=True)]
    kernels = [backend(member.name, hidden) for member, _, _ in parts]
    if not all(hasattr(module, "plan") for module in kernels):
        return None
    return [
        _fused().Member(partial(module.plan, member, tensors, out_features, hidden.dtype), own)
        for module, (member, tensors, own) in zip(kernels, parts, strict=True)
        if module is not None
    ]


@torch.library.custom_op("halfbit::experts", mutates_args=())
def experts_op(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    up: list[Tensor],
    down: list[Tensor],
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_codec: str,
    down_codec: str,
    num_experts: int,
    features: list[int],
    gate: str,
    gate_arguments: list[float],
) -> Tensor:
    """`experts_forward` as one op, for torch.compile and as the place where a fused kernel goes.

    `up_codec` and `down_codec` are configurations (JSON), `features` their output features per expert.
    """
    first, second = _codec(up_codec), _codec(down_codec)
    if hidden.shape[0] <= FUSED_TOKENS:
        members = [_members(*of, hidden) for of in zip((first, second), (up, down), features, strict=True)]
        if None not in members:
            given = up_bias, down_bias, num_experts, features, gate, gate_arguments
            return _fused().experts(hidden, index, weights, *members, *given)
    return experts_forward(
        hidden,
        index,
        weights,
        num_experts,
        up=lambda x, starts: first.product(x, starts, up, features[0]),
        down=lambda x, starts: second.product(x, starts, down, features[1]),
        gate=lambda x: GATES[gate](x, *gate_arguments),
        up_bias=up_bias,
        down_bias=down_bias,
        waiting=any(backend(codec.name, hidden) is None for codec in (first, second)),
    )


@experts_op.register_fake
def _(hidden: Tensor, *_args: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


class PackedExperts(nn.Module):
    """Takes the place of an experts module of transformers; same call, same result, compressed weights.

    Args:
        stack: what structure told about the original.
        original: the module itself; its gate, biases and norm are used, its weights are not.
        matrices: by the names that `stored_names(stack)` gives.
    """

    def __init__(self, stack: ExpertStack, original: nn.Module, matrices: dict[str, PackedMatrix]):
        super().__init__()
        self.stack = stack
        self._up, self._down = stored_names(stack)
        for name in (self._up, self._down):
            self.add_module(packed_name(name), matrices[name])
        self._biases = [[n for p in ps if (n := stack.biases[p]) is not None] for ps in (stack.up, (stack.down,))]
        for name in (n for names in self._biases for n in names):
            self.register_parameter(name, original.get_parameter(name))
        if stack.post_norm is not None:
            self.add_module(stack.post_norm, original.get_submodule(stack.post_norm))
        self._named_gate = name_gate(stack.gate(original), original) if stack.post_norm is None else None
        self._gate = None if self._named_gate is not None else OwnGate(stack, original)

    def matrix(self, name: str) -> PackedMatrix:
        """The packed matrix of a projection."""
        found = self.get_submodule(packed_name(name))
        assert isinstance(found, PackedMatrix)
        return found

    def _added(self) -> list[Tensor | None]:
        """To the products of the input and of the output projection, `[experts, out]`."""
        return [
            self.matrix(matrix).added(self._bias(names))
            for matrix, names in zip((self._up, self._down), self._biases, strict=True)
        ]

    def _bias(self, names: list[str]) -> Tensor | None:
        found: list[Tensor] = [self.get_parameter(n) for n in names]
        # one alone is not copied: this runs for every token
        return torch.cat(found, dim=-1) if len(found) > 1 else found[0] if found else None

    def run(self, hidden: Tensor, index: Tensor, weights: Tensor, up: Product, down: Product) -> Tensor:
        """The layer with other products in the places of its own, not as one op; see `experts_forward`."""
        if self._named_gate is not None:
            name, numbers = self._named_gate
            gate: Callable[[Tensor], Tensor] = partial(_named, name, numbers)
        else:
            assert self._gate is not None
            gate = self._gate
        up_bias, down_bias = self._added()
        post = self.get_submodule(self.stack.post_norm) if self.stack.post_norm is not None else None
        experts = self.stack.num_experts
        return experts_forward(hidden, index, weights, experts, up, down, gate, up_bias, down_bias, post)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        hidden, index, weights = self.stack.route(args, kwargs)
        up, down = self.matrix(self._up), self.matrix(self._down)
        # calling an operator of torch.library takes a tenth as long as the layer does with one token
        if self._named_gate is not None and not (hidden.is_cpu and eager(hidden)):
            gate, numbers = self._named_gate
            up_bias, down_bias = self._added()
            out = experts_op(
                hidden,
                index,
                weights,
                up.operands(),
                down.operands(),
                up_bias,
                down_bias,
                up.codec_config,
                down.codec_config,
                self.stack.num_experts,
                [up.shape[1], down.shape[1]],
                gate,
                numbers,
            )
        else:
            out = self.run(hidden, index, weights, up.forward, down.forward)
        given = args[0] if args else kwargs[self.stack.arguments[0]]
        return out.view_as(given)


@torch.library.custom_op("halfbit::linear", mutates_args=())
def linear_op(x: Tensor, operands: list[Tensor], codec: str, out_features: int) -> Tensor:
    """`[tokens, in]` -> `[tokens, out]` from one packed matrix, as one op for torch.compile; `codec` is JSON."""
    return _codec(codec).product(x, one_group(x.shape[0]), operands, out_features)


@linear_op.register_fake
def _(x: Tensor, operands: list[Tensor], codec: str, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("halfbit::lookup", mutates_args=())
def lookup_op(rows: Tensor, operands: list[Tensor], codec: str, shape: list[int]) -> Tensor:
    """int64 `[n]` -> float32 `[n, columns]`: rows of one packed matrix `[rows, columns]`; `codec` is JSON.

    Raises IndexError for a row that is outside; on a GPU, which would have to be waited for, this is not looked at.
    """
    if rows.device.type == "cpu" and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < shape[0]:
        raise IndexError(f"index out of range: rows 0 to {shape[0] - 1}, got {int(rows.min())} to {int(rows.max())}")
    return _codec(codec).lookup(rows, operands, shape[1])


@lookup_op.register_fake
def _(rows: Tensor, operands: list[Tensor], codec: str, shape: list[int]) -> Tensor:
    return torch.empty(rows.shape[0], shape[1], dtype=torch.float32, device=rows.device)


class _PackedLayer(nn.Module):
    """One packed matrix `[1, out, in]`, held or borrowed.

    Args:
        matrix: the matrix.
        dtype: what the weight had: some models ask a layer for it. Follows `.to(dtype)`.
        tied: the matrix belongs to another module (tied embeddings), which saves it and moves it.
    """

    weight: Tensor

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype, tied: bool):
        super().__init__()
        if not tied:
            self.add_module(packed_name(WEIGHT), matrix)
        # a list hides a borrowed module from nn.Module, so that it has one owner
        self._borrowed = [matrix] if tied else []
        # no rows: what a model's rule for new weights does to it, by way of the parent, is nothing
        self.register_buffer(WEIGHT, torch.empty(0, matrix.shape[2], dtype=dtype), persistent=False)

    @property
    def matrix(self) -> PackedMatrix:
        found = self._borrowed[0] if self._borrowed else self.get_submodule(packed_name(WEIGHT))
        assert isinstance(found, PackedMatrix)
        return found

    def stand_in(self) -> None:
        """Make the empty weight a parameter, which is never saved: a model without any cannot tell what it is in."""
        weight = self.get_buffer(WEIGHT)
        delattr(self, WEIGHT)
        self.register_parameter(WEIGHT, nn.Parameter(weight, requires_grad=False))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}{WEIGHT}", None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *lists: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *lists)
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}{WEIGHT}"]


class PackedLinear(_PackedLayer):
    """Takes the place of `nn.Linear`: same call, same result, compressed weight; any leading dimensions.

    Args:
        matrix: one matrix `[1, out, in]`.
        bias: `[out]` or None, as it was.
        dtype, tied: see `_PackedLayer`.
    """

    bias: nn.Parameter | None

    def __init__(self, matrix: PackedMatrix, bias: nn.Parameter | None, dtype: torch.dtype, *, tied: bool = False):
        super().__init__(matrix, dtype, tied)
        _, self.out_features, self.in_features = matrix.shape
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        matrix = self.matrix
        rows = input.reshape(-1, self.in_features)
        if rows.is_cpu and eager(rows):
            y = matrix(rows, one_group(rows.shape[0]))
        else:
            y = linear_op(rows, matrix.operands(), matrix.codec_config, self.out_features)
        added = matrix.added(self.bias)
        if added is not None:
            y = y + added.to(y.dtype)
        return y.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedEmbedding(_PackedLayer):
    """Takes the place of `nn.Embedding`: rows are decoded when they are looked up.

    Args:
        matrix: one matrix `[1, vocabulary, width]`.
        dtype, tied: see `_PackedLayer`; the result has this dtype.
        padding_idx: as `nn.Embedding` has it; only told, since nothing is trained.
    """

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype, padding_idx: int | None = None, *, tied: bool = False):
        super().__init__(matrix, dtype, tied)
        _, self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx = padding_idx

    def forward(self, input: Tensor) -> Tensor:
        matrix = self.matrix
        rows = lookup_op(input.reshape(-1), matrix.operands(), matrix.codec_config, list(matrix.shape[1:]))
        return rows.to(self.weight.dtype).view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def stored_names(stack: ExpertStack) -> tuple[str, str]:
    """Names under which a stack's input and output projection are stored; gate and up kept apart become one."""
    up = stack.up[0] if len(stack.up) == 1 else "_".join(stack.up)
    return up, stack.down
