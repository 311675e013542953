"""SpQR's solver: outliers, column orders and thresholds by share, held equal to the definition in `naive.py`."""

import conformance
import pytest
import torch
from torch import Tensor

from halfbit.errors import RecipeError, Unsupported
from halfbit.grids.affine import Affine
from halfbit.grids.bilevel import Bilevel
from halfbit.solve import naive, orders
from halfbit.solve.budget import gptq_with_share
from halfbit.solve.gptq import Answer, Problem, gptq, solve
from halfbit.solve.hessian import damp
from halfbit.solve.loss import relative_loss
from halfbit.solve.outliers import likely_outliers, threshold, without_outliers
from halfbit.types import Solution

NAMES = ["expert 0", "expert 1", "expert 2"]
# where how statistics are found is not what is tested
QUICK = Bilevel(fitting="min-max")


def problem(experts: int, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 heavy-tailed weights with a mean, and Hessians of correlated inputs of unequal size."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(experts, rows, columns, generator=random, dtype=torch.float64)
    w *= 1 + 5 * (torch.rand(w.shape, generator=random, dtype=torch.float64) < 0.03)
    w += 0.3
    x = torch.randn(experts, 2 * columns, columns, generator=random, dtype=torch.float64)
    x[..., 1:] += 0.7 * x[..., :-1]
    x *= 1 + 2 * torch.rand(columns, generator=random, dtype=torch.float64)
    return w, x.mT @ x


def places(solution: Solution) -> dict[tuple[int, int], float]:
    """Outliers by place, in the matrix's own columns."""
    if solution.outliers is None:
        return {}
    o = solution.outliers
    columns = o.columns if solution.order is None else solution.order[o.columns]
    return dict(zip(zip(o.rows.tolist(), columns.tolist(), strict=True), o.values.tolist(), strict=True))


def assert_same(a: Solution, b: Solution) -> None:
    assert torch.equal(a.codes, b.codes)
    assert (a.order is None) == (b.order is None)
    if a.order is not None and b.order is not None:
        assert torch.equal(a.order, b.order)
    for key in b.params:
        if b.params[key].dtype == torch.float64:
            torch.testing.assert_close(a.params[key], b.params[key], rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(a.params[key], b.params[key])
    assert places(a).keys() == places(b).keys()
    assert list(places(a).values()) == pytest.approx([places(b)[key] for key in places(a)], rel=1e-9)


# ------------------------------------------------------------------------------------------ equal to the definition


@pytest.mark.parametrize(
    ("grid", "order"),
    [
        (Bilevel(group=8, supergroup=3), "identity"),
        (Bilevel(group=8, supergroup=3, fitting="min-max"), "identity"),
        (Bilevel(group=8, supergroup=3, fitting="min-max"), "act_order"),
        (Bilevel(group=8, supergroup=3, fitting="min-max"), "sensitivity"),
        (Bilevel(4, 5, 16, 3, 4, "bfloat16"), "act_order"),
        (Bilevel(2, 16, 4, 16, 16, "float64", fitting="min-max"), "sensitivity"),
        (Bilevel(3, None, 3, 3, 4, rounding="float16"), "act_order"),
        (Bilevel(3, 16, 16, 16), "sensitivity"),
    ],
    ids=str,
)
def test_spqr_equals_the_definition(grid: Bilevel, order: orders.Order):
    w, h = problem(3, 7, 37)
    tau = [0.005, 0.1, float("inf")]
    solved = gptq(w, h, grid, names=NAMES, damping=0.1, order=order, outliers=torch.tensor(tau))
    for e, solution in enumerate(solved):
        assert_same(solution, naive.error_feedback(w[e], h[e], grid, 0.1, order, tau[e]))
    assert len(places(solved[0])) > 10
    assert places(solved[2]) == {}


@pytest.mark.parametrize(("kept", "cached"), [(1, 1), (7, 9)])
def test_spqr_is_independent_of_how_columns_and_experts_are_taken(
    kept: int, cached: int, monkeypatch: pytest.MonkeyPatch
):
    w, h = problem(2, 9, 50)
    kwargs = {"names": NAMES, "order": "act_order", "outliers": 0.2}
    usual = gptq(w, h, QUICK, **kwargs)
    monkeypatch.setattr("halfbit.solve.columns.FEW", kept)
    monkeypatch.setattr("halfbit.solve.columns.UNIT", 1)
    monkeypatch.setattr("halfbit.solve.columns.CACHED", cached)
    for a, b in zip(gptq(w, h, QUICK, **kwargs), usual, strict=True):
        assert_same(a, b)


def test_experts_solved_together_are_solved_alone():
    w, h = problem(3, 9, 40)
    tau = torch.tensor([0.1, 0.4, 0.2], dtype=torch.float64)
    together = gptq(w, h, QUICK, names=NAMES, order="sensitivity", outliers=tau)
    for e in range(3):
        (alone,) = gptq(w[e : e + 1], h[e : e + 1], QUICK, names=["w"], order="sensitivity", outliers=float(tau[e]))
        assert_same(together[e], alone)


@pytest.mark.parametrize(("columns", "bits"), [(1, 3), (2, 3), (3, 2), (16, 3), (16, 4)])
def test_leaving_out_one_equals_brute_force(columns: int, bits: int):
    random = torch.Generator().manual_seed(0)
    w = torch.randn(2, 60, columns, generator=random, dtype=torch.float64) ** 3
    # rows with the smallest or the largest weight twice, rows of one and of two values
    w[:, ::5] = w[:, ::5].clamp(-0.5, 1)
    w[:, 1::10], w[:, 2::10] = 0.7, w[:, 2::10].sign()
    importance = 1 + 3 * torch.rand(2, columns, generator=random, dtype=torch.float64)
    limit = torch.tensor([0.02, 0.3], dtype=torch.float64)
    likely = likely_outliers(w, importance, limit, (1 << bits) - 1)
    replaced = without_outliers(w, importance, limit, (1 << bits) - 1)
    for e in range(2):
        assert torch.equal(likely[e], naive.likely_outliers(w[e], importance[e], float(limit[e]), (1 << bits) - 1))
        torch.testing.assert_close(
            replaced[e], naive.without_outliers(w[e], importance[e], float(limit[e]), (1 << bits) - 1)
        )
    assert likely.any() == (columns > 2)


# ------------------------------------------------------------------------------------------------------- what it does


def test_outliers_replace_what_lies_under_them():
    w, h = problem(1, 32, 64)
    w[0, 5, 40] = 50.0
    (solution,) = gptq(w, h, Bilevel(), names=NAMES, order="act_order", outliers=0.2)
    assert places(solution)[5, 40] == pytest.approx(float(solution.dense()[5, 40]))
    assert solution.dense()[5, 40] == pytest.approx(50, abs=3)
    assert solution.outliers is not None
    assert not solution.codes[solution.outliers.rows, solution.outliers.columns].any()
    assert solution.loss == pytest.approx(relative_loss(w[0], solution.dense().double(), h[0]))


def test_outliers_lower_the_loss():
    w, h = problem(3, 32, 64)
    losses = [sum(s.loss for s in gptq(w, h, Bilevel(), names=NAMES, outliers=t)) for t in (None, 0.5, 0.2, 0.05)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


def test_the_rounding_of_an_outlier_is_fed_back():
    """Everything is an outlier: what is left is bfloat16's rounding, less what later columns could make up for."""
    w, h = problem(1, 32, 64)
    (solution,) = gptq(w, h, Bilevel(dtype="bfloat16"), names=NAMES, damping=0.001, outliers=0.0)
    assert len(places(solution)) > 0.99 * w[0].numel()
    assert solution.loss < 0.7 * relative_loss(w[0], w[0].bfloat16().double(), h[0])


def test_orders_are_what_they_say():
    w, h = problem(2, 5, 20)
    by_diagonal = orders.column_order("act_order", w, h, h)
    assert by_diagonal is not None
    diagonals = h.diagonal(dim1=-2, dim2=-1).gather(1, by_diagonal)
    assert torch.equal(diagonals, diagonals.sort(descending=True).values)
    for e in range(2):
        (solution,) = gptq(w[e : e + 1], h[e : e + 1], QUICK, names=["w"], damping=0.1, order="sensitivity")
        saliency = w[e].square().sum(0) / torch.linalg.inv(damp(h[e : e + 1], 0.1)[0]).diagonal()
        assert solution.order is not None
        assert torch.equal(solution.order, saliency.argsort(descending=True))
    assert gptq(w, h, QUICK, names=NAMES)[0].order is None


def test_dead_columns_are_kept():
    w, h = problem(1, 8, 32)
    h[0, 3], h[0, :, 3] = 0, 0
    (solution,) = gptq(w, h, Bilevel(4), names=NAMES, order="act_order", outliers=0.2)
    assert (solution.dense()[:, 3] - w[0, :, 3]).abs().max() < 0.3 * w[0].std()


# ----------------------------------------------------------------------------------------------------- given a share


@pytest.mark.parametrize("share", [0.002, 0.01, 0.1])
def test_a_share_is_met(share: float):
    w, h = problem(3, 48, 96)
    for solution in gptq_with_share(w, h, QUICK, share, names=NAMES, order="act_order"):
        wanted = share * w[0].numel()
        assert abs(len(places(solution)) - wanted) <= max(1.5, 0.03 * wanted)


def test_every_expert_has_its_own_share():
    w, h = problem(3, 48, 96)
    shares = torch.tensor([0.0, 0.02, 0.005])
    solved = gptq_with_share(w, h, QUICK, shares, names=NAMES)
    counts = [len(places(s)) for s in solved]
    assert counts[0] == 0
    assert counts[1:] == [pytest.approx(0.02 * 48 * 96, rel=0.035), pytest.approx(23, abs=1)]
    assert_same(solved[0], gptq(w, h, QUICK, names=NAMES)[0])


def test_large_matrices_are_searched_on_some_rows_first(monkeypatch: pytest.MonkeyPatch):
    w, h = problem(2, 200, 64)
    rows: list[int] = []

    def counted(part: Problem, *args) -> Answer:
        rows.append(part.w.shape[1])
        return solve(part, *args)

    monkeypatch.setattr("halfbit.solve.budget.SAMPLE", 40 * 64)
    monkeypatch.setattr("halfbit.solve.budget.solve", counted)
    solved = gptq_with_share(w, h, QUICK, 0.02, names=NAMES)
    assert [len(places(s)) for s in solved] == [pytest.approx(0.02 * 200 * 64, rel=0.035)] * 2
    # of 13 supergroups, the last with 8 rows, those with the numbers 0, 5 and 10
    assert rows[0] == 48
    assert rows.count(200) <= 3
    # less than one outlier in the sample
    assert 1 <= len(places(gptq_with_share(w, h, QUICK, 1 / 6400, names=NAMES)[0])) <= 3


@pytest.mark.parametrize("weights", ["zero", "two values", "one value", "one spike"])
def test_a_share_that_cannot_be_met_is_not_exceeded(weights: str):
    _, h = problem(1, 16, 32)
    w = torch.zeros(1, 16, 32, dtype=torch.float64)
    if weights == "two values":
        w[:, ::2, ::2] = 1
    elif weights == "one value":
        w += 0.7
    elif weights == "one spike":
        w[0, 3, 5] = 9
    (solution,) = gptq_with_share(w, h, Bilevel(), 0.1, names=NAMES)
    assert len(places(solution)) <= 0.1 * w.numel() + 2
    assert torch.isfinite(solution.dense()).all()


# --------------------------------------------------------------------------------------------------- hostile weights


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", conformance.hostile_rows())
def test_hostile_weights_stay_finite(rows: str, dtype: str):
    w = conformance.hostile_rows()[rows][None]
    h = torch.eye(w.shape[2])[None]
    kwargs = {"names": NAMES, "order": "act_order", "outliers": 0.1}
    if rows == "huge" or (rows == "mixed" and dtype == "float16"):
        with pytest.raises(Unsupported, match=f"too large for .* in {dtype}"):
            gptq(w, h, Bilevel(dtype=dtype), **kwargs)
    else:
        (solution,) = gptq(w, h, Bilevel(dtype=dtype), **kwargs)
        assert torch.isfinite(solution.dense()).all()


def test_weights_beyond_float16_say_what_helps():
    w, h = problem(1, 8, 32)
    w[0, 2] *= 1e6
    with pytest.raises(Unsupported, match=r'too large for statistics in float16; dtype="bfloat16"'):
        gptq(w, h, Bilevel(), names=NAMES)
    (solution,) = gptq(w, h, Bilevel(dtype="bfloat16"), names=NAMES, outliers=0.1)
    assert solution.loss < 0.01


def test_an_outlier_beyond_float16_says_what_helps():
    w, h = problem(1, 8, 32)
    w[0, 2, 7] = 1e5
    with pytest.raises(Unsupported, match='too large for an outlier in float16; dtype="bfloat16"'):
        gptq(w, h, Bilevel(), names=NAMES, outliers=0.01)
    (solution,) = gptq(w, h, Bilevel(dtype="bfloat16"), names=NAMES, outliers=0.01)
    assert places(solution)[2, 7] == pytest.approx(1e5, rel=0.004)


def test_identical_rows_have_a_threshold():
    w, h = problem(1, 8, 32)
    w = w[:, :1].expand(1, 8, 32)
    importance = torch.ones(1, 32, dtype=torch.float64)
    assert threshold(w, importance, torch.tensor([0.5], dtype=torch.float64)) == pytest.approx(
        0.5 * float(w.square().mean())
    )
    (solution,) = gptq(w, h, Bilevel(), names=NAMES, outliers=0.2)
    assert len(places(solution)) < 0.2 * w.numel()


@pytest.mark.parametrize("tau", [-0.1, float("nan"), torch.tensor([0.1, -1.0])])
def test_impossible_thresholds_are_refused(tau):
    w, h = problem(2, 4, 16)
    with pytest.raises(RecipeError, match="tau must be at least 0"):
        gptq(w, h, QUICK, names=NAMES, outliers=tau)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_impossible_shares_are_refused(share: float):
    w, h = problem(2, 4, 16)
    with pytest.raises(RecipeError, match="share of outliers must be 0 to 1"):
        gptq_with_share(w, h, QUICK, share, names=NAMES)


def test_unknown_orders_and_grids_without_outliers_are_refused():
    w, h = problem(1, 4, 16)
    with pytest.raises(RecipeError, match="order must be one of identity, act_order, sensitivity, got 'spearman'"):
        gptq(w, h, QUICK, names=NAMES, order="spearman")  # pyright: ignore[reportArgumentType]
    with pytest.raises(Unsupported, match=r"Affine.*outliers need"):
        gptq(w, h, Affine(3), names=NAMES, outliers=0.2)
