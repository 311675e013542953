"""The Hessians of experts: of their own tokens, as often as they count."""

import pytest
import torch

from halfbit.activations import Routed
from halfbit.expert_groups import Group, Training, hessians
from halfbit.recipe import Coverage, Recipe, Rule, Solving

EXPERTS, WIDTH, INNER, TOKENS = 3, 5, 4, 60


def given() -> tuple[Group, Routed]:
    random = torch.Generator().manual_seed(0)
    up, down = (
        torch.randn(EXPERTS, INNER, WIDTH, generator=random),
        torch.randn(EXPERTS, WIDTH, INNER, generator=random),
    )
    group = Group(range(EXPERTS), list("abc"), up, down, None, None, torch.relu, None)
    routed = Routed(EXPERTS, TOKENS)
    index = torch.stack([torch.randperm(EXPERTS, generator=random)[:2] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, 2, generator=random)
    keep = torch.rand(TOKENS, generator=random) > 0.2
    routed.add(torch.randn(TOKENS, WIDTH, generator=random), index, weights, keep)
    return group, routed.close()


@pytest.mark.parametrize("router_weights", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_hessians_are_the_weighted_sums_that_their_definition_says(router_weights: bool, inner: bool) -> None:
    """Against loops in float64. Only the ratio of weights matters, so those of an expert have a mean square of 1."""
    group, routed = given()
    how = Recipe(
        "", (Rule("*"),), Solving(router_weights=router_weights), Coverage(undersampled="identity", max_tokens=100.0)
    )

    def view(i: int, rows: torch.Tensor) -> torch.Tensor:
        return group.hidden(i, routed.hidden[rows]) if inner else routed.hidden[rows]

    found = hessians(Training.of(group, how, routed), how.coverage, view)
    for e in range(EXPERTS):
        rows, gates = [], []
        for t in range(TOKENS):
            for k in range(2):
                if routed.index[t, k] == e and routed.keep[t]:
                    x = routed.hidden[t].double()
                    rows.append(torch.relu(group.up[e].double() @ x) if inner else x)
                    gates.append(float(routed.weights[t, k]) if router_weights else 1.0)
        scale = sum(g * g for g in gates) / len(gates)
        expected = sum(g * g / scale * torch.outer(x, x) for g, x in zip(gates, rows, strict=True))
        assert torch.allclose(found[e].double(), expected, rtol=1e-5, atol=1e-5)
