"""A ternary matrix at the rate that was asked for, counted from what is stored."""

import itertools
import math

import pytest
import torch
from test_solving import NAMES, matrices, solve

from halfbit.errors import RecipeError
from halfbit.formats.runlength import RunLength
from halfbit.grids.deadzone import Deadzone
from halfbit.recipe import Rule, Solving, load
from halfbit.solve.rate import MEASURED, at_rate, guess
from halfbit.types import Solution


def test_the_guess_goes_through_what_was_measured_and_falls() -> None:
    for spread, entropy in MEASURED[1:]:
        assert guess(entropy) == pytest.approx(spread)
    bits = [0.1 + 0.01 * i for i in range(148)]
    spreads = [guess(b) for b in bits]
    assert all(a > b > 0 for a, b in itertools.pairwise(spreads))


@pytest.mark.parametrize("bits", [0.4, 0.67, 1.0, 1.45])
def test_stored_bits_are_those_asked_for_within_one_percent(bits: float) -> None:
    w, h = matrices(out=192)
    rule = Rule("*", "gptq", Deadzone(), RunLength(), bits=bits)
    stored = [RunLength().encode(s).bits_per_weight for s in solve(w, h, rule, Solving(), NAMES, [])]
    assert sum(stored) / len(stored) == pytest.approx(bits, rel=0.01)


def test_what_cannot_be_is_told() -> None:
    w, h = matrices(out=32)
    notices: list[str] = []
    solve(w, h, Rule("*", "gptq", Deadzone(), RunLength(), bits=2.5), Solving(), NAMES, notices)
    assert len(notices) == 1
    assert "where 2.5 were asked for" in notices[0]
    assert "a and 1 more" in notices[0]


def test_the_nearest_of_all_tries_wins() -> None:
    """A source of bits that jumps over what was asked for."""
    tried: list[float] = []

    def tries(spread: float) -> list[Solution]:
        tried.append(spread)
        return [Solution(Deadzone(spread=spread), torch.zeros(1, 1, dtype=torch.uint8), {})]

    def stored(found: list[Solution]) -> float:
        return 0.9 if tried[-1] > 2.0 else 1.3

    found, used = at_rate(1.0, tries, stored, guess(1.0), 0.003)
    assert used == 0.9
    assert isinstance(found[0].grid, Deadzone)
    assert found[0].grid == Deadzone()
    assert found[0].grid.spread in [s for s in tried if s > 2.0]
    assert 1 < len(tried) <= 5
    assert all(math.isfinite(s) for s in tried)


def test_only_rules_that_can_keep_a_rate_take_one() -> None:
    assert {rule.bits for rule in load("runlength").budgeted("bits", 0.5).rules} == {0.5}
    with pytest.raises(RecipeError, match="no rule that could keep it"):
        load("runlength").budgeted("tau", 0.2)
    with pytest.raises(RecipeError, match="stores no outliers"):
        Rule("*", "gptq", Deadzone(), RunLength(), outliers=0.01)
