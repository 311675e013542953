"""The optional C++ extension: there, or the reason why not; and what torch's own products are asked for.

Everything works without it, more slowly. `import halfbit._C` is written here and nowhere else, so that a missing
compiler, a build for another Python or a missing system library is one readable sentence instead of a broken package.
"""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

CPU = Path("/proc/cpuinfo")

extension: ModuleType | None = None
reason: str = ""
"""Why `extension` is None; empty when it is there."""

try:
    extension = import_module("halfbit._C")
except ModuleNotFoundError:
    reason = "halfbit was installed without its C++ extension (no C++ compiler or CMake when it was built)"
except ImportError as error:
    reason = f"the C++ extension does not load: {error}"


def isa() -> str:
    """What the CPU kernels use: "portable", "avx2", "avx512" or "avx512vnni"; "none" without the extension."""
    return extension.isa() if extension is not None else "none"


def ask_for_same_sums() -> None:
    """Let MKL's products give the same bits with any number of threads, unless MKL_CBWR says otherwise.

    MKL looks at it at its first product. Only on Intel's CPUs, where it costs nothing (docs/LOG.md); on others MKL may
    fall back to slow code.
    """
    if "GenuineIntel" in (CPU.read_text("utf-8") if CPU.is_file() else ""):
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def same_sums() -> bool:
    """True where results do not depend on the number of threads."""
    return os.environ.get("MKL_CBWR", "").endswith(",STRICT")
