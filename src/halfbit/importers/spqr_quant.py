"""SpQR checkpoints as `spqr_quant` 0.2 and transformers read them (Vahe1994/SpQR): 3 bits, tiles of 16 x 16, float16.

Of every linear layer [m, n] four tensors lie in the files, rows and columns of the stored matrix:

    dense_weights  int64 [m * n / 16]   tile row by tile row, tiles from left to right, a word per row of the tile:
                                        bits 0-2 scale | 3-5 zero | 6-53 sixteen codes | 54-61 statistics | 62-63 zero
                                        statistics: byte k // 2 of the tile's four float16 in row k of the tile
    row_offsets    int32                CSR [m + 1]: one run of `col_vals` per row; PTCSR [m / 16 + 1]: one per tile
                                        row, entry i in row i % 16, rows filled up to the longest with entries 0
    col_vals       int32                float16 outlier in the upper half, column in the lower; without any outlier
                                        the library writes an empty float32 tensor
    in_perm        int32 [n / 2]        stored column -> column, 16 bits each, two per word; may be missing

The quantizer meant an outlier to REPLACE what its code stands for; the kernel ADDS it. Most codes under outliers stand
for something else than 0.0, so the two are different models (`--outliers`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from halfbit.errors import FormatError, Unsupported
from halfbit.events import Event, Imported
from halfbit.families import open_family
from halfbit.formats.spqr import SpQR
from halfbit.linears import WEIGHT
from halfbit.reader import Folder, Hub, Reader, read_json
from halfbit.storing import put_linear
from halfbit.types import Outliers, Params, Solution
from halfbit.writer import Writer

METHOD = "spqr"
TILE = 16
CODEC = SpQR(bits=3, group=TILE, scale_bits=3, zero_bits=3, supergroup=TILE, dtype="float16", rounding="float16")
# what the published library can be, as it is called in config.json
PUBLISHED = {"bits": CODEC.bits, "beta1": TILE, "beta2": TILE}
DTYPES = {
    "dense_weights": torch.int64,
    "row_offsets": torch.int32,
    "col_vals": torch.int32,
    "in_perm": torch.int32,
}
MEANINGS = ("add", "replace")


def matches(files: Folder | Hub) -> bool:
    """Whether this importer takes a folder with these files."""
    found = read_json(files, "config.json").get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def open_checkpoint(source: str, revision: str | None, outliers: str | None) -> "Checkpoint":
    """The checkpoint; nothing of its weights is read yet."""
    return Checkpoint(Packing(source, revision), MEANINGS[0] if outliers is None else outliers)


class Packing(Reader):
    """A reader that shows each packed layer's weight, and has its parts under their own names.

    Attributes:
        shapes: of the packed weights, which are not in the files; given once the model is built.
    """

    def __init__(self, source: str, revision: str | None):
        super().__init__(source, revision)
        self.shapes: dict[str, tuple[int, int]] = {}

    def names(self) -> list[str]:
        shown = []
        for name in self._shards:
            path, _, part = name.rpartition(".")
            if part == "dense_weights":
                shown.append(f"{path}.{WEIGHT}")
            elif part not in DTYPES:
                shown.append(name)
        return shown

    def stored(self) -> list[str]:
        """Names of the tensors in the files."""
        return list(self._shards)

    def packed(self) -> list[str]:
        """Names of the weights that are packed."""
        return [name for name in self.names() if name not in self._shards]

    def parts(self, path: str) -> dict[str, Tensor]:
        """What is stored of a packed layer."""
        return {part: self.tensor(f"{path}.{part}") for part in DTYPES if f"{path}.{part}" in self}

    def file(self, name: str) -> str:
        return super().file(_stored(name) if name in self.shapes else name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name] if name in self.shapes else super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float16 if name in self.shapes else super().dtype(name)

    def _quantization(self, packed_ok: bool) -> tuple[str | None, tuple[int, int]]:
        return METHOD, (1, 1)


def _stored(weight: str) -> str:
    return f"{weight.removesuffix(WEIGHT)}dense_weights"


class Checkpoint:
    """See `Published`. Counts outliers in the manifest's `about`."""

    def __init__(self, reader: Packing, meaning: str):
        if meaning not in MEANINGS:
            raise Unsupported(f"outliers: expected {' or '.join(MEANINGS)}, got {meaning!r}")
        self._said = _check_config(reader.config["quantization_config"])
        self.reader, self.family, self.meaning = reader, open_family(reader), meaning
        self.packed = set(reader.packed())
        self.matrices = len(self.packed)
        self.about = {"imported": METHOD, "outliers": meaning, "outlier_count": 0, "outliers_that_differ": 0}
        # in the model's order
        modules = {path: m for path, m in self.family.model.named_modules() if f"{path}.{WEIGHT}" in self.packed}
        for name in sorted(self.packed):
            path = name.removesuffix(f".{WEIGHT}")
            if not isinstance(modules.get(path), nn.Linear):
                raise FormatError(
                    f"{path}.dense_weights: {type(self.family.model).__name__} has no linear layer {path}; config.json "
                    "belongs to another model",
                    tensor=f"{path}.dense_weights",
                )
        self._paths = list(modules)
        reader.shapes = {f"{path}.{WEIGHT}": (m.out_features, m.in_features) for path, m in modules.items()}
        owned = {f"{path}.{part}" for path in self._paths for part in DTYPES}
        for name in reader.stored():
            if name.rpartition(".")[2] in DTYPES and name not in owned:
                raise FormatError(f"{name}: there is no {name.rpartition('.')[0]}.dense_weights", tensor=name)

    def stored(self) -> list[str]:
        return self.reader.stored()

    def put(self, block: str | None, writer: Writer) -> Iterator[Event]:
        orders: dict[str, dict[str, Tensor]] = {}
        about = writer.manifest["about"]
        for path in self._paths:
            if self.family.block_of(path) != block:
                continue
            name = f"{path}.{WEIGHT}"
            parts, shape = self.reader.parts(path), self.reader.shapes[name]
            self._check_said(path, parts)
            solution, differing = read_layer(parts, shape, self.meaning, path)
            packed = CODEC.encode(solution)
            try:
                CODEC.check(packed)
            except FormatError as e:
                raise FormatError(f"{path}: {e}", tensor=f"{path}.dense_weights") from e
            # layers of one parent may read one input, and then have one order
            nbytes = put_linear(path, packed, orders.setdefault(path.rpartition(".")[0], {}), writer)
            about["outlier_count"] += len(solution.outliers) if solution.outliers is not None else 0
            about["outliers_that_differ"] += differing
            yield Imported(name, 8 * nbytes / (shape[0] * shape[1]))

    def notices(self, writer: Writer) -> Iterator[str]:
        about = writer.manifest["about"]
        if about["outliers_that_differ"]:
            done = "added to the weights under them, as the published kernel does"
            other = "--outliers replace puts them in the weights' places, as the quantizer meant them"
            if self.meaning == "replace":
                done = "put in the places of the weights under them, as the quantizer meant them"
                other = "the published kernel adds them, which --outliers add reproduces"
            yield (
                f"{about['outliers_that_differ']:,} of {about['outlier_count']:,} outliers lie on codes that do not "
                f"stand for 0.0; they were {done}; {other}"
            )

    def _check_said(self, path: str, parts: dict[str, Tensor]) -> None:
        """Each tensor must be as long as config.json says, where it says anything."""
        for part, tensor in parts.items():
            said = self._said.get(f"{path}.{part}.shape", tensor.numel())
            if said != tensor.numel():
                raise FormatError(
                    f"{path}.{part}: config.json says {said} entries, got {tensor.numel()}; download both again",
                    tensor=f"{path}.{part}",
                )


