"""Where the weights are in a model: `open_family` picks the family by the config, structure does the rest."""

from transformers import PreTrainedConfig

from halfbit import registry
from halfbit.errors import Unsupported
from halfbit.family import Family, read_config
from halfbit.reader import Reader


def open_family(reader: Reader) -> Family:
    """The checkpoint's model, nothing loaded yet.

    Raises:
        Unsupported: no family takes this config.
    """
    config = read_config(reader)
    return registry.module("families", family_of(reader, config)).open_family(reader, config)


def family_of(reader: Reader, config: PreTrainedConfig) -> str:
    """Name of the family that takes a model with this config. Raises Unsupported as `open_family`."""
    for name in registry.names("families"):
        if registry.module("families", name).matches(config):
            return name
    raise Unsupported(
        f"{reader.files}: no family takes model_type {config.model_type!r}; known: "
        f"{', '.join(registry.names('families'))} (decoder-only models that generate text, and Switch Transformers)"
    )
