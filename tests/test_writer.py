"""The run folder: atomic, resumable, and loud when the disk is not."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from halfbit import disk
from halfbit import writer as module
from halfbit.errors import FormatError, OutputError
from halfbit.manifest import MANIFEST, checksum, read_manifest
from halfbit.writer import Writer


def begin(folder: Path, fingerprint: str = "f") -> Writer:
    return Writer(folder, fingerprint, {"source": "model", "recipe": "qmoe"})


def test_a_block_is_read_back_bit_for_bit(tmp_path) -> None:
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.arange(7).to(torch.uint16),
        "empty": torch.empty(0, dtype=torch.int64),
        "scalar": torch.tensor(3.5),
    }
    writer = begin(tmp_path / "out")
    for name, tensor in tensors.items():
        writer.put(name, tensor)
    writer.record("matrices", "a", {"loss": 0.5, "bits_per_weight": 1.5, "tokens": 3})
    writer.commit("block.0", "block.safetensors")
    again = begin(tmp_path / "out")
    assert again.has("block.0")
    assert not again.has("block.1")
    back = again.read("block.0")
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
        assert again.manifest["tensors"][name]["sha256"] == checksum(tensor)
    assert again.manifest["matrices"] == {"a": {"loss": 0.5, "bits_per_weight": 1.5, "tokens": 3}}


def test_checksums_are_those_of_the_bytes_row_by_row() -> None:
    assert checksum(torch.tensor([1.0])) == hashlib.sha256(b"\x00\x00\x80\x3f").hexdigest()
    square = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    assert checksum(square) == hashlib.sha256(bytes([1, 2, 3, 4])).hexdigest()
    assert checksum(square.T) == hashlib.sha256(bytes([1, 3, 2, 4])).hexdigest()


def test_an_unfinished_folder_is_no_model(tmp_path) -> None:
    writer = begin(tmp_path / "out")
    writer.put("a", torch.ones(2))
    writer.commit("block.0", "block.safetensors")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["block.safetensors", MANIFEST]
    writer.finish({"model_type": "x"}, [], "name = 'qmoe'\n")
    names = {"config.json", "model.safetensors.index.json", "recipe.toml", "block.safetensors", MANIFEST}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert begin(tmp_path / "out").complete
    (tmp_path / "out" / "config.json").unlink()  # killed before the last file
    assert not begin(tmp_path / "out").complete
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "block.safetensors"}


def test_another_run_in_the_folder_is_refused(tmp_path) -> None:
    begin(tmp_path / "out", "one")
    with pytest.raises(OutputError, match="holds another run"):
        begin(tmp_path / "out", "two")


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(OutputError, match="not empty"):
        begin(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(OutputError, match="is a file"):
        begin(tmp_path / "precious.txt")


def test_no_name_is_written_twice(tmp_path) -> None:
    writer = begin(tmp_path / "out")
    writer.put("a", torch.ones(1))
    with pytest.raises(OutputError, match="a: would be written twice"):
        writer.put("a", torch.ones(1))
    writer.commit("block.0", "block.safetensors")
    with pytest.raises(OutputError, match="a: would be written twice"):
        writer.put("a", torch.ones(1))


@pytest.mark.parametrize("step", ["write", "sync", "rename"])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(step: str, tmp_path, monkeypatch) -> None:
    writer = begin(tmp_path / "out")
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    writer.put("a", torch.ones(4))

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(module, "save_file", full)
        elif step == "sync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(Path, "replace", full)
        with pytest.raises(OutputError, match="No space left on device; free some space, and run the same command"):
            writer.commit("block.0", "block.safetensors")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [MANIFEST]
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before
    assert not begin(tmp_path / "out").has("block.0")


def test_files_reach_the_disk_before_their_name(tmp_path, monkeypatch) -> None:
    """Power-cut order: the file is synced, then renamed, then the folder is synced, and the manifest comes after."""
    writer = begin(tmp_path / "out")
    writer.put("a", torch.ones(4))
    log: list[str] = []
    sync, replace = disk.sync, Path.replace
    monkeypatch.setattr(disk, "sync", lambda path: (log.append(f"sync {path.name}"), sync(path))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (log.append(f"rename {b.name}"), replace(a, b))[1])
    writer.commit("block.0", "block.safetensors")
    steps = []
    for name in ("block.safetensors", MANIFEST):
        steps += [f"sync .{name}.tmp", f"rename {name}", "sync out"]
    assert log == steps


def test_damaged_manifests_are_format_errors(tmp_path) -> None:
    with pytest.raises(FormatError, match=f"no {MANIFEST}"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(FormatError, match="expected format 1 or 2, got 99"):
        read_manifest(tmp_path)
