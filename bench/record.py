"""Rows of bench/results.csv, for the scripts here; `halfbit bench --csv` writes the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbit.bench import rows as in_package
from halfbit.bench.rows import machine

__all__ = ["RESULTS", "append", "machine"]

RESULTS = Path(__file__).parent / "results.csv"


def append(bench: str, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows; date, commit and machine are filled in."""
    in_package.append(RESULTS, bench, rows)
