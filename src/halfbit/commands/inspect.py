"""`halfbit inspect` and `halfbit verify`: what a folder holds, and whether it is whole."""

import json
from os.path import commonpath
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from halfbit import native, registry, triton_support
from halfbit.commands import AsJson, Folder, err, out, told
from halfbit.commands.progress import show_report
from halfbit.errors import (
    Unsupported,
)
from halfbit.folder import Problem
from halfbit.folder import inspect as inspect_folder
from halfbit.folder import verify as verify_folder
from halfbit.gates import LEAST


@told
def inspect(
    folder: Annotated[str | None, typer.Argument(help="Folder that halfbit compress wrote.")] = None,
    backends: Annotated[
        bool, typer.Option("--backends", help="Which kernels run here, and why others do not.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bytes and true bits by part, which format and how many bits each layer was given, losses and calibration coverage
    per layer; or, with --backends, the kernels. Also shows what a run that is under way has decided."""
    if folder is None and not backends:
        raise Unsupported("inspect: give a FOLDER, or --backends")
    report: dict[str, Any] = inspect_folder(folder) if folder else {}
    if backends:
        report["backends"] = _backends()
    if as_json:
        print(json.dumps(report))
        return
    if backends:
        table = Table("backend", "active", "because", title="kernels")
        for name, (active, reason) in report["backends"].items():
            table.add_row(name, "yes" if active else "no", reason)
        out.print(table)
    if folder:
        show_report(report)
        if report["allocation"] is not None:
            _show_allocation(report["allocation"])
        if report["gates"]["worst"]:
            _show_gates(report["gates"]["worst"])
        _show_layers(report)


def _backends() -> dict[str, tuple[bool, str]]:
    found = native.extension is not None
    return {
        "reference (torch)": (True, "always there; used where no kernel is"),
        "cpu (C++)": (found, f"instructions: {native.isa()}" if found else native.reason),
        **{f"gpu (Triton): {name}": _triton(name) for name in registry.names("formats")},
    }


def _triton(name: str) -> tuple[bool, str]:
    if not triton_support.has_kernels(name):
        return False, "no kernels for this format; GPU tensors use the reference"
    why_not = triton_support.why_not()
    return not why_not, why_not or (
        "interpreted, slow" if triton_support.INTERPRETED else "for CUDA, ROCm and XPU tensors"
    )


def _show_allocation(allocation: dict[str, Any]) -> None:
    told = "; ".join(f"{r['match']} at {r['bits']:g} bits, {r['loss']:.4f} nats" for r in allocation["rules"])
    parents = [name.rpartition(".")[0].replace(".", "/") for name in allocation["projections"]]
    prefix = commonpath(parents).replace("/", ".")
    columns = (Column(name, no_wrap=True) for name in (f"{prefix}.", "bits, fewest to most", "of loss"))
    table = Table(*columns, "formats", title=f"predicted: {told}")
    for name, row in allocation["projections"].items():
        bits, formats = row["bits"], ", ".join(f"{n} {kind}" for kind, n in sorted(row["formats"].items()))
        spread = f"{sum(bits) / len(bits):.3f}, {min(bits):.2f} to {max(bits):.2f}"
        table.add_row(name.removeprefix(f"{prefix}."), spread, f"{row['share']:.1%}", formats)
    out.print(table)


def _show_gates(worst: dict[str, dict[str, Any]]) -> None:
    columns = (Column("gate", no_wrap=True), "worst", "original", "limit", "at")
    table = Table(*columns, title="gates: what came nearest to failing")
    for gate, row in worst.items():
        value = "not finite" if row["value"] is None else f"{row['value']:.4g}"
        original = f"{row['original']:.4g}" if "original" in row else ""
        limit = f"{'at least' if gate in LEAST else 'within' if original else 'at most'} {row['limit']:g}"
        table.add_row(gate, value, original, limit, row["where"])
    out.print(table)


def _show_layers(report: dict[str, Any]) -> None:
    table = Table(
        Column("module", no_wrap=True),
        "projection",
        "mean loss",
        "worst loss",
        "bits",
        "tokens per expert",
        "below floor",
    )
    for path, layer in report["layers"].items():
        cover = layer["coverage"]
        spread = f"{min(cover['trained'])} to {max(cover['trained'])}" if cover else "none"
        for projection, row in layer["projections"].items():
            table.add_row(
                path,
                projection,
                f"{row['mean_loss']:.4f}",
                f"{row['worst_loss']:.4f}",
                f"{row['bits_per_weight']:.3f}",
                spread,
                str(len(cover["below_floor"])) if cover else "-",
            )
    out.print(table)


@told
def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Read every byte of a compressed folder and check every checksum and structural rule. Exit code 1 on damage."""
    problems, whole = [], 0
    for found in verify_folder(folder):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            whole += 1
    if as_json:
        print(json.dumps({"tensors": whole, "problems": [{"where": p.where, "message": p.message} for p in problems]}))
    else:
        for problem in problems:
            err.print(problem.message, style="bold red", markup=False, highlight=False, soft_wrap=True)
        told_all = f"{folder}: {whole} tensors whole, {len(problems)} problems"
        out.print(told_all, markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
