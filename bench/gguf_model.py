"""A model of bench/generate.py for llama.cpp: random weights in its types, as a GGUF file, and tokens written with it.

Embeddings, norms and routers are the original's; of every other matrix some rows are quantized, and repeated. Needs the
packages gguf and llama-cpp-python.
"""
# pyright: reportMissingImports=false

import ctypes
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from halfbit.bench import llama
from halfbit.bench.matrices import Statistics
from halfbit.machine import resident

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
OF_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")
KEPT = ("model.embed_tokens", "mlp.gate")
LONGEST = 1024


def write(original: Path, file: Path, of_experts: str, of_linears: str, weights: Statistics) -> None:
    """`original` as a GGUF file: experts and other linear layers in llama.cpp's types, of a dense model all alike."""
    config = AutoConfig.from_pretrained(original)
    mixture = hasattr(config, "num_experts")
    types = (of_experts, of_linears if mixture else of_experts)
    writer = gguf.GGUFWriter(file, "qwen3moe" if mixture else "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    if mixture:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for shard in sorted(original.glob("*.safetensors")):
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                _add(writer, name, opened, types, config, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(
    writer: Any, name: str, opened: Any, types: tuple[str, str], config: PretrainedConfig, weights: Statistics
) -> None:
    found = IN_LAYER.fullmatch(name)
    layer, path = (f"blk.{found[1]}.", found[2]) if found else ("", name.removesuffix(".weight"))
    shape = opened.get_slice(name).get_shape()
    if expert := OF_EXPERT.fullmatch(path):
        if expert[1] == "0":
            one = llama.quantized(types[0], shape[0], shape[1], weights).numpy()
            every = np.broadcast_to(one, (config.num_experts, *one.shape))
            kind = getattr(gguf.GGMLQuantizationType, types[0])
            writer.add_tensor(f"{layer}ffn_{expert[2]}_exps.weight", np.ascontiguousarray(every), raw_dtype=kind)
    elif len(shape) == 1 or path in KEPT:
        writer.add_tensor(f"{layer}{NAMES[path]}.weight", opened.get_tensor(name).float().numpy())
    else:
        kind = getattr(gguf.GGMLQuantizationType, types[1])
        rows = llama.quantized(types[1], shape[0], shape[1], weights).numpy()
        writer.add_tensor(f"{layer}{NAMES[path]}.weight", rows, raw_dtype=kind)


class Opened:
    """A model in llama.cpp, with its own attention and cache, on so many threads."""

    def __init__(self, file: str, threads: int):
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {file}")
        how = llama_cpp.llama_context_default_params()
        how.n_ctx = how.n_batch = LONGEST
        how.n_threads = how.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, how)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def written(self, prompt: int, tokens: int) -> dict[str, Any]:
        """As `generation.written`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        given = torch.randint(2, self._vocabulary, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
        at = [time.perf_counter()]
        for _ in range(tokens):
            ids = (llama_cpp.llama_token * len(given))(*given)
            if status := llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(ids, len(given))):
                raise SystemExit(f"llama_decode gives {status}")
            logits = llama_cpp.llama_get_logits_ith(self._context, -1)
            values = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocabulary,))
            given = [int(np.argmax(values))]
            at.append(time.perf_counter())
        first, *rest = [b - a for a, b in pairwise(at)]
        return {"prompt": first, "each": rest, "resident": resident()}
