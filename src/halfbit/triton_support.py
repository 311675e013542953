"""Triton: where its kernels run, or why they do not, and the launch configurations of each device.

How a format gets kernels for GPUs:

    formats/NAME/triton.py      kernels and the functions that launch them; a format that is one file has
                                formats/_NAME_triton.py. Only such files import triton
    backend(NAME, tensor)       that module, imported when first asked for, or None where other code must do it

`Codec.runtime`, `product` and `lookup` (or the format's `kernels.py`) ask `backend`. The rules of such a module:

- `runtime` is called with tensors on the device, once (`PackedMatrix` calls it again when it is moved to another kind
  of device), so operands may be arranged for the device, without loss; what that costs in memory is told there.
- A product does not wait for the device. `starts` with two entries is one matrix with all tokens, and is not looked at;
  any other may be on the device of x, and then tokens beyond its last entry get no result (`Codec.product`).
- x is float32, bfloat16 or float16 of any strides; sums are float32; any number of tokens, rows and columns, none
  included. What it cannot do raises Unsupported, and nothing falls back without being written where all can see it.
- Results are the same in every run: no floating-point atomics; partial sums are added in a fixed order
  (`formats/_triton_parts.py`).

Kernels run on CUDA's (ROCm's, too) and XPU's tensors. With TRITON_INTERPRET=1 in the environment from the start Triton
interprets them, on tensors of the CPU: slow, for tests, and then all products on a CPU are Triton's.

Nothing is tuned while a model loads or runs. `launch` gives what is known for a device: what was tuned there by the
user (`halfbit bench --tune`, `bench/tuning.py`), what comes with the package (`launches.json`), or the kernel's own
default. Any values of a kernel's candidates must give right results.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from halfbit.disk import atomically, make_folder
from halfbit.errors import FormatError, Unsupported

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels are interpreted; triton itself looks at the variable when it is imported."""

SHIPPED = Path(__file__).parent / "launches.json"
INPUTS = (torch.float32, torch.bfloat16, torch.float16)

Launch = dict[str, int]
"""Of one launch: tile sizes by the kernel's names for them, and num_warps, num_stages."""


@cache
def why_not() -> str:
    """Why no Triton kernel runs here; empty where they do."""
    if find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA and ROCm, or by: pip install halfbit[gpu]"
    if INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return ""
    return "torch sees no GPU here"


def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels serve tensors of a device."""
    return device.type in (("cpu", "cuda", "xpu") if INTERPRETED else ("cuda", "xpu")) and not why_not()


def has_kernels(name: str) -> bool:
    """Whether a format has Triton kernels, here or elsewhere."""
    return _module(name) is not None


@cache
def _module(name: str) -> str | None:
    formats = Path(__file__).parent / "formats"
    files = {f"{name}.triton": formats / name / "triton.py", f"_{name}_triton": formats / f"_{name}_triton.py"}
    return next((f"halfbit.formats.{module}" for module, file in files.items() if file.is_file()), None)


def backend(name: str, t: Tensor) -> ModuleType | None:
    """The kernels of format `name` where they serve tensors like `t`; None where it has none, or they do not run."""
    if t.is_cpu and not INTERPRETED:  # asked for each product: from cold caches all else takes 30 microseconds
        return None
    return _kernels(name) if runs_on(t.device) else None


@cache
def _kernels(name: str) -> ModuleType | None:
    module = _module(name)
    return None if module is None else import_module(module)


def check_input(x: Tensor, columns: int, kernel: str) -> None:
    """Raise Unsupported unless x is a matrix with so many columns, in a dtype that kernels take."""
    if x.dtype not in INPUTS or x.ndim != 2 or x.shape[1] != columns:
        raise Unsupported(
            f"{kernel}: x must be [tokens, {columns}] in {', '.join(map(str, INPUTS))}, got {x.dtype} {list(x.shape)}"
        )


def processors(device: torch.device) -> int:
    """How many multiprocessors or compute units a device has for programs; 1 where they are interpreted."""
    if device.type == "cpu":
        return 1
    told = getattr(torch, device.type).get_device_properties(device)
    return told.gpu_subslice_count if device.type == "xpu" else told.multi_processor_count


# --- launch configurations


def device_name(device: torch.device) -> str:
    """As launch configurations are stored under: "NVIDIA H200"; "interpreter" on a CPU."""
    if device.type == "cpu":
        return "interpreter"
    return str(getattr(torch, device.type).get_device_properties(device).name)


def user_file() -> Path:
    """Where launch configurations that were tuned here are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbit" / "launches.json"


def launch(kernel: str, key: Sequence[object], default: Launch, device: torch.device) -> Launch:
    """How to launch `kernel` for what `key` says of shape, format and tokens; `default` where nothing is known."""
    entry = _entry(kernel, key)
    if (trial := _trial.get()) is not None:
        trial.asked[entry] = kernel
        if entry in trial.chosen:
            return default | trial.chosen[entry]
    return default | _known(device).get(entry, {})


class Trial(NamedTuple):
    """What `launch` answers instead while something is tried, and what it was asked: entry by entry, their kernels."""

    chosen: dict[str, Launch]
    asked: dict[str, str]


_trial: ContextVar[Trial | None] = ContextVar("trial", default=None)


@contextmanager
def trying(chosen: dict[str, Launch]) -> Iterator[dict[str, str]]:
    """Within, launches are those that are chosen, or else as ever. What was asked for is in the result."""
    trial = Trial(chosen, {})
    token = _trial.set(trial)
    try:
        yield trial.asked
    finally:
        _trial.reset(token)


def remember(entry: str, found: Launch, device: torch.device) -> None:
    """Keep a configuration for this device in the user's file; later launches in this process use it, too."""
    path = user_file()
    known = _read(path)
    known.setdefault(device_name(device), {})[entry] = found
    make_folder(path.parent)
    atomically(path, lambda file: file.write_text(json.dumps(known, indent=1, sort_keys=True), "utf-8"))
    _known.cache_clear()


def _entry(kernel: str, key: Sequence[object]) -> str:
    return " ".join([kernel, *map(str, key)])


@cache
def _known(device: torch.device) -> dict[str, Launch]:
    name = device_name(device)
    return _read(SHIPPED).get(name, {}) | _read(user_file()).get(name, {})


def _read(path: Path) -> dict[str, dict[str, Launch]]:
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as e:
        raise FormatError(f"{path}: launch configurations must be JSON: {e}; delete the file") from e
