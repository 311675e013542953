"""Switch Transformers: an encoder and a decoder of T5 blocks, with one small MLP per expert.

What structure cannot tell: there are two stacks, the decoder's blocks read the encoder's output, and the relative position
bias of the first block of a stack serves all its blocks. Its small embedding is therefore loaded with the outer part.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from halfbit.blocks import Inputs, Stack, find_blocks
from halfbit.family import Family
from halfbit.reader import Reader


def matches(config: PreTrainedConfig) -> bool:
    """Whether this family takes a model with this config."""
    return config.model_type == "switch_transformers"


def open_family(reader: Reader, config: PreTrainedConfig, dtype: torch.dtype) -> Family:
    """The checkpoint as this family."""
    return Switch(reader, config, dtype)


class Switch(Family):
    """Two stacks. Inputs of the encoder: `input_ids` and, where there is padding, `attention_mask`. Inputs of the decoder:
    `decoder_input_ids`, `encoder_hidden_states` (what the encoder's stack ended with) and the same `attention_mask`.
    """

    builder = AutoModelForSeq2SeqLM

    def find_stacks(self) -> list[Stack]:
        model = self.model
        encoder = find_blocks(model.encoder, len(model.encoder.block), "encoder.")
        decoder = find_blocks(model.decoder, len(model.decoder.block), "decoder.")
        return [
            Stack("encoder", model, encoder, self._encode, self._answer),
            Stack("decoder", model, decoder, self._decode, self._answer),
        ]

    def pinned(self) -> set[str]:
        return {f"{s}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for s in ("encoder", "decoder")}

    def _encode(self, inputs: Inputs) -> Tensor:
        return self.model.encoder(**inputs).last_hidden_state

    def _decode(self, inputs: Inputs) -> Tensor:
        rest = dict(inputs)
        encoded = BaseModelOutput(last_hidden_state=rest.pop("encoder_hidden_states"))
        return self.model(encoder_outputs=encoded, use_cache=False, **rest).logits

    def _answer(self, path: str, hidden: Tensor) -> Any:
        """(hidden states, position bias, cross-attention bias), as a block returns them.

        Only the first block's bias is kept by the recorders of the others; the cross-attention has none.
        """
        stack = path.split(".")[0]
        attention = self.model.get_submodule(f"{stack}.block.0.layer.0.SelfAttention")
        length = hidden.shape[1]
        return hidden, attention.compute_bias(length, length, device=hidden.device), None
