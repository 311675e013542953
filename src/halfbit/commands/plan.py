"""`halfbit plan`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from halfbit import recipe as recipes
from halfbit.commands import AsJson, Device, device_of, out, told
from halfbit.errors import (
    RecipeError,
)
from halfbit.plan import Plan, budgeted
from halfbit.plan import plan as make_plan
from halfbit.sizes import parse_size


@told
def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|CONFIG", help="Model folder, hub id, or a config.json; nothing else is read."),
    ],
    recipe: Annotated[str, typer.Option(help=f"Name ({', '.join(recipes.names())}) or TOML file.")] = "halfbit",
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration samples. [recipe: 128]")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per sample. [the model's, at most 2048]")
    ] = None,
    bits: Annotated[float | None, typer.Option(help="Stored bits per weight, as of halfbit compress. [recipe]")] = None,
    size: Annotated[str | None, typer.Option(help="Of the whole folder, 12GB or 900MiB.")] = None,
    layout: Annotated[str | None, typer.Option(help="compact or fast, as of halfbit compress. [recipe]")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the compressed folder would be.")] = Path("."),
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure this machine for some seconds, and predict times.")
    ] = True,
    offload: Annotated[bool, typer.Option("--offload", help="With the activations in files.")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """What compressing MODEL will take, from its config.json alone: bytes of every part, memory, disk and time.

    Says what would not fit on this machine, and which option makes it fit.

    Examples:
    halfbit plan Qwen/Qwen3-30B-A3B --bits 0.8
    halfbit plan examples/configs/switch-c-2048.json --recipe qmoe
    """
    given = {"samples": samples, "sequence_length": sequence_length}
    chosen = recipes.load(recipe).calibrated(**{k: v for k, v in given.items() if v is not None})
    chosen = chosen if layout is None else chosen.in_layout(layout)
    if bits is not None and size is not None:
        raise RecipeError("--bits and --size are ways to say one thing; give one of them")
    if bits is not None or size is not None:
        chosen = budgeted(model, chosen, bits, None if size is None else parse_size(size))
    found = make_plan(model, chosen, out=folder, device=device_of(device), timed=measure, offload=offload)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        _show_plan(found)


def _show_plan(found: Plan) -> None:
    def told(n: int) -> str:
        return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB" if n >= 1e6 else f"{n / 1e3:,.1f} kB"

    right: Any = {"justify": "right", "no_wrap": True}
    table = Table(
        Column("part", no_wrap=True),
        Column("weights", **right),
        Column("now", **right),
        Column("compressed", **right),
        Column("bits", **right),
        title=f"{found.source} by {found.recipe}",
    )
    for part in found.parts:
        bits = f"{8 * part.after / part.weights:.4f}" if part.weights else ""
        weights = f"{part.weights:,}" if part.weights else ""
        table.add_row(part.name, weights, told(part.before), told(part.after), bits)
    table.add_row("all", f"{found.parameters:,}", told(found.before), told(found.after), "", style="bold")
    out.print(table)
    out.print(f"compressed weights: {found.bits_per_packed_weight:.4f} bits each, all included", soft_wrap=True)
    table = Table(
        Column("phase", no_wrap=True), "what", Column("host", **right), Column("device", **right), title="peak memory"
    )
    for peak in found.memory:
        name = f"{peak.phase}, {peak.block}"
        table.add_row(name, "", told(peak.host_bytes), told(peak.device_bytes) if peak.device else "-", style="bold")
        for what, n in sorted(peak.host.items(), key=lambda row: -row[1]):
            table.add_row("", what, told(n), "")
        for what, n in sorted(peak.device.items(), key=lambda row: -row[1]):
            table.add_row("", what, "", told(n))
    out.print(table)
    if found.time:
        table = Table(
            Column("phase", no_wrap=True), "what", Column("time", **right), title="time on this machine, idle"
        )
        for spent in found.time:
            table.add_row(spent.phase, "", _duration(spent.seconds), style="bold")
            for what, seconds in sorted(spent.by.items(), key=lambda row: -row[1]):
                table.add_row("", what, _duration(seconds))
        table.add_row("all", "", _duration(found.seconds), style="bold")
        out.print(table)
    disk = ", ".join(f"{what} {told(n)}" for what, n in found.disk.items())
    table = Table(Column("limit", no_wrap=True), Column("needed", **right), Column("free", **right), "verdict")
    for verdict in found.verdicts:
        free = "unknown" if verdict.free is None else told(verdict.free)
        says = "fits" if verdict.fits else f"does not fit; {verdict.advice}"
        table.add_row(verdict.limit, told(verdict.needed), free, escape(says))
    out.print(table)
    out.print(f"disk: {disk}", soft_wrap=True)
    for told_of in found.assumptions:
        out.print(f"assumed: {told_of}", markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
