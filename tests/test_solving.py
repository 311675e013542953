"""One rule applied to matrices: budgets are met by what is stored, and told where they cannot be."""

import pytest
import torch
from torch import Tensor

from halfbit.errors import RecipeError, Unsupported
from halfbit.formats.spqr import SpQR
from halfbit.grids.bilevel import Bilevel
from halfbit.recipe import Rule, Solving
from halfbit.solving import solve


def matrices(count: int = 2, out: int = 96, width: int = 160) -> tuple[Tensor, Tensor]:
    """Heavy-tailed weights and Hessians of correlated inputs."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(count, out, width, generator=random) * torch.randn(count, out, width, generator=random).exp()
    x = torch.randn(count, 2 * width, width, generator=random) @ torch.randn(count, width, width, generator=random)
    return w, x.mT @ x


def rule(fitting: str = "min-max", **fields) -> Rule:
    grid = Bilevel(bits=3, group=16, fitting=fitting)
    return Rule("*", "gptq", grid, SpQR(bits=3, group=16), order="act_order", damping=0.1, **fields)


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
