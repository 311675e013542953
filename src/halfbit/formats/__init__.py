"""How a Solution becomes bytes, and how bytes multiply. One file or folder per format, with its codec under `CODEC`.

`grouped.py` is the template: copy it, change the layout, and the shared tests find the new format by its file name.
"""

from typing import Any

from halfbit import config as configuration
from halfbit import registry
from halfbit.types import Codec


def to_config(codec: Codec) -> dict[str, Any]:
    """{"name": "qmoe", "p0": 0.885}."""
    return configuration.to_dict(codec)


def from_config(config: Any) -> Codec:
    """The codec that `to_config` described, from registered formats only. Raises UnknownName or FormatError."""
    name = configuration.name_of(config, "codec")
    return configuration.from_dict(registry.module("formats", name).CODEC, config)
