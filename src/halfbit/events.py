"""What happens during a run, in the order in which it happens: the loop yields these and prints nothing."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Began:
    """The run starts: `matrices` in `blocks` blocks, of which `solved` and `resumed` come from an earlier run."""

    folder: Path
    blocks: int
    matrices: int
    resumed: int
    solved: int


@dataclass(frozen=True)
class Probed:
    """It is known what so many of the `matrices` of the rules with options cost at each size."""

    done: int
    matrices: int


@dataclass(frozen=True)
class BlockBegan:
    block: str
    number: int
    resumed: bool


@dataclass(frozen=True)
class Solved:
    """One matrix is decided; `loss` is tr(dW H dW^T) / tr(W H W^T), `tokens` what it was trained on."""

    matrix: str
    loss: float
    bits_per_weight: float
    tokens: int


@dataclass(frozen=True)
class Imported:
    """One matrix of a published checkpoint is taken over."""

    matrix: str
    bits_per_weight: float


@dataclass(frozen=True)
class Tuned:
    """One step of tuning; `loss` is the divergence from the original on its tokens, in nats."""

    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class Noticed:
    """Something a user should know that does not stop the run."""

    message: str


@dataclass(frozen=True)
class Gated:
    """Gates looked at a unit: the calibration text, a block, or the finished model; of so many checks some `failed`."""

    unit: str
    checks: int
    failed: int


@dataclass(frozen=True)
class BlockDone:
    block: str
    number: int


@dataclass(frozen=True)
class Spent:
    """Where the time went: of all `seconds` on the clock, what the loop spent on what it did or waited for, and what
    was done beside it (`pipeline.py`)."""

    seconds: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Finished:
    folder: Path


Event = Began | Probed | BlockBegan | Solved | Imported | Tuned | Noticed | Gated | BlockDone | Spent | Finished
