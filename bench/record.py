"""Rows of bench/results.csv: what was measured, when, by which commit, on which machine."""

import csv
import datetime
import platform
import subprocess
from pathlib import Path

import torch

from halfbit import native

COLUMNS = ["date", "commit", "machine", "bench", "shape", "tokens", "threads", "what", "seconds", "ratio_to_bf16"]
COLUMNS += ["ratio_to_fp32", "note"]
RESULTS = Path(__file__).parent / "results.csv"


def append(bench: str, rows: list[dict[str, object]]) -> None:
    """Add rows; date, commit and machine are filled in."""
    stamp = {"date": datetime.date.today().isoformat(), "commit": commit(), "machine": machine(), "bench": bench}
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows([stamp | row for row in rows])


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    name = (
        f"{facts.get('model name', platform.processor())} family {facts.get('cpu family')} model {facts.get('model')}"
    )
    return f"{name}, {torch.get_num_threads()} cores, {native.isa()}"


def commit() -> str:
    """The commit that runs, "-dirty" where anything but the results themselves is not committed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!bench/results.csv")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
