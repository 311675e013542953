"""New memory for large tensors that live for a moment, in pages of 2 MiB where the system has them.

The first touch of a page of 4 KiB costs some 2 microseconds on a virtual machine, and large tensors are new memory each
time: a tenth of what factoring two Hessians of 6144 columns and feeding back took. Large pages cost a fifth of it.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

# below it the C library keeps what was freed for the next one
LARGE = 8 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # a system may have no large pages
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
