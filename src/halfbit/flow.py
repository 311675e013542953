"""The calibration samples on their way through one part of a model, block by block.

A block with experts runs twice: once up to the experts' door, to learn what each expert is given, and once more with
the compressed experts' outputs in their place, so that no more than a group of experts is ever on the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halfbit.activations import Activations, Routed
from halfbit.blocks import Context, Stack
from halfbit.errors import NonFinite, Unsupported
from halfbit.experts import ExpertStack
from halfbit.samples import Sample

# tokens that go through a block at a time
BLOCK_TOKENS = 4096


class _Door(Exception):
    """Ends a block's forward where its experts would start."""


class _answering:
    """Within it, submodules of a block answer with other functions."""

    def __init__(self, module: nn.Module, block: str, functions: dict[str, Callable[..., Tensor]]):
        self._pairs = [(module.get_submodule(p.removeprefix(f"{block}.")), f) for p, f in functions.items()]

    def __enter__(self) -> None:
        for submodule, function in self._pairs:
            submodule.forward = function

    def __exit__(self, *_: object) -> None:
        for submodule, _function in self._pairs:
            del submodule.forward  # uncovers the class's own


class Flow:
    """Activations in a list buffer, advanced block by block. Accumulates: each block overwrites the last one's rows.

    Args:
        part: a decoder or encoder of a family.
        samples: the calibration samples; a decoder that listens to an encoder reads their `decoder_ids`.
        encoded: the encoder's final states, for such a decoder.
        device: where blocks run; the buffer stays on the CPU.
    """

    def __init__(self, part: Stack, samples: list[Sample], encoded: Activations | None, device: str):
        self._part, self._device = part, device
        second = encoded is not None
        ids = [s.decoder_ids if second else s.ids for s in samples]
        keep = [s.decoder_keep if second else s.keep for s in samples]
        assert all(i is not None for i in ids)
        starts = torch.tensor([0] + [len(i) for i in ids]).cumsum(0).tolist()  # pyright: ignore[reportArgumentType]
        tokens = Activations(torch.cat(ids)[:, None], starts, torch.cat(keep))  # pyright: ignore[reportCallIssue, reportArgumentType]
        self._batches = tokens.batches(BLOCK_TOKENS)
        if encoded is not None:  # samples of one batch must listen to equally long encoder states
            self._batches = [part for batch in self._batches for part in encoded.equal_runs(batch)]
        self._contexts: list[Context] = []
        self._replays: dict[str, tuple[ExpertStack, Routed]] = {}
        self._activations: Activations | None = None
        for batch in self._batches:
            rows = tokens.view(batch).squeeze(-1).to(device)
            given = {} if encoded is None else {"encoder_hidden_states": encoded.view(batch).to(device)}
            hidden, context = part.begin(rows, **given)
            if self._activations is None:
                buffer = torch.empty(starts[-1], hidden.shape[-1], dtype=hidden.dtype)
                self._activations = Activations(buffer, starts, tokens.keep)
            self._activations.view(batch).copy_(hidden)
            self._contexts.append(context)

    @property
    def activations(self) -> Activations:
        assert self._activations is not None
        return self._activations

    def capture(self, block: str, module: nn.Module, stack: ExpertStack) -> Routed:
        """What `stack` is given by all samples; experts before it in the same block replay their outputs."""
        routed = Routed(stack.num_experts, len(self.activations.buffer))
        starts = self.activations.starts
        for number, batch in enumerate(self._batches):
            keep = self.activations.keep[starts[batch.start] : starts[batch.stop]]

            def record(*args: Any, keep: Tensor = keep, **kwargs: Any) -> Tensor:
                routed.add(*stack.route(args, kwargs), keep)
                raise _Door

            with _answering(module, block, {**self._replayed(number), stack.path: record}):
                try:
                    self._run(block, number, batch)
                except _Door:
                    continue
                raise Unsupported(f"{stack.path}: the block ran without calling these experts; cannot calibrate them")
        return routed.close()

    def give(self, stack: ExpertStack, routed: Routed) -> None:
        """The outputs of the compressed `stack`, to be replayed in its place."""
        routed.forget_inputs()
        self._replays[stack.path] = stack, routed

    def advance(self, block: str, module: nn.Module) -> None:
        """All samples through the block, with what was given in the experts' place."""
        for number, batch in enumerate(self._batches):
            with _answering(module, block, self._replayed(number)):
                hidden = self._run(block, number, batch)
            if not torch.isfinite(hidden).all():
                sample = batch.start + int((~torch.isfinite(hidden)).flatten(1).any(1).nonzero()[0])
                raise NonFinite(
                    f"{block}: NaN or infinity in its output for calibration sample {sample}; the checkpoint may be "
                    "damaged, or its activations too large for this dtype",
                    tensor=block,
                )
            self.activations.view(batch).copy_(hidden)
        self._replays.clear()

    def end(self) -> Activations:
        """The states an encoder hands to its decoder: what is left after the last block, such as the final norm."""
        for number, batch in enumerate(self._batches):
            hidden = self._part.end(self.activations.view(batch).to(self._device), self._contexts[number])
            self.activations.view(batch).copy_(hidden)
        return self.activations

    def _run(self, block: str, number: int, batch: range) -> Tensor:
        return self._part.run(block, self.activations.view(batch).to(self._device), self._contexts[number])

    def _replayed(self, number: int) -> dict[str, Callable[..., Tensor]]:
        def answer(stack: ExpertStack, routed: Routed) -> Callable[..., Tensor]:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                given = args[0] if args else kwargs[stack.arguments[0]]
                return routed.answer(number).to(given).view_as(given)

            return forward

        return {path: answer(*found) for path, found in self._replays.items()}
