"""Bits go where they help: the allocator against brute force, the probe's parts, and whole runs by file bytes."""

import itertools

import pytest
import torch

from halfbit.probe import between
from halfbit.solve.allocate import Choice, Curve, allocate, hull


def curve(weights: int, *points: tuple[float, float]) -> Curve:
    return Curve(weights, tuple(Choice(bits, loss, i) for i, (bits, loss) in enumerate(points)))


def random_curves(seed: int, count: int = 4) -> list[Curve]:
    """Falling, but neither convex nor of equal sizes; one choice is worse in both."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        bits = (torch.rand(4, generator=random) * 4).sort().values.tolist()
        loss = (torch.rand(4, generator=random) ** 3).sort(descending=True).values.tolist()
        weights = int(torch.randint(1, 5, (1,), generator=random)) * 100
        found.append(curve(weights, *zip(bits, loss, strict=True), (4.5, 2.0)))
    return found


def spent(curves: list[Curve], choices) -> tuple[float, float]:
    """(bits, loss) in all."""
    return (
        sum(c.weights * x.bits for c, x in zip(curves, choices, strict=True)),
        sum(x.loss for x in choices),
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_of_no_more_bits_has_less_loss_than_the_lagrangian_solution(seed: int) -> None:
    """Whatever is taken is the best of all combinations that take no more bits than it does, up to the one step that
    did not fit; at the budgets where the last step ends exactly it is the best of all."""
    curves = random_curves(seed)
    every = [spent(curves, choices) for choices in itertools.product(*(c.choices for c in curves))]
    least = min(bits for bits, _ in every)
    most = max(bits for bits, _ in every)
    for budget in (least + (most - least) * i / 11 for i in range(12)):
        bits, loss = spent(curves, allocate(curves, budget))
        assert bits <= budget + 1e-6
        step = max(c.weights * (b.bits - a.bits) for c in curves for a, b in itertools.pairwise(hull(c.choices)))
        best = min(other for taken, other in every if taken <= max(least, budget - step) + 1e-6)
        assert loss <= best + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_at_the_budget_of_a_slope_it_is_the_best_of_all(seed: int) -> None:
    curves = random_curves(seed)
    every = [spent(curves, choices) for choices in itertools.product(*(c.choices for c in curves))]
    for price in (1e-5, 1e-4, 1e-3, 1e-2):
        taken, loss = min(every, key=lambda pair: pair[1] + price * pair[0])
        bits, found = spent(curves, allocate(curves, taken + 1e-6))
        assert bits <= taken + 1e-6
        assert found == pytest.approx(loss, abs=1e-9)


def test_a_hull_is_convex_and_leaves_out_what_never_pays() -> None:
    found = hull(curve(1, (1, 8.0), (2, 7.5), (3, 2.0), (4, 3.0), (5, 1.9), (5, 1.0)).choices)
    assert [(c.bits, c.loss) for c in found] == [(1, 8.0), (3, 2.0), (5, 1.0)]


def test_a_budget_below_the_least_gives_the_cheapest() -> None:
    curves = [curve(10, (1, 1.0), (2, 0.5)), curve(10, (0.5, 1.0), (2, 0.1))]
    assert [c.bits for c in allocate(curves, 0)] == [1, 0.5]


def test_large_matrices_are_not_preferred() -> None:
    """The same saving costs ten times as much in the large one."""
    large, small = curve(1000, (1, 1.0), (2, 0.5)), curve(100, (1, 1.0), (2, 0.5))
    assert [c.bits for c in allocate([large, small], 1200)] == [1, 2]
    assert [c.bits for c in allocate([large, small], 2200)] == [2, 2]


def test_between_two_spreads_lies_what_lies_between() -> None:
    ends = [Choice(1.0, 0.01, 0, 2.0), Choice(0.4, 0.16, 0, 8.0), Choice(2.4, 0.001, 1)]
    found = between(ends)
    assert found[:3] == ends
    middle = found[3:][2]
    assert middle.bits == pytest.approx(0.7)
    assert middle.loss == pytest.approx(0.04)
    assert middle.spread == pytest.approx(4.0)
    assert between([Choice(1.0, 0.0, 0, 2.0), Choice(0.4, 0.0, 0, 8.0)])[2:] == []
