"""The order in which a matrix's columns are stored: a permutation in ceil(log2 columns) bits per column.

    order   uint8 [k, bytes]    k = 0: the columns are where they were; 1: all matrices of a stack share it; or one each

A row is planes of `columns` fields: first the low byte of every entry, then bits 8 to 15 of every entry, and so on; the
last plane has only the bits that an entry below `columns` can need, packed as `bits.py` does.
"""

import torch
from torch import Tensor

from halfbit.bits import pack, packed_bytes, unpack
from halfbit.errors import FormatError


def planes(columns: int) -> list[int]:
    """Bits of each plane: [8, 4] for 4096 columns."""
    bits = max(1, (columns - 1).bit_length())
    return [8] + [min(8, bits - low) for low in range(8, bits, 8)]


def row_bytes(columns: int) -> int:
    """Bytes of one order."""
    return sum(packed_bytes(columns, bits) for bits in planes(columns))


def pack_order(order: Tensor | None, columns: int, device: torch.device) -> Tensor:
    """uint8 `[1, bytes]` of a permutation int64 `[columns]`, or `[0, bytes]` where it moves nothing."""
    if order is None or torch.equal(order, torch.arange(columns, device=order.device)):
        return torch.empty(0, row_bytes(columns), dtype=torch.uint8, device=device)
    return _pack(order).to(device)


def unpack_order(packed: Tensor, columns: int) -> Tensor:
    """int64 `[k, columns]`."""
    sizes = [packed_bytes(columns, bits) for bits in planes(columns)]
    order = torch.zeros(packed.shape[0], columns, dtype=torch.int64, device=packed.device)
    for n, (plane, bits) in enumerate(zip(packed.split(sizes, 1), planes(columns), strict=True)):
        order |= unpack(plane, bits, columns).to(torch.int64) << (8 * n)
    return order


def check_order(packed: Tensor, columns: int, matrices: int, codec: str) -> None:
    """Raise FormatError unless each row is a permutation of the columns and the bits beyond it are zero."""

    def damaged(what: str) -> FormatError:
        return FormatError(f"{codec}: {what}; the file is damaged, compress the block again", tensor="order")

    nbytes = row_bytes(columns)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != nbytes:
        raise damaged(f"order must be uint8 [n, {nbytes}], got {packed.dtype} {list(packed.shape)}")
    if packed.shape[0] not in (0, 1, matrices):
        raise damaged(f"order must have 0, 1 or {matrices} rows, got {packed.shape[0]}")
    order = unpack_order(packed, columns)
    for number, (row, stored) in enumerate(zip(order, packed, strict=True)):
        seen = torch.zeros(columns + 1, dtype=torch.bool, device=row.device)
        seen[row.clamp(max=columns)] = True
        if not seen[:columns].all():
            missing = int(torch.nonzero(~seen[:columns])[0])
            raise damaged(f"order {number} is no permutation of {columns} columns, column {missing} is missing")
        ends = torch.tensor([packed_bytes(columns, bits) for bits in planes(columns)]).cumsum(0).tolist()
        for end, bits in zip(ends, planes(columns), strict=True):
            used = columns * bits % 8
            if used and int(stored[end - 1]) >> used:
                raise damaged(f"the unused bits of order {number} are not zero")


def stack_orders(orders: list[Tensor], columns: int) -> Tensor:
    """The orders of single matrices, `[0 or 1, bytes]` each, as that of their stack: equal ones are stored once."""
    if all(o.shape[0] == 0 for o in orders):
        return orders[0]
    first = next(o for o in orders if o.shape[0])
    if all(torch.equal(o, first) for o in orders):
        return first
    identity = _identity(columns, first.device)
    return torch.cat([o if o.shape[0] else identity for o in orders])


def part_order(packed: Tensor, number: int, columns: int) -> Tensor:
    """The order of matrix `number`, as `pack_order` gives it."""
    row = packed[:1] if packed.shape[0] == 1 else packed[number : number + 1]
    return row[:0] if row.shape[0] and torch.equal(row, _identity(columns, row.device)) else row


def order_of(order: Tensor, number: int) -> Tensor | None:
    """Of int64 `[k, columns]`, the order of matrix `number`; None: the columns are where they were."""
    return None if order.shape[0] == 0 else order[number if order.shape[0] > 1 else 0]


def put_back(stored: Tensor, order: Tensor | None) -> Tensor:
    """Columns of `[rows, columns]` where they belong: stored column j becomes column `order[j]`."""
    return stored if order is None else torch.empty_like(stored).index_copy_(1, order, stored)


def _identity(columns: int, device: torch.device) -> Tensor:
    return _pack(torch.arange(columns, device=device))


def _pack(order: Tensor) -> Tensor:
    widths = planes(order.shape[0])
    fields = [((order >> (8 * n)) & 0xFF).to(torch.uint8) for n in range(len(widths))]
    return torch.cat([pack(f, bits) for f, bits in zip(fields, widths, strict=True)])[None]
