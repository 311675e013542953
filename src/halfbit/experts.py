"""What an experts module is, found by structure, and what it computes, spelled out for one expert.

Three forms cover the models of transformers 5; nothing here asks for a model's name.

    top_k     decorated by `use_experts_implementation`: 3-D parameters, forward(hidden, index [T, k], weights [T, k])
    sorted    Llama 4: 3-D parameters, forward(hidden [experts * T, H]), the rows of expert 0 first; scaled beforehand
    one_hot   Switch: one small MLP per expert, forward(hidden, one-hot [T, 1, experts], weights [T, 1])

`ExpertStack.route` brings the three calls to one: rows, the expert of each row, and the weight of its output. An index
outside [0, num_experts) means "skip": expert parallelism, Switch's full experts and Llama 4's zero rows use it.

Matrices are [out, in] here, whatever way round the module stores them.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbit.errors import Unsupported


@dataclass(frozen=True)
class ExpertStack:
    """One experts module: `num_experts` MLPs of one shape.

    Attributes:
        path: of the module in the model, "model.layers.0.mlp.experts".
        num_experts: the first dimension of its weights.
        projections: (out, in) of each weight by name, input projections first.
        up: names of the input projections; their outputs, side by side, go into the gate.
        down: name of the output projection.
        form: the calling convention, see above.
        transposed: the module stores [experts, in, out].
        biases: parameter name of the bias of a projection, where it has one.
        post_norm: name of the submodule applied to each expert's output.
        members: names of the experts' submodules (one_hot), else empty.
        activation: attribute that holds the activation function of a module or member; None: the module's own gate.
    """

    path: str
    num_experts: int
    projections: Mapping[str, tuple[int, int]]
    up: tuple[str, ...]
    down: str
    form: Literal["top_k", "sorted", "one_hot"]
    transposed: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)
    post_norm: str | None = None
    members: tuple[str, ...] = ()
    activation: str | None = None

    def parameters(self, projection: str) -> list[str]:
        """Names of a projection's weights in the model: one 3-D tensor, or one matrix per expert."""
        if self.members:
            return [f"{self.path}.{member}.{projection}.weight" for member in self.members]
        return [f"{self.path}.{projection}"]

    def bias_parameters(self, projection: str) -> list[str]:
        """Names of a projection's biases in the model; empty where it has none."""
        if projection not in self.biases:
            return []
        if self.members:
            return [f"{self.path}.{member}.{self.biases[projection]}" for member in self.members]
        return [f"{self.path}.{self.biases[projection]}"]

    def all_parameters(self) -> list[str]:
        """Every weight and bias of the stack: what is streamed instead of loaded with its block."""
        return [n for p in self.projections for n in (*self.parameters(p), *self.bias_parameters(p))]

    def gate(self, module: nn.Module, y: Tensor) -> Tensor:
        """From the input projections' outputs side by side [T, sum of outs] to the output projection's input."""
        holder = module.get_submodule(self.members[0]) if self.members else module
        if self.activation is None:
            return holder._apply_gate(y)
        act = getattr(holder, self.activation)
        if self.projections[self.down][1] == y.shape[-1]:
            return act(y)
        gate, up = y.chunk(2, dim=-1)
        return act(gate) * up

    def route(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of the module's forward as (hidden [T, H], index int64 [T, k], weights [T, k])."""
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        hidden, *routing = list(bound.arguments.values())[1:]
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.form == "sorted":
            index = torch.arange(self.num_experts, device=rows.device)
            index = index.repeat_interleave(rows.shape[0] // self.num_experts)
            # a token that did not choose the expert was multiplied by zero; without biases its output is zero too
            index = index.masked_fill((rows == 0).all(dim=1), self.num_experts)
            return rows, index[:, None], torch.ones_like(rows[:, :1])
        index, weights = routing
        if self.form == "one_hot":
            # the row of a token beyond its expert's capacity is all zeros
            chosen = index.reshape(-1, self.num_experts)
            index = chosen.argmax(dim=1).masked_fill(chosen.sum(dim=1) == 0, self.num_experts)[:, None]
        return rows, index.to(torch.int64), weights.reshape(index.shape)


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
    y = stack.gate(module, y)
    y = F.linear(y, weights[stack.down], biases.get(stack.down))
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
        w = {name: weights[name][expert] for name in stack.projections}
        b = {name: biases[name][expert] for name in stack.biases}
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
            stacks[path] = stack
    return stacks


# attributes that hold an activation function, in transformers' models
ACTIVATIONS = ("act_fn", "act", "activation_fn")


def _of_parameters(path: str, module: nn.Module) -> ExpertStack | None:
    """Experts as 3-D parameters that share their first dimension."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return None
    cubes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1}
    named = "expert" in type(module).__name__.lower()
    if len({shape[0] for shape in cubes.values()}) != 1 or (len(cubes) < 2 and not named):
        if named and cubes:
            raise _unknown(path, module, cubes)
        return None
    up = ("gate_up_proj",) if "gate_up_proj" in cubes else ("up_proj",)
    if set(cubes) != {*up, "down_proj"}:
        raise _unknown(path, module, cubes)
    num_experts = cubes["down_proj"][0]
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        if len(arguments) != 3 or not module.is_concatenated and type(module)._apply_gate.__name__ == "_default_apply_gate":
            raise _unknown(path, module, cubes)
        form, transposed = "top_k", bool(module.is_transposed)
        activation = None if module.has_gate else "act_fn"
        biases = {p: f"{p}_bias" for p in (*up, "down_proj")} if module.has_bias else {}
        post_norm = "post_expert_norm" if module.has_post_expert_norm else None
    elif len(arguments) == 1 and up == ("gate_up_proj",) and callable(getattr(module, "act_fn", None)):
        # down [H, I] after up [2 I, H], or transposed [I, H] after [H, 2 I]; never both, as I is not 2 I
        (_, a, b), (_, c, d) = cubes["gate_up_proj"], cubes["down_proj"]
        if (b == c) == (a == d):
            raise _unknown(path, module, cubes)
        form, transposed, activation, biases, post_norm = "sorted", a == d, "act_fn", {}, None
    else:
        raise _unknown(path, module, cubes)
    others = {n for n, _ in module.named_parameters(recurse=False)} - set(cubes) - set(biases.values())
    if others:
        raise _unknown(path, module, cubes)
    projections = {n: (cubes[n][2], cubes[n][1]) if transposed else (cubes[n][1], cubes[n][2]) for n in (*up, "down_proj")}
    return ExpertStack(
        path=path, num_experts=num_experts, projections=projections, up=up, down="down_proj", form=form,
        transposed=transposed, biases=biases, post_norm=post_norm, activation=activation,
    )  # fmt: skip


# the linear layers of an expert that is a module of its own: inputs, output
MEMBERS = (
    (("wi",), "wo"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
)


def _of_members(path: str, module: nn.Module) -> ExpertStack | None:
    """Experts as identical small MLPs in a container that has a forward of its own."""
    children = dict(module.named_children())
    if not isinstance(module, nn.ModuleDict | nn.ModuleList) or len(children) < 2:
        return None
    kinds = {(type(c), tuple((n, tuple(p.shape)) for n, p in c.named_parameters())) for c in children.values()}
    first = next(iter(children.values()))
    linears = {n: c for n, c in first.named_children() if isinstance(c, nn.Linear)}
    known = next(((up, down) for up, down in MEMBERS if set(linears) == {*up, down}), None)
    expected = {f"{n}.{leaf}" for n, c in linears.items() for leaf, _ in c.named_parameters()}
    if len(kinds) != 1 or known is None or {n for n, _ in first.named_parameters()} != expected:
        return None
    # plain containers have no forward: whoever owns the list decides what it means
    if type(module) in (nn.ModuleDict, nn.ModuleList):
        return None
    up, down = known
    activation = next((a for a in ACTIVATIONS if callable(getattr(first, a, None))), None)
    if activation is None or len(inspect.signature(type(module).forward).parameters) != 4:
        raise _unknown(path, module, {n: tuple(c.weight.shape) for n, c in linears.items()})
    return ExpertStack(
        path=path, num_experts=len(children), projections={n: tuple(linears[n].weight.shape) for n in (*up, down)}, up=up,
        down=down, form="one_hot", biases={n: f"{n}.bias" for n in (*up, down) if linears[n].bias is not None},
        members=tuple(children), activation=activation,
    )  # fmt: skip


def _unknown(path: str, module: nn.Module, weights: Mapping[str, tuple[int, ...]]) -> Unsupported:
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in weights.items())
    return Unsupported(
        f"{path} ({type(module).__name__}): looks like experts ({shapes}), but what it computes cannot be told from its "
        "structure; it needs a form of its own in experts.py"
    )
