"""Linear layers and embeddings outside the experts, found by structure: what a dense rule can compress.

A weight under two names (tied embeddings) is one matrix, stored under the name that the checkpoint gives.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# what the one weight of a linear layer is called, in the model and in config.json
WEIGHT = "weight"


@dataclass(frozen=True)
class Linear:
    """One matrix `[out, in]`.

    Attributes:
        path: of the module, "model.layers.0.self_attn.q_proj".
        shape: (out, in); an embedding is [vocabulary, width].
        kind: "linear", or "embedding": rows are looked up, by this module or by a twin.
        twins: other modules that are the same matrix; the head of a model with tied embeddings.
    """

    path: str
    shape: tuple[int, int]
    kind: Literal["linear", "embedding"]
    twins: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the weight in the model."""
        return f"{self.path}.{WEIGHT}"


@cache
def is_linear(kind: type[nn.Module]) -> bool:
    """Whether a module of this class is `nn.Linear` in all but name: a subclass with a forward of its own (Falcon's) is
    asked for x W^T + b. Routers that are subclasses answer something else."""
    if not issubclass(kind, nn.Linear):
        return False
    if kind.forward is nn.Linear.forward:
        return True
    with torch.device("cpu"):
        plain, x = nn.Linear(5, 3), torch.randn(2, 4, 5)
    try:
        answer = kind.forward(plain, x)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        # it needs more than a weight and a bias
        return False
    expected = plain(x)
    return isinstance(answer, Tensor) and answer.shape == expected.shape and torch.allclose(answer, expected, atol=1e-5)


def find_linears(model: PreTrainedModel, experts: Iterable[str], tied: Mapping[str, str]) -> dict[str, Linear]:
    """Every linear layer outside the experts, and the input embedding, by path.

    Args:
        model: may be on the meta device.
        experts: paths of the experts modules.
        tied: weight -> the weight that is loaded in its place, as `Claims.tied`.
    """
    found: dict[str, Linear] = {}
    inside = tuple(f"{path}." for path in experts)
    embedding = model.get_input_embeddings()
    for path, module in model.named_modules():
        if path.startswith(inside) or f"{path}.{WEIGHT}" in tied:
            continue
        # only a plain embedding is a table and nothing else; some scale or shift what they look up
        is_embedding = module is embedding and type(module) is nn.Embedding
        if is_embedding or is_linear(type(module)):
            out, width = module.get_parameter(WEIGHT).shape
            twins = tuple(n.removesuffix(f".{WEIGHT}") for n, to in tied.items() if to == f"{path}.{WEIGHT}")
            others = [model.get_submodule(twin) for twin in twins]
            if any(type(m) is not nn.Embedding and not is_linear(type(m)) for m in others):
                continue  # a twin that scales or shifts what it looks up
            looked_up = is_embedding or any(isinstance(m, nn.Embedding) for m in others)
            found[path] = Linear(path, (out, width), "embedding" if looked_up else "linear", twins)
    return found
