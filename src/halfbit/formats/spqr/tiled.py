"""Matrices of 2- to 8-bit or 16-bit fields in tiles of 16 rows, so that a lane of a vector unit or of a warp is a row.

    tile    16 rows (the last: rows % 16)    block   32 columns    lane   row in its tile
    a block has `bits` words of 32 bits per lane; words lie in the order tile, block, word, lane

    a lane's words   floor(32 / bits) fields each, lowest bits first: field i in word i // that at bit bits * (i % that)
                     what does not fit whole lies in the bits left over at the top of the words, from word 0 upwards,
                     as one bit string, lowest bit first
    columns beyond the last whole block: after all tiles, one bit string of rows * (columns % 32) fields, row by row

Nothing is wasted but the bits that fill the last word. README.md beside this file has the drawing.
"""

import torch
from torch import Tensor

from halfbit import bits as bytewise

TILE = 16
BLOCK = 32
FIELDS_AT_ONCE = 1 << 22


def count_words(rows: int, columns: int, bits: int) -> int:
    """32-bit words of a tiled matrix."""
    return rows * (columns // BLOCK) * bits + -(-rows * (columns % BLOCK) * bits // 32)


def pack(fields: Tensor, bits: int) -> Tensor:
    """Integers `[rows, columns]` below `2 ** bits` as int32 `[words]`."""
    columns = fields.shape[1]
    if fields.numel() and not 0 <= int(fields.min()) <= int(fields.max()) < 1 << bits:
        raise ValueError(f"fields from {int(fields.min())} to {int(fields.max())} do not fit in {bits} bits")
    whole = columns // BLOCK
    parts = []
    # some tiles at a time: a word on its way is 8 bytes large
    step = TILE * max(1, FIELDS_AT_ONCE // (TILE * max(columns, 1)))
    for part in fields[:, : BLOCK * whole].split(step) if whole else ():
        words = _to_words(part.unflatten(1, (whole, BLOCK)).to(torch.int64), bits)
        full = part.shape[0] // TILE * TILE
        parts.append(words[:full].unflatten(0, (-1, TILE)).permute(0, 2, 3, 1).flatten())
        parts.append(words[full:].permute(1, 2, 0).flatten())
    parts.append(_string(fields[:, BLOCK * whole :].flatten(), bits))
    return torch.cat([_signed(p) for p in parts])


def read(words: Tensor, which: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """Rows `which`, int64 `[n]`, of a tiled matrix: int64 `[n, columns]`."""
    whole, rest = columns // BLOCK, columns % BLOCK
    tile, lane = which // TILE, which % TILE
    height = (rows - TILE * tile).clamp(max=TILE)
    step = torch.arange(whole * bits, device=words.device)
    at = (TILE * whole * bits * tile + lane)[:, None] + height[:, None] * step
    body = _fields(_unsigned(words[at]).unflatten(1, (whole, bits)), bits).flatten(1) if whole else at
    if not rest:
        return body
    tail = which[:, None] * rest + torch.arange(rest, device=words.device)
    return torch.cat([body, _string_at(words[rows * whole * bits :], tail, bits)], 1)


def at(words: Tensor, row: Tensor, column: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """The fields at places `[n]` of a tiled matrix: int64 `[n]`."""
    whole = columns // BLOCK
    found = torch.zeros_like(row)
    inside = column < BLOCK * whole
    r, c = row[inside], column[inside]
    tile = r // TILE
    first = (tile * TILE * whole + (c // BLOCK) * (rows - TILE * tile).clamp(max=TILE)) * bits + r % TILE
    step = torch.arange(bits, device=words.device) * (rows - TILE * tile).clamp(max=TILE)[:, None]
    picked = []
    # some places at a time: a block on its way is 32 fields of 8 bytes
    for some, number in zip((first[:, None] + step).split(1 << 16), (c % BLOCK).split(1 << 16), strict=True):
        picked.append(_fields(_unsigned(words[some]), bits).gather(1, number[:, None]))
    found[inside] = torch.cat(picked).flatten()
    tail = row[~inside] * (columns % BLOCK) + column[~inside] - BLOCK * whole
    found[~inside] = _string_at(words[rows * whole * bits :], tail, bits)
    return found


def edge(words: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """What kernels read in place of a ragged edge: whole tiles and blocks, filled up with zeros, int32 `[n]`.

    First, where columns % 32, one block of each tile with the columns beyond the last whole block; then, where
    rows % 16, the whole blocks of the last tile.
    """
    whole, rest, height = columns // BLOCK, columns % BLOCK, rows % TILE
    parts = []
    if rest:
        tail = torch.arange(rows * rest, device=words.device)
        fields = _string_at(words[rows * whole * bits :], tail, bits).view(rows, rest)
        block = torch.nn.functional.pad(fields, (0, BLOCK - rest, 0, -rows % TILE))
        parts.append(_signed(_to_words(block, bits).unflatten(0, (-1, TILE)).transpose(1, 2).flatten()))
    if height:
        last = words[(rows - height) * whole * bits : rows * whole * bits].view(-1, height)
        parts.append(torch.nn.functional.pad(last, (0, TILE - height)).flatten())
    return torch.cat(parts) if parts else words.new_empty(0)


def unused_bits(words: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """What the last word holds beyond the last field; zero in an intact file."""
    used = rows * (columns % BLOCK) * bits % 32
    return _unsigned(words[-1:]) >> used if used else torch.zeros(1, dtype=torch.int64)


def _to_words(fields: Tensor, bits: int) -> Tensor:
    """int64 `[..., 32]` -> the words of a lane, int64 `[..., bits]`, unsigned."""
    each = 32 // bits
    spare = 32 - each * bits
    shifts = torch.arange(each, device=fields.device) * bits
    words = (fields[..., : each * bits].unflatten(-1, (bits, each)) << shifts).sum(-1)
    if spare:
        string = (fields[..., each * bits :] << torch.arange(spare, device=fields.device) * bits).sum(-1, keepdim=True)
        pieces = (string >> torch.arange(bits, device=fields.device) * spare) & ((1 << spare) - 1)
        words |= pieces << (each * bits)
    return words


def _fields(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_to_words`."""
    each = 32 // bits
    spare = 32 - each * bits
    mask = (1 << bits) - 1
    fields = (words[..., None] >> torch.arange(each, device=words.device) * bits & mask).flatten(-2)
    if not spare:
        return fields
    string = (words >> (each * bits) << torch.arange(bits, device=words.device) * spare).sum(-1, keepdim=True)
    return torch.cat([fields, string >> torch.arange(spare, device=words.device) * bits & mask], -1)


def _string(fields: Tensor, bits: int) -> Tensor:
    """Fields `[n]` as one bit string, int64 `[words]`, unsigned."""
    if bits == 16:
        nbytes = torch.stack([fields & 0xFF, fields >> 8], -1).flatten()
    else:
        nbytes = bytewise.pack(fields.to(torch.uint8), bits)
    nbytes = torch.nn.functional.pad(nbytes.to(torch.int64), (0, -nbytes.shape[0] % 4))
    return (nbytes.view(-1, 4) << torch.arange(0, 32, 8, device=fields.device)).sum(-1)


def _string_at(words: Tensor, number: Tensor, bits: int) -> Tensor:
    """The fields of the given numbers in a bit string."""
    first = number * bits
    low = first // 32
    high = (low + 1).clamp(max=max(words.shape[0] - 1, 0))
    both = _unsigned(words[low]) | _unsigned(words[high]) << 32
    return both >> first % 32 & ((1 << bits) - 1)


def _unsigned(words: Tensor) -> Tensor:
    return words.to(torch.int64) & 0xFFFFFFFF


def _signed(words: Tensor) -> Tensor:
    """int64 0 to 2^32 - 1 as the int32 of the same bits."""
    return (words - (words >> 31 << 32)).to(torch.int32)
