"""Files that cannot lie: every byte of a folder is vouched for, on loading and by `verify`; hostile ones are errors."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import edit_manifest, load
from safetensors.torch import load_file, save_file

import halfbit
from halfbit import dequantize, formats
from halfbit.blueprint import Blueprint
from halfbit.errors import FormatError, HalfbitError
from halfbit.families import open_family
from halfbit.folder import Problem, inspect
from halfbit.manifest import MANIFEST, fast_checksum, parse_manifest, read_manifest, text_of, verify_shard
from halfbit.reader import Reader
from halfbit.untrusted import DEEPEST, check_counts, header_bytes, is_plain, parse_json, short
from halfbit.writer import INDEX


@pytest.fixture(scope="module")
def llama(made) -> Path:
    """A compressed folder; left as it is."""
    return made("llama", "spqr").folder


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def problems(folder: Path) -> list[Problem]:
    return [p for p in halfbit.verify(folder) if isinstance(p, Problem)]


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def places(path: Path) -> list[int]:
    """Bytes to flip: beginning and end, some anywhere; of a shard the length, header, metadata, padding and tensors."""
    size, some = path.stat().st_size, random.Random(path.name)
    found = {0, 1, size - 2, size - 1, *(some.randrange(size) for _ in range(3))}
    if path.suffix == ".safetensors":
        end = len(header_bytes(path))
        entries = json.loads(header_bytes(path)[8:])
        metadata = path.read_bytes().index(b'"pt"') + 1
        found |= {7, 8, metadata, end - 1, *(some.randrange(8, end) for _ in range(3))}
        spans = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
        found |= {end + some.randrange(start, stop) for start, stop in some.sample(spans, 4) if stop > start}
    return sorted(found)


def test_verify_finds_any_flipped_bit_of_any_file_and_says_which(copy) -> None:
    """Of every file; of tensors it names the tensor."""
    assert not problems(copy)
    tensors = read_manifest(copy)["tensors"]
    blocks = sorted(copy.glob("*.safetensors"))
    for path in [p for p in copy.iterdir() if p not in blocks] + blocks[:1]:
        content, some = path.read_bytes(), random.Random(path.name)
        for at in places(path):
            flip(path, at, some.randrange(8))
            found = problems(copy)
            assert found, (path.name, at)
            where = {p.where for p in found}
            if path in blocks and at >= len(header_bytes(path) if at > 7 else b"x" * 10**9):
                assert any(tensors.get(w, {}).get("file") == path.name for w in where), (path.name, at, where)
            else:
                assert path.name in where or any(path.name in p.message for p in found), (path.name, at, where)
            path.write_bytes(content)
    assert not problems(copy)


def test_every_byte_of_the_manifest_is_vouched_for(copy) -> None:
    path = copy / MANIFEST
    content = path.read_bytes()
    # its last line has its checksum, and the first says which format
    ends = [*range(40), *range(len(content) - 100, len(content))]
    for at in [*ends, *random.Random(0).sample(range(len(content)), 60)]:
        for bit in random.Random(at).sample(range(8), 2):
            flip(path, at, bit)
            with pytest.raises(FormatError, match=MANIFEST):
                read_manifest(copy)
            path.write_bytes(content)
    for other in (content + b"\n", content[:-1], content.replace(b"\n", b"\r\n"), b" " + content):
        path.write_bytes(other)
        with pytest.raises(FormatError, match=MANIFEST):
            read_manifest(copy)


def test_loading_names_the_tensor_that_was_changed(copy) -> None:
    """Packed or not; without the comparison the rules of the formats are all that is left."""
    for name in ("model.layers.1.self_attn.q_proj.packed_weight.codes", "model.layers.0.input_layernorm.weight"):
        path = copy / read_manifest(copy)["tensors"][name]["file"]
        content, entry = path.read_bytes(), json.loads(header_bytes(path)[8:])[name]
        flip(path, len(header_bytes(path)) + entry["data_offsets"][0], 0)
        with pytest.raises(FormatError, match=f"{name}: checksum differs") as caught:
            load(copy)
        assert caught.value.tensor == name
        with pytest.raises(FormatError, match=f"{name}: checksum differs"):
            halfbit.load(str(copy))
        halfbit.load(str(copy), verify=False)
        with halfbit.unverified():
            load(copy)
        with pytest.raises(FormatError):
            load(copy)
        path.write_bytes(content)
    load(copy)


def test_loading_compares_headers_and_lists(copy) -> None:
    shard = next(copy.glob("model-block-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b'"pt"', b'"pu"', 1))
    with pytest.raises(HalfbitError, match="header differs"):
        halfbit.load(str(copy))
    shard.write_bytes(content)
    # a loader takes this file before those of the index
    save_file({"x": torch.ones(1)}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="is not listed in the manifest"):
        load(copy)
    (copy / "model.safetensors").unlink()
    edit_manifest(copy, lambda m: m["packed"].popitem())
    with pytest.raises(FormatError, match="packed modules are not those"):
        load(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(FormatError, match=r"manifest\.json: is missing"):
        load(copy)
    with halfbit.unverified():
        load(copy)


def test_a_folder_of_the_first_format_is_verified_by_its_sha256(copy, monkeypatch) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["format"] = 1
        del manifest["headers"]
        for entry in manifest["tensors"].values():
            del entry["xxh3"]

    edit_manifest(copy, edit)
    manifest = read_manifest(copy)
    # as it was written
    (copy / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    assert not problems(copy)
    load(copy)
    entry = next(iter(manifest["tensors"].values()))
    path = copy / entry["file"]
    flip(path, path.stat().st_size - 1, 3)
    assert problems(copy)
    with pytest.raises(FormatError, match="checksum differs"):
        load(copy)


def test_a_file_that_is_cut_off_while_it_is_verified_is_a_problem(copy) -> None:
    """Not a bus error, which reading mapped bytes would give: whoever could not load a folder replaces it."""
    manifest = read_manifest(copy)
    shard = max(copy.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    found = verify_shard(shard, manifest)
    assert isinstance(next(found), str)
    with shard.open("r+b") as file:
        file.truncate(len(header_bytes(shard)))
    last = list(found)[-1]
    assert isinstance(last, Problem)
    assert last.where == shard.name


def test_a_model_that_is_saved_again_says_of_no_manifest(copy, tmp_path) -> None:
    model = load(copy)
    model.save_pretrained(tmp_path / "again")
    assert "manifest" not in json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    again = load(tmp_path / "again")
    for (name, tensor), (other, same) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(tensor, same)


def test_the_fast_checksum_is_that_of_the_bytes_row_by_row() -> None:
    # https://github.com/Cyan4973/xxHash, XXH3_128bits of nothing
    assert fast_checksum(torch.empty(0)) == "99aa06d3014798d86001c324468d497f"
    square = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    assert fast_checksum(square.T) == fast_checksum(torch.tensor([1, 3, 2, 4], dtype=torch.uint8))
    assert fast_checksum(square.T) != fast_checksum(square)


# --- hostile text


HOSTILE = {
    "no UTF-8": b"\xff{}",
    "a list": b"[]",
    "nothing": b"",
    "twice": b'{"a": 1, "b": {"c": 1, "c": 2}}',
    "too deep": b'{"a":' + b"[" * DEEPEST + b"]" * DEEPEST + b"}",
    "deep enough to end the parser": b'{"a":' * 100_000,
    "a number of too many digits": b'{"a": ' + b"1" * 5000 + b"}",
    "a lone half of a pair": b'{"a": "\\ud800"',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_json_is_a_format_error(case: str, tmp_path) -> None:
    with pytest.raises(FormatError, match="here: "):
        parse_json(HOSTILE[case], "here")
    (tmp_path / "config.json").write_bytes(HOSTILE[case])
    with pytest.raises(HalfbitError):
        halfbit.load(str(tmp_path))


def test_what_is_quoted_of_a_file_is_short() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "x" * 10**6, list(range(10**5)), {i: i for i in range(10**5)}, 10**4000):
        assert len(short(value)) <= 80


def test_only_plain_names_are_names_of_files() -> None:
    assert all(map(is_plain, ("model-block-00000.safetensors", "tokenizer.json", "a b")))
    wrong = ("", ".", "..", "/etc/passwd", "../x", "a/b", "a\\b", "C:x", "a\0", None, 3, ["x"])
    assert not any(map(is_plain, wrong))


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file elsewhere": lambda m: next(iter(m["tensors"].values())).update(file="/etc/passwd"),
    "a file above": lambda m: m["files"].update({"../config.json": "0" * 64}),
    "a header above": lambda m: m["headers"].update({"../x.safetensors": "0" * 64}),
    "a block above": lambda m: next(iter(m["blocks"].values())).update(file="../x.safetensors"),
    "a block of nothing": lambda m: next(iter(m["blocks"].values())).update(tensors=["nothing"]),
    "a dtype that is no word": lambda m: next(iter(m["tensors"].values())).update(dtype=["float32"]),
    "a negative side": lambda m: next(iter(m["tensors"].values())).update(shape=[-1]),
    "sides without end": lambda m: next(iter(m["tensors"].values())).update(shape=[1] * 1000),
    "a side of 2^70": lambda m: next(iter(m["tensors"].values())).update(shape=[2**70]),
    "a side that is true": lambda m: next(iter(m["tensors"].values())).update(shape=[True]),
    "no sums": lambda m: next(iter(m["tensors"].values())).pop("xxh3"),
    "a fact beyond floats": lambda m: next(iter(m["matrices"].values())).update(loss=10**400),
    "coverage of nothing": lambda m: m["coverage"].update({"model.layers.0": 3}),
    "coverage of no experts": lambda m: m["coverage"].update({"x": {"trained": [], "below_floor": []}}),
    "coverage in words": lambda m: m["coverage"].update({"x": {"trained": ["many"], "below_floor": []}}),
    "a codec by path": lambda m: first_entry(m)["codec"].update(name="os.path"),
    "a codec of large numbers": lambda m: first_entry(m)["codec"].update(group=2**70),
    "a codec of no number": lambda m: first_entry(m)["codec"].update(group=float("nan")),
    "another format": lambda m: m.update(format=[2]),
    "a list of tensors": lambda m: m.update(tensors=[]),
    "no headers": lambda m: m.pop("headers"),
}


def first_entry(manifest: dict[str, Any]) -> dict[str, Any]:
    return next(iter(next(iter(manifest["packed"].values())).values()))


@pytest.mark.parametrize("case", MANIFESTS)
def test_hostile_manifests_are_format_errors(case: str, copy) -> None:
    edit_manifest(copy, MANIFESTS[case])
    with pytest.raises(FormatError, match=MANIFEST):
        read_manifest(copy)
    assert [p.where for p in problems(copy)] == [MANIFEST]
    with pytest.raises(HalfbitError):
        inspect(copy)
    with pytest.raises(HalfbitError):
        load(copy)


# --- hostile sizes


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def plain(folder: Path, header: dict[str, Any], data: bytes = bytes(8)) -> Path:
    """A checkpoint of one file with this header."""
    text = json.dumps(header).encode()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


HEADERS: dict[str, Any] = {
    "2^40 entries in eight bytes": {"shape": [2**40]},
    "2^70 entries": {"shape": [2**70]},
    "sides whose product overflows to two": {"shape": [2**32 + 1, 2**32, 2]},
    "a negative side": {"shape": [-2, -1]},
    "a side of text": {"shape": ["2"]},
    "a side of lists": {"shape": [[[2]]]},
    "no shape": {"shape": 2},
    "bytes beyond the file": {"data_offsets": [0, 2**40]},
    "bytes backwards": {"data_offsets": [8, 0]},
    "bytes before the file": {"data_offsets": [-8, 0]},
    "no bytes": {"data_offsets": []},
    "a dtype of numbers": {"dtype": 2**70},
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_are_errors_before_anything_is_allocated(case: str, tmp_path) -> None:
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert torch.equal(Reader(plain(tmp_path, {"x": whole})).tensor("x"), torch.zeros(2))
    for read in (lambda r: r.tensor("x"), lambda r: r.slice("x", 0, 1)):
        with pytest.raises(HalfbitError):
            read(Reader(plain(tmp_path, {"x": whole | HEADERS[case]})))


def test_a_shard_that_is_not_as_its_header_was_is_an_error(tmp_path) -> None:
    """A hub's header is read apart from the file."""
    reader = Reader(plain(tmp_path, {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}))
    plain(tmp_path, {"x": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}, bytes(4))
    with pytest.raises(FormatError, match="x is not as its header said"):
        reader.tensor("x")


