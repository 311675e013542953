"""Events of a run as a bar and lines, and what the folder holds in the end."""

import json
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from halfbit.commands import err, out
from halfbit.events import Began, BlockBegan, Event, Finished, Gated, Imported, Noticed, Probed, Solved, Spent, Tuned
from halfbit.folder import inspect as inspect_folder


def show_progress(events: Any) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        event: Event
        for event in events:
            match event:
                case Began(matrices=matrices, blocks=blocks, resumed=resumed, solved=solved):
                    progress.update(task, total=matrices, completed=solved)
                    if resumed:
                        progress.console.print(f"continuing: {resumed} of {blocks} blocks are done", markup=False)
                case Probed(done=done, matrices=matrices):
                    progress.update(task, total=matrices, completed=done, description="measuring what bits buy")
                case BlockBegan(block=block, resumed=resumed):
                    progress.update(task, description=f"{block}{' (read back)' if resumed else ''}")
                case Solved() | Imported():
                    progress.advance(task)
                case Tuned(step=step, steps=steps, loss=loss):
                    progress.update(task, total=steps, completed=step, description=f"tuning, {loss:.4f} nats")
                case Noticed(message=message):
                    progress.console.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
                case Gated(unit=unit, failed=failed) if failed:
                    progress.console.print(f"{unit}: {failed} gates failed", style="bold red", markup=False)
                case Spent(seconds=seconds, parts=parts):
                    shares = sorted(((s, name) for name, s in parts.items() if s > 0.01 * seconds), reverse=True)
                    spent = ", ".join(f"{name} {s / seconds:.0%}" for s, name in shares)
                    progress.console.print(f"{seconds:.0f} s: {spent}", markup=False, highlight=False, soft_wrap=True)
                case Finished(folder=folder):
                    progress.update(task, description="done")
                    progress.console.print(f"written: {folder}", markup=False, highlight=False, soft_wrap=True)


def tell(folder: Path, as_json: bool) -> None:
    report = inspect_folder(folder)
    if as_json:
        print(json.dumps(report))
    else:
        show_report(report)


def show_report(report: dict[str, Any]) -> None:
    table = Table("part", "bytes", "weights", "bits per weight", title=report["folder"])
    for part, row in sorted(report["parts"].items(), key=lambda item: -item[1]["bytes"]):
        table.add_row(part, f"{row['bytes']:,}", f"{row['weights']:,}", f"{row['bits_per_weight']:.3f}")
    out.print(table)
    told = "nothing compressed yet"
    if (bits := report["bits_per_packed_weight"]) is not None:
        several = len(report["packed"]) > 1
        each = ", ".join(f"{part} {row['bits_per_weight']:.4f}" for part, row in sorted(report["packed"].items()))
        told = (
            f"compressed weights: {bits:.4f} bits each, all included{f' ({each})' if several else ''}; "
            f"whole model: {report['bits_per_weight']:.4f}"
        )
    out.print(f"all files: {report['total_bytes']:,} bytes; {told}", soft_wrap=True)
    if (gates := report["gates"])["checks"]:
        failed = [
            f"{row['gate']} at {row['where']}{' (accepted)' if row.get('accepted') else ''}" for row in gates["failed"]
        ]
        result = f"failed: {', '.join(failed)}" if failed else "all passed"
        told = f"{gates['checks']} checks by gates, {result}"
        out.print(told, markup=False, highlight=False, soft_wrap=True)
    if not report["complete"]:
        out.print("the run that writes this folder has not finished; the same compress command continues it")
