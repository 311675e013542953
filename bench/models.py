"""Whole models: time and peak memory of compressing, bits from file bytes, and what the compressed model still says.

Each recipe runs in a process of its own, so that its peak memory is its own. The peak holds Python, torch and
transformers too; `--recipe rtn-ternary` without a Hessian shows what that alone is.

    python bench/models.py MODEL --calibration TEXT --test TEXT [--recipe qmoe] [--corruption fixed]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
import torch


def run(*arguments: object) -> tuple[dict, float, int]:
    """One command: its JSON, its seconds, its peak resident memory in MiB."""
    watched = (
        "import resource, subprocess, sys; "
        "done = subprocess.run([sys.executable, '-m', 'halfbit.cli', *sys.argv[1:]], stdout=subprocess.PIPE); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); "
        "sys.stdout.flush(); sys.stdout.buffer.write(done.stdout); sys.exit(done.returncode)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", watched, *map(str, arguments)], stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - begin
    peak, _, told = done.stdout.decode().partition("\n")
    return json.loads(told), seconds, int(peak) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=40_960)
    parser.add_argument("--corruption", default="t5")
    parser.add_argument("--dry-run", action="store_true", help="print, do not append to results.csv")
    options = parser.parse_args()
    shared = ["--sequence-length", options.sequence_length, "--corruption", options.corruption]
    rows = []
    for recipe in options.recipe or ["qmoe", "qmoe-2bit", "rtn-ternary"]:
        with tempfile.TemporaryDirectory() as root:
            out = Path(root) / "out"
            given = [options.model, out, "--recipe", recipe, "--calibration", options.calibration]
            report, seconds, peak = run("compress", *given, "--samples", options.samples, *shared, "--json")
            given = [out, "--text", options.test, "--against", options.model, "--max-tokens", options.max_tokens]
            figures, _, _ = run("eval", *given, *shared, "--json")
        change = 100 * (figures["perplexity"] / figures["original_perplexity"] - 1)
        note = (
            f"{report['bits_per_packed_weight']:.4f} bits per packed weight, whole model "
            f"{report['bits_per_weight']:.4f}, perplexity {figures['perplexity']:.3f} (original "
            f"{figures['original_perplexity']:.3f}, {change:+.2f} %), loss {figures['loss']:.4f} "
            f"({figures['original_loss']:.4f}), KL {figures['kl_divergence']:.5f}, top-1 agreement "
            f"{figures['top1_agreement']:.4f}, peak memory {peak} MiB, "
            f"{options.samples} x {options.sequence_length} tokens"
        )
        print(f"{options.model.name:>16} {recipe:>18} {seconds:7.1f} s  {note}", flush=True)
        rows.append(
            {
                "shape": options.model.name,
                "tokens": options.samples * options.sequence_length,
                "threads": torch.get_num_threads(),
                "what": f"compress {recipe}",
                "seconds": f"{seconds:.1f}",
                "note": note,
            }
        )
    if not options.dry_run:
        record.append("models", rows)


if __name__ == "__main__":
    main()
