"""What was freed goes back to the system.

glibc keeps the memory of freed tensors of up to 32 MiB for later; with what stays (packed weights) lying between them,
the heap of a run grew by 3 MiB a group of experts, far beyond what was in use. Other C libraries have no such call.
"""

import ctypes
import sys

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim() -> None:
    """Give free memory back; takes a millisecond or so."""
    if _trim is not None:
        _trim(0)