def test_blocks_of_fp8_scales_that_are_larger_than_the_weight() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).to(torch.float8_e4m3fn)
    found = dequantize.fp8(weight, torch.tensor([[0.5]]), (2**40, 2**50))
    assert torch.equal(found, (weight.float() * 0.5).to(torch.bfloat16))


def test_gigabytes_of_json_are_not_read(copy) -> None:
    for name in (MANIFEST, "config.json"):
        content = (copy / name).read_bytes()
        with (copy / name).open("r+b") as file:
            # nothing is on the disk
            file.truncate(1 << 40)
        assert name in {p.where for p in problems(copy)}
        with pytest.raises(FormatError, match=f"{name}: more than 100,000,000 bytes"):
            (read_manifest if name == MANIFEST else Reader)(copy)
        (copy / name).write_bytes(content)


COUNTS = ({"num_hidden_layers": 2**40}, {"n_layers": 10**6}, {"num_hidden_layers": 1000, "num_experts": 10**6})


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_a_config_of_more_modules_than_any_model_has_is_an_error_at_once(counts: dict[str, int], copy) -> None:
    """transformers would make lists and modules until the memory ends."""
    edit_json(copy / "config.json", lambda c: c.update(counts))
    with pytest.raises(FormatError, match="more than any model has"):
        halfbit.load(str(copy))
    edit_json(copy / "config.json", lambda c: c.pop("quantization_config"))
    with pytest.raises(FormatError, match="more than any model has"):
        Blueprint.of(copy)
    with pytest.raises(FormatError, match="more than any model has"):
        open_family(Reader(copy))


