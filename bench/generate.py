"""A checkpoint of any size with weights like trained ones: Qwen3-MoE or Llama, sharded, bfloat16, in little memory.

For runs that ask what the size of a model costs, not what it says. Weights have heavy tails, rows of unequal size and
a few columns that are larger than the rest; outputs of layers keep the size that they have in a trained model, so that
activations stay finite and the router sends tokens everywhere. There is one shard in memory at a time.

    python bench/generate.py OUT --gigabytes 6 --experts 64 [--tokenizer FOLDER]
    python bench/generate.py OUT --experts 0 --width 4096 --expert-width 11008 --head-size 128    # Llama
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

# of the normal numbers n that weights are made of, n + TAIL n^3: a kurtosis of about 10
TAIL = 0.1
# spread of the logarithm of a row's size; share and size of the columns that are larger
ROWS, LARGE_COLUMNS, LARGER = 0.3, 0.005, 4.0
BYTES = 2

Config = Qwen3MoeConfig | LlamaConfig


def shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names as published checkpoints have them, one matrix per expert, in the order of the layers."""
    width, of_queries = config.hidden_size, config.num_attention_heads
    heads, of_keys = config.head_dim or width // of_queries, config.num_key_value_heads or of_queries
    mixture = isinstance(config, Qwen3MoeConfig)
    yield "model.embed_tokens.weight", (config.vocab_size, width)
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (width,)
        for projection, count in (("q", of_queries), ("k", of_keys)):
            yield f"{layer}.self_attn.{projection}_proj.weight", (count * heads, width)
            if mixture:
                yield f"{layer}.self_attn.{projection}_norm.weight", (heads,)
        yield f"{layer}.self_attn.v_proj.weight", (of_keys * heads, width)
        yield f"{layer}.self_attn.o_proj.weight", (width, of_queries * heads)
        if mixture:
            yield f"{layer}.mlp.gate.weight", (config.num_experts, width)
        neurons = config.moe_intermediate_size if mixture else config.intermediate_size
        for part in [f"mlp.experts.{expert}" for expert in range(config.num_experts)] if mixture else ["mlp"]:
            for projection in ("gate_proj", "up_proj"):
                yield f"{layer}.{part}.{projection}.weight", (neurons, width)
            yield f"{layer}.{part}.down_proj.weight", (width, neurons)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (config.vocab_size, width)


def tensor(name: str, shape: tuple[int, ...], layers: int, generator: torch.Generator) -> torch.Tensor:
    """One weight, bfloat16."""
    x = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return (1 + 0.1 * x).abs().bfloat16()
    x += TAIL * x**3
    x *= torch.randn((shape[0], 1), generator=generator).mul(ROWS).exp()
    if name == "model.embed_tokens.weight":
        return x.bfloat16()
    large = torch.rand(shape[1], generator=generator) < LARGE_COLUMNS
    x *= 1 + (LARGER - 1) * large
    # E[(n + t n^3)^2] = 1 + 6 t + 15 t^2; the two projections of a layer that add to the stream share it
    size = math.sqrt(1 + 6 * TAIL + 15 * TAIL**2) * math.exp(ROWS**2) * math.sqrt(shape[1])
    size *= math.sqrt(2 * layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
    return (x / size).bfloat16()


def write(folder: Path, config: Config, shard: int, seed: int) -> int:
    """config.json, shards of at most `shard` bytes (one tensor at least) and their index; returns bytes of weights."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for name, shape in shapes(config):
        size = BYTES * math.prod(shape)
        if shards[-1] and filled + size > shard:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled, total = filled + size, total + size
    places = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        tensors = {name: tensor(name, shape, config.num_hidden_layers, generator) for name, shape in members}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        print(f"{file}: {len(tensors)} tensors", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return total


def add_tokenizer(folder: Path, source: Path | None) -> None:
    """The tokenizer of another model, or one whose tokens are the bytes."""
    if source is not None:
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (source / file).is_file():
                shutil.copy(source / file, folder / file)
        return
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="10^9 bytes; to the nearest number of layers")
    parser.add_argument("--experts", type=int, default=64, help="0: a dense Llama")
    parser.add_argument("--per-token", type=int, default=4, help="experts that a token takes")
    parser.add_argument("--width", type=int, default=1024, help="of the activations; a multiple of --head-size")
    parser.add_argument("--heads", type=int, help="of the queries [width / head size]")
    parser.add_argument("--kv-heads", type=int, help="of the keys and values [a quarter of --heads]")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--expert-width", type=int, default=512, help="neurons of an expert, or of a dense layer")
    parser.add_argument("--vocabulary", type=int, default=4096, help="at least as many tokens as the tokenizer has")
    parser.add_argument("--length", type=int, default=2048, help="most tokens of a text")
    parser.add_argument("--shard", type=float, default=0.5, help="most gigabytes in a file")
    parser.add_argument("--tokenizer", type=Path, help="folder to copy it from [one token per byte]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists; give a new folder")
    if options.width % options.head_size:
        parser.error(f"--width {options.width}: give a multiple of {options.head_size}, the size of a head")
    heads = options.heads or options.width // options.head_size
    sizes = {
        "vocab_size": options.vocabulary,
        "hidden_size": options.width,
        "intermediate_size": options.expert_width,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": options.kv_heads or max(1, heads // 4),
        "head_dim": options.head_size,
        "max_position_embeddings": options.length,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    config: Config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    if options.experts:
        config = Qwen3MoeConfig(
            **sizes,
            moe_intermediate_size=options.expert_width,
            num_experts=options.experts,
            num_experts_per_tok=min(options.per_token, options.experts),
            norm_topk_prob=True,
            architectures=["Qwen3MoeForCausalLM"],
        )
    one = sum(BYTES * math.prod(shape) for _, shape in shapes(config))
    outside = BYTES * (2 * options.vocabulary + 1) * options.width
    config.num_hidden_layers = max(1, round((options.gigabytes * 1e9 - outside) / (one - outside)))
    total = write(options.folder, config, int(options.shard * 1e9), options.seed)
    add_tokenizer(options.folder, options.tokenizer)
    print(f"{options.folder}: {config.num_hidden_layers} layers, {total:,} bytes, {total // BYTES:,} weights")


if __name__ == "__main__":
    main()
