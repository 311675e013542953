"""Rows that compete for bits by what their errors cost the expert's answers."""

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from halfbit.activations import Routed
from halfbit.errors import RecipeError
from halfbit.expert_groups import Group, Training
from halfbit.expert_groups import solve as solve_group
from halfbit.formats.runlength import RunLength
from halfbit.grids.deadzone import Deadzone
from halfbit.nn import GATES
from halfbit.recipe import Coverage, Recipe, Rule, Solving
from halfbit.solve.rows import NARROWEST, WIDEST, slopes, widths

RANDOM = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ["glu:silu", "plain:relu2", "plain:gelu", "clamped-swiglu"])
def test_slopes_are_the_columns_of_the_jacobian(name: str) -> None:
    """Of the answer, token by token, in float64."""
    inner = 5
    y = 2 * torch.randn(7, inner if "plain" in name else 2 * inner, generator=RANDOM, dtype=torch.float64)
    down = torch.randn(6, inner, generator=RANDOM, dtype=torch.float64)

    def gate(x: Tensor) -> Tensor:
        return GATES[name](x, 1.7, 2.0)

    found = slopes(y, gate, down)
    for of_token, row in zip(found, y, strict=True):
        whole = jacobian(lambda x: gate(x[None])[0] @ down.T, row)
        assert isinstance(whole, Tensor)
        assert torch.allclose(of_token, whole.norm(dim=0), rtol=1e-12, atol=1e-12)


def test_widths_fall_with_the_cost_and_have_limits() -> None:
    cost = torch.tensor([[1.0, 16.0, 1 / 16, 1.0], [0.0, 1.0, 1.0, 1e30]], dtype=torch.float64)
    found = widths(cost, 0.25)
    assert torch.allclose(found[0], torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64))
    assert found.min() >= NARROWEST
    assert found.max() <= WIDEST
    assert torch.equal(widths(1e-300 * cost[:1], 0.25).round(decimals=9), found[:1].round(decimals=9))
    assert torch.equal(widths(torch.zeros(2, 3), 0.25), torch.ones(2, 3))


def given(bias: Tensor | None = None) -> tuple[Group, Routed]:
    """Two experts; of the first one input row counts for much, one for nothing; the second has no token."""
    experts, width, inner, tokens = 2, 64, 32, 512
    up = torch.randn(experts, 2 * inner, width, generator=RANDOM)
    down = torch.randn(experts, width, inner, generator=RANDOM)
    down[:, :, 3], down[:, :, 4] = 30 * down[:, :, 3], 0
    group = Group(range(experts), ["a", "b"], up, down, bias, None, GATES["glu:silu"], None)
    routed = Routed(experts, tokens)
    keep = torch.rand(tokens, generator=RANDOM) > 0.2
    index = torch.zeros(tokens, 1, dtype=torch.int64)
    routed.add(torch.randn(tokens, width, generator=RANDOM), index, torch.rand(tokens, 1, generator=RANDOM), keep)
    return group, routed.close()


def recipe(weights: float, **solving) -> Recipe:
    rule = Rule("*", "gptq", Deadzone(), RunLength(), bits=1.0)
    return Recipe("", (rule,), Solving(output_weights=weights, **solving), Coverage(max_tokens=1000.0))


@pytest.mark.parametrize("router", [False, True])
def test_widths_of_rows_are_those_of_a_loop_over_tokens(router: bool) -> None:
    group, routed = given(torch.randn(2, 64, generator=RANDOM))
    assert group.up_bias is not None
    how = recipe(0.25, router_weights=router)
    training = Training.of(group, how, routed)
    found = training.row_widths(group, lambda _, rows: routed.hidden[rows], how.solving)
    assert found is not None
    up, down, bias = group.up[0].double(), group.down[0].double(), group.up_bias[0].double()
    slope, square = torch.zeros(2, 64, dtype=torch.float64)
    for t in range(512):
        if not routed.keep[t]:
            continue
        gate = float(routed.weights[t, 0]) ** 2 if router else 1.0
        y = up @ routed.hidden[t].double()
        whole = jacobian(lambda v: down @ GATES["glu:silu"](v[None])[0], y + bias)
        assert isinstance(whole, Tensor)
        slope += gate * whole.square().sum(0)
        square += gate * y.square()
    assert torch.allclose(found[0].double(), widths(slope * square, 0.25), rtol=1e-4)
    # no token says anything
    assert torch.equal(found[1].float(), torch.ones(64))


@pytest.mark.parametrize("rotated", [False, True])
def test_rows_that_cost_more_get_more_of_the_same_bits(rotated: bool) -> None:
    group, routed = given()
    rule = Rule("*", "gptq", Deadzone(), RunLength(rotated=rotated), bits=1.0)
    rules = ([rule] * 2, [rule] * 2)
    plain, weighed = (solve_group(group, rules, recipe(power), routed) for power in (0.0, 0.25))
    codec = RunLength(rotated=rotated)
    for solved in (plain, weighed):
        for solution in (*solved.up, *solved.down):
            # what is fitted is stored like any other
            assert type(solution.grid) is Deadzone
            assert torch.equal(codec.decode(codec.encode(solution)), solution.dense())
        bits = [codec.encode(s).bits_per_weight for s in solved.up]
        assert sum(bits) / 2 == pytest.approx(1.0, rel=0.03)

    def nonzeros(row: int) -> tuple[int, int]:
        before, after = (int((solved.up[0].codes[[row, 32 + row]] != 0).sum()) for solved in (plain, weighed))
        return before, after

    before, after = nonzeros(3)
    assert after > 1.2 * before
    before, after = nonzeros(4)
    assert after < 0.8 * before
    # an output projection's rows, and rows of which nothing is known, are alike
    assert torch.equal(plain.down[1].codes, weighed.down[1].codes)

    def error(solution) -> float:
        x = routed.hidden
        away = group.output(0, x, (solution.dense(), group.down[0])) - group.output(0, x)
        return float(away.square().sum())

    assert error(weighed.up[0]) < error(plain.up[0])


def test_powers_out_of_range_are_refused() -> None:
    for power in (-0.1, 1.1):
        with pytest.raises(RecipeError, match="output_weights in"):
            Solving(output_weights=power)