def test_the_largest_models_have_no_more_modules_than_that() -> None:
    configs = sorted((Path(__file__).parents[1] / "examples").glob("**/*.json"))
    assert any("switch-c-2048" in str(path) for path in configs)
    for path in configs:
        check_counts(json.loads(path.read_text()), path)


@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size"])
def test_a_model_that_its_files_cannot_hold_is_refused_before_it_is_allocated(field: str, copy) -> None:
    """transformers fills what does not fit the files with random numbers, and tells afterwards."""
    edit_json(copy / "config.json", lambda c: c.update({field: 2**40}) or c["quantization_config"].update(modules={}))
    with halfbit.unverified(), pytest.raises(FormatError, match="describes a model of"):
        load(copy)


def test_an_index_does_not_lead_out_of_its_folder(copy, tmp_path) -> None:
    shard = min(copy.glob("model-block-*.safetensors"))
    shutil.copytree(copy, tmp_path / "other")
    for name in (f"../other/{shard.name}", f"{tmp_path}/other/{shard.name}", f"../copy/../other/{shard.name}"):
        text = (tmp_path / "other" / INDEX).read_text()
        (copy / INDEX).write_text(text.replace(shard.name, name))
        for verify in (True, False):
            with pytest.raises(FormatError, match=r"its index names .* elsewhere"):
                halfbit.load(str(copy), verify=verify)
        with pytest.raises(FormatError, match="is not a plain file name"):
            Reader(copy, packed_ok=True)


