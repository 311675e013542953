"""The command line: compress, plan, import, repack, eval, generate, inspect, verify, bench. It parses, calls, shows.

Results go to stdout (as tables, or as JSON with --json), progress and messages to stderr. Exit codes: 0 done, 1 verify
found damage or bench a wrong product, 2 the input is at fault, 3 a gate stopped the run.
"""

import json
import math
from collections.abc import Callable
from functools import wraps
from os.path import commonpath
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from transformers import TextStreamer
from transformers.utils.logging import disable_progress_bar

from halfbit import bench, native, registry, triton_support
from halfbit import recipe as recipes
from halfbit.bench import rows as bench_rows
from halfbit.bench.matrices import KNOWN, Statistics
from halfbit.compress import compress as run_compress
from halfbit.errors import (
    CalibrationError,
    ClusterError,
    GateError,
    HalfbitError,
    RecipeError,
    UnknownName,
    Unsupported,
)
from halfbit.evaluate import evaluate, load
from halfbit.events import Began, BlockBegan, Event, Finished, Gated, Imported, Noticed, Probed, Solved, Spent, Tuned
from halfbit.folder import Problem
from halfbit.folder import inspect as inspect_folder
from halfbit.folder import verify as verify_folder
from halfbit.gates import LEAST
from halfbit.importers import import_checkpoint
from halfbit.plan import Plan, budgeted
from halfbit.plan import plan as make_plan
from halfbit.repack import repack
from halfbit.samples import load_tokenizer
from halfbit.search import compress_to_loss
from halfbit.sizes import parse_size, with_bits, with_model_bits, with_size

