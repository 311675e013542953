"""Operands of random matrices, made on the device."""

import torch
from torch import Tensor

from gpu import DEVICE
from halfbit.bench import matrices as matrices_of
from halfbit.types import Codec, Packed

OUTLIERS = 0.01


def random_operands(codec: Codec, rows: int, columns: int, matrices: int = 1) -> tuple[list[Tensor], int]:
    """Operands of a random matrix of a grid format, made on the device, and the bytes that a product reads.

    Encoding 235 million weights on a CPU would take longer than all that is measured here."""
    from halfbit.formats import _grid_triton as grid

    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        told = torch.iinfo(dtype)
        return torch.randint(told.min, told.max, shape, dtype=dtype, device=DEVICE)

    blocks = -(-columns // 32)
    if codec.name == "spqr":
        tiles, groups = -(-rows // 16), columns // codec.group  # type: ignore[attr-defined]
        second = torch.tensor([0.01, -1.0, 0.5, -2.0], dtype=torch.float16, device=DEVICE)
        each = torch.poisson(torch.full((matrices * tiles * 16,), OUTLIERS * columns, device=DEVICE))
        offsets = torch.nn.functional.pad(each.long().cumsum(0), (1, 0)).int()
        count = int(offsets[-1])
        found = [
            integers(matrices, tiles, blocks, codec.bits, 16),  # type: ignore[attr-defined]
            torch.randint(64, (matrices, tiles, groups, 16), dtype=torch.uint8, device=DEVICE),
            second.expand(matrices, -(-rows // codec.supergroup), groups, 4).contiguous(),  # type: ignore[attr-defined]
            offsets,
            torch.randint(columns, (count,), device=DEVICE).to(torch.int16),
            torch.randn(count, device=DEVICE).half(),
            torch.randperm(columns, device=DEVICE).int()[None],
        ]
    else:
        groups = -(-columns // codec.group)  # type: ignore[attr-defined]
        scale = (torch.rand(matrices * rows, groups, device=DEVICE) + 0.5).mul(0.01).bfloat16().view(torch.int16)
        if not codec.symmetric:  # type: ignore[attr-defined]
            scale = (scale.int() & 0xFFFF) | torch.randint(4, scale.shape, dtype=torch.int32, device=DEVICE) << 16
        nothing = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        found = [
            integers(matrices * rows, blocks * codec.bits),  # type: ignore[attr-defined]
            scale,
            torch.empty(0, 0, dtype=torch.bfloat16, device=DEVICE),
            nothing,
            nothing.short(),
            torch.zeros(1, dtype=torch.bfloat16, device=DEVICE),
            torch.empty(0, columns, dtype=torch.int32, device=DEVICE),
        ]
    extent = rows if codec.name == "spqr" else matrices * rows
    found.append(torch.empty(extent, columns, 0, device=DEVICE))
    assert len(found) == len(grid.Operands._fields)
    return found, sum(t.numel() * t.element_size() for t in found)


def operands_of(codec: Codec, rows: int, columns: int, matrices: int = 1) -> tuple[list[Tensor], int, Tensor | None]:
    """Operands on the device, the bytes that a product reads, and the decoded matrix where it is known."""
    if codec.name in ("spqr", "grouped"):
        return *random_operands(codec, rows, columns, matrices), None
    one = matrices_of.packed(codec, rows, columns, matrices_of.Statistics(outliers=OUTLIERS))
    packed = codec.stack([one] * matrices) if matrices > 1 else one
    moved = Packed(codec, packed.shape, {name: t.to(DEVICE) for name, t in packed.tensors.items()})
    w = codec.decode(one).to(DEVICE) if matrices == 1 else None
    return codec.runtime(moved), packed.nbytes, w


def copies(codec: Codec, tensors: list[Tensor], count: int) -> list[list[Tensor]]:
    """The same operands in memory of their own, but for the dictionary, which all matrices of a model share."""
    shared = {id(t) for t in tensors if codec.name == "qmoe" and t.numel() == 65536}
    return [[t if id(t) in shared else t.clone() for t in tensors] for _ in range(count)]
