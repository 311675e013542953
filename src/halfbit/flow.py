"""The calibration samples on their way through one part of a model, block by block.

A block with experts runs twice: once up to the experts' door, to learn what each expert is given, and once more with
the compressed experts' outputs in their place, so that no more than a group of experts is ever on the device. Where
linear layers are compressed too it runs once more for those before the door and once for those behind it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbit.activations import Activations, Routed, room
from halfbit.blocks import Context, Stack
from halfbit.errors import NonFinite, Unsupported
from halfbit.experts import ExpertStack
from halfbit.samples import Sample
from halfbit.solve.hessian import Hessian

# tokens that go through a block at a time
BLOCK_TOKENS = 4096
# rows of held-back samples that are kept of a linear layer's input
MOST_HELD = 1024


class _Door(Exception):
    """Ends a forward where what follows is not there yet, or not needed."""


@dataclass(eq=False)
class Seen:
    """Linear layers that are given the same tensor, in the order in which they run, and its Hessian (one "expert").

    Without calibration there is none. `total` is the sum of what they are given, `[in]`; `held` what they are given by
    samples that are held back, some rows (`MOST_HELD` at most) of each batch, on the device.
    """

    paths: list[str]
    hessian: Hessian | None
    total: Tensor | None = None
    held: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class _Watch:
    """Adds up what linear layers are given. Accumulates: `groups` over all batches, `given` over one."""

    groups: list[Seen] = field(default_factory=list)
    given: list[tuple[Tensor, Seen]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    keep: Tensor | None = None
    held: bool = False

    def begin(self, keep: Tensor, held: bool) -> None:
        """The next batch, of which `keep` may train, or which is held back."""
        self.keep, self.held, self.given = keep, held, []
        self.calls.clear()

    def end(self) -> None:
        """Raises Unsupported where layers that once had one input did not have it together."""
        for group in self.groups:
            odd = next((path for path in group.paths if self.calls[path] != self.calls[group.paths[0]]), None)
            if odd is not None:
                raise Unsupported(
                    f"{odd}: runs {self.calls[odd]} times where {group.paths[0]}, which has the same input, runs "
                    f"{self.calls[group.paths[0]]} times; leave one of them out with a rule that has no codec"
                )
        self.given = []

    def add(self, path: str, x: Tensor) -> None:
        self.calls[path] += 1
        seen = next((group for tensor, group in self.given if tensor is x), None)
        known = next((group for group in self.groups if path in group.paths), None)
        if known is None:
            if seen is None:
                seen = Seen([], Hessian(1, x.shape[-1], device=x.device))
                self.groups.append(seen)
            seen.paths.append(path)
            known = seen
        if path == known.paths[0]:
            rows = x.reshape(-1, x.shape[-1])
            if self.held:
                room = MOST_HELD - sum(map(len, known.held))
                known.held.append(rows[:: -(-len(rows) // room)] if room > 0 else rows[:0])
                self.given.append((x, known))
                return
            # what is not one row per token, such as an encoder's states in a decoder, is taken whole
            keep = self.keep
            assert known.hessian is not None
            rows = rows[keep.to(x.device)] if keep is not None and len(keep) == len(rows) else rows
            known.hessian.add(rows)
            total = rows.sum(0, dtype=torch.float32)
            known.total = total if known.total is None else known.total + total
        self.given.append((x, known))


def _shut(*_args: Any, **_kwargs: Any) -> Tensor:
    raise _Door


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


def _cut(batch: range, at: int) -> list[range]:
    """The batch in two where the sample number `at` begins another."""
    return [batch] if not batch.start < at < batch.stop else [range(batch.start, at), range(at, batch.stop)]


class Flow:
    """Activations in a list buffer, advanced block by block. Accumulates: each block overwrites the last one's rows.

    Args:
        part: a decoder or encoder of a family.
        samples: the calibration samples; a decoder that listens to an encoder reads their `decoder_ids`.
        encoded: the encoder's final states, for such a decoder.
        device: where blocks run; the buffer stays on the CPU.
        offload: folder for files in place of memory, see `activations.room`.
    """

    def __init__(
        self,
        part: Stack,
        samples: list[Sample],
        encoded: Activations | None,
        device: str,
        offload: Path | None = None,
    ):
        self._part, self._device, self._offload = part, device, offload
        second = encoded is not None
        ids = [s.decoder_ids if second else s.ids for s in samples]
        keep = [s.decoder_keep if second else s.keep for s in samples]
        assert all(i is not None for i in ids)
        starts = torch.tensor([0] + [len(i) for i in ids]).cumsum(0).tolist()  # pyright: ignore[reportArgumentType]
        tokens = Activations(torch.cat(ids)[:, None], starts, torch.cat(keep))  # pyright: ignore[reportCallIssue, reportArgumentType]
        self._batches = tokens.batches(BLOCK_TOKENS)
        if encoded is not None:  # samples of one batch must listen to equally long encoder states
            self._batches = [part for batch in self._batches for part in encoded.equal_runs(batch)]
        # what is held back comes last, in batches of its own
        self._held_from = next((i for i, s in enumerate(samples) if s.held), len(samples))
        self._batches = [part for batch in self._batches for part in _cut(batch, self._held_from)]
        self._contexts: list[Context] = []
        self._replays: dict[str, tuple[ExpertStack, Routed]] = {}
        self._activations: Activations | None = None
        for batch in self._batches:
            rows = tokens.view(batch).squeeze(-1).to(device)
            given = {} if encoded is None else {"encoder_hidden_states": encoded.view(batch).to(device)}
            hidden, context = part.begin(rows, **given)
            if self._activations is None:
                buffer = room(starts[-1], hidden.shape[-1], hidden.dtype, offload)
                self._activations = Activations(buffer, starts, tokens.keep)
            self._activations.view(batch).copy_(hidden)
            self._contexts.append(context)

    def restore(self, rows: Tensor) -> None:
        """Go on from activations that an earlier run kept, of the same samples."""
        self.activations.buffer.copy_(rows)

    def copy(self) -> "Flow":
        """The same samples at the same block, to go another way from here."""
        other, now = copy(self), self.activations
        other._activations = Activations(now.buffer.clone(), now.starts, now.keep)
        other._replays = dict(self._replays)
        return other

    @property
    def held_rows(self) -> Tensor | None:
        """A copy of the rows of the samples that are held back, `[rows, width]`; None where there are none."""
        first = self.activations.starts[self._held_from]
        return self.activations.buffer[first:].clone() if self._held_from < len(self.activations) else None

    def held_back(self) -> "Flow":
        """The samples that are held back, alone, at the same block, to go another way from here."""
        other, now, first = copy(self), self.activations, self._held_from
        chosen = [(b, c) for b, c in zip(self._batches, self._contexts, strict=True) if b.start >= first]
        other._batches = [range(b.start - first, b.stop - first) for b, _ in chosen]
        other._contexts = [c for _, c in chosen]
        starts = [start - now.starts[first] for start in now.starts[first:]]
        other._activations = Activations(now.buffer[now.starts[first] :].clone(), starts, now.keep[now.starts[first] :])
        other._held_from, other._replays = 0, {}
        return other

    @property
    def activations(self) -> Activations:
        assert self._activations is not None
        return self._activations

    def observe(self, block: str, module: nn.Module, paths: Iterable[str], doors: Iterable[ExpertStack]) -> list[Seen]:
        """What the linear layers at `paths` are given by all samples, grouped by input.

        The block runs up to the first of `doors`, the experts that are not solved yet; layers behind it, and layers
        that do not run, are not in the result. Solved experts replay their outputs.
        """
        watch = _Watch()
        linears = {path: module.get_submodule(path.removeprefix(f"{block}.")) for path in paths}
        for number, batch in enumerate(self._batches):
            with (
                self._watching(watch, linears, batch),
                _answering(module, block, {**self._replayed(number), **{door.path: _shut for door in doors}}),
                suppress(_Door),
            ):
                self._run(block, number, batch)
        return watch.groups

    def observe_head(self, path: str, head: nn.Module) -> Seen:
        """What the output head is given by all samples, after the last block."""
        watch = _Watch()
        with _answering(self._part.model, "", {path: _shut}):
            for number, batch in enumerate(self._batches):
                with self._watching(watch, {path: head}, batch), suppress(_Door):
                    self._part.end(self.activations.view(batch).to(self._device), self._contexts[number])
        if not watch.groups:
            raise Unsupported(f"{path}: the model ended without calling its head; cannot calibrate it")
        return watch.groups[0]

    @contextmanager
    def _watching(self, watch: _Watch, linears: dict[str, nn.Module], batch: range) -> Iterator[None]:
        starts = self.activations.starts
        watch.begin(self.activations.keep[starts[batch.start] : starts[batch.stop]], batch.start >= self._held_from)

        def before(path: str) -> Callable[..., None]:
            return lambda _module, args, kwargs: watch.add(path, args[0] if args else kwargs["input"])

        hooks = [m.register_forward_pre_hook(before(path), with_kwargs=True) for path, m in linears.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        watch.end()

    def capture(self, block: str, module: nn.Module, stack: ExpertStack, *, every: bool = False) -> Routed:
        """What `stack` is given by all samples; experts before it in the same block replay their outputs.

        With `every`, rows that no expert takes are among it.
        """
        rows = len(self.activations.buffer)
        routed = Routed(stack.num_experts, rows, every=every, offload=self._offload)
        starts = self.activations.starts
        for number, batch in enumerate(self._batches):
            keep = self.activations.keep[starts[batch.start] : starts[batch.stop]]
            held = batch.start >= self._held_from

            def record(*args: Any, keep: Tensor = keep, held: bool = held, **kwargs: Any) -> Tensor:
                routed.add(*stack.route(args, kwargs), keep, held=held)
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

    def after(self, block: str, module: nn.Module) -> Tensor:
        """What the block makes of the samples that are held back, `[rows, width]`; they do not move on."""
        found = []
        for number, batch in enumerate(self._batches):
            if batch.start >= self._held_from:
                with _answering(module, block, self._replayed(number)):
                    found.append(self._run(block, number, batch).flatten(0, -2).to(self.activations.buffer))
        return torch.cat(found)

    def end(self) -> Activations:
        """The states an encoder hands to its decoder: what is left after the last block, such as the final norm."""
        for number, batch in enumerate(self._batches):
            hidden = self._part.end(self.activations.view(batch).to(self._device), self._contexts[number])
            self.activations.view(batch).copy_(hidden)
        return self.activations

    def logits(self) -> Iterator[Tensor]:
        """What the model makes of each batch after the last block, `[tokens, vocabulary]`, sample after sample."""
        for number, batch in enumerate(self._batches):
            logits = self._part.end(self.activations.view(batch).to(self._device), self._contexts[number])
            yield logits.reshape(-1, logits.shape[-1])

    def _run(self, block: str, number: int, batch: range) -> Tensor:
        return self._part.run(block, self.activations.view(batch).to(self._device), self._contexts[number])

    def _replayed(self, number: int) -> dict[str, Callable[..., Tensor]]:
        def answer(stack: ExpertStack, routed: Routed) -> Callable[..., Tensor]:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                given = args[0] if args else kwargs[stack.arguments[0]]
                return routed.answer(number).to(given).view_as(given)

            return forward

        return {path: answer(*found) for path, found in self._replays.items()}
