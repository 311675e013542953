"""Models: compressed on the device and on the CPU, and writing."""

import json
import tempfile
from pathlib import Path
from typing import Any

from gpu import INTERPRET, ROOT
from gpu.measuring import Report, command, guarded


def compress_step(report: Report) -> None:
    """Issues 2 to 5: the same model compressed on the CPU and on the device; the solver at Switch c2048's sizes."""
    model, text = ROOT / "examples" / "tiny-moe", ROOT / "examples" / "tiny-moe" / "calibration.txt"
    device = "cpu" if INTERPRET else "cuda"
    with tempfile.TemporaryDirectory() as root:
        for recipe in ("rtn-ternary",) if INTERPRET else ("qmoe", "spqr-3bit", "halfbit"):
            with guarded(report, "compress", recipe):
                for where in dict.fromkeys(("cpu", device)):
                    given = ["compress", str(model), f"{root}/{recipe}-{where}", "--recipe", recipe, "--device", where]
                    given += ["--calibration", str(text), "--samples", "4" if INTERPRET else "64", "--json"]
                    command(report, "compress", f"{recipe} on {where}", ["-m", "halfbit.cli", *given], 70)
                report.add("compress", f"{recipe}: {device} against cpu", note=_same(Path(root), recipe, device))
    if not INTERPRET:
        with guarded(report, "compress", "bench/trillion.py"):
            given = ["bench/trillion.py", "--device", "cuda", "--experts", "16", "--tokens", "4096", "--dry-run"]
            command(report, "compress", "bench/trillion.py on cuda", given, 120)


def _same(root: Path, recipe: str, device: str) -> str:
    """How near the device's result is to the CPU's: equal bytes of packed tensors, and losses."""
    losses = []
    for where in ("cpu", device):
        manifest = json.loads((root / f"{recipe}-{where}" / "manifest.json").read_text("utf-8"))
        losses.append({name: row["loss"] for name, row in manifest["matrices"].items()})
    ratio = [b / a for a, b in zip(losses[0].values(), losses[1].values(), strict=True) if a]
    return f"{len(ratio)} matrices, losses {min(ratio):.5f} to {max(ratio):.5f} of the CPU's"


GENERATE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
import halfbit
folder, device, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device).eval()
ids = torch.randint(5, 200, (1, 32), device=device)
def run(n, **more):
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, **more)
    if device != 'cpu': torch.cuda.synchronize()
    return time.perf_counter() - begin
told = {}
for name, more in (('eager', {}), ('static cache, compiled', {'cache_implementation': 'static'})):
    try:
        run(tokens, **more)
        told[name] = tokens / min(run(tokens, **more) for _ in range(2))
    except (RuntimeError, ValueError, TypeError) as error:  # torch.compile, CUDA, a cache that a model cannot have
        told[name] = f'{type(error).__name__}: {str(error)[:200]}'
if device != 'cpu': told['GiB'] = torch.cuda.max_memory_allocated() / 2**30
print(json.dumps(told))
"""


def generation_step(report: Report) -> None:
    """Tokens each second at batch 1: a random Qwen3-MoE of 128 experts, and what rounding to nearest makes of it."""
    size = ["--gigabytes", "0.01", "--experts", "4", "--width", "64", "--expert-width", "64"] if INTERPRET else [
        "--gigabytes", "2.5", "--experts", "128", "--per-token", "8", "--width", "1024", "--expert-width", "512",
    ]  # fmt: skip
    device, tokens = ("cpu", 4) if INTERPRET else ("cuda", 64)
    with tempfile.TemporaryDirectory() as root:
        command(report, "generation", "bench/generate.py", ["bench/generate.py", f"{root}/original", *size], 60)
        folders = {"original": f"{root}/original"}
        for recipe in ("rtn-ternary",) if INTERPRET else ("rtn-ternary", "rtn-3-g128"):
            with guarded(report, "generation", recipe):
                given = ["compress", f"{root}/original", f"{root}/{recipe}", "--recipe", recipe, "--device", device]
                given += ["--calibration", str(ROOT / "examples" / "tiny-moe" / "calibration.txt")]
                given += ["--samples", "2", "--sequence-length", "128", "--json"]
                command(report, "generation", f"compress by {recipe}", ["-m", "halfbit.cli", *given], 90)
                folders[recipe] = f"{root}/{recipe}"
        original: dict[str, Any] = {}
        for name, folder in folders.items():
            with guarded(report, "generation", name):
                told = json.loads(
                    command(report, "generation", name, ["-c", GENERATE, folder, device, str(tokens)], 80)
                )
                original = original or told
                for kind, rate in told.items():
                    if isinstance(rate, float) and kind != "GiB" and isinstance(original.get(kind), float):
                        report.add(
                            "generation", f"{name}, {kind}", ratio=rate / original[kind], note=f"{rate:.1f} tokens/s"
                        )
