"""Draws docs/speed.png from bench/results.csv: bits per weight against times as fast as the better of torch's products.

Of each product the newest row of `halfbit bench --csv`, with one number of threads; a panel for each shape and number
of tokens. llama.cpp rounds x to 8 bits.

    python bench/plot.py [--threads 1] [--machine 'part of its name']
"""

import argparse
import csv
import re
from pathlib import Path

import matplotlib
import record

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TARGET = Path(__file__).parent.parent / "docs" / "speed.png"
BITS, EXPERTS = re.compile(r"([0-9.]+) bits,"), re.compile(r"([0-9]+) experts in one call")
OURS, OTHERS = "C0", "C1"


def newest(threads: int, machine: str) -> dict[tuple[str, int], dict[str, tuple[float, float]]]:
    """(shape, tokens) -> product -> (bits per weight, times as fast)."""
    found: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}
    with record.RESULTS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["bench"] != "bench" or int(row["threads"]) != threads or machine not in row["machine"]:
                continue
            bits, experts = BITS.search(row["note"]), EXPERTS.search(row["note"])
            if row["what"].startswith("torch") or not row["ratio_to_bf16"] or not bits:
                continue
            shape = f"{experts[1]} experts of {row['shape']}" if experts else row["shape"]
            slowest = max(float(row["ratio_to_bf16"]), float(row["ratio_to_fp32"]))
            found.setdefault((shape, int(row["tokens"])), {})[row["what"]] = float(bits[1]), 1 / slowest
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", default="", help="part of the machine's name in the rows")
    options = parser.parse_args()
    panels = newest(options.threads, options.machine)
    lines = -(-len(panels) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(11, 4 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((shape, tokens), products) in zip(axes.flat, sorted(panels.items()), strict=False):
        for what, (bits, speed) in products.items():
            axis.scatter(bits, speed, color=OTHERS if what.startswith("llama") else OURS)
            axis.annotate(
                what.removeprefix("llama.cpp "), (bits, speed), (4, 4), textcoords="offset points", fontsize=8
            )
        axis.axhline(1, color="black", linewidth=0.8)
        title = f"{shape}, {tokens} {'token' if tokens == 1 else 'tokens'}{' each' if ' of ' in shape else ''}"
        axis.set(title=title, xlabel="bits per weight", ylabel="times as fast as torch", xlim=(0.4, 5.6))
        axis.set_ylim(0, 1.15 * max(1, *(speed for _, speed in products.values())))
        axis.grid(alpha=0.3)
    for what, color in (("halfbit", OURS), ("llama.cpp, x in 8 bits", OTHERS)):
        axes[0, 0].scatter([], [], color=color, label=what)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(TARGET, dpi=80)


if __name__ == "__main__":
    main()
