"""Large zeroed tensors in large pages."""

import mmap

import pytest
import torch

from halfbit import pages


@pytest.mark.parametrize("shape", [(0, 3), (3, 5), (2, 1024, 1025), (1, pages.LARGE)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_they_are_zero_and_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = pages.zeros(shape, dtype, torch.device("cpu"))
    assert torch.equal(found, torch.zeros(shape, dtype=dtype))
    assert torch.equal(found.add_(1), torch.ones(shape, dtype=dtype))


def test_a_system_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError("Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert not pages.zeros((pages.LARGE,), torch.uint8, torch.device("cpu")).any()
