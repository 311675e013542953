"""How far what compressed weights answer is from what the original's answer to the same tokens: what gates look at.

The tokens are held back from the solver. Both get the same input, that of the compressed model so far, so that an error
is of these weights alone. The compressed ones are what was encoded and decoded again, as inference will see them.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from halfbit.activations import Routed
from halfbit.types import Solution

# rows on which an expert is judged
MOST = 256
# an expert with fewer of its own is judged on rows of the whole layer
LEAST = 16


@dataclass(frozen=True)
class Judged:
    """One expert, linear layer or block, with y the original's answers and z the compressed one's.

    Attributes:
        error: |z - y|^2 / |y|^2; 1 is what answering nothing would give. None: not a finite number.
        energy: |z|^2 / |y|^2. None: not a finite number.
        tokens: held-back tokens of its own; below `LEAST`, an expert was judged on those of its neighbours too. None:
            nothing was held back, y and z are the weights themselves.
        wrong: weights that decode to something else than was solved, before any tuning.
    """

    error: float | None
    energy: float | None
    tokens: int | None
    wrong: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, original: Tensor, compressed: Tensor, tokens: int | None, wrong: int = 0) -> "Judged":
        """From answers of any one shape."""
        y, z = original.double(), compressed.to(original.device).double()
        whole = float(y.square().sum())
        error, energy = float((z - y).square().sum()), float(z.square().sum())
        return cls(_share(error, whole), _share(energy, whole), tokens, wrong)


def _share(part: float, whole: float) -> float | None:
    if whole == 0:
        # nothing asked, nothing answered; or an answer out of nothing
        whole, part = 1.0, float(part != 0)
    ratio = part / whole
    return float(f"{ratio:.6g}") if ratio - ratio == 0 else None


def unlike(solution: Solution, decoded: Tensor) -> int:
    """How many weights `[out, in]` are not, bit for bit, what was solved."""
    return int((solution.dense().to(decoded) != decoded).sum())


def rows_of(expert: int, routed: Routed) -> tuple[Tensor, int]:
    """Held-back rows of `Routed.hidden` to judge an expert by, and how many are its own. Without any there are none."""
    taken, _ = routed.tokens_of(expert)
    own = taken[routed.held[taken]]
    rows = own if len(own) >= LEAST else torch.cat([own, routed.held.nonzero().squeeze(1)])
    return rows[:MOST], len(own)
