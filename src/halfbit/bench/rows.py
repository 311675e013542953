"""Rows of bench/results.csv: what was measured, when, by which commit, on which machine.

`ratio_to_bf16` and `ratio_to_fp32` are times: 0.4 is two and a half times as fast.
"""

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from halfbit import native
from halfbit.bench import Result

COLUMNS = ["date", "commit", "machine", "bench", "shape", "tokens", "threads", "what", "seconds", "ratio_to_bf16"]
COLUMNS += ["ratio_to_fp32", "note"]
SOURCE = Path(__file__).parents[3]


def append(path: Path, bench: str, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows; date, commit and machine are filled in."""
    stamp = {"date": datetime.date.today().isoformat(), "commit": commit(), "machine": machine(), "bench": bench}
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows([stamp | row for row in rows])


def of_result(result: Result, about: str) -> list[dict[str, Any]]:
    """One row for each contestant; `about` the weights."""
    case, rows = result.case, []
    seconds = {p.what: p.median for p in result.products if p.seconds}
    experts = f"{case.experts} experts in one call, " if case.experts > 1 else ""
    for p in result.products:
        if not p.seconds:
            continue
        low, high = p.range
        note = (
            f"median of {len(p.seconds)}, 10-90 % {1e3 * low:.3f}-{1e3 * high:.3f} ms, best {1e3 * min(p.seconds):.3f} "
            f"ms, {result.copies} matrices in turn, {experts}{about}, x in {case.dtype}, {p.bits:.3f} bits, "
            f"{p.nbytes / 1e6:.2f} MB, error {p.error:.1e}, read {result.read / 1e9:.1f} GB/s, "
            f"load average {os.getloadavg()[0]:.1f}"
        )
        row = {"shape": case.shape, "tokens": case.tokens, "threads": case.threads, "what": p.what}
        row |= {"seconds": f"{p.median:.6f}", "note": note}
        for other in ("bf16", "fp32"):
            if (torchs := seconds.get(f"torch {other}")) is not None:
                row[f"ratio_to_{other}"] = f"{p.median / torchs:.3f}"
        rows.append(row)
    return rows


def machine() -> str:
    """The processor, its cores, and the instructions that are used."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text("utf-8").splitlines() if cpu.is_file() else []
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    name = (
        f"{facts.get('model name', platform.processor())} family {facts.get('cpu family')} model {facts.get('model')}"
    )
    return f"{name}, {torch.get_num_threads()} cores, {native.isa()}"


def commit() -> str:
    """The commit that runs, "-dirty" where anything but the results is not committed; empty outside of a clone."""
    if not (SOURCE / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(SOURCE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!bench/results.csv")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