def _check_config(config: dict[str, Any]) -> dict[str, Any]:
    """`shapes` of a quantization_config that the published library can run."""
    for key, value in PUBLISHED.items():
        if config.get(key, value) != value:
            raise FormatError(f"config.json: {key} must be {value} in a checkpoint of {METHOD}, got {config[key]!r}")
    shapes = config.get("shapes") or {}
    if not isinstance(shapes, dict):
        raise FormatError(f"config.json: quantization_config.shapes must be an object, got {shapes!r:.60}")
    return shapes


def read_layer(parts: dict[str, Tensor], shape: tuple[int, int], meaning: str, path: str) -> tuple[Solution, int]:
    """One layer, and how many of its outliers the other meaning would give another weight.

    Args:
        parts: `dense_weights`, `row_offsets`, `col_vals`, and `in_perm` where the order is not the identity.
        shape: (rows, columns), multiples of 16.
        meaning: "add" or "replace".
        path: for messages.

    Raises:
        FormatError: names the tensor, and the place in it.
    """
    _check_parts(parts, shape, path)
    codes, params = _unpack_words(parts["dense_weights"], shape, path)
    order = _unpack_order(parts["in_perm"], shape[1], path) if "in_perm" in parts else None
    rows, columns, values = _unpack_outliers(parts["row_offsets"], parts["col_vals"], shape, path)
    under = _values_at(codes, params, rows, columns)
    # the published sum: float32, rounded once
    added = (under + values.float()).to(torch.float16)
    too_large = torch.nonzero(~torch.isfinite(added)).flatten()
    if meaning == "add" and len(too_large):
        i = int(too_large[0])
        raise FormatError(
            f"{path}.col_vals: entry {i}, row {int(rows[i])}, column {int(columns[i])}: {float(values[i])} added to "
            f"{float(under[i])} is beyond float16",
            tensor=f"{path}.col_vals",
        )
    codes[rows, columns] = 0
    outliers = Outliers(rows, columns, added if meaning == "add" else values) if len(rows) else None
    return Solution(CODEC.grid, codes, params, outliers=outliers, order=order), int((added != values).sum())


