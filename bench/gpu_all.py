"""Everything that is owed on a GPU, in one call: correctness first, then speed, in less than nine minutes.

Each step has a time budget and fails alone: what went wrong becomes a row and the rest runs. Formats are found by what
is registered with Triton kernels. Rows are written after every step (OUT/rows.json, OUT/rows.csv), printed at the end.

Products: many matrices of one shape, more bytes than the L2 cache holds on either side, are multiplied one after the
other in a CUDA graph; graphs of the rivals are replayed in turn, and the median of the replays counts. Bandwidth is
that of the compressed bytes a product reads, and its share of a device copy measured in the same run. The rival is
torch's F.linear in bfloat16 (cuBLAS); for the experts layer the fastest of transformers' implementations.

    python bench/gpu_all.py --out results              # on a GPU
    python bench/gpu_all.py --out results --interpret  # without: tiny shapes, interpreted, only to show that it works
    python bench/gpu_all.py --out results --only products --seconds 200
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from gpu import DEVICE, INTERPRET
from gpu.correctness import correctness
from gpu.layer import experts_step
from gpu.measuring import (
    OverTime,
    Report,
    at_most,
    guarded,
    timed,
)
from gpu.models import compress_step, generation_step
from gpu.products import products_step, tuning_step

from halfbit import native, triton_support


def environment(report: Report) -> None:
    facts = {"python": platform.python_version(), "torch": torch.__version__, "halfbit extension": native.isa()}
    import triton

    facts["triton"] = triton.__version__
    if not INTERPRET:
        told = torch.cuda.get_device_properties(0)
        facts |= {"device": told.name, "multiprocessors": told.multi_processor_count, "L2": told.L2_cache_size}
    report.add("environment", json.dumps(facts), note=triton_support.why_not() or "kernels run")
    size = 1 << (20 if INTERPRET else 30)
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    median = statistics.median(timed({"copy": (lambda: target.copy_(source), 1)})["copy"])
    # bytes read and written
    report.copy = 2 * size / median / 1e3
    report.add("environment", "copy", microseconds=median, gigabytes_per_second=report.copy)


# seconds of each step; all of it stays below nine minutes
STEPS: dict[str, tuple[Callable[[Report], None], float]] = {
    "environment": (environment, 30),
    "correctness": (correctness, 100),
    "tuning": (tuning_step, 50),
    "products": (products_step, 110),
    "experts": (experts_step, 60),
    "generation": (generation_step, 95),
    "compress": (compress_step, 85),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.json and rows.csv")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes without a GPU")
    parser.add_argument("--only", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--seconds", type=float, help="of each step, in place of its own budget")
    options = parser.parse_args()
    if not INTERPRET and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --interpret shows that this script works")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    report = Report(options.out)
    for name, (step, budget) in STEPS.items():
        if name in options.only or name == "environment":
            begin = time.perf_counter()
            print(f"{name}:", flush=True)
            # what went over time is a row already
            with suppress(OverTime), guarded(report, name, "the whole step"), at_most(options.seconds or budget):
                step(report)
            report.add(name, "done", seconds=time.perf_counter() - begin)
            report.write()
            if not INTERPRET:
                torch.cuda.empty_cache()
    print(
        f"\n{'step':12} {'what':44} {'shape':>13} {'tokens':>6} {'us':>9} {'rival us':>9} {'ratio':>6} {'GB/s':>7} ok"
    )
    for row in report.rows:
        cells = [row.get(k, "") for k in ("microseconds", "rival_microseconds", "ratio", "gigabytes_per_second")]
        numbers = [f"{cell:.2f}" if isinstance(cell, float) else "" for cell in cells]
        verdict = "yes" if row["ok"] else f"NO: {row.get('note', '')[:120]}"
        what = f"{row['step']:12} {row['what'][:44]:44} {row.get('shape', ''):>13} {row.get('tokens', ''):>6}"
        print(f"{what} {numbers[0]:>9} {numbers[1]:>9} {numbers[2]:>6} {numbers[3]:>7} {verdict}")


if __name__ == "__main__":
    main()
