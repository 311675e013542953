"""Tensors of a folder or a hub repository, plain and quantized; damaged and foreign files are named."""

import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny_models
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    SafetensorsParsingError,
)
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from halfbit import dequantize
from halfbit.errors import CheckpointError, FormatError, Unsupported
from halfbit.reader import INDEX, SINGLE, Reader

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-moe"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return tiny_models.save("qwen3-moe", tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_models.save("qwen3-moe", tmp_path / "sharded", max_shard_size="20KB")


# plain folders


def test_single_and_sharded_give_what_was_saved(single, sharded):
    expected = load_file(single / SINGLE)
    for folder in (single, sharded):
        reader = Reader(folder)
        assert sorted(reader.names()) == sorted(expected)
        for name, value in expected.items():
            assert torch.equal(reader.tensor(name), value)
            assert (reader.shape(name), reader.dtype(name)) == (tuple(value.shape), value.dtype)
            assert torch.equal(reader.slice(name, 1, 3), value[1:3])
            assert name in reader
            assert (folder / reader.file(name)).is_file()


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="no /proc")
def test_what_is_read_is_memory_of_its_own(single):
    """Mapped pages would count as the process's memory, and a shard that is replaced meanwhile would end it."""
    reader = Reader(single)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    first, rows = reader.tensor(name), reader.slice(name, 1, 3)
    assert str(single) not in Path("/proc/self/maps").read_text()
    before = first.clone()
    (single / SINGLE).write_bytes(b"")
    assert torch.equal(first, before)
    assert torch.equal(rows, before[1:3])
    with pytest.raises(FormatError, match="the file ends in it; download it again"):
        reader.tensor(name)


def test_the_example_is_read():
    reader = Reader(EXAMPLE)
    expected = load_file(EXAMPLE / SINGLE)
    assert sorted(reader.names()) == sorted(expected)
    assert reader.quantization is None
    name = "model.layers.3.mlp.experts.7.down_proj.weight"
    assert torch.equal(reader.slice(name, 17, 63), expected[name][17:63])
    assert reader.auxiliary_files() == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads(reader.path("config.json").read_text()) == reader.config


def test_slices_are_checked_and_may_be_empty(single):
    reader = Reader(single)
    name = "model.norm.weight"
    assert reader.slice(name, 5, 5).shape == (0,)
    for start, stop in ((-1, 3), (3, 2), (0, 37)):
        with pytest.raises(IndexError, match=rf"{name}: slice {start}:{stop} of 36"):
            reader.slice(name, start, stop)


def test_a_name_that_is_not_there_is_named(single):
    for read in (Reader(single).tensor, Reader(single).shape, Reader(single).file):
        with pytest.raises(CheckpointError, match=r"no tensor named model.nothing") as e:
            read("model.nothing")
        assert e.value.tensor == "model.nothing"
    assert "model.nothing" not in Reader(single)
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        Reader(single).path("tokenizer.json")


# damage


def test_a_truncated_file_is_an_error_before_anything_is_read(single):
    path = single / SINGLE
    content = path.read_bytes()
    for length in (0, 7, 8, 500, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError, match=rf"{re.escape(str(path))}: .*(truncated|header)"):
            Reader(single)


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04" + bytes(100), struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 9) + b'{"a":[1]}', b"GGUF" * 30],
)
def test_a_foreign_file_is_named(content, single):
    (single / SINGLE).write_bytes(content)
    with pytest.raises(FormatError, match=r"not a safetensors|the header|truncated"):
        Reader(single)


def test_a_dtype_that_nobody_knows_is_named(single):
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (single / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(Unsupported, match=r"w has dtype F4"):
        Reader(single)


def test_a_missing_shard_and_a_tensor_missing_from_its_shard_are_named(sharded):
    index = json.loads((sharded / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    tensors = load_file(sharded / shard)
    tensors.pop(name)
    tensors["other"] = torch.zeros(1)
    save_file(tensors, sharded / shard)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is listed in {INDEX} but not in its shard {shard}"):
        Reader(sharded).tensor(name)
    (sharded / shard).unlink()
    with pytest.raises(CheckpointError, match=rf"shard {shard} is listed in {INDEX} but missing"):
        Reader(sharded)


def test_a_damaged_index_is_named_and_cannot_lead_out_of_the_folder(sharded):
    for content, error in (("[]", FormatError), ("{", FormatError), ('{"weight_map": []}', FormatError)):
        (sharded / INDEX).write_text(content)
        with pytest.raises(error, match=INDEX):
            Reader(sharded)
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"w": "../single/model.safetensors"}}))
    with pytest.raises(FormatError, match=r"not a plain file name"):
        Reader(sharded)


