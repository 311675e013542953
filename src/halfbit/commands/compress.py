"""`halfbit compress`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbit import recipe as recipes
from halfbit.commands import MOST, AsJson, device_of, told
from halfbit.commands.progress import show_progress, tell
from halfbit.compress import compress as run_compress
from halfbit.errors import (
    ClusterError,
    RecipeError,
    UnknownName,
)
from halfbit.search import compress_to_loss
from halfbit.sizes import parse_size, with_bits, with_model_bits, with_size


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
    layout: Annotated[
        str | None,
        typer.Option(
            help="Of ternary matrices. compact: the smallest file. fast: at the same zeros some 0.1 bits more, and one "
            "to four tokens 1.1 to 1.7 times as fast on CPUs. Bits and sizes are counted in it. [recipe: compact]"
        ),
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
    chosen = chosen if layout is None else chosen.in_layout(layout)
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
    how: Any = {"device": ",".join(map(device_of, device.split(","))), "ray": ray, "workers": workers}
    how |= {"restart": restart, "offload": offload, "accept": accept or ()}
    if max_loss is not None:
        show_progress(compress_to_loss(model, folder, chosen, calibration, max_loss, **how))
    else:
        show_progress(run_compress(model, folder, chosen, calibration, **how, curves=curves))
    tell(folder, as_json)
