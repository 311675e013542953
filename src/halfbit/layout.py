"""How a packed module is described in config.json and the manifest, and what its tensors are called.

    "model.layers.0.mlp.experts": {"down_proj": {
        "codec": {"name": "qmoe", "p0": 0.885}, "shape": [experts, out, in],
        "tensors": {"codewords": ["uint16", [91234]], ...}}}
    "model.layers.0.self_attn.k_proj": {"weight": {
        "codec": {"name": "spqr", ...}, "shape": [1, out, in], "tensors": {
            "codes": ["int32", [1, 24576]], ..., "order": ["uint8", [1, 256], "model.layers.0.self_attn.q_proj"]}}}

A tensor with a module behind its shape is not stored again: it is that module's, as the column order of matrices that
read the same input. Beside the codec's parts there may be a `correction`, bfloat16 [experts, out], which is added to
every product. Both files may come from anywhere, so `Entry.parse` believes nothing.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from halfbit import formats
from halfbit.errors import FormatError, HalfbitError
from halfbit.types import CORRECTION, Codec, Packed
from halfbit.untrusted import short

DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (
        torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
        torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
        torch.float8_e5m2, torch.complex64,
    )
}  # fmt: skip

# the one part that a module may have from another: matrices that read the same input are sorted alike
SHAREABLE = "order"
# of one tensor; more fit no file, and would overflow where sizes are multiplied
MOST_ELEMENTS = 1 << 56
# more than torch takes
MOST_SIDES = 64
# what a codec stores of a matrix that it pads to tiles is far below this many bytes for each weight
MOST_BYTES_PER_WEIGHT = 64
TILE = 256


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def packed_name(projection: str) -> str:
    """Module that holds a projection's packed tensors. Not the projection's own name: transformers' weight conversions
    match names by pattern, and `experts.down_proj.codewords` would be taken for a weight to split on saving."""
    return f"packed_{projection}"


def stored_name(path: str, projection: str, part: str) -> str:
    """Name of a stored tensor, e.g. `model.layers.0.mlp.experts.packed_down_proj.codewords`."""
    return f"{path}.{packed_name(projection)}.{part}"


@dataclass(frozen=True)
class Entry:
    """One projection of a packed module: `experts` matrices one above another.

    Attributes:
        codec: of the stored tensors.
        shape: (experts, out, in).
        tensors: part -> (dtype, shape), the codec's parts in their order, and CORRECTION where there is one.
        shared: part -> module whose tensor of that name it is; nothing but `SHAREABLE`.
    """

    codec: Codec
    shape: tuple[int, int, int]
    tensors: dict[str, tuple[torch.dtype, list[int]]]
    shared: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, packed: Packed, experts: int, shared: dict[str, str] | None = None) -> "Entry":
        rows, columns = packed.shape
        tensors = {part: (t.dtype, list(t.shape)) for part, t in packed.stored.items()}
        return cls(packed.codec, (experts, rows // experts, columns), tensors, shared or {})

    def to_config(self) -> dict[str, Any]:
        tensors = {
            part: [name_of(dtype), shape, *([self.shared[part]] if part in self.shared else [])]
            for part, (dtype, shape) in self.tensors.items()
        }
        return {"codec": formats.to_config(self.codec), "shape": list(self.shape), "tensors": tensors}

    def stored(self, path: str, projection: str) -> dict[str, str]:
        """Part -> name of its stored tensor, for the entry of `projection` of the module at `path`."""
        return {part: stored_name(self.shared.get(part, path), projection, part) for part in self.tensors}

    @classmethod
    def parse(cls, config: Any, where: str) -> "Entry":
        """From a file. Raises FormatError that begins with `where`."""
        if not isinstance(config, dict) or set(config) != {"codec", "shape", "tensors"}:
            raise FormatError(f"{where}: expected codec, shape and tensors, got {short(config)}", tensor=where)
        try:
            codec = formats.from_config(config["codec"])
        except HalfbitError as e:
            raise FormatError(f"{where}: {e}", tensor=where) from e
        shape = config["shape"]
        if not _is_shape(shape) or len(shape) != 3 or 0 in shape:
            raise FormatError(f"{where}: expected the shape [experts, out, in], got {short(shape)}", tensor=where)
        given = config["tensors"]
        if not isinstance(given, dict) or set(given) - {CORRECTION} != set(codec.parts):
            raise FormatError(
                f"{where}: expected the tensors {', '.join(codec.parts)} of {codec.name}, got {short(given)}",
                tensor=where,
            )
        shared = {p: v[2] for p, v in given.items() if isinstance(v, list) and len(v) == 3 and isinstance(v[2], str)}
        plain = {part: value[:2] if part in shared else value for part, value in given.items()}
        parts = [*codec.parts, *({CORRECTION} & set(given))]
        tensors = {part: parse_tensor(plain[part], f"{where}.{part}") for part in parts}
        if tensors.get(CORRECTION, expected := (torch.bfloat16, shape[:2])) != expected:
            raise FormatError(
                f"{where}.{CORRECTION}: expected bfloat16 {short(shape[:2])}, got {short(given[CORRECTION])}",
                tensor=where,
            )
        if set(shared) - {SHAREABLE}:
            raise FormatError(f"{where}: only {SHAREABLE} can be another module's, got {short(shared)}", tensor=where)
        experts, *sides = shape
        most = MOST_BYTES_PER_WEIGHT * experts * prod(-(-side // TILE) * TILE for side in sides)
        for part, (dtype, size) in tensors.items():
            if prod(size) * dtype.itemsize > most:
                raise FormatError(
                    f"{where}.{part}: {short(size)} is more than {codec.name} stores of {short(shape)}", tensor=where
                )
        return cls(codec, (shape[0], shape[1], shape[2]), tensors, shared)

    def packed(self, tensors: dict[str, torch.Tensor]) -> Packed:
        """The tall matrix `[experts * out, in]` from its parts."""
        experts, out, columns = self.shape
        parts = {part: tensor for part, tensor in tensors.items() if part != CORRECTION}
        return Packed(self.codec, (experts * out, columns), parts, tensors.get(CORRECTION))

    def check(self, packed: Packed) -> None:
        """Raise FormatError where the codec finds damage, or finds another number of matrices than there are; or where
        a correction is no number."""
        formats.check_stack(packed, self.shape[0])
        if packed.correction is not None and not torch.isfinite(packed.correction).all():
            raise FormatError("a correction is NaN or infinite; the file is damaged", tensor=CORRECTION)


def parse_tensor(value: Any, where: str) -> tuple[torch.dtype, list[int]]:
    """`["uint16", [17]]` from a file, as dtype and shape. Raises FormatError."""
    match value:
        case [str(dtype), list(shape)] if dtype in DTYPES and _is_shape(shape):
            return DTYPES[dtype], shape
        case _:
            raise FormatError(f"{where}: expected a dtype and a shape, got {short(value)}", tensor=where)


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        return False
    # strides overflow too where a side is 0
    return len(value) <= MOST_SIDES and prod(max(n, 1) for n in value) <= MOST_ELEMENTS
