"""What files from anywhere say: JSON, names of files, and headers of safetensors files, believed in nothing.

Nothing is allocated from a size that a file states; what is read is bounded by how long the file is.
"""

import json
import struct
from pathlib import Path
from reprlib import Repr
from typing import Any

from halfbit.errors import FormatError

# the specification's own limit on a header, so that a foreign file cannot make us read gigabytes
HEADER_LIMIT = 100_000_000
# of objects and lists in one another: ours have eight, and whatever walks them recursively is far from Python's limit
DEEPEST = 64

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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FormatError where there is no such file or no such object."""
    if not path.is_file():
        raise FormatError(f"{path}: is missing, or no file; download it again")
    return parse_json(path.read_bytes(), path)


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
