"""What verification costs when a compressed folder is loaded: `from_pretrained` with the checksums and without them.

Weights are mapped: some formats' are read by the first token alone, which `--token` counts in. Seconds on the clock,
and of the processor, which other programs disturb less.

A folder of random weights, about a gigabyte: a Llama whose linear layers are all in one format, embeddings in bfloat16.
One matrix of each shape is encoded and written for every layer, so the folder is quickly made. Loads with and without
verification take turns, in one process after both have been run once; `--cold` has the kernel drop the folder's pages
before each.

    python bench/loading.py --format spqr           # appends to bench/results.csv; --folder keeps what is made
"""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import record
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import halfbit
from halfbit.bench import matrices
from halfbit.bench.matrices import Statistics
from halfbit.layout import Entry, stored_name
from halfbit.linears import WEIGHT
from halfbit.types import Packed
from halfbit.writer import FORMAT_VERSION, Writer

WIDTH, INNER, VOCABULARY = 4096, 11008, 32000
FORMATS = {"qmoe": "qmoe", "runlength": "runlength", "spqr": "spqr-3bit", "grouped": "grouped-4-g64"}


def encoded(name: str, rows: int, columns: int) -> Packed:
    """A random matrix."""
    return matrices.packed(matrices.codec_of(FORMATS[name]), rows, columns, Statistics())


def make(folder: Path, name: str, nbytes: int) -> int:
    """Write the folder; the bytes of its weights."""
    sizes: Any = {"hidden_size": WIDTH, "intermediate_size": INNER, "vocab_size": VOCABULARY}
    heads: Any = {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=1, tie_word_embeddings=True, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linears = {p: tuple(m.weight.shape) for p, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del linears["lm_head"]
    packed = {shape: encoded(name, *shape) for shape in sorted(set(linears.values()))}
    outer = 2 * VOCABULARY * WIDTH
    layers = max(1, (nbytes - outer) // sum(packed[shape].nbytes for shape in linears.values()))
    writer = Writer(folder, "bench", {"recipe": "bench"})
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for path, shape in linears.items():
            own = path.replace("model.layers.0", prefix)
            for part, tensor in packed[shape].tensors.items():
                writer.put(stored_name(own, WEIGHT, part), tensor.clone())
            writer.record("packed", own, {WEIGHT: Entry.of(packed[shape], 1).to_config()})
        for norm in ("input_layernorm", "post_attention_layernorm"):
            writer.put(f"{prefix}.{norm}.weight", torch.ones(WIDTH, dtype=torch.bfloat16))
        writer.commit(prefix, f"model-block-{layer:05d}.safetensors")
    writer.put("model.norm.weight", torch.ones(WIDTH, dtype=torch.bfloat16))
    writer.put("model.embed_tokens.weight", torch.randn(VOCABULARY, WIDTH).to(torch.bfloat16))
    writer.commit("outer", "model-outer-00000.safetensors")
    config.num_hidden_layers = layers
    settings = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    modules = {"quant_method": "halfbit", "format": FORMAT_VERSION, "modules": writer.manifest["packed"]}
    modules["manifest"] = True
    writer.finish(settings | {"quantization_config": modules}, [])
    return outer + layers * sum(packed[shape].nbytes for shape in linears.values())


def drop(folder: Path) -> None:
    """Let the kernel forget the files' pages."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def seconds(folder: Path, dtype: torch.dtype, *, verify: bool, cold: bool, token: bool) -> tuple[float, float]:
    """Of one load, on the clock and of the processor."""
    if cold:
        drop(folder)
    start = time.perf_counter(), time.process_time()
    with nullcontext() if verify else halfbit.unverified():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if token:
        with torch.no_grad():
            model(torch.tensor([[1]]))
    return time.perf_counter() - start[0], time.process_time() - start[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="spqr")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where the folder is, or is made and kept")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--token", action="store_true", help="until the model has computed a token")
    parser.add_argument("--dry-run", action="store_true", help="print, do not append to results.csv")
    given = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / "folder"
        if not (folder / "config.json").is_file():
            make(folder, given.format, int(given.gigabytes * 1e9))
        held = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
        dtype = getattr(torch, given.dtype)
        times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(given.loads + 1):
            for verify, found in times.items():
                found.append(seconds(folder, dtype, verify=verify, cold=given.cold, token=given.token))
    about = f"{given.format}, {given.dtype}, {'cold' if given.cold else 'warm'}, {held:.2f} GB"
    medians = {
        verify: [statistics.median(row) for row in zip(*found[1:], strict=True)] for verify, found in times.items()
    }
    (plain, plain_cpu), (checked, checked_cpu) = medians.values()
    note = (
        f"{plain:.3f} s without, {checked / plain - 1:+.1%}; of the processor {checked_cpu:.3f} and {plain_cpu:.3f} s, "
        f"{checked_cpu / plain_cpu - 1:+.1%}; medians of {given.loads}"
    )
    what = "load and first token, verified" if given.token else "load, verified"
    print(f"{about}: {what} {checked:.3f} s; {note}")
    for without, verified in zip(*times.values(), strict=True):
        print("    without {:.3f} ({:.3f}), verified {:.3f} ({:.3f})".format(*without, *verified))
    row: dict[str, object] = {
        "shape": about,
        "threads": torch.get_num_threads(),
        "what": what,
        "seconds": f"{checked:.3f}",
    }
    if not given.dry_run:
        record.append("loading", [row | {"note": note}])


if __name__ == "__main__":
    main()
