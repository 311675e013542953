"""What files from anywhere say: JSON, names of files, and headers of safetensors files, believed in nothing.

Nothing is allocated from a size that a file states; what is read is bounded by how long the file is, and what is parsed
by limits beside.
"""

import json
import re
import struct
from io import RawIOBase
from pathlib import Path
from reprlib import Repr
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from halfbit.errors import FormatError

# the specification's own limit on a header, so that a foreign file cannot make us read gigabytes
HEADER_LIMIT = 100_000_000
# of a file of JSON; a manifest with the facts of 2048 experts in each of 15 layers has some 10 MB
JSON_LIMIT = 100_000_000
# of objects and lists in one another: ours have eight, and whatever walks them recursively is far from Python's limit
DEEPEST = 64

# how transformers' configs name what there are several modules of
COUNTS = re.compile(r"(layer|expert)s?$")
# of a layer beside its experts, and of a model: google/switch-c-2048 has 15 layers with 2048 experts
MODULES, MOST_MODULES = 16, 1 << 17

# what transformers stumbles with over values in a config.json that it takes for granted
STUMBLES = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError,
    RuntimeError, StrictDataclassError,
)  # fmt: skip

_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlist = _repr.maxdict = _repr.maxtuple = 6


def short(value: Any) -> str:
    """A value from a file for a message: of bounded length, however large or deep it is."""
    text = _repr.repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def parse_json(content: bytes, where: Any) -> dict[str, Any]:
    """The object in a JSON file: UTF-8, no key twice, not too deep. Raises FormatError that begins with `where`."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    # a number of too many digits is a ValueError, as is what is no JSON
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON ({error or 'too deep'}); download the file again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, got {short(value)}; download the file again")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [v for node in level for v in (node.values() if isinstance(node, dict) else node) if _has_members(v)]
        if not level:
            return value
    raise FormatError(f"{where}: more than {DEEPEST} objects or lists in one another; download the file again")


def _has_members(value: Any) -> bool:
    return isinstance(value, dict | list)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {short(next(n for n in names if names.count(n) > 1))} is there twice")
    return found


def json_bytes(path: Path) -> bytes:
    """What is in a JSON file. Raises FormatError where there is no such file, or it is larger than any of ours."""
    # not a device or a pipe, which would have no end
    if not path.is_file():
        raise FormatError(f"{path}: is missing, or no file; download it again")
    with path.open("rb") as file:
        content = file.read(JSON_LIMIT + 1)
    if len(content) > JSON_LIMIT:
        raise FormatError(f"{path}: more than {JSON_LIMIT:,} bytes of JSON; download the file again")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FormatError where there is no such file or no such object."""
    return parse_json(json_bytes(path), path)


def check_counts(config: Any, where: Any) -> None:
    """Raise FormatError where a model's config.json, as parsed, asks for more layers and experts than any model has.

    transformers makes a module, or an entry of a list, of each before it looks for a weight.
    """
    largest = {"layer": 1, "expert": 0}
    nodes = [config]
    while nodes:
        node = nodes.pop()
        nodes += [v for v in (node.values() if isinstance(node, dict) else node) if _has_members(v)]
        for key, value in node.items() if isinstance(node, dict) else ():
            if type(value) is int and (found := COUNTS.search(key)):
                largest[found[1]] = max(largest[found[1]], value)
    layers, experts = largest["layer"], largest["expert"]
    if layers * (MODULES + experts) > MOST_MODULES:
        raise FormatError(
            f"{where}: {short(layers)} layers of {short(experts)} experts are more than any model has; download it "
            "again"
        )


def is_plain(name: Any) -> bool:
    """Whether this is the name of a file in the folder that is meant, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")


def header_bytes(path: Path) -> bytes:
    """The first bytes of a safetensors file, its length field, its header and the padding. Raises FormatError."""
    # not a device or a pipe, which would have no end
    if not path.is_file():
        raise FormatError(f"{path}: is missing, or no file; download it again")
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        nbytes = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= nbytes <= min(HEADER_LIMIT, length - 8):
            raise FormatError(
                f"{path}: not a safetensors file, or truncated: {length} bytes, header of {nbytes} bytes; download it "
                "again"
            )
        return head + file.read(nbytes)


def read_into(file: RawIOBase, buffer: memoryview) -> None:
    """Fill the buffer with the bytes that come next. Raises FormatError where the file has no more."""
    while buffer:
        nbytes = file.readinto(buffer)
        if not nbytes:
            raise FormatError("the file ends in it")
        buffer = buffer[nbytes:]