def _check_parts(parts: dict[str, Tensor], shape: tuple[int, int], path: str) -> None:
    rows, columns = shape
    if rows % TILE or columns % TILE:
        raise FormatError(
            f"{path}: {rows} x {columns} are not multiples of {TILE}; config.json belongs to another model", tensor=path
        )
    for part in ("dense_weights", "row_offsets", "col_vals"):
        if part not in parts:
            raise FormatError(f"{path}.{part} is missing; download the checkpoint again", tensor=f"{path}.{part}")
    lengths = {
        "dense_weights": (rows * columns // TILE,),
        "row_offsets": (rows + 1, rows // TILE + 1),
        "in_perm": (columns // 2,),
    }
    for part, tensor in parts.items():
        # without outliers the library writes an empty tensor of the default dtype
        expected = DTYPES[part] if part != "col_vals" or tensor.numel() else tensor.dtype
        if tensor.dtype != expected or tensor.ndim != 1 or tensor.numel() not in lengths.get(part, (tensor.numel(),)):
            wanted = " or ".join(map(str, lengths.get(part, ("n",))))
            raise FormatError(
                f"{path}.{part}: expected {DTYPES[part]} [{wanted}] for {rows} x {columns} weights, got {tensor.dtype} "
                f"{list(tensor.shape)}",
                tensor=f"{path}.{part}",
            )


def _unpack_words(words: Tensor, shape: tuple[int, int], path: str) -> tuple[Tensor, Params]:
    """uint8 codes `[rows, columns]` and the grid's parameters."""
    rows, groups = shape[0], shape[1] // TILE
    damaged = f"{path}.dense_weights"
    words = words.view(rows // TILE, groups, TILE).transpose(1, 2).reshape(rows, groups)
    if (words >> 62).any():
        place = _first(words >> 62 != 0)
        raise FormatError(f"{damaged}: bits 62 and 63 must be zero, row {place[0]}, tile {place[1]}", tensor=damaged)
    codes = torch.empty(rows, groups, TILE, dtype=torch.uint8)
    for j in range(TILE):
        codes[..., j] = (words >> (6 + 3 * j)) & 7
    copies = ((words >> 54) & 0xFF).to(torch.uint8).view(rows // TILE, TILE // 2, 2, groups)
    if (copies[:, :, 0] != copies[:, :, 1]).any():
        tile, byte, group = _first(copies[:, :, 0] != copies[:, :, 1])
        raise FormatError(
            f"{damaged}: the two copies of byte {byte} of the statistics differ, tile row {tile}, tile {group}",
            tensor=damaged,
        )
    # scale of scales, scale of zeros, zero of scales, zero of zeros
    second = copies[:, :, 0].transpose(1, 2).contiguous().view(torch.float16)
    if not torch.isfinite(second).all():
        tile, group, _ = _first(~torch.isfinite(second))
        raise FormatError(f"{damaged}: a statistic is NaN or infinite, tile row {tile}, tile {group}", tensor=damaged)
    params = {
        "scale_codes": (words & 7).to(torch.uint8),
        "scale_grid": second[..., 0::2].contiguous(),
        "zero_codes": ((words >> 3) & 7).to(torch.uint8),
        "zero_grid": second[..., 1::2].contiguous(),
    }
    return codes.view(shape), params


def _unpack_order(words: Tensor, columns: int, path: str) -> Tensor:
    """int64 `[columns]`, stored column -> column."""
    order = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], 1).flatten().to(torch.int64)
    seen = torch.zeros(1 << 16, dtype=torch.bool)
    seen[order] = True
    if not seen[:columns].all():
        missing = int(torch.nonzero(~seen[:columns])[0])
        raise FormatError(
            f"{path}.in_perm: not a permutation of {columns} columns, column {missing} is missing",
            tensor=f"{path}.in_perm",
        )
    return order


def _unpack_outliers(
    offsets: Tensor, entries: Tensor, shape: tuple[int, int], path: str
) -> tuple[Tensor, Tensor, Tensor]:
    """int64 rows, int64 stored columns and float16 values; padding is left out."""
    offsets, entries = offsets.to(torch.int64), entries.to(torch.int64)
    lengths = offsets.diff()
    name = f"{path}.row_offsets"
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(entries) or (lengths < 0).any():
        falls = torch.nonzero(lengths < 0).flatten()
        told = f"entry {int(falls[0]) + 1} is below the one before it" if len(falls) else ""
        told = told or f"they go from {int(offsets[0])} to {int(offsets[-1])}, col_vals has {len(entries)} entries"
        raise FormatError(f"{name}: offsets must rise from 0 to the length of col_vals; {told}", tensor=name)
    run = torch.arange(len(lengths)).repeat_interleave(lengths)
    rows, kept = run, torch.ones(len(entries), dtype=torch.bool)
    if len(lengths) != shape[0]:
        if (lengths % TILE).any():
            tile = int(torch.nonzero(lengths % TILE)[0])
            raise FormatError(
                f"{name}: tile row {tile} has {int(lengths[tile])} entries, not a multiple of {TILE}", tensor=name
            )
        place = torch.arange(len(entries)) - offsets[:-1][run]
        rows, place = TILE * run + place % TILE, place // TILE
        # an entry 0 is padding unless a real one follows in its row
        real = entries != 0
        last = torch.full((shape[0],), -1).scatter_reduce(0, rows[real], place[real], "amax")
        kept = place <= last[rows]
    where = torch.nonzero(kept).flatten()
    rows, columns, bits = rows[where], entries[where] & 0xFFFF, entries[where] >> 16
    values = bits.to(torch.int16).view(torch.float16)
    name = f"{path}.col_vals"
    for wrong, what in (
        (columns >= shape[1], f"a column beyond the last of {shape[1]}"),
        (~torch.isfinite(values), "a value that is NaN or infinite"),
        (_repeated(rows * shape[1] + columns), "a second outlier in one place"),
    ):
        if wrong.any():
            i = int(torch.nonzero(wrong)[0])
            raise FormatError(
                f"{name}: entry {int(where[i])}: {what}, row {int(rows[i])}, column {int(columns[i])}", tensor=name
            )
    return rows, columns, values


def _values_at(codes: Tensor, params: Params, rows: Tensor, columns: Tensor) -> Tensor:
    """What the codes at some places stand for, float32, each step rounded to float16 as the published kernel does."""
    grid = CODEC.grid
    # groups first: the grid takes leading dimensions
    ready = grid.ready({key: value.transpose(0, 1) for key, value in params.items()})
    here = {key: value[columns // TILE, rows] for key, value in ready.items()}
    return grid.values(codes[rows, columns, None], here)[:, 0]


def _repeated(keys: Tensor) -> Tensor:
    """Where a key is not the first of its kind."""
    order = torch.argsort(keys, stable=True)
    repeated = torch.zeros(len(keys), dtype=torch.bool)
    repeated[order[1:]] = keys[order].diff() == 0
    return repeated


def _first(mask: Tensor) -> list[int]:
    """Indices of the first place that is true."""
    return torch.nonzero(mask)[0].tolist()
