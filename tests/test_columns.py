"""The kernel that rounds columns one after another, against float64 and against plain torch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from halfbit import native
from halfbit.grids.affine import Affine
from halfbit.grids.bilevel import Bilevel
from halfbit.grids.deadzone import Deadzone
from halfbit.grids.ternary import Ternary
from halfbit.solve.columns import Far, Pass, round_columns
from halfbit.types import Grid

pytestmark = pytest.mark.skipif(native.extension is None, reason="needs the extension")
QUICK = {"group": None, "fitting": "min-max"}
GRIDS: list[Grid] = [
    Ternary(),
    Deadzone(spread=1.5),
    Affine(2),
    Affine(8, symmetric=True),
    Bilevel(3, **QUICK),
    Bilevel(4, scale_bits=16, zero_bits=16, **QUICK),
]
OUTLIERS = [Bilevel(3, dtype=dtype, **QUICK) for dtype in ("float16", "bfloat16", "float32")]
all_grids = pytest.mark.parametrize("grid", [*GRIDS, *OUTLIERS], ids=repr)


def begun(grid: Grid, experts: int, rows: int, columns: int) -> Pass:
    """Something has been fed to every column."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(experts, rows, columns, generator=random)
    feedback = 0.1 * torch.randn(experts, columns, columns, generator=random)
    feedback = feedback.triu(1) + torch.eye(columns)
    fed = 0.1 * torch.randn(experts, columns, rows, generator=random)
    far = None
    if grid in OUTLIERS:
        assert isinstance(grid, Bilevel)
        outlying = torch.zeros(w.shape, dtype=torch.bool)
        # some ten percent
        limit, importance = torch.linspace(0.02, 0.03, experts), 0.5 + torch.rand(experts, columns, generator=random)
        far = Far(limit, importance, grid.dtype, outlying, torch.zeros_like(w))
    return Pass(w, feedback, fed, torch.full(w.shape, 77, dtype=torch.uint8), far)


def copied(at: Pass) -> Pass:
    far = at.far
    if far is not None:
        far = replace(far, outlying=far.outlying.clone(), values=far.values.clone())
    return replace(at, fed=at.fed.clone(), codes=at.codes.clone(), far=far)


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32)


def same(a: Pass, b: Pass) -> bool:
    equal = torch.equal(a.codes, b.codes) and torch.equal(bits(a.fed), bits(b.fed))
    if a.far is None or b.far is None:
        return equal
    kept = a.far.values[a.far.outlying], b.far.values[b.far.outlying]
    return equal and torch.equal(a.far.outlying, b.far.outlying) and torch.equal(bits(kept[0]), bits(kept[1]))


@all_grids
@pytest.mark.parametrize(
    ("rows", "columns", "start", "stop"), [(33, 20, 2, 19), (1, 1, 0, 1), (77, 130, 1, 129), (99, 350, 3, 337)]
)
def test_each_weight_goes_where_float64_says(
    isa: str, grid: Grid, rows: int, columns: int, start: int, stop: int
) -> None:
    at = begun(grid, 2, rows, columns)
    before = copied(at)
    params = grid.ready(grid.fit(at.w))
    round_columns(at, grid, params, start, stop)
    for open_ in (slice(0, start), slice(stop, columns)):
        assert torch.equal(at.fed[:, open_], before.fed[:, open_])
        assert (at.codes[:, :, open_] == 77).all()
    every = torch.arange(256 if isinstance(grid, Affine) and grid.bits == 8 else 1 << getattr(grid, "bits", 2))
    every = every[:3] if isinstance(grid, (Ternary, Deadzone)) else every
    points = grid.values(every.expand(2, rows, -1).to(torch.uint8), params).double()
    size = points.abs().max()
    for j in range(start, stop):
        done = at.fed[:, start:j].double()
        wanted = before.fed[:, j].double() + torch.einsum("ek,ekr->er", at.feedback[:, start:j, j].double(), done)
        column = at.w[:, :, j].double() + wanted
        nearest = (column[..., None] - points).abs().amin(-1)
        value = grid.values(at.codes[:, :, j : j + 1], params)[..., 0]
        if at.far is not None:
            outlying, kept = at.far.outlying[:, :, j], at.far.values[:, :, j]
            cost = nearest.square() * at.far.importance[:, j, None]
            clear = (cost - at.far.limit[:, None]).abs() > 1e-4
            assert torch.equal(outlying[clear], (cost > at.far.limit[:, None])[clear])
            assert (at.codes[:, :, j][outlying] == 0).all()
            torch.testing.assert_close(kept[outlying].double(), column[outlying], rtol=1e-5, atol=1e-5)
            dtype = getattr(torch, at.far.dtype)
            value = torch.where(outlying, kept.to(dtype).float(), value)
            nearest = torch.where(outlying, torch.inf, nearest)
        assert ((column - value).abs() <= nearest + 1e-5 * size).all()
        assert torch.equal(at.fed[:, j], at.w[:, :, j] - value)


