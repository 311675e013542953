"""The optional C++ extension: there, or the reason why not.

Everything works without it, more slowly. `import halfbit._C` is written here and nowhere else, so that a missing
compiler, a build for another Python or a missing system library is one readable sentence instead of a broken package.
"""

from importlib import import_module
from types import ModuleType

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
