"""QMoE's list buffer: the activations of all samples in one CPU tensor, and what the experts of a block were given.

One contiguous tensor with a view per sample (QMoE, arXiv 2310.16795, section 3.2): blocks run sample by sample, experts
gather their tokens from all samples in one vectorised read; device memory follows one block and one group of experts.
Where the tensor would not fit into memory it is a file that is mapped, of which the system keeps what is in use.
"""

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbit.disk import file_errors, make_folder


def room(rows: int, width: int, dtype: torch.dtype, offload: Path | None) -> Tensor:
    """`[rows, width]` on the CPU, zeros or anything: in memory, or in a file in the folder `offload`.

    The file has no name: the disk is free again when the tensor is, also after a kill. Raises OutputError where there
    is too little room for it.
    """
    nbytes = rows * width * dtype.itemsize
    if offload is None or nbytes == 0:
        return torch.empty(rows, width, dtype=dtype)
    make_folder(offload)
    with file_errors(offload), tempfile.TemporaryFile(dir=offload) as file:
        # now, and not as a bus error when a page is written
        os.posix_fallocate(file.fileno(), 0, nbytes)
        mapped = mmap.mmap(file.fileno(), nbytes)
    return torch.frombuffer(mapped, dtype=dtype).view(rows, width)


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

    def equal_runs(self, samples: range) -> list[range]:
        """`samples` cut into runs of neighbours of equal length."""
        runs: list[range] = []
        for i in samples:
            if runs and self._length(runs[-1].start) == self._length(i):
                runs[-1] = range(runs[-1].start, i + 1)
            else:
                runs.append(range(i, i + 1))
        return runs

    def batches(self, tokens: int) -> list[range]:
        """Runs of neighbouring samples of equal length, at most `tokens` tokens (one sample at least) each."""
        found = []
        for run in self.equal_runs(range(len(self))):
            step = max(1, tokens // max(self._length(run.start), 1))
            found += [range(i, min(i + step, run.stop)) for i in range(run.start, run.stop, step)]
        return found

    def _length(self, sample: int) -> int:
        return self.starts[sample + 1] - self.starts[sample]


# of a `Routed`
QUESTIONS = ("hidden", "index", "weights", "keep", "held", "places")


class Routed:
    """What one experts module was given: a list buffer with routing. Accumulates batch by batch while a block runs.

    Args:
        num_experts: an index outside [0, num_experts) takes no expert.
        capacity: rows expected; more are taken too, at the price of a copy.
        every: keep rows that no expert takes, too.
        offload: folder for files in place of memory, see `room`.

    Attributes (after `close`):
        hidden: `[rows, width]` CPU; the rows that at least one expert takes.
        outputs: `[rows, width]` CPU; what the experts answered, added up group by group by whoever runs them.
        index, weights: `[rows, top_k]`, the experts of each row and how much they count.
        keep: bool `[rows]`, the rows that may enter a Hessian.
        places: int64 `[rows]`, where each row stands among all rows that the module was called with.
        called: how many rows the module was called with.
        held: bool `[rows]`, the rows that are held back for gates.
    """

    hidden: Tensor
    outputs: Tensor
    index: Tensor
    weights: Tensor
    keep: Tensor
    places: Tensor
    called: int
    held: Tensor

    def __init__(self, num_experts: int, capacity: int, *, every: bool = False, offload: Path | None = None):
        self.num_experts, self._every, self._offload = num_experts, every, offload
        self._capacity, self._filled = capacity, 0
        self._buffer: Tensor | None = None
        self._routing: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        # per call: where its rows begin in the buffer, which rows of the call they are, how many rows it had
        self._calls: list[tuple[int, Tensor, int]] = []

    def add(self, hidden: Tensor, index: Tensor, weights: Tensor, keep: Tensor, *, held: bool = False) -> None:
        """One call of the module; `keep` `[tokens]` repeats over `hidden`'s rows where a module is given every token
        once per expert (Llama 4). `held`: all of them are held back."""
        taken = ((index >= 0) & (index < self.num_experts)).any(dim=1)
        rows = (taken | self._every).nonzero().squeeze(1)
        start, self._filled = self._filled, self._filled + len(rows)
        if self._buffer is None:
            self._buffer = room(self._capacity, hidden.shape[1], hidden.dtype, self._offload)
        if self._filled > len(self._buffer):
            more = room(max(self._filled, 2 * len(self._buffer)), hidden.shape[1], hidden.dtype, self._offload)
            more[:start] = self._buffer[:start]
            self._buffer = more
        self._buffer[start : self._filled] = hidden[rows]
        back = torch.full((len(rows),), held)
        self._routing.append((index[rows].cpu(), weights[rows].cpu(), keep[rows.cpu() % keep.shape[0]], back))
        self._calls.append((start, rows.cpu(), hidden.shape[0]))

    def close(self) -> "Routed":
        """No more calls: the attributes are there."""
        assert self._buffer is not None
        self.hidden = self._buffer[: self._filled]
        self.index, self.weights, self.keep, self.held = map(torch.cat, zip(*self._routing, strict=True))
        self.outputs = room(len(self.hidden), self.hidden.shape[1], self.hidden.dtype, self._offload).zero_()
        totals = torch.tensor([0] + [total for _, _, total in self._calls]).cumsum(0)
        self.called = int(totals[-1])
        self.places = torch.cat([rows + before for (_, rows, _), before in zip(self._calls, totals, strict=False)])
        self._routing.clear()
        expert, self._order = torch.sort(self.index.reshape(-1), stable=True)
        self._starts = torch.searchsorted(expert, torch.arange(self.num_experts + 1)).tolist()
        return self

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Rows that the router sends to `expert`, in order, and how much the expert counts for each, float `[rows]`."""
        taken = self._order[self._starts[expert] : self._starts[expert + 1]]
        return taken // self.index.shape[1], self.weights.reshape(-1)[taken]

    def questions(self) -> dict[str, Tensor]:
        """What `asked` wants: all but the answers."""
        found = {name: getattr(self, name) for name in QUESTIONS}
        return found | {"order": self._order, "starts": torch.tensor(self._starts)}

    @classmethod
    def asked(cls, num_experts: int, questions: dict[str, Tensor]) -> "Routed":
        """The same in another process, without room for answers; it has attributes and `tokens_of`."""
        routed = cls(num_experts, 0)
        for name in QUESTIONS:
            setattr(routed, name, questions[name])
        routed._order, routed._starts = questions["order"], questions["starts"].tolist()
        return routed

    def answer(self, call: int) -> Tensor:
        """What the `call`-th recorded call should have returned: its rows of `outputs`, zeros elsewhere."""
        start, rows, total = self._calls[call]
        whole = self.outputs.new_zeros(total, self.outputs.shape[1])
        whole[rows] = self.outputs[start : start + len(rows)]
        return whole

    def forget_inputs(self) -> None:
        """Free `hidden`; only answers are wanted from here on."""
        self._buffer = None
        self.hidden = self.outputs[:0]
