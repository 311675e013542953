import conformance
import pytest
import torch
from torch import Tensor

from halfbit.errors import NonFinite, NotPositiveDefinite
from halfbit.grids.ternary import Ternary
from halfbit.solve import naive
from halfbit.solve.gptq import gptq
from halfbit.solve.hessian import Hessian, Repair, damp, factor, shrink
from halfbit.solve.loss import relative_loss
from halfbit.solve.rtn import rtn
from halfbit.types import Grid, Solution

all_grids = pytest.mark.parametrize("grid", conformance.grids(), ids=repr)
NAMES = ["expert 0", "expert 1", "expert 2"]


def problem(experts: int, rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 weights and Hessians; neighbouring inputs correlate, and one column in nine is three times larger."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(experts, rows, columns, generator=random, dtype=torch.float64)
    x = torch.randn(experts, tokens, columns, generator=random, dtype=torch.float64)
    x[..., 1:] += 0.7 * x[..., :-1]
    x[..., ::9] *= 3
    return w, x.mT @ x


def same(a: Solution, b: Solution) -> bool:
    return torch.equal(a.codes, b.codes) and all(torch.equal(a.params[key], b.params[key]) for key in b.params)


# -------------------------------------------------------------------------------------------------------- gptq and rtn


@all_grids
@pytest.mark.parametrize(("rows", "columns"), [(5, 37), (1, 17), (7, 1), (2, 48)])
def test_gptq_by_halves_equals_the_definition(grid: Grid, rows: int, columns: int):
    w, h = problem(3, rows, columns, 2 * columns)
    for e, solution in enumerate(gptq(w, h, grid, names=NAMES, damping=0.03)):
        assert same(solution, naive.error_feedback(w[e], h[e], grid, damping=0.03))


@all_grids
def test_float32_gptq_is_as_good_as_the_definition(grid: Grid):
    w, h = problem(3, 40, 96, 300)
    for e, solution in enumerate(gptq(w.float(), h.float(), grid, names=NAMES, damping=0.03)):
        exact = naive.error_feedback(w[e].float(), h[e].float(), grid, damping=0.03)
        # one flipped rounding changes the loss by about its share of the weights, 1 / 3840
        assert solution.loss == pytest.approx(relative_loss(w[e], exact.dense().double(), h[e]), rel=2e-3)
        assert (solution.codes == exact.codes).float().mean() > 0.98


@all_grids
@pytest.mark.parametrize(("kept", "cached"), [(1, 1), (3, 18), (1000, 1 << 15)])
def test_gptq_is_independent_of_how_columns_and_experts_are_taken(
    grid: Grid, kept: int, cached: int, monkeypatch: pytest.MonkeyPatch
):
    w, h = problem(3, 9, 50, 80)
    usual = gptq(w, h, grid, names=NAMES)
    monkeypatch.setattr("halfbit.solve.columns.FEW", kept)
    monkeypatch.setattr("halfbit.solve.columns.UNIT", 1)
    monkeypatch.setattr("halfbit.solve.columns.CACHED", cached)
    for a, b in zip(gptq(w, h, grid, names=NAMES), usual, strict=True):
        assert same(a, b)


@all_grids
def test_identity_hessian_is_rounding_to_nearest(grid: Grid):
    w, _ = problem(3, 6, 33, 1)
    eye = torch.eye(33, dtype=torch.float64).expand(3, -1, -1)
    for a, b in zip(gptq(w, 5 * eye, grid, names=NAMES), rtn(w, None, grid, names=NAMES), strict=True):
        assert same(a, b)
        assert a.loss == pytest.approx(b.loss)


@all_grids
def test_rtn_equals_the_definition(grid: Grid):
    w, h = problem(3, 5, 37, 70)
    for e, solution in enumerate(rtn(w, h, grid, names=NAMES)):
        assert same(solution, naive.round_to_nearest(w[e], grid))


@all_grids
def test_error_feedback_beats_rounding(grid: Grid):
    w, h = problem(3, 40, 96, 300)
    fed_back, rounded = gptq(w, h, grid, names=NAMES), rtn(w, h, grid, names=NAMES)
    assert all(a.loss < 0.9 * b.loss for a, b in zip(fed_back, rounded, strict=True))


def test_the_loss_is_the_error_of_the_output():
    random = torch.Generator().manual_seed(0)
    w, x = torch.randn(1, 6, 21, generator=random), torch.randn(50, 21, generator=random)
    (solution,) = gptq(w, (x.T @ x)[None], Ternary(), names=NAMES)
    y, q = x.double() @ w[0].double().T, x.double() @ solution.dense().double().T
    assert solution.loss == pytest.approx(float((q - y).square().sum() / y.square().sum()), rel=1e-5)


def test_the_loss_takes_half_of_the_hessian(monkeypatch: pytest.MonkeyPatch):
    w, h = problem(1, 6, 21, 50)
    q = w[0].round()
    exact = float(((q - w[0]) @ h[0] * (q - w[0])).sum() / (w[0] @ h[0] * w[0]).sum())
    for panel in (1, 8, 21, 512):
        monkeypatch.setattr("halfbit.solve.loss.PANEL", panel)
        assert relative_loss(w[0], q, h[0]) == pytest.approx(exact, rel=1e-12)


def test_bfloat16_weights_are_solved_in_float32():
    w, h = problem(2, 6, 33, 70)
    w = w.bfloat16()
    for a, b in zip(
        gptq(w, h.float(), Ternary(), names=NAMES), gptq(w.float(), h.float(), Ternary(), names=NAMES), strict=True
    ):
        assert same(a, b)


@all_grids
@pytest.mark.parametrize(("rows", "columns"), [(4, 33), (1, 33), (4, 1)])
def test_inputs_are_left_as_they_were(grid: Grid, rows: int, columns: int):
    w, h = problem(2, rows, columns, 70)
    w_before, h_before = w.clone(), h.clone()
    gptq(w, h, grid, names=NAMES)
    rtn(w, h, grid, names=NAMES)
    assert torch.equal(w, w_before)
    assert torch.equal(h, h_before)


def test_zero_weights_and_zero_hessian_have_no_loss():
    w, h = problem(1, 4, 9, 20)
    assert gptq(0 * w, h, Ternary(), names=NAMES)[0].loss == 0
    assert rtn(w, 0 * h, Ternary(), names=NAMES)[0].loss == 0


# ----------------------------------------------------------------------------------------- experts that saw too little


@all_grids
def test_dead_columns_are_rounded_to_nearest(grid: Grid):
    random = torch.Generator().manual_seed(0)
    w, x = torch.randn(1, 5, 32, generator=random), torch.randn(90, 32, generator=random)
    x[:, [3, 20, 31]] = 0
    (solution,) = gptq(w, (x.T @ x)[None], grid, names=NAMES)
    if grid.group is None:
        (rounded,) = rtn(w, None, grid, names=NAMES)
        assert torch.equal(solution.codes[:, [3, 20, 31]], rounded.codes[:, [3, 20, 31]])
    assert torch.equal(solution.codes, naive.error_feedback(w[0], x.T @ x, grid, 0.1).codes)


@all_grids
def test_an_unseen_expert_is_named_and_rounded(grid: Grid):
    w, h = problem(3, 5, 33, 70)
    h[1] = 0
    repairs: list[Repair] = []
    solved = gptq(w, h, grid, names=NAMES, on_repair=repairs.append)
    assert [(r.name, r.action) for r in repairs] == [("expert 1", "identity")]
    assert same(solved[1], rtn(w[1:2], None, grid, names=["expert 1"])[0])
    assert same(solved[2], naive.error_feedback(w[2], h[2], grid, 0.1))


def test_repairs_are_loud_by_default():
    w, h = problem(3, 5, 33, 70)
    h[1] = 0
    with pytest.warns(UserWarning, match="expert 1: no usable Hessian.*rounded to nearest"):
        gptq(w, h, Ternary(), names=NAMES)


def test_an_unseen_expert_can_be_an_error():
    w, h = problem(3, 5, 33, 70)
    h[1] = 0
    with pytest.raises(NotPositiveDefinite, match="expert 1: its Hessian saw no token") as caught:
        gptq(w, h, Ternary(), names=NAMES, fallback="raise")
    assert caught.value.name == "expert 1"


def test_a_singular_hessian_gets_more_damping():
    _, h = problem(3, 1, 33, 70)
    # an eigenvalue of about -0.05 of the mean diagonal: 0.01 is too little damping, 0.1 is enough
    v = torch.ones(33, dtype=torch.float64) / 33**0.5
    h[1] = torch.eye(33, dtype=torch.float64) - 1.05 * torch.outer(v, v)
    factors, repairs = factor(h, 0.01, NAMES)
    assert repairs == [Repair("expert 1", "damped", 0.1)]
    assert torch.allclose(factors[1] @ factors[1].T, damp(h[1:2], 0.1)[0], rtol=1e-10, atol=1e-12)


def test_a_hopeless_hessian_is_the_identity_or_an_error():
    _, h = problem(3, 1, 33, 70)
    h[2] = -h[2]
    factors, repairs = factor(h, 0.1, NAMES)
    assert repairs == [Repair("expert 2", "identity", 100.0)]
    assert torch.equal(factors[2], torch.eye(33, dtype=torch.float64))
    with pytest.raises(NotPositiveDefinite, match="expert 2") as caught:
        factor(h, 0.1, NAMES, "raise")
    assert caught.value.name == "expert 2"


@pytest.mark.parametrize("solver", [gptq, rtn])
def test_non_finite_weights_are_named(solver):
    w, h = problem(3, 5, 9, 20)
    w[2, 1, 1] = float("nan")
    with pytest.raises(NonFinite, match="expert 2") as caught:
        solver(w, h, Ternary(), names=NAMES)
    assert caught.value.tensor == "expert 2"


def test_non_finite_hessians_are_named():
    w, h = problem(3, 5, 9, 20)
    h[1, 1, 1] = float("inf")
    with pytest.raises(NonFinite, match="expert 1: its Hessian"):
        gptq(w, h, Ternary(), names=NAMES)


# ----------------------------------------------------------------------------------------------------------- hessian.py


@pytest.mark.parametrize("width", [1, 33, 128, 700])
def test_factors_give_the_damped_hessian(width: int):
    """Also by panels, and by panels of these."""
    _, h = problem(3, 1, width, 2 * width)
    factors, repairs = factor(h, 0.1, NAMES)
    assert repairs == []
    factors = factors.triu()
    assert torch.allclose(factors @ factors.mT, damp(h, 0.1), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("place", [(0, 699), (5, 5), (699, 699), (130, 400)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_hessians_are_found_wherever_it_is(place: tuple[int, int], value: float):
    _, h = problem(2, 1, 700, 900)
    h = h.float()
    h[1, place[0], place[1]] = h[1, place[1], place[0]] = value
    with pytest.raises(NonFinite, match="expert 1: its Hessian"):
        factor(h, 0.1, NAMES)


def test_factors_do_not_depend_on_how_many_are_factored_at_once(monkeypatch: pytest.MonkeyPatch):
    _, h = problem(3, 1, 33, 70)
    h[2] = -h[2]
    together, repairs = factor(h, 0.1, NAMES)
    monkeypatch.setattr("halfbit.solve.hessian.WORKSPACE_ELEMENTS", 33 * 33)
    one_by_one, same_repairs = factor(h, 0.1, NAMES)
    assert torch.allclose(together, one_by_one, rtol=1e-12, atol=0)
    assert repairs == same_repairs


def test_damping_is_relative_to_each_expert():
    h = torch.stack([2 * torch.eye(4), torch.zeros(4, 4), 1e-30 * torch.eye(4)])
    damped = damp(h, 0.1)
    assert torch.allclose(damped[2], 1.1e-30 * torch.eye(4), atol=0)
    assert torch.allclose(damped[0], 2.2 * torch.eye(4))
    assert torch.equal(damped[1], 1e-6 * torch.eye(4))
    assert torch.equal(h[0], 2 * torch.eye(4))


def test_hessians_accumulate_over_batches_and_experts():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(101, 17, generator=random).bfloat16()
    starts = torch.tensor([0, 40, 40, 101])
    at_once, in_two = Hessian(3, 17), Hessian(3, 17)
    at_once.add_sorted(x, starts)
    in_two.add(x[:13], 0)
    in_two.add(x[13:40], 0)
    in_two.add(x[40:], 2)
    assert at_once.tokens.tolist() == in_two.tokens.tolist() == [40, 0, 61]
    for hessian in (at_once, in_two):
        for e, part in [(0, x[:40]), (2, x[40:])]:
            exact = part.double().T @ part.double()
            assert (hessian.sum[e] - exact).abs().max() <= 61 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert not hessian.sum[1].any()


def test_hessians_are_symmetric_by_half_the_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("halfbit.solve.hessian.PANEL", 8)
    x, other = torch.randn(2, 40, 21, generator=torch.Generator().manual_seed(0))
    hessian, cross = Hessian(1, 21), Hessian(1, 21)
    hessian.add(x)
    hessian.add(x[:7])
    cross.add(x, other=other)
    exact = x.double().T @ x.double() + x[:7].double().T @ x[:7].double()
    assert torch.allclose(hessian.sum[0].double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.allclose(cross.sum[0].double(), other.double().T @ x.double(), rtol=1e-5, atol=1e-5)


def test_shrinking_moves_from_the_pooled_to_the_own_mean():
    h = torch.stack([4 * torch.eye(2), torch.zeros(2, 2), 900 * torch.eye(2)])
    tokens = torch.tensor([1, 0, 300])
    pooled = h.sum(0)
    shrunk = shrink(h, tokens, pooled, 301, k=3.0)
    mean = 904 / 301
    expected = [4 * 0.25 + mean * 0.75, mean, 3 * 300 / 303 + mean * 3 / 303]
    assert torch.allclose(shrunk[:, 0, 0], torch.tensor(expected))
    assert torch.allclose(shrink(h, tokens, pooled, 301, k=0.0)[:, 0, 0], torch.tensor([4.0, mean, 3.0]))
    assert not shrink(0 * h, 0 * tokens, 0 * pooled, 0, k=3.0).any()
