"""Switch Transformers: an encoder and a decoder of T5 blocks, with one small MLP per expert.

What structure cannot tell: there are two stacks, the decoder's blocks read the encoder's output, and the relative
position bias of the first block of a stack serves all its blocks. Its small embedding is loaded with the outer part.
"""

from typing import Any

from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.modeling_outputs import MoEModelOutput

from halfbit.blocks import Inputs, Stack, find_blocks
from halfbit.family import Family
from halfbit.reader import Reader

# of the config: how many experts there are, each a module of its own
EXPERTS_FIELD = "num_experts"


def matches(config: PreTrainedConfig) -> bool:
    """Whether this family takes a model with this config."""
    return config.model_type == "switch_transformers"


def open_family(reader: Reader, config: PreTrainedConfig) -> Family:
    """The checkpoint as this family."""
    return Switch(reader, config)


class Switch(Family):
    """Two stacks, `begin(ids)` of the encoder and `begin(decoder_ids, encoder_hidden_states=...)` of the decoder, which
    is given what the encoder ended with. Both take the source's `attention_mask` where there is padding.
    """

    builder = AutoModelForSeq2SeqLM

    def find_stacks(self) -> list[Stack]:
        model = self.model
        encoder = find_blocks(model.encoder, len(model.encoder.block), "encoder.")
        decoder = find_blocks(model.decoder, len(model.decoder.block), "decoder.")
        return [
            Stack("encoder", model, encoder, self._encode, answer=self._answer),
            Stack("decoder", model, decoder, self._decode, answer=self._answer, ids="decoder_input_ids"),
        ]

    def pinned(self) -> frozenset[str]:
        return frozenset(f"{_first_attention(s)}.relative_attention_bias.weight" for s in ("encoder", "decoder"))

    def _encode(self, inputs: Inputs) -> Tensor:
        return self.model.encoder(**inputs).last_hidden_state

    def _decode(self, inputs: Inputs) -> Tensor:
        rest = dict(inputs)
        encoded = MoEModelOutput(last_hidden_state=rest.pop("encoder_hidden_states"))  # pyright: ignore[reportArgumentType]
        return self.model(encoder_outputs=encoded, use_cache=False, **rest).logits

    def _answer(self, path: str, hidden: Tensor) -> Any:
        """(hidden states, position bias, cross-attention bias), as a block returns them.

        Cross-attention has no position bias: its blocks make zeros of None.
        """
        attention = self.model.get_submodule(_first_attention(path.split(".")[0]))
        length = hidden.shape[1]
        return hidden, attention.compute_bias(length, length, device=hidden.device), None


def _first_attention(stack: str) -> str:
    return f"{stack}.block.0.layer.0.SelfAttention"
