import pytest
import torch

from halfbit.bits import pack, packed_bytes, unpack


def written_out(row: list[int], bits: int) -> list[int]:
    """The definition: one big integer, code i at bit i * bits."""
    number = sum(code << (i * bits) for i, code in enumerate(row))
    return list(number.to_bytes((len(row) * bits + 7) // 8, "little"))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 17, 33, 63])
def test_packing_is_the_definition_and_unpacking_its_inverse(bits: int, count: int):
    codes = torch.randint(0, 1 << bits, (5, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.tolist() == [written_out(row, bits) for row in codes.tolist()]
    assert packed.shape[-1] == packed_bytes(count, bits)
    assert torch.equal(unpack(packed, bits, count), codes)


def test_all_bits_set_survive_the_sign_bit():
    codes = torch.full((3, 8), 255, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 8), 8, 8), codes)


def test_leading_dimensions_and_empty_rows():
    codes = torch.arange(2 * 3 * 5, dtype=torch.uint8).view(2, 3, 5)
    assert torch.equal(unpack(pack(codes, 5), 5, 5), codes)
    assert pack(codes[..., :0], 3).shape == (2, 3, 0)
    assert unpack(pack(codes[:0], 5), 5, 5).shape == (0, 3, 5)


def test_non_contiguous_codes():
    codes = torch.randint(0, 8, (9, 7), dtype=torch.uint8)
    assert torch.equal(pack(codes.T, 3), pack(codes.T.contiguous(), 3))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a code of 4 does not fit in 2 bits"):
        pack(torch.tensor([[0, 4]], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="5 codes of 3 bits are 2 bytes, not 3"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), 3, 5)
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        pack(torch.zeros(1, 1, dtype=torch.uint8), 9)