app = typer.Typer(
    help="Compress large language models until they fit the hardware you have, and run them compressed.",
    epilog="First steps: halfbit compress MODEL OUT --calibration TEXT, then halfbit generate OUT --prompt 'Once'.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)

# seeds are 64-bit numbers
MOST = (1 << 63) - 1
Folder = Annotated[str, typer.Argument(help="Folder that halfbit compress wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
Verified = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare what is loaded with the checksums of its manifest.")
]


def told(command: Callable[..., None]) -> Callable[..., None]:
    """Errors of the input become one message and exit code 2, without a traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except HalfbitError as e:
            err.print(
                f"halfbit: {type(e).__name__}: {e}", style="bold red", markup=False, highlight=False, soft_wrap=True
            )
            raise typer.Exit(3 if isinstance(e, GateError) else 2) from None
        except KeyboardInterrupt:
            err.print(
                "halfbit: interrupted; the same command continues where it was",
                markup=False,
                soft_wrap=True,
            )
            raise typer.Exit(130) from None

    return run


def _device(name: str) -> str:
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "auto") or (number and (kind != "cuda" or not number.isdecimal())):
        raise Unsupported(f"--device: expected cpu, cuda, cuda:NUMBER or auto, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise Unsupported(f"--device {name}: torch sees no CUDA device here; use --device cpu, or install a CUDA torch")
    if number and int(number) >= torch.cuda.device_count():
        raise Unsupported(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


@app.command()
@told
def compress(
    model: Annotated[str, typer.Argument(help="Model folder with safetensors, or hub id such as Qwen/Qwen3-30B-A3B.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="New folder; an interrupted run in it is continued.")],
    recipe: Annotated[str, typer.Option(help=f"Name ({', '.join(recipes.names())}) or TOML file.")] = "halfbit",
    calibration: Annotated[
        str | None, typer.Option(help="Text file, .jsonl with 'text', or data set 'name:config:split'.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration samples. [recipe: 128]")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per sample. [the model's, at most 2048]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MOST, help="Draw samples with this seed. [the text's first, in order]")
    ] = None,
    corruption: Annotated[str | None, typer.Option(help="Of encoder-decoder models: t5 or fixed. [recipe: t5]")] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Stored bits per weight of the experts, or of the linear layers where there are no experts. [recipe]"
        ),
    ] = None,
    bits_of: Annotated[
        str, typer.Option(help="What --bits counts: experts (or what --bits says) or model (every weight of it).")
    ] = "experts",
    size: Annotated[
        str | None, typer.Option(help="Of the whole folder, 12GB or 900MiB: --bits that make it so.")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="0.02: the fewest bits with which the loss on held-back text rises by 2 % at most."),
    ] = None,
    outliers: Annotated[
        float | None, typer.Option(help="SpQR rules: this share of weights as outliers, 0.005.")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="SpQR rules: outliers by the paper's relative threshold, 0.2.")
    ] = None,
    tune: Annotated[
        int | None, typer.Option(min=0, help="Steps of tuning towards the original on the whole text. [recipe]")
    ] = None,
    tune_groups: Annotated[
        int | None,
        typer.Option(min=0, help="Steps of tuning for each group of experts, before the next is read. [recipe]"),
    ] = None,
    curves: Annotated[
        Path | None,
        typer.Option(help="Recipes with options: what each matrix costs at each size, read from here or written here."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete the run that OUT holds, whatever it is of, and begin anew.")
    ] = False,
    offload: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep the samples' activations in files there. [in memory]", show_default=False
        ),
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Go on where a gate failed: the gate, or the expert, layer or block that it named, or all. May be "
            "given several times.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Solve groups of experts with a Ray cluster: its address, auto, or local for one on this machine.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Of the cluster. [one per GPU, or per machine]", show_default=False)
    ] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, auto, or several of one kind that share the experts: cuda:0,cuda:1.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Compress MODEL into the folder OUT, which transformers then loads and runs compressed.

    Blocks are solved one after another; memory follows one block and one group of experts. Stopped with Ctrl-C or
    killed, the same command continues. Gates look at every block and at the finished model on text that was held back;
    a failed one stops the run with exit code 3 and keeps the work.

    Example:
    halfbit compress examples/tiny-moe out --calibration examples/tiny-moe/calibration.txt --sequence-length 256
    """
    given = {"samples": samples, "sequence_length": sequence_length, "seed": seed, "corruption": corruption}
    chosen = recipes.load(recipe).calibrated(**{k: v for k, v in given.items() if v is not None})
    if curves is not None and not any(rule.options for rule in chosen.rules):
        raise RecipeError(f"--curves: recipe {recipe!r} has no rule with options, so nothing is measured; leave it out")
    asked = {"bits": bits, "size": size, "max-loss": max_loss, "outliers": outliers, "tau": tau}
    budgets = {k: v for k, v in asked.items() if v is not None}
    if len(budgets) > 1:
        raise RecipeError(f"--{' and --'.join(budgets)} are ways to say one thing; give one of them")
    if bits_of not in ("experts", "model"):
        raise UnknownName("--bits-of", bits_of, ["experts", "model"])
    if size is not None:
        chosen = with_size(model, chosen, parse_size(size))
    elif bits is not None:
        chosen = (with_model_bits if bits_of == "model" else with_bits)(model, chosen, bits)
    elif outliers is not None:
        chosen = chosen.budgeted("outliers", outliers)
    elif tau is not None:
        chosen = chosen.budgeted("tau", tau)
    steps = {"steps": tune, "group_steps": tune_groups}
    chosen = chosen.tuned(**{k: v for k, v in steps.items() if v is not None})
    if workers and ray is None:
        raise ClusterError("--workers: are those of a Ray cluster; give its address with --ray, or --ray local")
    how: Any = {"device": ",".join(map(_device, device.split(","))), "ray": ray, "workers": workers}
    how |= {"restart": restart, "offload": offload, "accept": accept or ()}
    if max_loss is not None:
        show_progress(compress_to_loss(model, folder, chosen, calibration, max_loss, **how))
    else:
        show_progress(run_compress(model, folder, chosen, calibration, **how, curves=curves))
    _tell(folder, as_json)


@app.command()
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
    if bits is not None and size is not None:
        raise RecipeError("--bits and --size are ways to say one thing; give one of them")
    if bits is not None or size is not None:
        chosen = budgeted(model, chosen, bits, None if size is None else parse_size(size))
    found = make_plan(model, chosen, out=folder, device=_device(device), timed=measure, offload=offload)
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


@app.command("import")
@told
def import_command(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder or hub id of a checkpoint of spqr_quant or of the QMoE code."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="New folder; an interrupted import is continued.")],
    outliers: Annotated[
        str | None,
        typer.Option(
            help="SpQR only. add: an outlier is added to the weight under it, as in the published kernel, which the "
            "model's figures come from; replace: it takes the weight's place, as the published quantizer meant. [add]"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take over a published SpQR or QMoE checkpoint, weight for weight; nothing is solved.

    SpQR: folders with quant_method "spqr" in config.json (3 bits, tiles of 16 x 16). QMoE: folders of .pt files, opened
    with torch.load(weights_only=True) only.

    Example:
    halfbit import Llama-2-7b-SPQR-3Bit-16x16 out --outliers replace
    """
    show_progress(import_checkpoint(source, folder, outliers=outliers))
    _tell(folder, as_json)


@app.command("repack")
def repack_command(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that halfbit compress wrote.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="New folder; an interrupted repack is continued.")],
    layout: Annotated[
        str,
        typer.Option(
            help="compact: the smallest file. fast: ternary matrices take about 0.1 bits per weight more and multiply "
            "few tokens several times as fast on CPUs."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Turn what is stored into another layout; no weight changes.

    Example:
    halfbit repack out out-fast --layout fast
    """
    show_progress(repack(source, folder, layout))
    _tell(folder, as_json)


def _tell(folder: Path, as_json: bool) -> None:
    report = inspect_folder(folder)
    if as_json:
        print(json.dumps(report))
    else:
        _show_report(report)


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


@app.command("eval")
@told
def evaluate_command(
    folder: Annotated[str, typer.Argument(help="Compressed folder, or any model.")],
    text: Annotated[str, typer.Option(help="Text file, .jsonl with 'text', or data set name.")],
    against: Annotated[str | None, typer.Option(help="The original: adds KL divergence and top-1 agreement.")] = None,
    sequence_length: Annotated[
        int, typer.Option(min=0, help="Tokens per window. [the model's, at most 2048]", show_default=False)
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Use only so many tokens of the text. [all]", show_default=False)
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, max=MOST, help="Of the span corruption (encoder-decoder models).")] = 0,
    corruption: Annotated[
        str, typer.Option(help="Of encoder-decoder models: t5 (random spans) or fixed (3 tokens).")
    ] = "t5",
    device: Device = "auto",
    verify: Verified = True,
    as_json: AsJson = False,
) -> None:
    """Perplexity and loss on a text; encoder-decoder models: loss by span corruption.

    The text is tokenized as a whole without special tokens and cut into windows that do not overlap; the loss is the
    mean cross-entropy over positions 2 to the end of each window.
    """
    result = evaluate(
        folder,
        text,
        against=against,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        seed=seed,
        corruption=corruption,
        device=_device(device),
        verify=verify,
    ).as_dict()
    if as_json:
        print(json.dumps(result))
        return
    table = Table("figure", "value", title=str(folder))
    for key, value in result.items():
        table.add_row(key.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else str(value))
    out.print(table)


@app.command()
@told
def generate(
    folder: Annotated[str, typer.Argument(help="Compressed folder, or any model.")],
    prompt: Annotated[str, typer.Option(help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    device: Device = "auto",
    verify: Verified = True,
) -> None:
    """Continue a prompt; tokens appear as they are made."""
    where = _device(device)
    if not math.isfinite(temperature):
        raise Unsupported(f"--temperature: expected a finite number, got {temperature}")
    model, tokenizer = load(folder, device=where, verify=verify), load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt").to(where)
    if inputs["input_ids"].numel() == 0:
        raise CalibrationError("--prompt: gives no tokens; write at least a word to continue")
    inputs.pop("token_type_ids", None)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=not model.config.is_encoder_decoder, skip_special_tokens=True)
    model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer)


@app.command()
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
        _show_report(report)
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


def _show_report(report: dict[str, Any]) -> None:
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


@app.command()
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


@app.command("bench")
@told
def bench_command(
    shapes: Annotated[
        str, typer.Option(metavar="LIST", help="ROWSxCOLUMNS of the matrices, with commas.")
    ] = "2080x6144,768x2048,4096x4096",
    formats: Annotated[
        str, typer.Option(metavar="LIST", help=f"Of {', '.join(KNOWN)}.")
    ] = "qmoe,runlength,spqr-3bit,spqr-4bit",
    tokens: Annotated[str, typer.Option(metavar="LIST", help="That are multiplied at once, for each expert.")] = "1",
    threads: Annotated[
        str, typer.Option(metavar="LIST", help="Of torch, of halfbit and of llama.cpp. [torch's]", show_default=False)
    ] = "",
    experts: Annotated[
        int, typer.Option(min=1, help="Matrices in one call, as a layer of a Mixture-of-Experts takes them.")
    ] = 1,
    against: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="torch (bfloat16 and float32), llama.cpp (TQ1_0 to Q4_K; needs llama-cpp-python), or nothing.",
        ),
    ] = "torch",
    dtype: Annotated[str, typer.Option(help="Of x: float32, bfloat16 or float16; torch's products have their own.")] = (
        "float32"
    ),
    zeros: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of zeros in ternary weights.")] = 0.885,
    outliers: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of outliers in SpQR's.")] = 0.01,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each product; fewer above 40 tokens.")] = 50,
    memory: Annotated[
        str,
        typer.Option(help="Of other weights that is read before a matrix is used again; more than the caches hold."),
    ] = "512MiB",
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append rows there, as in bench/results.csv.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time products from compressed weights on this CPU, against torch's and llama.cpp's, after checking them.

    Every product is first compared with float64 from the decoded weights: an error above twice that of torch's product
    in the same dtype is exit code 1, and that product is not timed. Then each takes its turn with one of many matrices,
    so that weights come from memory, not from a cache, and a busy machine slows all alike. Shown are the median and the
    middle 80 % of the times, the bandwidth that the median means for the bytes of the weights, its share of what a
    plain sum over memory reaches, and how many times as fast as the better of torch's products it is.

    Examples:
    halfbit bench
    halfbit bench --shapes 768x2048 --experts 8 --tokens 1,4 --formats qmoe,runlength-rotated --threads 1,2
    halfbit bench --against torch,llama.cpp --json
    """
    results = bench.run(
        [bench.parse_shape(shape) for shape in _listed("--shapes", shapes)],
        _listed("--formats", formats),
        tokens=_numbers("--tokens", tokens, least=0),
        threads=_numbers("--threads", threads) if threads else (),
        experts=experts,
        against=_listed("--against", against) if against else (),
        dtype=dtype,
        of=Statistics(zeros, outliers),
        repetitions=repetitions,
        memory=parse_size(memory),
    )
    found, wrong = [], []
    for result in results:
        found.append(result.as_dict())
        wrong += [f"{p.what}, {result.case}: error {p.error:.3g}" for p in result.products if not p.correct]
        if csv is not None:
            bench_rows.append(csv, "bench", bench_rows.of_result(result, f"{zeros:.1%} zeros, {outliers:.1%} outliers"))
        if not as_json:
            _show_products(result)
    if as_json:
        told_of = {"machine": bench_rows.machine(), "torch": torch.__version__, "commit": bench_rows.commit()}
        print(json.dumps(told_of | {"results": found}))
    for message in wrong:
        err.print(f"wrong result: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


def _listed(option: str, text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise Unsupported(f"{option}: expected a list with commas, got {text!r}")
    return found


def _numbers(option: str, text: str, least: int = 1) -> list[int]:
    found = _listed(option, text)
    if not all(part.isdecimal() and least <= int(part) <= 1 << 20 for part in found):
        raise Unsupported(f"{option}: expected numbers from {least} to {1 << 20} with commas, got {text!r}")
    return [int(part) for part in found]


def _show_products(result: bench.Result) -> None:
    case = result.case
    experts = f"{case.experts} experts of " if case.experts > 1 else ""
    tokens = f"{case.tokens} {'token' if case.tokens == 1 else 'tokens'}{' each' if case.experts > 1 else ''}"
    threads = f"{case.threads} {'thread' if case.threads == 1 else 'threads'}"
    right: Any = {"justify": "right", "no_wrap": True}
    table = Table(
        Column("product", no_wrap=True),
        *(Column(name, **right) for name in ("bits", "MB", "ms", "10-90 %", "GB/s", "read", "torch", "error")),
        title=f"{experts}{case.shape}, {tokens}, {threads}; memory: {result.read / 1e9:.1f} GB/s",
        # as wide as a terminal of 80 columns
        box=None,
        padding=(0, 1, 0, 0),
    )
    for p in result.products:
        cells = [p.what, f"{p.bits:.3f}", f"{p.nbytes / 1e6:.2f}"]
        if p.seconds:
            low, high = p.range
            speedup = result.speedup(p)
            cells += [f"{1e3 * p.median:.3f}", f"{1e3 * low:.2f}-{1e3 * high:.2f}", f"{p.nbytes / p.median / 1e9:.2f}"]
            cells += [f"{p.nbytes / p.median / result.read:.0%}", "" if speedup is None else f"{speedup:.2f}x"]
        else:
            cells += ["wrong", "", "", "", ""]
        table.add_row(*cells, f"{p.error:.1e}", style=None if p.correct else "bold red")
    out.print(table)


def main() -> None:
    native.ask_for_same_sums()
    # the bars of transformers would run through ours
    disable_progress_bar()
    app()


if __name__ == "__main__":
    main()
