import conformance
import pytest
import torch

from halfbit import grids
from halfbit.errors import FormatError, NonFinite, RecipeError, UnknownName
from halfbit.grids.affine import Affine
from halfbit.grids.ternary import Ternary
from halfbit.types import Grid

all_grids = pytest.mark.parametrize("grid", conformance.grids(), ids=repr)
all_rows = pytest.mark.parametrize("rows", conformance.hostile_rows())


@all_grids
@all_rows
def test_nearest_equals_brute_force(grid: Grid, rows: str):
    conformance.check_nearest_is_brute_force(grid, conformance.hostile_rows()[rows])


@all_grids
@all_rows
def test_every_code_maps_to_itself(grid: Grid, rows: str):
    conformance.check_every_code_maps_to_itself(grid, conformance.hostile_rows()[rows])


@all_grids
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(grid: Grid, bad: float):
    w = torch.ones(3, 5)
    w[1, 2] = bad
    with pytest.raises(NonFinite):
        grid.fit(w)


@all_grids
def test_experts_are_independent(grid: Grid):
    w = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    together = grid.fit(w)
    codes = grid.nearest(w, together)
    for e in range(3):
        alone = grid.fit(w[e])
        assert all(torch.equal(together[key][e], alone[key]) for key in alone)
        assert torch.equal(codes[e], grid.nearest(w[e], alone))
        assert torch.equal(grid.values(codes, together)[e], grid.values(codes[e], alone))


@all_grids
def test_a_grid_is_its_configuration(grid: Grid):
    assert eval(repr(grid), {type(grid).__name__: type(grid)}) == grid
    assert grids.from_config(grids.to_config(grid)) == grid


def test_ternary_is_min_max():
    w = torch.tensor([[-1.0, 0.5, 2.0], [1.0, 0.25, 0.5], [-3.0, -1.0, -2.0], [0.0, 0.0, 0.0]])
    params = Ternary().fit(w)
    assert params["levels"].tolist() == [[-1, 2], [0, 1], [-3, 0], [-1, 1]]
    assert params["levels"].dtype == torch.bfloat16
    # exactly half way goes to zero
    assert Ternary().nearest(w, params).tolist() == [[1, 0, 2], [2, 0, 0], [1, 0, 1], [0, 0, 0]]


def test_two_bits_are_the_reference_formula():
    w = torch.tensor([[-1.0, 2.0, 0.0, 0.6], [0.0, 0.0, 0.0, 0.0]])
    params = Affine(2, dtype="float32").fit(w)
    assert params["scale"].tolist() == [1.0, pytest.approx(2 / 3)]
    assert params["zero"].tolist() == [1, 2]
    codes = Affine(2, dtype="float32").nearest(w, params)
    assert codes[0].tolist() == [0, 3, 1, 2]
    assert Affine(2, dtype="float32").values(codes, params)[0].tolist() == [-1, 2, 0, 1]


def test_the_zero_is_chosen_for_the_rounded_scale():
    """Some minimum in a range of 15 lies near a half step, where the two orders give two zeros."""
    grid, exact = Affine(8), Affine(8, dtype="float32")
    for low in torch.linspace(-3, -0.1, 200):
        w = torch.tensor([[float(low), 15.305]])
        rounded, unrounded = grid.fit(w), exact.fit(w)
        if int(rounded["zero"]) != int(unrounded["zero"]):
            break
    else:
        raise AssertionError("no example in which the order matters")
    assert int(rounded["zero"]) == round(-float(w[0, 0]) / float(rounded["scale"]))


def test_symmetric_keeps_zero_in_the_middle():
    params = Affine(3, symmetric=True).fit(torch.tensor([[-0.5, 3.5, 1.0]]))
    assert list(params) == ["scale"]
    assert params["scale"].tolist() == [1.0]
    codes = torch.arange(8, dtype=torch.uint8)[None]
    assert Affine(3, symmetric=True).values(codes, params).tolist() == [[-4, -3, -2, -1, 0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Ternary("int8"), "bfloat16, float32"),
        (lambda: Affine(1), "bits must be 2 to 8, got 1"),
        (lambda: Affine(9), "bits must be 2 to 8, got 9"),
        (lambda: Affine(group=0), "at least 1, got 0"),
        (lambda: Affine(dtype="int8"), "bfloat16, float32"),
    ],
)
def test_impossible_values_are_refused(make, says: str):
    with pytest.raises(RecipeError, match=says):
        make()


@pytest.mark.parametrize(
    "config", [{"name": "ternary", "bits": 2}, {"name": "affine", "bits": 11}, {}, {"name": 3}, []]
)
def test_damaged_configs_are_refused(config):
    with pytest.raises(FormatError):
        grids.from_config(config)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownName, match="affine, bilevel, ternary"):
        grids.from_config({"name": "os"})
