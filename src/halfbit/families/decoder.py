"""Decoder-only models that generate text, dense and mixtures of experts, all found by structure."""

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from halfbit.blocks import Inputs, Stack, find_blocks
from halfbit.family import Family
from halfbit.reader import Reader


def matches(config: PreTrainedConfig) -> bool:
    """Whether this family takes a model with this config."""
    return not config.is_encoder_decoder


def open_family(reader: Reader, config: PreTrainedConfig) -> Family:
    """The checkpoint as this family."""
    return Decoder(reader, config)


class Decoder(Family):
    """One stack of blocks; it ends with logits."""

    builder = AutoModelForCausalLM

    def find_stacks(self) -> list[Stack]:
        count = self.config.get_text_config(decoder=True).num_hidden_layers
        return [Stack("decoder", self.model, find_blocks(self.model, count), self._forward)]

    def _forward(self, inputs: Inputs) -> Tensor:
        return self.model(**inputs, use_cache=False).logits
