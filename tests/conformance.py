"""What every grid, solver and codec must do. The registry is the test matrix: a new file is found and put through this.

`test_grids.py`, `test_solvers.py` and `test_codecs.py` call these checks; VARIANTS lists more configurations than the
default one.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from halfbit import registry
from halfbit.errors import FormatError, Unsupported
from halfbit.grids.bilevel import Bilevel
from halfbit.solve.rtn import rtn
from halfbit.types import Codec, Grid, Outliers, Packed, Params, Solution

VARIANTS: dict[str, list[dict]] = {
    "ternary": [{}, {"dtype": "float32"}],
    "deadzone": [{}, {"scale_bits": 3}, {"scale_bits": 8}],
    "affine": [
        {},
        {"bits": 3, "group": 16},
        {"bits": 4, "group": 5, "symmetric": True},
        {"bits": 8, "dtype": "float32"},
        {"bits": 2, "symmetric": True, "dtype": "float32"},
    ],
    "bilevel": [
        {},
        {"dtype": "bfloat16", "fitting": "min-max"},
        {"bits": 2, "group": 5, "supergroup": 3, "scale_bits": 16, "dtype": "bfloat16", "fitting": "min-max"},
        {"bits": 4, "group": None, "supergroup": 64, "zero_bits": 16, "fitting": "min-max"},
        {"bits": 8, "scale_bits": 16, "zero_bits": 16, "dtype": "bfloat16", "fitting": "min-max"},
        {"bits": 3, "group": 8, "scale_bits": 4, "zero_bits": 2, "rounding": "float16", "fitting": "min-max"},
    ],
    "qmoe": [{}, {"p0": 0.6}],
    "spqr": [
        {},
        {"bits": 2, "group": 5, "supergroup": 3, "scale_bits": 16, "dtype": "bfloat16"},
        {"bits": 4, "group": None, "supergroup": 64, "zero_bits": 16},
        {"bits": 7, "group": 8, "scale_bits": 16, "zero_bits": 16},
        {"bits": 3, "group": 8, "supergroup": 16, "scale_bits": 4, "zero_bits": 2, "rounding": "float16"},
    ],
    "runlength": [
        {},
        {"scale_bits": 0},
        {"scale_bits": 3, "lane": 256},
        {"scale_bits": 8, "lane": 16384},
        {"rotated": True},
    ],
    "quads": [{}, {"scale_bits": 0}, {"scale_bits": 3}, {"rotated": True}],
    "grouped": [{}, {"bits": 3, "group": 16}, {"bits": 4, "group": 5, "symmetric": True}],
    # encodes nothing; test_mixed.py puts it through the checks of stacks
    "mixed": [],
}


def grids() -> list[Grid]:
    return [registry.module("grids", n).GRID(**v) for n in registry.names("grids") for v in VARIANTS.get(n, [{}])]


def codecs() -> list[Codec]:
    return [registry.module("formats", n).CODEC(**v) for n in registry.names("formats") for v in VARIANTS.get(n, [{}])]


# --------------------------------------------------------------------------------------------------------------- grids


def hostile_rows() -> dict[str, Tensor]:
    """Rows that break careless arithmetic, each `[rows, columns]`."""
    random = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    return {
        "random": random,
        "constant": torch.full((1, 9), 0.3),
        "negative constant": torch.full((1, 9), -0.3),
        "zero": torch.zeros(2, 9),
        "negative zero": -torch.zeros(1, 9),
        "one column": torch.tensor([[1.5], [-2.0], [0.0]]),
        "huge": torch.tensor([[3e38, -3e38, 1e38, 0.0], [3.4e38, 3.4e38, 3.4e38, 0.0]]),
        "tiny": torch.tensor([[1e-38, -1e-38, 3e-39, 0.0], [1e-45, 0.0, 0.0, 0.0]]),
        "mixed": torch.tensor([[3e38, 1e-38, -1.0, 0.0]]),
        "positive": random.abs(),
        "negative": -random.abs(),
    }


def all_points(grid: Grid, params: Params, shape: tuple[int, int]) -> Tensor:
    """float64 `[codes, rows, columns]`: each value each weight could take. Codes of a grid are 0 to some largest."""
    largest = getattr(grid, "largest_code", 2)
    return torch.stack(
        [grid.values(torch.full(shape, c, dtype=torch.uint8), params).double() for c in range(largest + 1)]
    )


def fit(grid: Grid, w: Tensor) -> Params | None:
    """None where the grid says that its statistics cannot hold weights beyond float16."""
    try:
        return grid.fit(w)
    except Unsupported as error:
        if "too large" not in str(error) or w.abs().max() <= 65504:
            raise
        return None


def check_nearest_is_brute_force(grid: Grid, w: Tensor) -> None:
    params = fit(grid, w)
    if params is None:
        return
    points = all_points(grid, params, (w.shape[0], w.shape[1]))
    assert torch.isfinite(points).all()
    chosen = grid.values(grid.nearest(w, params), params).double()
    best = (points - w.double()).abs().amin(0)
    # float32 division may round a midpoint to either side, so a tie is a tie up to 2^-20 of the distance
    assert ((chosen - w.double()).abs() <= best * (1 + 2**-20)).all()


def check_every_code_maps_to_itself(grid: Grid, w: Tensor) -> None:
    params = fit(grid, w)
    if params is None:
        return
    for point in all_points(grid, params, (w.shape[0], w.shape[1])).float():
        assert torch.equal(grid.values(grid.nearest(point, params), params).float(), point)


# -------------------------------------------------------------------------------------------------------------- codecs


def solutions_for(codec: Codec, rows: int, columns: int, seed: int = 0) -> Iterator[Solution]:
    """One Solution for each grid that the codec stores, and another with all else it stores: a column order, outliers.

    Every other row is unusual.
    """
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(1, rows, columns, generator=random)
    # constant rows (of which no value is 0.0), rows of one sign, rows of zeros
    w[:, 1::8], w[:, 3::8], w[:, 5::8], w[:, 7::8] = 0.7, -0.3, w[:, 5::8].abs(), 0
    found = False
    for grid in _stored_grids(codec):
        (solution,) = rtn(w, None, grid, names=["w"])
        solution = replace(solution, rotated=codec.rotated)
        ordered = _ordered(solution, random)
        richer = next((s for s in (_with_outliers(ordered, random), ordered) if _stores(codec, s)), None)
        for kind in (solution, richer):
            if kind is not None and _stores(codec, kind):
                found = True
                yield kind
    assert found, f"{codec!r} stores none of the grids of conformance.VARIANTS; add one"


def _stores(codec: Codec, solution: Solution) -> bool:
    try:
        codec.encode(solution)
    except Unsupported:
        return False
    return True


@cache
def _stored_grids(codec: Codec) -> list[Grid]:
    """What the codec takes, tried on two weights; statistics are found the quick way, since no codec knows how."""
    stored = []
    for grid in dict.fromkeys(grids() + _own_grid(codec)):
        quick = replace(grid, fitting="min-max") if isinstance(grid, Bilevel) else grid
        (solution,) = rtn(torch.tensor([[[-1.0, 1.0]]]), None, quick, names=["w"])
        if _stores(codec, replace(solution, rotated=codec.rotated)):
            stored.append(quick)
    return stored


def _ordered(solution: Solution, random: torch.Generator) -> Solution:
    return replace(solution, order=torch.randperm(solution.shape[1], generator=random))


def _with_outliers(solution: Solution, random: torch.Generator) -> Solution:
    """About a tenth of the weights, the first and the last among them; the codes under them are 0."""
    there = torch.rand(solution.shape, generator=random) < 0.1
    there.view(-1)[[0, -1]] = True
    rows, columns = torch.nonzero(there[:, torch.randperm(solution.shape[1], generator=random)], as_tuple=True)
    # in any order: sorting them is the codec's business
    mixed = torch.randperm(len(rows), generator=random)
    rows, columns = rows[mixed], columns[mixed]
    dtype = getattr(torch, getattr(solution.grid, "dtype", "bfloat16"))
    values = (10 * torch.randn(len(rows), generator=random)).to(dtype)
    codes = solution.codes.clone()
    codes[rows, columns] = 0
    return replace(solution, codes=codes, outliers=Outliers(rows, columns, values))


def _own_grid(codec: Codec) -> list[Grid]:
    grid = getattr(codec, "grid", None)
    return [grid] if grid is not None else []


def check_law(codec: Codec, solution: Solution) -> Packed:
    """Decoding gives exactly what was encoded, and nothing but the listed tensors is stored."""
    packed = codec.encode(solution)
    codec.check(packed)
    decoded = codec.decode(packed)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, solution.dense())
    assert tuple(packed.tensors) == codec.parts
    assert packed.shape == solution.shape
    return packed


def check_stack(codec: Codec, solutions: list[Solution]) -> None:
    """Putting together and cutting need no decoding, and what is cut out has the bytes of what was put in."""
    check_cuts(codec, [codec.encode(solution) for solution in solutions])


def check_cuts(codec: Codec, parts: list[Packed]) -> Packed:
    """As `check_stack`, of matrices that are encoded; they may be of other codecs where `codec` stacks those."""
    whole = codec.stack(parts)
    codec.check(whole)
    assert whole.codec == codec
    assert tuple(whole.tensors) == codec.parts
    assert torch.equal(codec.decode(whole), torch.cat([part.codec.decode(part) for part in parts]))
    for number, part in enumerate(parts):
        cut = codec.part(whole, number, len(parts))
        assert cut.codec == part.codec
        assert cut.shape == part.shape
        assert tuple(cut.tensors) == part.codec.parts
        for name in part.codec.parts:
            assert cut.tensors[name].dtype == part.tensors[name].dtype
            assert torch.equal(cut.tensors[name], part.tensors[name]), name
    return whole


def check_lookup(codec: Codec, solution: Solution) -> None:
    """Looked-up rows are the matrix's rows, in any order, some twice, or none."""
    tensors = codec.runtime(codec.encode(solution))
    dense = solution.dense()
    for count in (0, 1, 40):
        rows = torch.randint(dense.shape[0], (count,), generator=torch.Generator().manual_seed(count))
        found = codec.lookup(rows, tensors, dense.shape[1])
        assert found.dtype == torch.float32
        assert torch.equal(found, dense[rows])


