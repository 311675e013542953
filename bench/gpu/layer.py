"""How fast is the experts layer: against transformers' implementations."""

import json
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu import DEVICE, INTERPRET
from gpu.matrices import operands_of
from gpu.measuring import Report, bandwidth, compared, guarded, in_turn, replayed, timed
from halfbit import formats, nn, registry, triton_support


def experts_step(report: Report) -> None:
    """Qwen3-30B-A3B's layer: 128 experts of 768 x 2048, eight per token."""
    experts, width, neurons, top = (2, 32, 16, 1) if INTERPRET else (128, 2048, 768, 8)
    rivals = _rivals(report, experts, width, neurons, top)
    choices = [("qmoe", {}), ("runlength", {}), ("spqr", {"bits": 3}), ("spqr", {"bits": 4})]
    choices.append(("grouped", {"bits": 4, "group": 32, "symmetric": True}))
    for name, options in choices:
        codec = registry.module("formats", name).CODEC(**options)
        if not triton_support.has_kernels(name):
            continue
        with guarded(report, "experts", repr(codec)):
            up, up_bytes, _ = operands_of(codec, 2 * neurons, width, experts)
            down, down_bytes, _ = operands_of(codec, width, neurons, experts)
            config = json.dumps(formats.to_config(codec))
            for tokens in (2,) if INTERPRET else (1, 4, 16):
                hidden = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
                # every call takes other experts, so that none is in the cache
                routes = [_route(tokens, experts, top, number) for number in range(1 if INTERPRET else 24)]

                given = up, down, None, None, config, config, experts, [2 * neurons, width], "glu:silu", []
                kinds = {"ours": (replayed([partial(nn.experts_op, hidden, *r, *given) for r in routes]), len(routes))}
                for rival, call in rivals.items():
                    with guarded(report, "experts", f"rival {rival}, {tokens} tokens"):
                        calls = [partial(call, hidden, *route) for route in routes]
                        # what waits for the device cannot be in a graph
                        run = in_turn(calls) if rival == "eager" else replayed(calls)
                        kinds[rival] = (run, len(routes))
                others = [name for name in kinds if name != "ours"]
                told = compared(report, timed(kinds, 8), "ours", others) if others else {}
                used = len({int(e) for e in routes[0][0].flatten()})
                told |= bandwidth(report, (up_bytes + down_bytes) * used // experts, told.get("microseconds", 1.0))
                shape = f"{experts}x{neurons}x{width}"
                report.add("experts", repr(codec), shape=shape, tokens=tokens, dtype="bfloat16", **told)


def _route(tokens: int, experts: int, top: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=random)[:top] for _ in range(tokens)])
    return index.to(DEVICE), torch.full((tokens, top), 1 / top, device=DEVICE, dtype=torch.bfloat16)


def _rivals(report: Report, experts: int, width: int, neurons: int, top: int) -> dict[str, Callable[..., Tensor]]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    found: dict[str, Callable[..., Tensor]] = {}
    for name in ("eager", "batched_mm", "grouped_mm"):
        with guarded(report, "experts", f"rival {name}"):
            config = Qwen3MoeConfig(
                hidden_size=width, moe_intermediate_size=neurons, num_experts=experts, num_experts_per_tok=top
            )
            config._experts_implementation = name
            module = Qwen3MoeExperts(config).to(DEVICE, torch.bfloat16)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            module.requires_grad_(False)
            module(torch.zeros(1, width, device=DEVICE, dtype=torch.bfloat16), *_route(1, experts, top, 0))
            found[name] = module
    return found
