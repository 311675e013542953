"""This machine: what memory and disk it has left, and how fast it is at what a compression spends its time on.

Rates are measured in a few seconds, each as the best of some tries, since other processes only ever make them worse.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbit.solve.hessian import factor

TRIES = 5
# seconds after which something is not tried again
PATIENCE = 0.4
# sides of the products and of the factored matrices that are measured; elements of the sum; bytes that are read
SIDE, FACTORED, ELEMENTS, READ = 768, (256, 1024), 1 << 20, 64 << 20


@dataclass(frozen=True)
class Room:
    """Bytes that are free; None where nobody can tell, or there is no device."""

    memory: int | None
    disk: int | None
    device: int | None


@dataclass(frozen=True)
class Rates:
    """Of one machine with torch's present number of threads.

    Attributes:
        flops: multiplications and additions each second, of float32 products; `double_flops`: of float64.
        factoring: seconds for each n^2 and each n^3 of one n x n Hessian, factored as the solver does it.
        element: seconds for one element of a float32 sum.
        read: bytes each second from the source's disk, or from the kernel's cache of it; None: nothing to read.
        started: CPU seconds that this process has taken to be here.
    """

    flops: float
    double_flops: float
    factoring: tuple[float, float]
    element: float
    read: float | None
    started: float

    def factored(self, n: int) -> float:
        """Seconds for one n x n Hessian."""
        return self.factoring[0] * n**2 + self.factoring[1] * n**3


def room(out: str | Path, device: str) -> Room:
    """What is free, on the disk where `out` will be."""
    where = Path(out).absolute()
    while not where.exists():
        where = where.parent
    memory = None
    if (meminfo := Path("/proc/meminfo")).is_file():
        facts = {k: v.split() for k, _, v in (line.partition(":") for line in meminfo.read_text().splitlines())}
        if "MemAvailable" in facts:
            memory = int(facts["MemAvailable"][0]) << 10
        memory = _within_group(memory)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else None
    return Room(memory, shutil.disk_usage(where).free, free)


def _within_group(memory: int | None) -> int | None:
    """No more than what a container allows (cgroup 2)."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.is_file() or not used.is_file() or not (most := limit.read_text().strip()).isdigit():
        return memory
    left = max(0, int(most) - int(used.read_text()))
    return left if memory is None else min(memory, left)


def resident() -> int:
    """Bytes of memory that this process takes; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.is_file() else 0


def seconds(work: Callable[[], object], device: str, tries: int = TRIES) -> float:
    """The shortest time that `work` takes: on the clock, or of the processor where others have it in between."""
    best = float("inf")
    for _ in range(tries):
        begin, used = time.perf_counter(), time.process_time()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        passed = time.perf_counter() - begin
        # a device is waited for without using the processor
        best = min(best, passed if device == "cuda" else min(passed, time.process_time() - used))
        if passed > PATIENCE:
            break
    return best


def measure(device: str, file: Path | None = None) -> Rates:
    """The rates of this machine.

    Args:
        device: "cpu" or "cuda".
        file: of the source, to be read from.
    """
    started = time.process_time()
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(SIDE, SIDE, generator=generator).to(device)
    b = a.double()
    single = seconds(lambda: a @ a, device)
    double = seconds(lambda: b @ b, device)
    each = []
    for n in FACTORED:
        x = torch.randn(2 * n, n, generator=generator).to(device)
        h = (x.T @ x)[None]
        each.append(seconds(lambda h=h: factor(h, 0.1, ["sample"]), device) / n**2)
    cubic = max(0.0, (each[1] - each[0]) / (FACTORED[1] - FACTORED[0]))
    y, z = (torch.randn(ELEMENTS, generator=generator).to(device) for _ in range(2))
    summed = seconds(lambda: torch.add(y, z, out=y), device)
    product = 2 * SIDE**3
    return Rates(
        product / single,
        product / double,
        (max(0.0, each[0] - cubic * FACTORED[0]), cubic),
        summed / ELEMENTS,
        None if file is None else _read(file),
        started,
    )


def _read(file: Path) -> float:
    size = min(file.stat().st_size, READ)
    begin = time.perf_counter()
    with file.open("rb") as stream:
        taken = len(stream.read(size))
    return taken / max(time.perf_counter() - begin, 1e-9)
