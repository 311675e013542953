"""Files that are there whole, on the disk, or not at all; what the file system says, as errors that tell what to do."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from halfbit.errors import OutputError


def atomically(target: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under a temporary name; fsync it, rename it, fsync its folder. Raises OutputError."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with file_errors(target):
            write(temporary)
            sync(temporary)
            temporary.replace(target)
            sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Also the folders around it. Raises OutputError."""
    with file_errors(path):
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Raise OutputError where the file system raises OSError."""
    try:
        yield
    except OSError as e:
        raise OutputError(f"{path}: {e.strerror or e}; {_advice(e.errno)}") from e
    except SafetensorError as e:  # safetensors reports the operating system's error as text
        number = re.search(r"os error (\d+)", str(e))
        raise OutputError(f"{path}: could not be written: {e}; {_advice(int(number[1]) if number else None)}") from e


def _advice(number: int | None) -> str:
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    wanted = "free some space" if full else "check the path, its rights and the disk"
    return f"{wanted}, and run the same command again; it continues"