def test_pickled_weights_are_never_opened(single):
    (single / SINGLE).rename(single / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"):
        Reader(single)


def test_folders_without_a_model_are_named(tmp_path, single):
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        Reader(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder"):
        Reader(tmp_path / "nowhere")
    (single / SINGLE).rename(single / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .*; found weights.safetensors"):
        Reader(single)
    (single / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config.json: not JSON"):
        Reader(single)


# quantized sources


def test_mxfp4_equals_transformers_dequantization_whole_and_by_expert(tmp_path):
    folder = tiny_models.save_mxfp4(tmp_path / "m")
    stored, reader = load_file(folder / SINGLE), Reader(folder)
    blocks = [n for n in stored if n.endswith("_blocks")]
    assert len(blocks) == 4
    assert reader.quantization == "mxfp4"
    for name in blocks:
        weight = name.removesuffix("_blocks")
        expected = convert_moe_packed_tensors(stored[name], stored[f"{weight}_scales"], dtype=torch.bfloat16)
        assert torch.equal(reader.tensor(weight), expected)
        assert torch.equal(reader.slice(weight, 2, 5), expected[2:5])
        assert (reader.shape(weight), reader.dtype(weight)) == (tuple(expected.shape), torch.bfloat16)
        assert reader.file(weight) == SINGLE
    assert len(reader.names()) == len(stored) - len(blocks)


def test_mxfp4_gives_every_value_of_the_format():
    blocks = torch.arange(16, dtype=torch.uint8).view(1, 1, 1, 16)
    scales = torch.tensor([[[129]]], dtype=torch.uint8)
    # the low nibble comes first: byte b is the values of nibbles b % 16, b // 16
    expected = [v for value in dequantize.E2M1 for v in (value * 4, 0.0)]
    assert dequantize.mxfp4(blocks, scales).flatten().tolist() == expected


def test_fp8_is_scaled_by_rectangle_whole_and_in_slices(tmp_path):
    folder = tiny_models.save_fp8(tmp_path / "m")
    stored, reader = load_file(folder / SINGLE), Reader(folder)
    scales = [n for n in stored if n.endswith("_scale_inv")]
    assert scales
    assert reader.quantization == "fp8"
    for name in scales:
        weight = name.removesuffix("_scale_inv")
        rows, columns = stored[weight].shape
        plain = stored[weight].float()
        for i in range(rows):
            for j in range(columns):
                plain[i, j] *= stored[name][i // 16, j // 16]
        assert torch.equal(reader.tensor(weight), plain.to(torch.bfloat16))
        for start, stop in ((0, rows), (3, 5), (15, 17), (rows - 1, rows), (4, 4)):
            assert torch.equal(reader.slice(weight, start, stop), plain[start:stop].to(torch.bfloat16))
    assert len(reader.names()) == len(stored) - len(scales)
    assert reader.dtype("model.norm.weight") == torch.float32


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq"}, "quantized with 'gptq'"),
        ({"quant_method": "fp8"}, "fp8 weights without block scales"),
        ({"quant_method": "halfbit"}, "already compressed by halfbit"),
    ],
)
def test_other_quantizations_are_named(quantization, message, single):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(Unsupported, match=message):
        Reader(single)
    # where a text model is a part of a larger one
    (single / "config.json").write_text(json.dumps({"text_config": {"quantization_config": quantization}}))
    with pytest.raises(Unsupported, match=message):
        Reader(single)


def test_a_folder_of_ours_is_opened_where_that_is_meant(single):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "halfbit"}}))
    reader = Reader(single, packed_ok=True)
    assert reader.quantization == "halfbit"
    assert "model.norm.weight" in reader


@pytest.mark.parametrize(("save", "part"), [(tiny_models.save_mxfp4, "_scales"), (tiny_models.save_fp8, "_scale_inv")])
def test_scales_that_do_not_fit_are_named(save, part, tmp_path):
    folder = save(tmp_path / "m")
    name = next(n for n in load_file(folder / SINGLE) if n.endswith(part))
    tiny_models.edit(folder, lambda t: t.update({name: t[name][..., :-1].contiguous()}))
    with pytest.raises(FormatError, match=re.escape(name.removesuffix(part))):
        Reader(folder)


