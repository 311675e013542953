"""Tiny random models of every family, saved as checkpoints: odd sizes, random routers, biases and norms.

`save` writes one of the configs below the way transformers does, which for many mixtures of experts is one tensor
per expert; `save_as_built` writes the weights under their own names instead (3-D experts), `save_mxfp4` and `save_fp8`
in the quantized layouts of gpt-oss and DeepSeek-V3. Every weight and saved buffer is random, so that none is left out
unseen.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CodeGenConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPTJConfig,
    GPTNeoConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)

VOCABULARY = 61

# head_dim must be even for rotary embeddings; everything else is odd where the model lets it be
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# a first and a last block; the others, of three, have one in the middle too
TWO = {**COMMON, "num_hidden_layers": 2}


def make(kind: Any, **fields: Any) -> PreTrainedConfig:
    """A config; the classes of transformers take more fields than they declare."""
    return kind(**fields)


CONFIGS: dict[str, PreTrainedConfig] = {
    "mixtral": make(MixtralConfig, **COMMON, intermediate_size=19, num_local_experts=5, num_experts_per_tok=2),
    "mixtral-sliding": make(MixtralConfig,
        **TWO, intermediate_size=19, num_local_experts=5, num_experts_per_tok=2, sliding_window=7
    ),
    "qwen2-moe": make(Qwen2MoeConfig,
        **COMMON, intermediate_size=23, moe_intermediate_size=17, shared_expert_intermediate_size=29, num_experts=7,
        num_experts_per_tok=3, decoder_sparse_step=2,
    ),
    # more than ten experts: "10" must come after "9"
    "qwen3-moe": make(Qwen3MoeConfig,
        **COMMON, intermediate_size=23, moe_intermediate_size=17, num_experts=13, num_experts_per_tok=3, head_dim=10,
    ),
    "qwen3-moe-tied": make(Qwen3MoeConfig,
        **TWO, intermediate_size=23, moe_intermediate_size=17, num_experts=7, num_experts_per_tok=3, head_dim=10,
        tie_word_embeddings=True, mlp_only_layers=[1],
    ),
    "olmoe": make(OlmoeConfig, **TWO, intermediate_size=17, num_experts=7, num_experts_per_tok=3),
    "deepseek-v2": make(DeepseekV2Config,
        **{**TWO, "num_key_value_heads": 6}, intermediate_size=23, moe_intermediate_size=17, n_routed_experts=6,
        n_shared_experts=2, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=14, q_lora_rank=21,
        qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5, n_group=3, topk_group=2,
        topk_method="group_limited_greedy",
    ),
    "deepseek-v3": make(DeepseekV3Config,
        **{**TWO, "num_key_value_heads": 6}, intermediate_size=23, moe_intermediate_size=17, n_routed_experts=6,
        n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=15, q_lora_rank=21,
        qk_rope_head_dim=4, qk_nope_head_dim=7, v_head_dim=5, n_group=2, topk_group=1,
    ),
    "gpt-oss": make(GptOssConfig,
        **TWO, intermediate_size=19, head_dim=10, num_local_experts=5,
        num_experts_per_tok=2, sliding_window=7,
    ),
    "phimoe": make(PhimoeConfig,
        **TWO, intermediate_size=19, num_local_experts=5, num_experts_per_tok=2, lm_head_bias=True
    ),
    "granitemoe": make(GraniteMoeConfig,
        **TWO, intermediate_size=19, num_local_experts=5, num_experts_per_tok=2, embedding_multiplier=3.0,
        logits_scaling=2.0, residual_multiplier=0.7, attention_multiplier=0.5,
    ),
    "llama4": make(Llama4TextConfig,
        **{**COMMON, "num_hidden_layers": 4}, intermediate_size=19, intermediate_size_mlp=23, num_local_experts=5,
        num_experts_per_tok=1, head_dim=10, interleave_moe_layer_step=2, attention_chunk_size=8,
    ),
    "nemotron-h": make(NemotronHConfig,
        **{k: v for k, v in COMMON.items() if k != "num_hidden_layers"}, hybrid_override_pattern="*E*E", head_dim=10,
        intermediate_size=23, moe_intermediate_size=17, moe_shared_expert_intermediate_size=13, n_routed_experts=6,
        num_experts_per_tok=2, n_group=1, topk_group=1,
    ),
    "llama": make(LlamaConfig, **COMMON, intermediate_size=41),
    "one-block": make(LlamaConfig, **{**COMMON, "num_hidden_layers": 1}, intermediate_size=41),
    "mistral": make(MistralConfig, **TWO, intermediate_size=41, sliding_window=7),
    "qwen3": make(Qwen3Config, **TWO, intermediate_size=41, head_dim=10),
    "gemma": make(GemmaConfig, **TWO, intermediate_size=41, head_dim=10),
    "gemma3": make(Gemma3TextConfig, **COMMON, intermediate_size=41, head_dim=10, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "falcon": make(FalconConfig,
        vocab_size=VOCABULARY, hidden_size=36, num_hidden_layers=2, num_attention_heads=6, alibi=False, bias=True,
        new_decoder_architecture=True, num_kv_heads=2, bos_token_id=1, eos_token_id=2,
    ),
    "falcon-one-block": make(FalconConfig,
        vocab_size=VOCABULARY, hidden_size=36, num_hidden_layers=1, num_attention_heads=6, alibi=True,
        bos_token_id=1, eos_token_id=2,
    ),
    "opt": make(OPTConfig,
        vocab_size=VOCABULARY, hidden_size=36, num_hidden_layers=2, num_attention_heads=6, ffn_dim=41,
        max_position_embeddings=64, word_embed_proj_dim=21, do_layer_norm_before=True,
    ),
    "switch": make(SwitchTransformersConfig,
        vocab_size=VOCABULARY, d_model=36, d_kv=5, d_ff=19, num_heads=6, num_layers=4, num_decoder_layers=2,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=1, num_experts=5, expert_capacity=64,
        router_jitter_noise=0.3, decoder_start_token_id=0, tie_word_embeddings=True,
    ),
    "switch-untied": make(SwitchTransformersConfig,
        vocab_size=VOCABULARY, d_model=36, d_kv=5, d_ff=19, num_heads=6, num_layers=2, num_decoder_layers=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=2, num_experts=5, expert_capacity=4,
        decoder_start_token_id=0, tie_word_embeddings=False,
    ),
}  # fmt: skip

# models whose rule for new weights does more than that: it fills position tables and causal masks, which no checkpoint
# has, or reaches from the parent into a linear layer
FILLED: dict[str, PreTrainedConfig] = {
    "gptj": make(GPTJConfig,
        vocab_size=VOCABULARY, n_embd=36, n_layer=3, n_head=6, n_positions=64, rotary_dim=4, bos_token_id=1,
        eos_token_id=2,
    ),
    "codegen": make(CodeGenConfig,
        vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt-neo": make(GPTNeoConfig,
        vocab_size=VOCABULARY, hidden_size=36, num_layers=2, num_heads=6, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, window_size=5, bos_token_id=1, eos_token_id=2,
    ),
    "mamba": make(MambaConfig,
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    ),
}  # fmt: skip

# its norms have no weights
NOTHING_ELSE: dict[str, PreTrainedConfig] = {"olmo": make(OlmoConfig, **COMMON, intermediate_size=41)}


def save(name: str, folder: Path, max_shard_size: str = "5GB") -> Path:
    """A checkpoint as `save_pretrained` writes it."""
    config = deepcopy((CONFIGS | FILLED | NOTHING_ELSE)[name])
    builder = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = builder.from_config(config, dtype=torch.float32)
    model.load_state_dict(_random(config, torch.Generator().manual_seed(0)), strict=False)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_as_built(name: str, folder: Path) -> Path:
    """A checkpoint with the weights under their names in the model: experts stay 3-D."""
    config = deepcopy(CONFIGS[name])
    return _write(config, _random(config, torch.Generator().manual_seed(0)), folder)


def save_mxfp4(folder: Path) -> Path:
    """gpt-oss with its experts as random 4-bit floats, 32 to a scale."""
    # sizes that are multiples of 32 are the format's own condition
    config = make(GptOssConfig,
        **{**COMMON, "hidden_size": 64, "num_hidden_layers": 2}, intermediate_size=32, head_dim=10, num_local_experts=5,
        num_experts_per_tok=2, sliding_window=7, quantization_config={"quant_method": "mxfp4"},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in _random(config, generator).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = weight.shape
            groups = (experts, rows, columns // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, generator=generator)
            # exponents around 2^-4, with the extremes of a real checkpoint left out
            tensors[f"{name}_scales"] = torch.randint(121, 125, groups, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = weight.to(torch.bfloat16)
    return _write(config, tensors, folder)


def save_fp8(folder: Path) -> Path:
    """Qwen3-MoE with every linear layer in float8 and one scale per 16 x 16 weights, one tensor per expert."""
    config = make(Qwen3MoeConfig,
        **COMMON, intermediate_size=23, moe_intermediate_size=17, num_experts=5, num_experts_per_tok=2, head_dim=10,
        mlp_only_layers=[1], quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    plain = deepcopy(config)
    delattr(plain, "quantization_config")
    model = AutoModelForCausalLM.from_config(plain, dtype=torch.float32)
    model.load_state_dict(_random(plain, generator))
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() == 2 and "proj" in name:
            tensors[name] = (weight * 8).to(torch.float8_e4m3fn)
            blocks = [-(-n // 16) for n in weight.shape]
            tensors[f"{name}_scale_inv"] = torch.rand(blocks, generator=generator) / 4
        else:
            tensors[name] = weight
    return _write(config, tensors, folder)


def _random(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights and saved buffers by name, each tied one once."""
    builder = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = builder.from_config(config, dtype=torch.float32)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        scale = 0.3 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
        offset = 1.0 if tensor.dim() == 1 and "norm" in name and name.endswith("weight") else 0.0
        tensors[name] = offset + scale * torch.randn(tensor.shape, generator=generator)
    return tensors


def _write(config: PreTrainedConfig, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of a saved checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
