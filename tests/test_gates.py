"""Gates between the two products are recognised by their values, never by a model's name."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from halfbit.nn import GATES, name_gate


class Clamped(nn.Module):
    alpha, limit = 1.702, 7.0

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x[..., ::2].clamp(max=self.limit), x[..., 1::2].clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


@pytest.mark.parametrize("name", sorted(set(GATES) - {"clamped-swiglu"}))
def test_each_gate_is_found_by_its_values(name: str) -> None:
    kind, _, act = name.partition(":")
    function = ACT2FN[act]

    def gate(x: torch.Tensor) -> torch.Tensor:
        if kind == "plain":
            return function(x)
        first, second = x.chunk(2, dim=-1)
        return function(first) * second

    assert name_gate(gate, nn.Module()) == (name, [])


def test_a_clamped_gate_is_found_with_its_numbers() -> None:
    module = Clamped()
    assert name_gate(module.gate, module) == ("clamped-swiglu", [1.702, 7.0])
    module.limit = 5.0
    assert name_gate(module.gate, module) == ("clamped-swiglu", [1.702, 5.0])


def test_other_gates_are_left_to_their_module() -> None:
    def swapped(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return first * torch.nn.functional.silu(second)

    assert name_gate(swapped, nn.Module()) is None
    assert name_gate(lambda x: torch.nn.functional.silu(x) * 1.001, nn.Module()) is None


@pytest.mark.parametrize("limit", [8.0, 10.0, 20.0, 100.0, 5000.0])
@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_a_clamp_is_seen_however_far_out(act: str, limit: float) -> None:
    """DeepSeek-V4's gates clamp at 10: named without the clamp they would be right on small values only."""
    function = ACT2FN[act]

    def clamped(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return function(first.clamp(max=limit)) * second.clamp(min=-limit, max=limit)

    assert name_gate(clamped, nn.Module()) is None
    assert name_gate(lambda x: function(x).clamp(max=limit), nn.Module()) is None


def test_gates_are_compared_on_the_cpu_whatever_the_default_device() -> None:
    """On the meta device, where transformers swaps modules, torch.equal answers with whatever lies in memory."""
    module = Clamped()
    with torch.device("meta"):
        assert all(name_gate(module.gate, module) == ("clamped-swiglu", [1.702, 7.0]) for _ in range(200))
