"""Layouts of ternary matrices: the smallest bytes, or those that multiply fastest on CPUs.

`compact` is `runlength`; `fast` is `quads`, which takes about 0.1 bits per weight more and multiplies one to four
tokens 1.1 to 1.7 times as fast with AVX-512. `halfbit compress` solves for one of them, `halfbit repack` turns one into
the other.
"""

from halfbit.errors import UnknownName
from halfbit.formats.qmoe import QMoE
from halfbit.formats.quads import Quads
from halfbit.formats.runlength import RunLength
from halfbit.types import Codec

LAYOUTS = {"compact": RunLength, "fast": Quads}
# codecs whose matrices have more than one layout
TERNARY = RunLength | Quads | QMoE


def codec_in(codec: Codec, layout: str) -> Codec:
    """What stores a codec's matrices in a layout; the codec itself where it is of that layout, or not ternary.

    Raises UnknownName.
    """
    if layout not in LAYOUTS:
        raise UnknownName("layout", layout, list(LAYOUTS))
    target = LAYOUTS[layout]
    if isinstance(codec, target) or not isinstance(codec, TERNARY):
        return codec
    if isinstance(codec, QMoE):
        return target(scale_bits=0)
    return target(scale_bits=codec.scale_bits, rotated=codec.rotated)