def test_links_and_pipes_in_a_folder(copy, tmp_path) -> None:
    """A link is what it leads to, as in the hub's cache; what is no file is not waited for."""
    shard = next(copy.glob("model-block-*.safetensors"))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert not problems(copy)
    for make in (lambda: os.mkfifo(shard), lambda: shard.symlink_to("/dev/zero"), lambda: shard.symlink_to("nothing")):
        shard.unlink()
        make()
        assert any(p.where == shard.name for p in problems(copy))
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    assert any(p.where == "config.json" for p in problems(copy))
    (copy / MANIFEST).unlink()
    os.mkfifo(copy / MANIFEST)
    assert [p.where for p in problems(copy)] == [MANIFEST]


def test_no_codec_is_imported_by_a_name_in_a_file() -> None:
    for name in ("os", "halfbit.cli", "_order", "../formats/spqr", "spqr.kernels", "__init__", ""):
        with pytest.raises(HalfbitError):
            formats.from_config({"name": name})


def test_manifests_are_read_as_they_were_written(copy) -> None:
    manifest = read_manifest(copy)
    assert parse_manifest(copy / MANIFEST) == manifest
    assert text_of(manifest).encode() == (copy / MANIFEST).read_bytes()
    assert set(manifest["headers"]) == {p.name for p in copy.glob("*.safetensors")}
    for path in copy.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert manifest["tensors"][name]["xxh3"] == fast_checksum(tensor)
