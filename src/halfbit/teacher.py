"""What the original model says of a text, kept on the disk: each token's most likely successors with their logarithms.

The original runs once, block by block, and is gone before the compressed model is loaded to be tuned towards it. Of a
vocabulary of some hundred thousand the `K` most likely tokens carry nearly all the mass; the rest is one class more, so
that the divergence measured with them is a lower bound of the true one and 0 only where that is 0 on them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from halfbit.expert_groups import through
from halfbit.family import Family
from halfbit.flow import Flow
from halfbit.samples import Sample

K = 64
# on the device at a time
EXPERTS = 16


def ask(family: Family, samples: list[Sample], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The original's `K` most likely tokens after each token of all samples (of the decoder's, where there is one).

    Memory follows one block and one group of experts, and the samples' activations.

    Returns:
        int32 `[tokens, K]` and float16 `[tokens, K]`, natural logarithms of probabilities, falling.
    """
    tokens: list[Tensor] = []
    logs: list[Tensor] = []
    for logits in logits_of(family, samples, device, dtype):
        values, ids = logits.float().log_softmax(-1).topk(min(K, logits.shape[-1]), dim=-1)
        tokens.append(ids.to("cpu", torch.int32))
        logs.append(values.to("cpu", torch.float16))
    return torch.cat(tokens), torch.cat(logs)


def logits_of(family: Family, samples: list[Sample], device: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """What the original says after each token of all samples, `[tokens, vocabulary]` of some at a time, in order."""
    family.load_outer(device, dtype)
    encoded = None
    for part in family.stacks():
        flow = Flow(part, samples, encoded, device)
        for block in part.blocks:
            module = family.load_block(block, device, dtype)
            through(flow, family, block, module, EXPERTS, device)
            family.unload_block(block)
        if part is family.stacks()[-1]:
            yield from flow.logits()
        else:
            encoded = flow.end()


def divergence(logits: Tensor, tokens: Tensor, logs: Tensor) -> Tensor:
    """Mean KL(original || model) per token in nats, what is not among the `K` taken as one token.

    Args:
        logits: float32 `[tokens, vocabulary]` of the model.
        tokens, logs: as `ask` gave them, `[tokens, K]`.
    """
    p_log = logs.to(logits.dtype)
    p = p_log.exp()
    q_log = logits.log_softmax(-1).gather(1, tokens.to(torch.int64))
    inside = (p * (p_log - q_log)).sum(-1)
    # of both models the mass that is left, never quite 0
    p_rest, q_rest = ((1 - mass.sum(-1)).clamp(min=1e-6) for mass in (p, q_log.exp()))
    return (inside + p_rest * (p_rest.log() - q_rest.log())).mean()
