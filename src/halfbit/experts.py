"""What an experts module is, found by structure, and what it computes, spelled out for one expert.

Three forms cover the models of transformers 5; nothing here asks for a model's name.

    top_k     decorated by `use_experts_implementation`: 3-D parameters, forward(hidden, index [T, k], weights [T, k])
    sorted    Llama 4: 3-D parameters, forward(hidden [experts * T, H]), the rows of expert 0 first, scaled beforehand
    one_hot   Switch: one small MLP per expert, forward(hidden, one-hot [T, 1, experts], weights [T, 1])

`ExpertStack.route` brings the three calls to one: rows, the experts of each row, and the weights of their outputs. An
index outside [0, num_experts) means "skip": Switch's full experts and Llama 4's zero rows come out so.

Matrices are [out, in] here, whatever way round the module stores them.
"""

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbit.errors import Unsupported

# attributes that hold an activation function in transformers' models
ACTIVATIONS = ("act_fn", "act", "activation_fn")

# linear layers of an expert that is a module of its own: those that read the token, the one that writes it
MEMBERS = ((("wi",), "wo"), (("gate_proj", "up_proj"), "down_proj"), (("w1", "w3"), "w2"))


@dataclass(frozen=True)
class ExpertStack:
    """One experts module: `num_experts` MLPs of one shape.

    Attributes:
        path: of the module in the model, "model.layers.0.mlp.experts".
        num_experts: how many.
        projections: (out, in) of each weight by name, input projections first.
        up: names of the input projections; their outputs, side by side, go into the gate.
        down: name of the output projection.
        biases: parameter name of each projection's bias, [experts, out]; None where it has none.
        form: the calling convention, see above.
        arguments: parameter names of the module's forward.
        transposed: the module stores [experts, in, out].
        post_norm: name of the submodule applied to each expert's output.
        members: names of the experts' submodules (one_hot), else empty.
        activation: attribute of the module or member with the activation function; None: `_apply_gate` has its own.
    """

    path: str
    num_experts: int
    projections: Mapping[str, tuple[int, int]]
    up: tuple[str, ...]
    down: str
    biases: Mapping[str, str | None]
    form: Literal["top_k", "sorted", "one_hot"]
    arguments: tuple[str, ...]
    transposed: bool = False
    post_norm: str | None = None
    members: tuple[str, ...] = ()
    activation: str | None = None

    def parameters(self, projection: str) -> list[str]:
        """Names of a projection's weights in the model: one 3-D tensor, or one matrix per expert."""
        if self.members:
            return [f"{self.path}.{member}.{projection}.weight" for member in self.members]
        return [f"{self.path}.{projection}"]

    def bias_parameter(self, projection: str) -> str | None:
        """Name of a projection's bias in the model."""
        name = self.biases[projection]
        return None if name is None else f"{self.path}.{name}"

    def streamed(self) -> dict[str, str]:
        """Every weight and bias in the model -> its projection: what is not loaded with its block."""
        found = {n: p for p in self.projections for n in self.parameters(p)}
        return found | {n: p for p in self.projections if (n := self.bias_parameter(p)) is not None}

    def gate(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """What turns the input projections' outputs [T, sum of outs] into the output projection's input."""
        holder = module.get_submodule(self.members[0]) if self.members else module
        if self.activation is None:
            # of its settings alone; without weights it can go to another process
            bare: Any = copy(holder)
            bare.__dict__["_parameters"] = {}
            return partial(type(bare)._apply_gate, bare)
        gated = sum(self.projections[p][0] for p in self.up) == 2 * self.projections[self.down][1]
        act = getattr(holder, self.activation)
        return partial(_gated, act) if gated else act

    def route(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of the module's forward as (hidden [T, H], index int64 [T, k], weights [T, k])."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        hidden, *routing = [given[name] for name in self.arguments]
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.form == "sorted":
            index = torch.arange(self.num_experts, device=rows.device)
            index = index.repeat_interleave(rows.shape[0] // self.num_experts)
            # a token that did not choose the expert was multiplied by zero; without biases its output is zero too
            index = index.masked_fill((rows == 0).all(dim=1), self.num_experts)
            return rows, index[:, None], torch.ones_like(rows[:, :1])
        index, weights = routing
        if self.form == "one_hot":
            chosen = index.reshape(-1, self.num_experts)
            # the row of a token beyond its expert's capacity is all zeros
            index = chosen.argmax(dim=1).masked_fill(chosen.sum(dim=1) == 0, self.num_experts)[:, None]
        return rows, index.to(torch.int64), weights.reshape(index.shape)


def _gated(act: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return act(gate) * up


def expert_forward(
    stack: ExpertStack, module: nn.Module, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], x: Tensor
) -> Tensor:
    """One expert on its tokens, the definition.

    Args:
        stack: the description of the experts.
        module: the experts module, for its gate and post norm; its weights are not touched.
        weights: [out, in] by projection.
        biases: [out] by projection, where there are any.
        x: [tokens, in].

    Returns:
        [tokens, out], not yet multiplied by the routing weight.
    """
    y = torch.cat([F.linear(x, weights[name], biases.get(name)) for name in stack.up], dim=-1)
    y = F.linear(stack.gate(module)(y), weights[stack.down], biases.get(stack.down))
    return y if stack.post_norm is None else module.get_submodule(stack.post_norm)(y)


def experts_forward(
    stack: ExpertStack,
    module: nn.Module,
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
) -> Tensor:
    """What the experts module returns, one expert after the other, for the output of `ExpertStack.route`.

    Args:
        stack: the description of the experts.
        module: the experts module, for its gate and post norm.
        weights: [experts, out, in] by projection.
        biases: [experts, out] by projection, where there are any.
        hidden: [tokens, in].
        index: int64 [tokens, k]; outside [0, num_experts): skip.
        gates: [tokens, k], multiplied onto the experts' outputs.

    Returns:
        [tokens, out] in the dtype of `hidden`.
    """
    result = torch.zeros_like(hidden)
    for expert in range(stack.num_experts):
        token, slot = torch.where(index == expert)
        if token.numel() == 0:
            continue
        w, b = ({name: tensor[expert] for name, tensor in given.items()} for given in (weights, biases))
        y = expert_forward(stack, module, w, b, hidden[token])
        result.index_add_(0, token, (y * gates[token, slot, None]).to(result.dtype))
    return result


def find_experts(model: nn.Module) -> dict[str, ExpertStack]:
    """Every experts module of a model by its path. Works on the meta device.

    Raises:
        Unsupported: something has expert-like weights, and what it computes cannot be told from its structure.
    """
    stacks: dict[str, ExpertStack] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{found}.") for found in stacks):
            continue
        stack = _of_parameters(path, module) or _of_members(path, module)
        if stack is not None:
            _refuse_others(stack, module)
            stacks[path] = stack
    return stacks


def _refuse_others(stack: ExpertStack, module: nn.Module) -> None:
    """Weights beside the matrices, biases and norm would be lost, for example those of a learned activation."""
    known = stack.streamed()
    for name, _ in module.named_parameters():
        if f"{stack.path}.{name}" not in known and not name.startswith(f"{stack.post_norm}."):
            raise Unsupported(
                f"{stack.path}.{name}: a weight of {type(module).__name__} that is no matrix, bias or norm; such "
                "experts need a form of their own in experts.py"
            )


def _of_parameters(path: str, module: nn.Module) -> ExpertStack | None:
    """Experts as 3-D parameters that share their first dimension."""
    parameters = dict(module.named_parameters(recurse=False))
    cubes = {n: tuple(p.shape) for n, p in parameters.items() if p.dim() == 3 and p.shape[0] > 1}
    named = "expert" in type(module).__name__.lower()
    several = len(cubes) > 1 and len({shape[0] for shape in cubes.values()}) == 1
    if not cubes or not (named or several):
        return None
    names = ("gate_up_proj" if "gate_up_proj" in cubes else "up_proj", "down_proj")
    if set(cubes) != set(names):
        raise _unknown(path, module, cubes)
    (up_experts, *up), (down_experts, *down) = (cubes[n] for n in names)
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    biases: dict[str, str | None] = dict.fromkeys(names)
    post_norm = None
    # what the decorator leaves on a module
    if all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed")):
        form, transposed = "top_k", bool(module.is_transposed)
        activation = None if module.has_gate else "act_fn"
        if module.has_bias:
            biases = {n: f"{n}_bias" for n in names}
        # transformers 5.17 has no such flag yet
        if getattr(module, "has_post_expert_norm", False):
            post_norm = "post_expert_norm"
        known = len(arguments) == 3 and (names[0] == "gate_up_proj") == bool(module.has_gate)
    else:
        # down [H, I] follows up [2 I, H], or transposed [I, H] follows [H, 2 I]; never both, as I is not 2 I
        form, transposed, activation = "sorted", up[0] == down[1], "act_fn"
        known = (
            len(arguments) == 1
            and names[0] == "gate_up_proj"
            and (up == [2 * down[1], down[0]] or up == [down[1], 2 * down[0]])
            and callable(getattr(module, "act_fn", None))
        )
    if not known or up_experts != down_experts or set(parameters) != {*names, *(b for b in biases.values() if b)}:
        raise _unknown(path, module, cubes)
    return ExpertStack(
        path=path,
        num_experts=up_experts,
        projections={n: _out_in(cubes[n], transposed) for n in names},
        up=names[:1],
        down=names[1],
        biases=biases,
        form=form,
        arguments=arguments,
        transposed=transposed,
        post_norm=post_norm,
        activation=activation,
    )


def _out_in(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    return (shape[2], shape[1]) if transposed else (shape[1], shape[2])


def _of_members(path: str, module: nn.Module) -> ExpertStack | None:
    """Experts as identical small MLPs in a container with a forward of its own."""
    children = dict(module.named_children())
    # a plain container has no forward: whoever owns it decides what it means, and its layers are loaded with the block
    if not isinstance(module, nn.ModuleDict | nn.ModuleList) or type(module) in (nn.ModuleDict, nn.ModuleList):
        return None
    kinds = {(type(c), tuple((n, tuple(p.shape)) for n, p in c.named_parameters())) for c in children.values()}
    if len(kinds) != 1 or len(children) < 2:
        return None
    first = next(iter(children.values()))
    linears = {n: c for n, c in first.named_children() if isinstance(c, nn.Linear)}
    shapes = {n: (c.out_features, c.in_features) for n, c in linears.items()}
    known = next(((up, down) for up, down in MEMBERS if set(linears) == {*up, down}), None)
    activation = next((a for a in ACTIVATIONS if callable(getattr(first, a, None))), None)
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    only_weights = {n for n, _ in first.named_parameters()} == {f"{n}.weight" for n in linears}
    if known is None or activation is None or len(arguments) != 3 or not only_weights:
        raise _unknown(path, module, shapes)
    up, down = known
    return ExpertStack(
        path=path,
        num_experts=len(children),
        projections={n: shapes[n] for n in (*up, down)},
        up=up,
        down=down,
        biases=dict.fromkeys((*up, down)),
        form="one_hot",
        arguments=arguments,
        members=tuple(children),
        activation=activation,
    )


def _unknown(path: str, module: nn.Module, weights: Mapping[str, tuple[int, ...]]) -> Unsupported:
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in weights.items())
    return Unsupported(
        f"{path} ({type(module).__name__}): looks like experts ({shapes}), but what it computes cannot be told from "
        "its structure; it needs a form of its own in experts.py"
    )
