"""QMoE's list buffer: the activations of all samples in one CPU tensor, and what the experts of a block were given.

One contiguous tensor with a view per sample (QMoE, arXiv 2310.16795, section 3.2): blocks run sample by sample, experts
gather their tokens from all samples in one vectorised read; device memory follows one block and one group of experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Activations:
    """QMoE's list buffer. Accumulates: rows are appended once per block and overwritten in place by the next.

    Attributes:
        buffer: `[tokens, width]` on the CPU, the rows of all samples one after another.
        starts: where each sample begins; one more entry than samples.
        keep: bool `[tokens]`, the rows that may enter a Hessian.
    """

    buffer: Tensor
    starts: list[int]
    keep: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def view(self, batch: range) -> Tensor:
        """Samples of equal length as a `[samples, length, width]` view of the buffer."""
        rows = self.buffer[self.starts[batch.start] : self.starts[batch.stop]]
        return rows.view(len(batch), -1, rows.shape[-1])

    def batches(self, tokens: int) -> list[range]:
        """Runs of neighbouring samples of equal length, at most `tokens` tokens (one sample at least) each."""
        found: list[range] = []
        lengths = [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]
        for i, length in enumerate(lengths):
            last = found[-1] if found else None
            if last and lengths[last.start] == length and (len(last) + 1) * length <= tokens:
                found[-1] = range(last.start, i + 1)
            else:
                found.append(range(i, i + 1))
        return found


@dataclass(eq=False)
class Routed:
    """What one experts module was given: a list buffer with routing. Accumulates batch by batch while a block runs.

    Attributes (after `close`):
        hidden: `[rows, width]` CPU; the rows that at least one expert takes.
        outputs: `[rows, width]` CPU; what the experts answered, added up group by group by whoever runs them.
        index, weights: `[rows, top_k]`, the experts of each row and how much they count; outside [0, experts) = none.
        keep: bool `[rows]`, the rows that may enter a Hessian.
    """

    num_experts: int
    hidden: Tensor = field(init=False)
    outputs: Tensor = field(init=False)
    index: Tensor = field(init=False)
    weights: Tensor = field(init=False)
    keep: Tensor = field(init=False)
    _parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    _places: list[tuple[Tensor, int]] = field(default_factory=list)
    _order: Tensor = field(init=False)
    _starts: list[int] = field(init=False)

    def add(self, hidden: Tensor, index: Tensor, weights: Tensor, keep: Tensor) -> None:
        """One call of the module; `keep` `[tokens]` repeats over `hidden`'s rows where a module is given every token
        once per expert (Llama 4)."""
        rows = ((index >= 0) & (index < self.num_experts)).any(dim=1).nonzero().squeeze(1)
        self._places.append((rows.cpu(), hidden.shape[0]))
        self._parts.append(
            (hidden[rows].cpu(), index[rows].cpu(), weights[rows].cpu(), keep[rows.cpu() % keep.shape[0]])
        )

    def close(self) -> "Routed":
        self.hidden, self.index, self.weights, self.keep = (torch.cat(p) for p in zip(*self._parts, strict=True))
        self.outputs = torch.zeros_like(self.hidden)
        self._parts.clear()
        expert, self._order = torch.sort(self.index.reshape(-1), stable=True)
        self._starts = torch.searchsorted(expert, torch.arange(self.num_experts + 1)).tolist()
        return self

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Rows that the router sends to `expert`, in order, and how much the expert counts for each, float `[rows]`."""
        taken = self._order[self._starts[expert] : self._starts[expert + 1]]
        return taken // self.index.shape[1], self.weights.reshape(-1)[taken]

    def replay(self) -> Iterator[Tensor]:
        """`outputs` cut into what each recorded call should have returned."""
        done = 0
        for rows, total in self._places:
            part = self.outputs.new_zeros(total, self.outputs.shape[1])
            part[rows] = self.outputs[done : done + len(rows)]
            done += len(rows)
            yield part
