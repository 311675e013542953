"""Rate against quality: one model compressed at many rates, with tuning and without, beside its rivals; a plot.

Each point is a run of its own through the command line; bits are counted from the files. Two texts are looked at, one
like the calibration text and one of another domain: a gain on the first alone is none.

    python bench/rates.py MODEL --calibration TEXT --test TEXT --test OTHER --recipe halfbit --curves FILE
    python bench/rates.py MODEL --calibration TEXT --test TEXT --bits 0.67 1.48 --tune 480
    python bench/rates.py MODEL --calibration TEXT --test TEXT --recipe qmoe rtn-ternary gptq-2-g128 --bits 0
    python bench/rates.py --plot docs/rates.png
"""

import argparse
import csv
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import record
import torch

from halfbit import recipe

# what the plot shows; other rows are experiments of docs/LOG.md
DRAWN = (
    "halfbit", "runlength", "qmoe", "qmoe-grid", "qmoe-2bit", "rtn-ternary", "gptq-2-g128", "gptq-3-g128", "rtn-2-g128",
)  # fmt: skip
RATES = [0.4, 0.5, 0.67, 0.8, 1.0, 1.2, 1.48, 2.0, 2.5, 3.0]
ROW = re.compile(r"(?P<text>\S+): perplexity (?P<perplexity>[\d.]+) .*?KL (?P<kl>[\d.]+)")


def run(*arguments: object) -> dict:
    """One command's JSON."""
    command = [sys.executable, "-m", "halfbit.cli", *map(str, arguments)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def point(options: argparse.Namespace, name: str, extra: list[object]) -> None:
    shared = ["--sequence-length", options.sequence_length, "--corruption", options.corruption]
    with tempfile.TemporaryDirectory() as root:
        out = Path(root) / "out"
        given = [options.model, out, "--calibration", options.calibration, "--samples", options.samples]
        begin = time.perf_counter()
        report = run("compress", *given, *extra, *shared, "--json")
        seconds = time.perf_counter() - begin
        parts = []
        for text in options.test:
            against = ["--against", options.model, "--max-tokens", options.max_tokens]
            figures = run("eval", out, "--text", text, *against, *shared, "--json")
            parts.append(
                f"{Path(text).stem}: perplexity {figures['perplexity']:.3f} (original "
                f"{figures['original_perplexity']:.3f}), loss {figures['loss']:.4f} ({figures['original_loss']:.4f}), "
                f"KL {figures['kl_divergence']:.5f}"
            )
    bits = report["bits_per_packed_weight"]
    note = f"{bits:.4f} bits per packed weight; {'; '.join(parts)}"
    print(f"{options.model.name:>16} {name:>24} {seconds:7.1f} s  {note}", flush=True)
    row = {
        "shape": options.model.name,
        "tokens": options.samples * options.sequence_length,
        "threads": torch.get_num_threads(),
        "what": name,
        "seconds": f"{seconds:.1f}",
        "note": note,
    }
    if not options.dry_run:
        record.append("rates", [row])


def on_experts(name: str) -> recipe.Recipe:
    """A recipe whose rules reach nothing but experts; what is a rule for them in it, or else for everything."""
    found = recipe.load(name)
    packing = [rule for rule in found.rules if rule.packs]
    chosen = next((rule for rule in packing if "experts" in rule.match), packing[-1])
    return replace(found, rules=(replace(chosen, match="*.experts.*"),))


def plot(path: Path) -> None:
    """Rows of results.csv, the newest of a name: bits against KL divergence, a row of panels per model, one per text;
    dashed: tuned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with record.RESULTS.open() as file:
        rows = {(row["shape"], row["what"]): row for row in csv.DictReader(file) if row["bench"] == "rates"}
    # model -> text -> (recipe, tuned) -> points
    panels: dict[str, dict[str, dict[tuple[str, bool], list[tuple[float, float]]]]] = {}
    for (model, what), row in rows.items():
        bits, name = float(row["note"].split()[0]), what.split(",")[0].split()[0]
        for found in ROW.finditer(row["note"]) if name in DRAWN else ():
            curves = panels.setdefault(model, {}).setdefault(found["text"], {})
            curves.setdefault((name, "tuning" in what), []).append((bits, float(found["kl"])))
    names = sorted({name for texts in panels.values() for curves in texts.values() for name, _ in curves})
    columns = max(map(len, panels.values()))
    figure, axes = plt.subplots(len(panels), columns, figsize=(6 * columns, 4.5 * len(panels)), squeeze=False)
    for line, (model, texts) in zip(axes, panels.items(), strict=True):
        for axis, (text, curves) in zip(line, texts.items(), strict=False):
            for (name, tuned), points in curves.items():
                style = {"color": f"C{names.index(name) % 10}", "linestyle": "--" if tuned else "-"}
                label = f"{name}, tuned" if tuned else name
                axis.plot(*zip(*sorted(points), strict=True), marker="x" if tuned else "o", label=label, **style)
            axis.set(title=f"{model}, {text}", xlabel="stored bits per expert weight", yscale="log")
            axis.set_ylabel("KL to the original, nats per token")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calibration")
    parser.add_argument("--test", action="append", default=[])
    parser.add_argument("--recipe", nargs="*", default=["halfbit"], help="of which the rule for experts is taken")
    parser.add_argument("--bits", type=float, nargs="*", default=RATES, help="0: the recipe's own")
    parser.add_argument("--tune", type=int, nargs="*", default=[0], help="steps of tuning")
    parser.add_argument("--curves", type=Path, help="what the probe measured, kept for the next rate")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=40_960)
    parser.add_argument("--corruption", default="t5")
    parser.add_argument("--plot", type=Path, help="draw what is in results.csv, measure nothing")
    parser.add_argument("--dry-run", action="store_true", help="print, do not append to results.csv")
    options = parser.parse_args()
    if options.plot:
        plot(options.plot)
        return
    for name, steps, bits in itertools.product(options.recipe, options.tune, options.bits):
        chosen = on_experts(name)
        with tempfile.TemporaryDirectory() as root:
            file = Path(root) / "recipe.toml"
            file.write_text(chosen.to_toml())
            extra: list[object] = ["--recipe", file, "--tune", steps]
            extra += ["--bits", bits] if bits else []
            if options.curves and any(rule.options for rule in chosen.rules):
                extra += ["--curves", options.curves]
            what = (
                Path(name).stem + (f" {bits:g} bits" if bits else "") + (f", {steps} steps of tuning" if steps else "")
            )
            point(options, what, extra)


if __name__ == "__main__":
    main()
