"""What codes 1 and 2 of a ternary matrix stand for, as formats of our own store it: code 0 is 0.0.

    scale_codes  uint8 [matrices, .]     codes of the rows' scales, packed to `scale_bits` bits each     grid `deadzone`
    scale_grid   bfloat16 [matrices, 2]  scale = lowest + step * code
    levels       bfloat16 [rows, 2]      in place of scales                                             grid `ternary`

Of the two kinds one is empty; `scale_bits` is 0 where levels are stored.
"""

import torch
from torch import Tensor

from halfbit import bits
from halfbit.errors import FormatError, RecipeError, Unsupported
from halfbit.formats._shapes import check_rotated
from halfbit.grids.deadzone import Deadzone
from halfbit.grids.ternary import Ternary
from halfbit.rotation import undo
from halfbit.types import Codec, Packed, Params, Solution

DTYPES = {"scale_codes": torch.uint8, "scale_grid": torch.bfloat16, "levels": torch.bfloat16}


def grid_of(scale_bits: int) -> Deadzone | Ternary:
    """The grid whose solutions are stored."""
    return Deadzone(scale_bits) if scale_bits else Ternary()


def check_scale_bits(name: str, scale_bits: int) -> None:
    if scale_bits != 0 and not 2 <= scale_bits <= 8:
        raise RecipeError(f"{name}: scale_bits must be 2 to 8, or 0, got {scale_bits}")


def check_solution(codec: Codec, scale_bits: int, solution: Solution) -> None:
    """Raise Unsupported unless it is of the codec's grid, plain, and ternary."""
    check_rotated(codec, solution)
    grid = grid_of(scale_bits)
    if solution.grid != grid:
        raise Unsupported(f"{codec.name}: {codec!r} stores the grid {grid!r}, got {solution.grid!r}")
    if solution.outliers is not None or solution.order is not None:
        raise Unsupported(f"{codec.name}: stores neither outliers nor a column order; use the format 'spqr'")
    if solution.codes.numel() and int(solution.codes.max()) > 2:
        raise Unsupported(f"{codec.name}: codes must be 0, 1 or 2, got {int(solution.codes.max())}")


def store(params: Params, scale_bits: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """scale_codes, scale_grid, levels of one matrix."""
    if scale_bits == 0:
        no_grid = torch.zeros(0, 2, dtype=torch.bfloat16)
        return torch.zeros(0, 0, dtype=torch.uint8), no_grid, params["levels"][:, 0].contiguous()
    codes = bits.pack(params["scale_codes"].reshape(1, rows), scale_bits)
    return codes, params["scale_grid"].reshape(1, 2), torch.zeros(0, 2, dtype=torch.bfloat16)


def part(t: dict[str, Tensor], of: slice, rows: slice) -> dict[str, Tensor]:
    """Those of some matrices of a stack, and of their rows."""
    return {"scale_codes": t["scale_codes"][of], "scale_grid": t["scale_grid"][of], "levels": t["levels"][rows]}


def params_of(t: dict[str, Tensor], scale_bits: int, rows: int) -> Params:
    """The inverse of `store`."""
    if scale_bits == 0:
        return {"levels": t["levels"][:, None]}
    codes = bits.unpack(t["scale_codes"], scale_bits, rows)
    return {"scale_codes": codes.view(rows, 1), "scale_grid": t["scale_grid"][:, None]}


def levels_of(packed: Packed, scale_bits: int, matrices: int) -> Tensor:
    """What codes 1 and 2 stand for, float32 `[rows, 2]`. Raises FormatError for scales that are not finite."""
    t, rows = packed.tensors, packed.shape[0]
    if scale_bits == 0:
        return t["levels"].float()
    codes = bits.unpack(t["scale_codes"], scale_bits, rows // matrices)
    of_rows = {"scale_codes": codes, "scale_grid": t["scale_grid"][:, None]}
    scale = Deadzone(scale_bits).ready(of_rows)["scale"].view(rows, 1)
    if not torch.isfinite(scale).all():
        raise FormatError(f"{packed.codec.name}: a scale is infinite; the file is damaged", tensor="scale_grid")
    return torch.cat([-scale, scale], 1)


def turned_back(name: str, dense: Tensor) -> Tensor:
    """Of a matrix with rotated columns the matrix. Raises FormatError where it is not finite."""
    if not torch.isfinite(dense := undo(dense)).all():
        raise FormatError(f"{name}: scales are too large for this matrix; the file is damaged", tensor="scale_grid")
    return dense


def check(packed: Packed, scale_bits: int, matrices: int) -> None:
    """Raise FormatError where shapes or values cannot be; dtypes have been looked at."""
    t, name, rows = packed.tensors, packed.codec.name, packed.shape[0]
    one, few = (0, 0), (0, 2)
    if scale_bits:
        one, few = (matrices, bits.packed_bytes(rows // matrices, scale_bits)), (matrices, 2)
    check_shape(packed, "scale_codes", one)
    check_shape(packed, "scale_grid", few)
    check_shape(packed, "levels", (0, 2) if scale_bits else (rows, 2))
    for key in ("levels", "scale_grid"):
        if not torch.isfinite(t[key]).all():
            raise FormatError(f"{name}: {key} has NaN or infinity; the file is damaged", tensor=key)
    used = rows // matrices * scale_bits % 8
    if used and (t["scale_codes"][:, -1] >> used).any():
        raise FormatError(f"{name}: unused bits behind scale_codes are not 0; it is damaged", tensor="scale_codes")


def check_shape(packed: Packed, key: str, shape: tuple[int, ...]) -> None:
    got = tuple(packed.tensors[key].shape)
    if got != shape:
        raise FormatError(f"{packed.codec.name}: {key} must have shape {shape}, got {got}", tensor=key)


def values(codes: Tensor, levels: Tensor) -> Tensor:
    """float32 `[rows, columns]` of codes and the `[rows, 2]` values of codes 1 and 2."""
    return torch.nn.functional.pad(levels, (1, 0)).gather(1, codes.to(torch.int64))