def check_damage_never_crashes(codec: Codec, packed: Packed, seed: int = 0) -> int:
    """Flip bits, cut tensors short, lose them: FormatError or another valid matrix. Returns the number of errors."""
    errors = 0
    for damaged in _damaged(packed, torch.Generator().manual_seed(seed)):
        try:
            decoded = codec.decode(damaged)
        except FormatError:
            errors += 1
        else:
            assert decoded.shape == packed.shape
            assert torch.isfinite(decoded).all()
    return errors


def _damaged(packed: Packed, random: torch.Generator) -> Iterator[Packed]:
    for part, tensor in packed.tensors.items():
        if tensor.numel():
            for _ in range(15):
                flipped = tensor.clone().contiguous()
                as_bytes = flipped.view(-1).view(torch.uint8)
                at = int(torch.randint(as_bytes.numel(), (1,), generator=random))
                as_bytes[at] ^= 1 << int(torch.randint(8, (1,), generator=random))
                yield Packed(packed.codec, packed.shape, packed.tensors | {part: flipped})
            yield Packed(packed.codec, packed.shape, packed.tensors | {part: tensor[:-1]})
            yield Packed(packed.codec, packed.shape, packed.tensors | {part: tensor.to(torch.float64)})
        yield Packed(packed.codec, packed.shape, {k: v for k, v in packed.tensors.items() if k != part})
    rows, columns = packed.shape
    for shape in [(rows + 1, columns), (rows - 1, columns), (rows, columns + 8), (rows, 0)]:
        try:
            packed.codec.decode(Packed(packed.codec, shape, packed.tensors))
        except FormatError:
            continue
        raise AssertionError(f"{shape} was accepted for the tensors of a {packed.shape} matrix")


