"""Where the weights are in a model: `open_family` picks the family by the config, structure does the rest."""

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
    for name in registry.names("families"):
        module = registry.module("families", name)
        if module.matches(config):
            return module.open_family(reader, config)
    raise Unsupported(
        f"{reader.files}: no family takes model_type {config.model_type!r}; known: "
        f"{', '.join(registry.names('families'))} (decoder-only models that generate text, and Switch Transformers)"
    )
