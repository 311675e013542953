"""Rows of a report, steps that may fail, and times of calls that take turns."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu import INTERPRET, ROOT

COLUMNS = ["step", "what", "shape", "tokens", "dtype", "ok", "microseconds", "spread", "rival", "rival_microseconds"]
COLUMNS += ["ratio", "bytes", "bits", "gigabytes_per_second", "share_of_copy", "seconds", "note"]
REPLAYS = 25


@dataclass
class Report:
    """The rows so far. Accumulates; written to the folder after every step."""

    out: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    copy: float = float("nan")

    def add(self, step: str, what: str, **facts: Any) -> None:
        row = {"step": step, "what": what, "ok": True} | facts
        self.rows.append(row)
        print("  " + ", ".join(f"{k} {_short(v)}" for k, v in row.items() if k != "step"), flush=True)

    def write(self) -> None:
        (self.out / "rows.json").write_text(json.dumps(self.rows, indent=1, default=str), "utf-8")
        with (self.out / "rows.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows(self.rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class OverTime(RuntimeError):
    """A step took longer than it may."""


@contextmanager
def guarded(report: Report, step: str, what: str) -> Iterator[None]:
    """Whatever goes wrong within becomes a row: this script must reach its end."""
    try:
        yield
    except BaseException as error:  # the one place where everything is caught, to be reported
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        report.add(step, what, ok=False, note=f"{type(error).__name__} at {where}: {str(error)[:400]}")
        if isinstance(error, OverTime):
            raise


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OverTime after so many seconds."""

    def over(*_: Any) -> None:
        raise OverTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All calls, one after the other."""

    def run() -> None:
        for call in calls:
            call()

    return run


def replayed(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All calls as one CUDA graph; interpreted, they are just called."""
    if INTERPRET:
        return in_turn(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def timed(kinds: Mapping[str, tuple[Callable[[], object], int]], repetitions: int = REPLAYS) -> dict[str, list[float]]:
    """Microseconds of one call of each kind, in turn; a kind is a function and how many calls it makes."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    warm = 0 if INTERPRET else 2
    for repetition in range(1 if INTERPRET else repetitions + warm):
        for name, (run, calls) in kinds.items():
            if INTERPRET:
                begin = time.perf_counter()
                run()
                spent = 1e6 * (time.perf_counter() - begin)
            else:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                run()
                last.record()
                last.synchronize()
                spent = 1e3 * first.elapsed_time(last)
            if repetition >= warm:
                times[name].append(spent / calls)
    return times


def compared(report: Report, times: dict[str, list[float]], ours: str, rivals: list[str]) -> dict[str, Any]:
    """Median, spread, and the fastest of the rivals."""
    median = {name: statistics.median(t) for name, t in times.items()}
    rival = min(rivals, key=median.__getitem__)
    low, high = min(times[ours]), max(times[ours])
    return {
        "microseconds": median[ours],
        "spread": f"{low:.2f}-{high:.2f}",
        "rival": rival,
        "rival_microseconds": median[rival],
        "ratio": median[rival] / median[ours],
    }


def bandwidth(report: Report, nbytes: int, microseconds: float) -> dict[str, float]:
    found = nbytes / microseconds / 1e3
    return {"bytes": nbytes, "gigabytes_per_second": found, "share_of_copy": found / report.copy}


def command(report: Report, step: str, what: str, arguments: list[str], seconds: float) -> str:
    """Run a command of this repository; a row with its time, or with the end of what it printed."""
    begin = time.perf_counter()
    # commands are not interpreted: they only show that they are called rightly
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        timeout=seconds,
        capture_output=True,
        text=True,
        check=False,
    )
    told = {"seconds": time.perf_counter() - begin, "ok": done.returncode == 0}
    report.add(
        step, what, **told, note=(done.stdout[-1500:] if told["ok"] else done.stdout[-300:] + done.stderr[-900:])
    )
    return done.stdout
