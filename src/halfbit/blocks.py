"""Activations through a model whose blocks are not all in memory.

The model's own forward runs with the `forward` of every block replaced by a recorder, which keeps what the block was called
with (masks, position embeddings; they differ between layers) and passes the hidden states on. A block is run later, when its
weights are there, with the arguments recorded for it. What comes after the last block is the model's own forward again, with
the last block's recorder answering with the hidden states it is given.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halfbit.errors import Unsupported

Inputs = Mapping[str, Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Context:
    """What one batch needs on its way beside its hidden states.

    Attributes:
        inputs: the model's inputs.
        calls: arguments of each block other than the hidden states.
    """

    inputs: Inputs
    calls: Mapping[str, Call]


def find_blocks(root: nn.Module, count: int, prefix: str = "") -> list[str]:
    """Paths of a decoder's or encoder's blocks: the outermost ModuleList with `count` entries.

    Raises:
        Unsupported: there is none, or more than one.
    """
    found: list[str] = []
    for path, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and not any(path.startswith(f"{f}.") for f in found):
            found.append(path)
    if len(found) != 1:
        what = f"{len(found)} of them: {', '.join(found)}" if found else "none"
        raise Unsupported(
            f"{type(root).__name__}: expected one list of {count} blocks (num_hidden_layers), found {what}; it needs a family "
            "of its own in families/"
        )
    return [f"{prefix}{found[0]}.{i}" for i in range(count)]


class Stack:
    """One chain of blocks and the model around it. Accumulates: keeps the recorded arguments of one batch per shape.

    Args:
        name: "decoder" or "encoder".
        model: the model; all but its blocks is on a device.
        blocks: paths of the blocks, in order.
        forward: the model's own forward, from the inputs to what follows the last block.
        answer: what the recorder of a block returns for its hidden states, where that is more than them.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        blocks: list[str],
        forward: Callable[[Inputs], Tensor],
        answer: Callable[[str, Tensor], Any] | None = None,
    ):
        self.name, self.model, self.blocks = name, model, blocks
        self._forward, self._answer = forward, answer
        self._seen: dict[tuple[Any, ...], dict[str, Call]] = {}

    @torch.no_grad()
    def begin(self, inputs: Inputs) -> tuple[Tensor, Context]:
        """Hidden states that enter the first block [batch, length, width], and the batch's context."""
        if self._answer is None:
            self._answer = self._probe(inputs)
        calls: dict[str, Call] = {}
        entered: list[Tensor] = []

        def record(path: str, hidden: Tensor, call: Call) -> Any:
            if entered and hidden is not entered[0]:
                raise Unsupported(f"{path}: the model changes the hidden states between two blocks; it needs its own family")
            entered.append(hidden)
            calls[path] = call
            if path == self.blocks[-1]:
                raise _Stop
            return self._answer(path, hidden)

        with self._recorders(record):
            try:
                self._forward(inputs)
            except _Stop:
                pass
        if len(calls) != len(self.blocks):
            raise Unsupported(f"{self.name}: the model ran {len(calls)} of its {len(self.blocks)} blocks")
        key = tuple((name, tuple(t.shape)) for name, t in inputs.items())
        shared = self._seen.setdefault(key, calls)
        return entered[0], Context(inputs, {path: _share(call, shared[path]) for path, call in calls.items()})

    @torch.no_grad()
    def run(self, path: str, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states after one block, which must be loaded."""
        args, kwargs = context.calls[path]
        result = self.model.get_submodule(path)(hidden, *args, **kwargs)
        return result if isinstance(result, Tensor) else result[0]

    @torch.no_grad()
    def end(self, hidden: Tensor, context: Context) -> Tensor:
        """What the model makes of the hidden states after its last block: logits, or the encoder's output."""
        if self._answer is None:
            self._answer = self._probe(context.inputs)

        def pass_on(path: str, entering: Tensor, _: Call) -> Any:
            return self._answer(path, hidden if path == self.blocks[-1] else entering)

        with self._recorders(pass_on):
            return self._forward(context.inputs)

    def _probe(self, inputs: Inputs) -> Callable[[str, Tensor], Any]:
        """Find out whether the model takes what a block returns as the hidden states or as a tuple that holds them.

        The recorder of the first block returns a tensor; what the model does first with it tells.
        """
        watch = _FirstUse()

        def record(path: str, hidden: Tensor, _: Call) -> Tensor:
            if watch.tensor is not None:
                raise _Stop
            watch.tensor = hidden.clone()
            return watch.tensor

        with self._recorders(record):
            try:
                with watch:
                    self._forward(inputs)
            except _Stop:
                pass
        if watch.use == "unpacked":
            raise Unsupported(
                f"{self.name}: the blocks of {type(self.model).__name__} hand each other more than hidden states; it needs a "
                "family of its own in families/"
            )
        if watch.use == "indexed":
            return lambda path, hidden: (hidden,)
        return lambda path, hidden: hidden

    @contextmanager
    def _recorders(self, record: Callable[[str, Tensor, Call], Any]) -> Iterator[None]:
        replaced = []
        for path in self.blocks:
            block = self.model.get_submodule(path)
            replaced.append((block, block.__dict__.get("forward")))
            block.forward = _recorder(path, record)
        try:
            yield
        finally:
            for block, before in replaced:
                del block.forward
                if before is not None:
                    block.forward = before


class _Stop(Exception):  # noqa: N818 - not an error
    """The recorders have seen enough."""


class _FirstUse(TorchFunctionMode):
    """Watches what is done first with one tensor."""

    def __init__(self):
        super().__init__()
        self.tensor: Tensor | None = None
        self.use: str | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # looking at shape, dtype or device tells nothing
        looks = func.__name__ in ("__get__", "dim", "size")
        if self.tensor is not None and not looks and any(a is self.tensor for a in args):
            indexed = func is Tensor.__getitem__ and type(args[1]) is int
            self.use = "indexed" if indexed else "unpacked" if func.__name__ == "unbind" else "hidden states"
            raise _Stop
        return func(*args, **(kwargs or {}))


def _recorder(path: str, record: Callable[[str, Tensor, Call], Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            return record(path, args[0], (args[1:], kwargs))
        kwargs = dict(kwargs)
        return record(path, kwargs.pop("hidden_states"), ((), kwargs))

    return forward


def _share(value: Any, seen: Any) -> Any:
    """`value`, with `seen`'s tensors wherever they are equal, so that batches of one shape share their masks."""
    if type(value) is not type(seen):
        return value
    if isinstance(value, Tensor):
        same = value.shape == seen.shape and value.dtype == seen.dtype and value.device == seen.device
        return seen if same and torch.equal(value, seen) else value
    if type(value) is dict:
        return {k: _share(v, seen[k]) if k in seen else v for k, v in value.items()}
    if type(value) in (tuple, list) and len(value) == len(seen):
        return type(value)(_share(v, s) for v, s in zip(value, seen, strict=True))
    return value
