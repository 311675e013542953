"""How a Solution becomes bytes, and how bytes multiply. One file or folder per format, with its codec under `CODEC`.

`grouped.py` is the template: copy it, change the layout, and the shared tests find the new format by its file name.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from halfbit import config as configuration
from halfbit import registry
from halfbit.formats._shapes import check_stack
from halfbit.formats.mixed import Mixed, by_codec, separate
from halfbit.types import Codec, Packed, corrections

__all__ = ["by_codec", "check_stack", "from_config", "separate", "stack", "to_config"]


def to_config(codec: Codec) -> dict[str, Any]:
    """{"name": "qmoe", "p0": 0.885}."""
    return configuration.to_dict(codec)


def from_config(config: Any) -> Codec:
    """The codec that `to_config` described, from registered formats only. Raises UnknownName or FormatError."""
    return _from_config(config, _from_config)


def _from_config(config: Any, member: Callable[[Any], Codec] | None = None) -> Codec:
    name = configuration.name_of(config, "codec")
    return configuration.from_dict(registry.module("formats", name).CODEC, config, member)


def stack(matrices: list[Packed]) -> Packed:
    """Matrices of one shape and any codecs, one above another: in their codec where they have one, else `Mixed`, its
    codecs in the order in which they come. What is mixed itself counts as the matrices that it holds.

    Raises ValueError for unequal shapes, RecipeError for more codecs than fit.
    """
    own = corrections(matrices)
    matrices = separate(matrices)
    codecs = tuple(dict.fromkeys(matrix.codec for matrix in matrices))
    codec = codecs[0] if len(codecs) == 1 else Mixed(codecs)
    return replace(codec.stack(matrices), correction=own)