def test_half_of_a_quantized_weight_is_named(tmp_path):
    for save, part in ((tiny_models.save_mxfp4, "_scales"), (tiny_models.save_fp8, "proj.weight")):
        folder = save(tmp_path / part)
        name = next(n for n in load_file(folder / SINGLE) if n.endswith(part))
        tiny_models.edit(folder, lambda t, name=name: [t.pop(name)])
        with pytest.raises(CheckpointError, match=rf"its .*{re.escape(name)} is missing"):
            Reader(folder)


# the hub


class FakeHub:
    """Answers like huggingface_hub from a local folder, and writes down what was asked for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.downloads, self.headers, self.revisions = folder, [], [], []
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", self.files)
        monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", self.header)

    def download(self, repository: str, filename: str, *, revision: str | None = None) -> str:
        assert repository == "owner/name"
        self.revisions.append(revision)
        if not (self.folder / filename).is_file():
            raise EntryNotFoundError(f"404 {filename}")
        self.downloads.append(filename)
        return str(self.folder / filename)

    def files(self, repository: str, *, revision: str | None = None) -> list[str]:
        return [p.name for p in self.folder.iterdir()]

    def header(self, repository: str, filename: str, *, revision: str | None = None) -> SimpleNamespace:
        self.headers.append(filename)
        names = {torch.float32: "F32"}
        tensors = {
            n: SimpleNamespace(dtype=names[t.dtype], shape=list(t.shape))
            for n, t in load_file(self.folder / filename).items()
        }
        return SimpleNamespace(tensors=tensors)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_shards_of_a_hub_repository_are_fetched_one_by_one_and_from_one_commit(sharded, tmp_path, monkeypatch):
    cached = tmp_path / "snapshots" / COMMIT
    cached.parent.mkdir()
    sharded.rename(cached)
    hub = FakeHub(cached, monkeypatch)
    reader = Reader("owner/name", "some-branch")
    assert reader.revision == COMMIT
    assert hub.revisions[0] == "some-branch"
    assert set(hub.revisions[1:]) == {COMMIT}
    assert set(hub.downloads) == {"config.json", INDEX}
    shards = json.loads((cached / INDEX).read_text())["weight_map"]
    name, shard = next(iter(shards.items()))
    # shapes come from the header alone
    expected = load_file(cached / shard)[name]
    assert reader.shape(name) == tuple(expected.shape)
    assert hub.headers == [shard]
    assert not any(f.endswith(".safetensors") for f in hub.downloads)
    assert torch.equal(reader.tensor(name), expected)
    assert torch.equal(reader.tensor(name), expected)
    assert [f for f in hub.downloads if f.endswith(".safetensors")] == [shard]
    assert reader.auxiliary_files() == ["generation_config.json"]


def test_a_single_file_repository_is_read(single, monkeypatch):
    hub = FakeHub(single, monkeypatch)
    reader = Reader("owner/name")
    assert SINGLE not in hub.downloads
    assert torch.equal(reader.tensor("model.norm.weight"), load_file(single / SINGLE)["model.norm.weight"])


def test_a_pickled_repository_is_named(single, monkeypatch):
    FakeHub(single, monkeypatch)
    (single / SINGLE).rename(single / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"owner/name@main: only pickled weights"):
        Reader("owner/name")


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no connection\nmore"), OSError("no connection")])
def test_an_unreachable_hub_is_a_checkpoint_error(error, monkeypatch):
    def no_network(*_args: object, **_kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    with pytest.raises(CheckpointError, match=r"owner/name@main: cannot be read .*no connection\); check the name"):
        Reader("owner/name")


def test_a_foreign_file_of_the_hub_is_a_format_error(sharded, monkeypatch):
    hub = FakeHub(sharded, monkeypatch)

    def broken(*_args: object, **_kwargs: object) -> None:
        raise SafetensorsParsingError("no header")

    monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", broken)
    reader = Reader("owner/name")
    with pytest.raises(FormatError, match=r"not a safetensors file: no header"):
        reader.shape(reader.names()[0])
    assert INDEX in hub.downloads