def check_product(codec: Codec, solutions: list[Solution], tokens: list[int], dtype: torch.dtype) -> None:
    """The error against float64 is at most twice that of torch's matmul in the dtype of x. One matrix per group."""
    packed = codec.stack([codec.encode(solution) for solution in solutions])
    check_product_of(packed, [solution.dense() for solution in solutions], tokens, dtype)


def check_product_of(packed: Packed, matrices: list[Tensor], tokens: list[int], dtype: torch.dtype) -> None:
    """As `check_product`, of a stack and what its matrices decode to."""
    codec = packed.codec
    out, columns = matrices[0].shape
    random = torch.Generator().manual_seed(1)
    # every second column of a wider tensor: not contiguous
    x = torch.randn(sum(tokens), 2 * columns, generator=random).to(dtype)[:, ::2]
    starts = torch.tensor([0, *tokens]).cumsum(0)
    y = codec.product(x, starts, codec.runtime(packed), out)
    assert y.shape == (sum(tokens), out)
    assert y.dtype == dtype
    for g, w in enumerate(matrices):
        those = slice(int(starts[g]), int(starts[g + 1]))
        exact = x[those].double() @ w.double().T
        plain = (x[those] @ w.to(dtype).T).double()
        if exact.numel():
            # the second term is two roundings of the result, for sizes at which torch happens to be exact
            allowed = 2 * (plain - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
            assert (y[those].double() - exact).abs().max() <= allowed
