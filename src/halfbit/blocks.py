"""Activations through a model whose blocks are not all in memory.

The model's own forward runs with the `forward` of every block replaced by a recorder, which keeps what the block was
called with (masks, position embeddings; they differ between layers) and passes the hidden states on. A block runs
later, when its weights are there, with the arguments recorded for it. What follows the last block is the model's own
forward again, with the last block's recorder answering with the hidden states it is given.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halfbit.errors import Unsupported

Inputs = Mapping[str, Tensor]
# arguments of a block beside its hidden states
Call = tuple[tuple[Any, ...], dict[str, Any]]
# what a block's recorder returns for (path, hidden states)
Answer = Callable[[str, Tensor], Any]


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
    """Paths of the blocks below `root`: the entries of the outermost ModuleList with `count` of them.

    Raises:
        Unsupported: there is none, or more than one.
    """
    lists = [path for path, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outermost = [p for p in lists if not any(p.startswith(f"{q}.") for q in lists)]
    if len(outermost) != 1:
        raise Unsupported(
            f"{type(root).__name__}: expected one list of {count} blocks, found {', '.join(outermost) or 'none'}; this "
            "model needs a family of its own in families/"
        )
    return [f"{prefix}{outermost[0]}.{i}" for i in range(count)]


class Stack:
    """One chain of blocks and the model around it. Accumulates: keeps the recorded arguments of one batch per shape.

    Args:
        name: "decoder" or "encoder".
        model: the model; all but its blocks is loaded.
        blocks: paths of the blocks, in order.
        forward: the model's own forward, from the inputs to what follows the last block.
        ids: name of the input that holds the token ids.
        answer: what a block returns for its hidden states; None: found out.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        blocks: list[str],
        forward: Callable[[Inputs], Tensor],
        *,
        ids: str = "input_ids",
        answer: Answer | None = None,
    ):
        self.name, self.model, self.blocks, self.ids = name, model, blocks, ids
        self._forward, self._answer = forward, answer
        self._seen: dict[tuple[Any, ...], dict[str, Call]] = {}

    @torch.no_grad()
    def begin(self, ids: Tensor, **given: Tensor) -> tuple[Tensor, Context]:
        """Hidden states that enter the first block [batch, length, width], and the batch's context.

        Args:
            ids: int64 [batch, length].
            given: other inputs of the model, such as `attention_mask` where there is padding.
        """
        inputs = {self.ids: ids, **given}
        answer = self._answered(inputs)
        calls: dict[str, Call] = {}
        entered: list[Tensor] = []

        def record(path: str, hidden: Tensor, call: Call) -> Any:
            if entered and hidden is not entered[0]:
                raise Unsupported(
                    f"{path}: the model changes the hidden states between two blocks; it needs a family of its own"
                )
            entered.append(hidden)
            calls[path] = call
            if path == self.blocks[-1]:
                raise _Stop
            return answer(path, hidden)

        with suppress(_Stop), self._recorders(record):
            self._forward(inputs)
        if list(calls) != self.blocks:
            raise Unsupported(f"{self.name}: the model ran blocks {', '.join(calls)}; expected all, in order")
        # masks depend on the shape alone where nothing is padded: batches of one shape share them
        key = tuple((name, tuple(t.shape), t.device) for name, t in inputs.items())
        seen = self._seen.setdefault(key, calls)
        return entered[0], Context(inputs, {path: _share(call, seen[path]) for path, call in calls.items()})

    @torch.no_grad()
    def run(self, path: str, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states after one block, which must be loaded."""
        args, kwargs = context.calls[path]
        result = self.model.get_submodule(path)(hidden, *args, **kwargs)
        return result if isinstance(result, Tensor) else result[0]

    @torch.no_grad()
    def end(self, hidden: Tensor, context: Context) -> Tensor:
        """What the model makes of the hidden states after its last block: logits, or the encoder's output."""
        answer = self._answered(context.inputs)

        def pass_on(path: str, entering: Tensor, _: Call) -> Any:
            return answer(path, hidden if path == self.blocks[-1] else entering)

        with self._recorders(pass_on):
            return self._forward(context.inputs)

    def _answered(self, inputs: Inputs) -> Answer:
        if self._answer is None:
            self._answer = self._probe(inputs)
        return self._answer

    def _probe(self, inputs: Inputs) -> Answer:
        """Find out whether the model takes what a block returns as hidden states or as a tuple that begins with them.

        The recorder of the first block returns a tensor; what the model does first with it tells.
        """
        watch = _FirstUse()

        def record(_path: str, hidden: Tensor, _call: Call) -> Tensor:
            if watch.tensor is not None:
                raise _Stop
            watch.tensor = hidden.clone()
            return watch.tensor

        with suppress(_Stop), self._recorders(record), watch:
            self._forward(inputs)
        if watch.use == "unpacked":
            raise Unsupported(
                f"{self.name}: the blocks of {type(self.model).__name__} hand each other more than hidden states; it "
                "needs a family of its own in families/"
            )
        if watch.use == "indexed":
            return lambda _path, hidden: (hidden,)
        return lambda _path, hidden: hidden

    @contextmanager
    def _recorders(self, record: Callable[[str, Tensor, Call], Any]) -> Iterator[None]:
        modules = [self.model.get_submodule(path) for path in self.blocks]
        before = [module.__dict__.get("forward") for module in modules]
        for path, module in zip(self.blocks, modules, strict=True):
            module.forward = _recorder(path, record)
        try:
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward


class _Stop(Exception):
    """The recorders have seen enough."""


class _FirstUse(TorchFunctionMode):
    """Watches what is done first with one tensor. Accumulates: `use` is set once."""

    def __init__(self):
        super().__init__()
        self.tensor: Tensor | None = None
        self.use: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # looking at shape, dtype or device tells nothing
        looks = func.__name__ in ("__get__", "dim", "size")
        if self.tensor is not None and not looks and any(a is self.tensor for a in args):
            indexed = func.__name__ == "__getitem__" and type(args[1]) is int
            self.use = "indexed" if indexed else "unpacked" if func.__name__ == "unbind" else "hidden states"
            raise _Stop
        return func(*args, **(kwargs or {}))


def _recorder(path: str, record: Callable[[str, Tensor, Call], Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            return record(path, args[0], (args[1:], kwargs))
        return record(path, kwargs["hidden_states"], ((), {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    return forward


def _share(value: Any, seen: Any) -> Any:
    """`value`, with the tensors of `seen` wherever they are equal."""
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
