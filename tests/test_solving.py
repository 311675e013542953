"""One rule applied to matrices: budgets are met by what is stored, and told where they cannot be."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halfbit.errors import RecipeError, Unsupported
from halfbit.formats.runlength import RunLength
from halfbit.formats.spqr import SpQR
from halfbit.grids.bilevel import Bilevel
from halfbit.grids.deadzone import Deadzone
from halfbit.recipe import Rule, Solving
from halfbit.solving import solve as solve_each
from halfbit.types import Solution


def matrices(count: int = 2, out: int = 96, width: int = 160) -> tuple[Tensor, Tensor]:
    """Heavy-tailed weights and Hessians of correlated inputs."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(count, out, width, generator=random) * torch.randn(count, out, width, generator=random).exp()
    x = torch.randn(count, 2 * width, width, generator=random) @ torch.randn(count, width, width, generator=random)
    return w, x.mT @ x


def rule(fitting: str = "min-max", **fields) -> Rule:
    grid = Bilevel(bits=3, group=16, fitting=fitting)
    return Rule("*", "gptq", grid, SpQR(bits=3, group=16), order="act_order", damping=0.1, **fields)


def solve(w: Tensor, h: Tensor, rule: Rule, *rest, **named) -> list[Solution]:
    """All matrices by one rule."""
    return solve_each(w, h, [rule] * len(w), *rest, **named)


NAMES = ["a", "b"]


@pytest.mark.parametrize("bits", [3.8, 4.1, 4.7])
def test_stored_bits_are_those_asked_for_within_one_percent(bits: float) -> None:
    w, h = matrices()
    found = rule(bits=bits)
    assert found.codec is not None
    stored = [found.codec.encode(s).bits_per_weight for s in solve(w, h, found, Solving(), NAMES, [])]
    assert sum(stored) / len(stored) == pytest.approx(bits, rel=0.01)


def test_a_budget_that_a_tiny_matrix_misses_is_told() -> None:
    w, h = matrices(1, 8, 64)
    notices: list[str] = []
    with pytest.raises(RecipeError, match=r"a: the grid alone takes 4\.875"):
        # the column order takes a bit and more of each weight here
        solve(w, h, rule(bits=4.2), Solving(), ["a"], notices)
    (s,) = solve(w, h, rule(bits=5.5), Solving(), ["a"], notices)
    found = rule(bits=5.5).codec
    assert found is not None
    missed = abs(found.encode(s).bits_per_weight - 5.5) > 0.055
    assert bool(notices) == missed
    with pytest.raises(RecipeError, match="a: 40 bits per weight are more than"):
        solve(w, h, rule(bits=40.0), Solving(), ["a"], notices)


def test_what_the_grid_alone_takes_is_known_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = matrices(1)
    plain, tight = rule("search"), rule("search", bits=3.2)
    assert plain.codec is not None
    taken = plain.codec.encode(solve(w, h, plain, Solving(), ["a"], [])[0]).bits_per_weight
    monkeypatch.setattr("halfbit.grids.bilevel.search", lambda *_: pytest.fail("statistics of zeros were searched"))
    with pytest.raises(RecipeError, match=f"the grid alone takes {taken:.3f} bits"):
        solve(w, h, tight, Solving(), ["a"], [])


def test_errors_name_the_matrix() -> None:
    w, h = matrices(1)
    with pytest.raises(Unsupported, match="a: Bilevel: the weights are too large for statistics in float16"):
        solve(1e7 * w, h, rule(), Solving(), ["a"], [])


def test_an_order_stored_elsewhere_leaves_room_for_outliers() -> None:
    w, h = matrices(1)
    counts = []
    for stored in (True, False):
        (s,) = solve(w, h, rule(bits=4.1), Solving(), ["a"], [], order_is_stored=stored)
        assert s.outliers is not None
        counts.append(len(s.outliers))
    assert counts[1] > counts[0]


@pytest.mark.parametrize("share", [0.001, 0.02])
def test_the_share_of_outliers_is_the_one_asked_for(share: float) -> None:
    w, h = matrices(width=320)
    for s in solve(w, h, rule(outliers=share), Solving(), NAMES, []):
        assert s.outliers is not None
        assert len(s.outliers) / s.codes.numel() == pytest.approx(share, rel=0.05)


def test_a_smaller_threshold_gives_more_outliers() -> None:
    w, h = matrices(1)
    counts = []
    for tau in (1.0, 0.3, 0.1):
        (s,) = solve(w, h, rule(tau=tau), Solving(), ["a"], [])
        assert s.outliers is not None
        counts.append(len(s.outliers))
    assert counts[0] < counts[1] < counts[2]


def test_bits_that_the_grid_alone_exceeds_are_refused() -> None:
    w, h = matrices(1)
    with pytest.raises(RecipeError, match=r"a: the grid alone takes 3\.[67]\d* bits per weight of the 3\.2 allowed"):
        solve(w, h, rule(bits=3.2), Solving(), ["a"], [])


def test_a_rules_damping_wins_over_the_recipes() -> None:
    w, h = matrices(1)
    weak, strong = (solve(w, h, rule(), Solving(damping=d), ["a"], [])[0] for d in (0.01, 10.0))
    assert torch.equal(weak.codes, strong.codes)


def test_a_repair_is_told_once() -> None:
    w, h = matrices(1)
    notices: list[str] = []
    solve(w, torch.zeros_like(h), rule(bits=4.0), Solving(), ["a"], notices)
    assert len(notices) == 1
    assert notices[0].startswith("a: its Hessian needed repair")


def test_matrices_of_different_rules_are_solved_as_if_alone() -> None:
    """Ternary with rates of their own, SpQR, and SpQR with outliers; the batch is put together by rule."""
    w, h = matrices(5, 64)
    ternary = Rule("*", "gptq", Deadzone(), RunLength(), bits=0.9)
    rules = [rule(), ternary, rule(tau=0.3), rule(), replace(ternary, bits=0.7)]
    names = list("abcde")
    found = solve_each(w, h, rules, Solving(), names, [])
    for i in (0, 2, 3):
        (alone,) = solve_each(w[i : i + 1], h[i : i + 1], [rules[i]], Solving(), [names[i]], [])
        assert torch.equal(found[i].dense(), alone.dense())
    assert found[2].outliers is not None
    # ternary ones share a mean rate; with spreads of their own they keep their ratio
    bits = [RunLength().encode(found[i]).bits_per_weight for i in (1, 4)]
    assert sum(bits) / 2 == pytest.approx(0.8, rel=0.01)
    wide = [replace(ternary, grid=Deadzone(spread=s)) for s in (2.0, 6.0)]
    own = solve_each(w[:2], h[:2], wide, Solving(), names[:2], [])
    bits = [RunLength().encode(s).bits_per_weight for s in own]
    assert sum(bits) / 2 == pytest.approx(0.9, rel=0.01)
    assert bits[0] > 1.5 * bits[1]
    scales = [Deadzone().ready({k: v[:, 0] for k, v in s.params.items()})["scale"][:, 0] for s in own]
    sizes = [matrix.square().mean(-1).sqrt() for matrix in w[:2]]
    # a step of five bits is some per cent of a scale
    assert (scales[1] / sizes[1]).mean() / (scales[0] / sizes[0]).mean() == pytest.approx(3.0, rel=0.1)
