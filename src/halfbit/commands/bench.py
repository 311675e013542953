"""`halfbit bench`."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Column, Table

from halfbit import bench
from halfbit.bench import rows as bench_rows
from halfbit.bench import tuning
from halfbit.bench.matrices import KNOWN, Statistics
from halfbit.commands import AsJson, err, out, told
from halfbit.errors import Unsupported
from halfbit.sizes import parse_size
from halfbit.triton_support import user_file


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
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="On a GPU: time how else Triton kernels could be launched for these shapes, formats, tokens and "
            "experts, and keep the fastest for this device. Nothing is compared.",
        ),
    ] = False,
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
    halfbit bench --tune --shapes 768x2048 --experts 128 --tokens 1,4,16
    """
    if tune:
        cases = [bench.parse_shape(shape) for shape in _listed("--shapes", shapes)]
        counts = _numbers("--tokens", tokens)
        of = Statistics(zeros, outliers)
        found = tuning.products(_listed("--formats", formats), cases, counts, experts, of)
        _show_tuned(found, as_json)
        return
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


def _show_tuned(found: Iterable[tuning.Tuned], as_json: bool) -> None:
    rows = []
    for tuned in found:
        rows.append(asdict(tuned) | {"best": tuned.best})
        first, best = tuned.microseconds[0], min(tuned.microseconds)
        told = f"{tuned.what}: {tuned.entry}: {first:.1f} us, {best:.1f} with {tuned.best or 'what it was'}"
        (err if as_json else out).print(told, markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"kept": str(user_file()), "tuned": rows}))
    else:
        out.print(f"kept: {user_file()}", markup=False, highlight=False, soft_wrap=True)


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
