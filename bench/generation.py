"""Tokens per second of a model in transformers, in bfloat16 and from compressed weights, and the memory of both.

The folder MODEL, as bench/generate.py writes it, is the original. Compressed folders hold its embeddings, norms and
routers, and in place of every other matrix a random one of the format: one of each shape is encoded, and written for
every layer and expert. How long a token takes depends on bytes and on the share of zeros, not on what the weights are.

Each model runs in a process of its own; they take turns, with the same prompt of random tokens and the same number of
threads: the prompt at once, then one token after another. Seconds of the prompt and of one token are medians over all
turns; memory is what the process has resident (weights are mapped: those that were read count).

    python bench/generate.py big --gigabytes 2.6 --experts 128 --per-token 8 --width 2048 --expert-width 768 \
        --heads 32 --kv-heads 4 --head-size 128 --vocabulary 8192            # two layers of Qwen3-30B-A3B
    python bench/generation.py big --formats runlength-rotated,qmoe,spqr-3bit     # appends to bench/results.csv
    python bench/generation.py big --formats qmoe --profile 20                # where the time of 20 tokens goes
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import record
import torch
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

import halfbit
from halfbit import formats
from halfbit.bench import matrices
from halfbit.experts import find_experts
from halfbit.layout import Entry, stored_name
from halfbit.linears import WEIGHT
from halfbit.machine import resident
from halfbit.nn import stored_names
from halfbit.types import Packed
from halfbit.writer import FORMAT_VERSION, Writer

# llama.cpp's type for linear layers beside experts
LLAMA_LINEARS = "Q4_K"


class Encoded:
    """Random matrices by format and shape, each encoded once."""

    def __init__(self, statistics: matrices.Statistics):
        self._statistics = statistics
        self._found: dict[tuple[str, int, int, int], Packed] = {}

    def get(self, name: str, experts: int, rows: int, columns: int) -> Packed:
        key = (name, experts, rows, columns)
        if key not in self._found:
            one = matrices.packed(matrices.codec_of(name), rows, columns, self._statistics)
            self._found[key] = formats.stack([one] * experts) if experts > 1 else one
        return self._found[key]


def compressed(original: Path, folder: Path, of_experts: str, of_linears: str, weights: matrices.Statistics) -> int:
    """Write the folder; the bytes of its weights. Of a dense model `of_experts` is the format of all linear layers."""
    config = AutoConfig.from_pretrained(original)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stacks, encoded = find_experts(model), Encoded(weights)
    of_linears = of_linears if stacks else of_experts
    writer = Writer(folder, "bench", {"recipe": "bench"})
    total = 0

    def put(path: str, projection: str, packed: Packed, experts: int) -> dict[str, Any]:
        nonlocal total
        total += packed.nbytes
        for part, tensor in packed.tensors.items():
            writer.put(stored_name(path, projection, part), tensor.clone())
        return Entry.of(packed, experts).to_config()

    for number, (path, module) in enumerate(model.named_modules()):
        if (stack := stacks.get(path)) is not None:
            up, down = stored_names(stack)
            rows = sum(stack.projections[p][0] for p in stack.up)
            shapes = {up: (rows, stack.projections[stack.up[0]][1]), down: stack.projections[stack.down]}
            n = stack.num_experts
            entries = {p: put(path, p, encoded.get(of_experts, n, *shape), n) for p, shape in shapes.items()}
        elif isinstance(module, torch.nn.Linear) and not any(path.startswith(f"{other}.") for other in stacks):
            entries = {WEIGHT: put(path, WEIGHT, encoded.get(of_linears, 1, *module.weight.shape), 1)}
        else:
            continue
        writer.record("packed", path, entries)
        writer.commit(path, f"model-block-{number:05d}.safetensors")
    packed = set(writer.manifest["packed"])
    for shard in sorted(original.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not any(name.startswith(f"{path}.") for path in packed):
                    writer.put(name, file.get_tensor(name))
                    total += file.get_tensor(name).nbytes
    writer.commit("outer", "model-outer-00000.safetensors")
    settings = {"quant_method": "halfbit", "format": FORMAT_VERSION, "modules": writer.manifest["packed"]}
    settings["manifest"] = True
    given = json.loads((original / "config.json").read_text("utf-8"))
    writer.finish(given | {"quantization_config": settings}, [])
    return total


class Clock:
    """A streamer of transformers that looks at the clock: once when the prompt is handed over, then at every token."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def written(model: Any, prompt: int, tokens: int) -> dict[str, Any]:
    """Seconds of the prompt and of each token after the first."""
    ids = torch.randint(2, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    clock, how = Clock(), {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **how)
    first, *rest = [b - a for a, b in pairwise(clock.at)]
    return {"prompt": first, "each": rest, "resident": resident()}


def opened(folder: str) -> Any:
    """A compressed folder as `halfbit generate` opens it, any other in bfloat16."""
    if "quantization_config" in json.loads((Path(folder) / "config.json").read_text("utf-8")):
        return halfbit.load(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def work(folder: str) -> None:
    """A process with one model: for each line (prompt, tokens) of the standard input one of figures."""
    if folder.endswith(".gguf"):
        from gguf_model import Opened

        write = Opened(folder, torch.get_num_threads()).written
    else:
        write = partial(written, opened(folder))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(write(*json.loads(line))), flush=True)


class Runner:
    """A process that runs `work`."""

    def __init__(self, folder: Path, threads: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, str(folder), "--work"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"the process with the model ended, {self._process.wait()}")
        return line

    def ask(self, prompt: int, tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps([prompt, tokens]), file=self._process.stdin, flush=True)
        return json.loads(self._answer())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(folders: dict[str, Path], sizes: dict[str, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of results.csv."""
    runners = {what: Runner(folder, options.threads) for what, folder in folders.items()}
    found: dict[str, list[dict[str, Any]]] = {what: [] for what in folders}
    for what, runner in runners.items():
        runner.ask(options.prompt, 4)  # weights are read for the first time
        found[what].clear()
    for _ in range(options.turns):
        for what, runner in runners.items():
            found[what].append(runner.ask(options.prompt, options.tokens))
    rows, original = [], 0.0
    print(f"{'model':>24} {'GB':>6} {'tokens/s':>9} {'ratio':>6} {'prompt s':>9} {'ratio':>6} {'resident GB':>12}")
    first = 0.0
    for what, told in found.items():
        each = [seconds for turn in told for seconds in turn["each"]]
        median, prompt = statistics.median(each), statistics.median(turn["prompt"] for turn in told)
        original, first = original or median, first or prompt
        memory = told[-1]["resident"]
        low, *_, high = statistics.quantiles(each, n=10)
        print(
            f"{what:>24} {sizes[what] / 1e9:6.2f} {1 / median:9.2f} {original / median:6.2f} {prompt:9.3f} "
            f"{first / prompt:6.2f} {memory / 1e9:12.2f}",
            flush=True,
        )
        note = (
            f"one token; {1 / median:.2f} tokens/s, median of {len(each)}, 10-90 % {1e3 * low:.1f}-{1e3 * high:.1f} "
            f"ms; prompt of {options.prompt} {prompt:.3f} s, {prompt / first:.3f} of the original's; "
            f"{sizes[what] / 1e9:.2f} GB of weights, {memory / 1e9:.2f} GB resident; "
            f"load average {os.getloadavg()[0]:.1f}"
        )
        row = {"shape": Path(options.model).name, "tokens": 1, "threads": options.threads, "what": what}
        rows.append(row | {"seconds": f"{median:.6f}", "ratio_to_bf16": f"{median / original:.3f}", "note": note})
    for runner in runners.values():
        runner.end()
    return rows


def show_profile(folder: Path, prompt: int, tokens: int) -> None:
    """The operators that take longest, of a prompt and so many tokens."""
    model = opened(str(folder))
    written(model, prompt, 4)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        told = written(model, prompt, tokens)
    print(f"{folder}: one token {1e3 * statistics.median(told['each']):.2f} ms while profiled")
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="folder of the original")
    parser.add_argument("--formats", default="runlength-rotated,qmoe,spqr-3bit", help="of the experts, with commas")
    parser.add_argument("--linears", default="spqr-4bit", help="format of all other linear layers")
    parser.add_argument("--llama", help="types of llama.cpp in their places, with commas; needs gguf, llama-cpp-python")
    parser.add_argument("--zeros", type=float, default=0.885, help="share of zeros in ternary weights")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--tokens", type=int, default=16, help="that are written in one turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for compressed models, which are kept there [removed]")
    parser.add_argument("--profile", type=int, metavar="TOKENS", help="profile the last format, and compare nothing")
    parser.add_argument("--dry-run", action="store_true", help="print, do not append to results.csv")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.model)
    original = Path(options.model)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"bf16": original}
        sizes = {"bf16": sum(shard.stat().st_size for shard in original.glob("*.safetensors"))}
        for name in options.formats.split(","):
            folders[name] = (options.folder or Path(temporary)) / name
            if not (folders[name] / "config.json").is_file():
                weights = matrices.Statistics(options.zeros)
                compressed(original, folders[name], name, options.linears, weights)
            sizes[name] = sum(shard.stat().st_size for shard in folders[name].glob("*.safetensors"))
        for name in options.llama.split(",") if options.llama else ():
            import gguf_model

            file = (options.folder or Path(temporary)) / f"{name}.gguf"
            if not file.is_file():
                gguf_model.write(original, file, name, LLAMA_LINEARS, matrices.Statistics(options.zeros))
            folders[f"llama.cpp {name}"], sizes[f"llama.cpp {name}"] = file, file.stat().st_size
        if options.profile:
            return show_profile(list(folders.values())[-1], options.prompt, options.profile)
        rows = compare(folders, sizes, options)
        if not options.dry_run:
            record.append("generation", rows)


if __name__ == "__main__":
    main()
