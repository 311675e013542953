"""k-bit codes, packed along the last dimension into bytes.

    code i of a row lies at bits i*k .. i*k + k - 1 of the row; bit b of the row is bit b % 8 of byte b // 8
    rows are padded with zero bits to whole bytes

Eight codes of k bits fill exactly k bytes, so the work is done on words of eight codes. Everything is shifts and masks,
so the result does not depend on the byte order of the machine.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import pad


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return (count * bits + 7) // 8


def pack(codes: UInt8[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows nbytes"]:
    """Codes below `2 ** bits` as bytes."""
    _check_bits(bits)
    count = codes.shape[-1]
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit in {bits} bits")
    # int64 also for 8 x 8 bits: the sign bit is bit 63 and survives the shifts below, which mask what they shift in
    eights = pad(codes, (0, -count % 8)).unflatten(-1, (-1, 8)).to(torch.int64)
    words = (eights << _steps(bits, 8, codes.device)).sum(-1)
    # a row of whole words is up to 7 codes longer than the row itself
    nbytes = (words[..., None] >> _steps(8, bits, codes.device)) & 0xFF
    return nbytes.to(torch.uint8).flatten(-2)[..., : packed_bytes(count, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "*rows nbytes"], bits: int, count: int) -> UInt8[Tensor, "*rows n"]:
    """The `count` codes of each row."""
    _check_bits(bits)
    if packed.shape[-1] != packed_bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits are {packed_bytes(count, bits)} bytes, not {packed.shape[-1]}")
    whole = pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int64)
    words = (whole << _steps(8, bits, packed.device)).sum(-1)
    codes = (words[..., None] >> _steps(bits, 8, packed.device)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count].contiguous()


def _steps(step: int, count: int, device: torch.device) -> Tensor:
    """[0, step, 2 * step, ...]: how far each of `count` fields is shifted."""
    return torch.arange(0, step * count, step, device=device)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