@all_grids
@pytest.mark.parametrize("size", [1.0, 1e-40, 1e-20, 1e30])
def test_where_nothing_is_fed_back_it_is_torch_bit_for_bit(
    isa: str, grid: Grid, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Denormals, weights beyond the range of 16 bits, ties and infinities included."""
    at = begun(grid, 2, 37, 40)
    params = grid.ready(grid.fit(size * at.w if size < 1e5 or "float16" not in repr(grid).split("b")[-1] else at.w))
    w = size * at.w
    w[:, :, 3] = 0
    # halfway between the first two points
    w[:, :, 4] = grid.values(torch.tensor([[0, 1]]).expand(2, 37, 2).to(torch.uint8), params).mean(-1)
    fed = size * at.fed
    fed[:, 5], fed[:, 6] = torch.inf, -torch.inf
    far = None if at.far is None else replace(at.far, limit=size * size * at.far.limit)
    by_kernel = replace(at, w=w, fed=fed, far=far, feedback=torch.eye(40).expand(2, -1, -1).contiguous())
    by_torch = copied(by_kernel)
    round_columns(by_kernel, grid, params, 0, 40)
    monkeypatch.setattr(native, "extension", None)
    round_columns(by_torch, grid, params, 0, 40)
    assert same(by_kernel, by_torch)


@all_grids
@pytest.mark.parametrize(("rows", "columns"), [(1100, 24), (2150, 200)])
def test_it_is_the_same_with_any_instructions_and_threads(grid: Grid, rows: int, columns: int) -> None:
    assert native.extension is not None
    at = begun(grid, 2, rows, columns)
    params = grid.ready(grid.fit(at.w))
    found = []
    threads = torch.get_num_threads()
    for isa in ("portable", "best"):
        for count in (1, 3):
            found.append(copied(at))
            native.extension.set_isa(isa)
            torch.set_num_threads(count)
            try:
                round_columns(found[-1], grid, params, 0, columns)
            finally:
                torch.set_num_threads(threads)
                native.extension.set_isa("best")
    assert all(same(one, found[0]) for one in found)


def test_what_is_not_a_number_becomes_the_least_code(isa: str) -> None:
    for grid in (Ternary(), Affine(4), Bilevel(3, **QUICK)):
        at = begun(grid, 1, 5, 8)
        at.fed[:, 0] = torch.nan
        round_columns(at, grid, grid.ready(grid.fit(at.w)), 0, 1)
        assert (at.codes[:, :, 0] == 0).all()
        assert torch.isfinite(at.fed[:, 0]).all()


def test_other_tensors_are_refused() -> None:
    assert native.extension is not None
    at = begun(Ternary(), 2, 5, 1600)
    numbers = torch.zeros(2, 4, 5)

    def call(start: int, stop: int, form: str = "levels", numbers: Tensor = numbers, fed: Tensor = at.fed) -> None:
        assert native.extension is not None
        native.extension.round_columns(at.w, fed, at.codes, at.feedback, start, stop, form, numbers, 2, None, 1)

    call(0, 1536)
    for wrong in ((0, 1537), (-1, 3), (5, 3), (1590, 1601)):
        with pytest.raises(ValueError, match="not columns of the weights"):
            call(*wrong)
    with pytest.raises(ValueError, match="form"):
        call(0, 3, "rings")
    with pytest.raises(ValueError, match="another shape"):
        call(0, 3, numbers=numbers[:1])
    with pytest.raises(ValueError, match="contiguous"):
        call(0, 3, fed=at.fed.double())
