"""What verification costs when a compressed folder is loaded: `from_pretrained` with the checksums and without them.

A folder of random weights, about a gigabyte: a Llama whose linear layers are all in one format, embeddings in bfloat16.
One matrix of each shape is encoded and written for every layer, so the folder is quickly made. Loads with and without
verification take turns, in one process after both have been run once; `--cold` has the kernel drop the folder's pages
before each.

    python bench/loading.py --format spqr           # prints a table; --folder keeps what is made
"""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import products
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import halfbit
from halfbit import registry
from halfbit.grids.bilevel import Bilevel
from halfbit.layout import Entry, stored_name
from halfbit.linears import WEIGHT
from halfbit.solve.rtn import rtn
from halfbit.types import Packed
from halfbit.writer import FORMAT_VERSION, Writer

WIDTH, INNER, VOCABULARY = 4096, 11008, 32000
CODECS: dict[str, dict[str, Any]] = {
    "qmoe": {}, "runlength": {"scale_bits": 0}, "spqr": {}, "grouped": {"bits": 4, "group": 64},
}  # fmt: skip


def encoded(name: str, rows: int, columns: int) -> Packed:
    """A random matrix."""
    codec = registry.module("formats", name).CODEC(**CODECS[name])
    if name == "spqr":
        return codec.encode(products.bilevel(Bilevel(fitting="min-max"), rows, columns, 0.01))
    if name == "grouped":
        random = torch.Generator().manual_seed(0)
        return codec.encode(rtn(torch.randn(1, rows, columns, generator=random), None, codec.grid, names=["x"])[0])
    return codec.encode(products.ternary(rows, columns))


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


def seconds(folder: Path, dtype: torch.dtype, verify: bool, cold: bool) -> float:
    """Of one load."""
    if cold:
        drop(folder)
    start = time.perf_counter()
    with nullcontext() if verify else halfbit.unverified():
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=CODECS, default="spqr")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where the folder is, or is made and kept")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / "folder"
        if not (folder / "config.json").is_file():
            print(f"{make(folder, given.format, int(given.gigabytes * 1e9)) / 1e9:.3f} GB of weights")
        dtype = getattr(torch, given.dtype)
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(given.loads + 1):
            for verify, found in times.items():
                found.append(seconds(folder, dtype, verify, given.cold))
        plain, checked = (statistics.median(found[1:]) for found in times.values())
        how = f"{given.format}, {given.dtype}, {'cold' if given.cold else 'warm'}, {torch.get_num_threads()} threads"
        print(f"{how}: {plain:.3f} s without, {checked:.3f} s with verification, {checked / plain - 1:+.1%}")
        print(", ".join(f"{without:.3f} {with_:.3f}" for without, with_ in zip(*times.values(), strict=True)))


if __name__ == "__main__":
    main()
