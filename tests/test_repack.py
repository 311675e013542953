"""Layouts: every weight stays, bytes change, and a repack that is interrupted goes on to the same files. What is
compressed in a layout is what a repack would make of it, or keeps its bits in that layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed import Made, chosen, edit_manifest, inputs, load, text
from safetensors.torch import load_file

from halfbit.compress import compress
from halfbit.errors import FormatError, OutputError, UnknownName
from halfbit.folder import verify
from halfbit.formats.grouped import Grouped
from halfbit.formats.qmoe import QMoE
from halfbit.formats.quads import Quads
from halfbit.formats.runlength import RunLength
from halfbit.grids.deadzone import Deadzone
from halfbit.grids.ternary import Ternary
from halfbit.manifest import Problem, read_manifest
from halfbit.recipe import Recipe
from halfbit.repack import in_layout, repack
from halfbit.solve.rtn import rtn
from halfbit.types import Codec, Packed

MANY = """
[[rules]]
match = "*.0"
grid = { name = "ternary" }
codec = { name = "qmoe" }
[[rules]]
match = "*.1"
grid = { name = "affine", bits = 3, group = 16 }
codec = { name = "grouped", bits = 3, group = 16 }
[[rules]]
match = "*experts*"
grid = { name = "deadzone", spread = 2.4 }
codec = { name = "runlength", rotated = true }
"""


def solved(codec: object, grid: object) -> Packed:
    w = torch.randn(1, 40, 300, generator=torch.Generator().manual_seed(0))
    # rows of zeros, constant ones, and of one sign
    w[:, ::9], w[:, 1::9], w[:, 2::9] = 0, 0.7, w[:, 2::9].abs()
    (solution,) = rtn(w, None, grid, names=["w"])  # type: ignore[arg-type]
    return codec.encode(solution)  # type: ignore[attr-defined]


@pytest.mark.parametrize("codec", [RunLength(), RunLength(scale_bits=3), RunLength(scale_bits=0), QMoE()], ids=repr)
def test_there_and_back_every_weight_is_the_same(codec: object):
    scale_bits = getattr(codec, "scale_bits", 0)
    small = solved(codec, Deadzone(scale_bits, spread=2.4) if scale_bits else Ternary())
    fast = in_layout(small, "fast")
    back = in_layout(fast, "compact")
    assert (fast.codec, back.codec) == (Quads(scale_bits), RunLength(scale_bits))
    for packed in (fast, back):
        packed.codec.check(packed)
        assert torch.equal(packed.codec.decode(packed), small.codec.decode(small))
    if isinstance(codec, RunLength):
        assert all(torch.equal(back.tensors[part], small.tensors[part]) for part in small.codec.parts)


def test_what_has_no_other_layout_stays():
    other = solved(Grouped(), Grouped().grid)
    assert in_layout(other, "fast") is other
    fast = in_layout(solved(RunLength(), Deadzone(5)), "fast")
    assert in_layout(fast, "fast") is fast


@pytest.fixture
def small(made: Callable[[str, str], Made]) -> Made:
    return made("qwen3-moe", MANY)


def test_a_model_computes_what_it_did_and_says_its_own_bytes(small: Made, tmp_path: Path):
    events = list(repack(small.folder, tmp_path / "fast", "fast"))
    assert events[-1].folder == tmp_path / "fast"  # type: ignore[union-attr]
    assert not [found for found in verify(tmp_path / "fast") if isinstance(found, Problem)]
    before, after = read_manifest(small.folder), read_manifest(tmp_path / "fast")
    codecs = {c["codec"]["name"] for p in after["packed"].values() for c in p.values()}
    assert codecs <= {"mixed", "quads", "grouped"}
    assert set(before["matrices"]) == set(after["matrices"])
    assert any(before["matrices"][name] != fact for name, fact in after["matrices"].items())
    for name, fact in after["matrices"].items():
        assert fact["loss"] == before["matrices"][name]["loss"]
    model = load(tmp_path / "fast")
    with torch.no_grad():
        there, here = model(**inputs(model)).logits, small.model(**inputs(small.model)).logits
    assert float((there - here).abs().max()) <= 1e-4 * float(here.abs().max())
    # and back: the same weights in every tensor that is not qmoe's
    list(repack(tmp_path / "fast", tmp_path / "compact", "compact"))
    dense = [
        {(path, projection): entry.codec.decode(entry) for path, projection, entry in packed_of(folder)}
        for folder in (small.folder, tmp_path / "compact")
    ]
    assert dense[0].keys() == dense[1].keys()
    assert all(torch.equal(dense[0][key], dense[1][key]) for key in dense[0])


def packed_of(folder: Path) -> list[tuple[str, str, Packed]]:
    from halfbit.layout import Entry

    manifest, found = read_manifest(folder), []
    tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    for path, projections in manifest["packed"].items():
        for projection, config in projections.items():
            entry = Entry.parse(config, path)
            parts = {part: tensors[name] for part, name in entry.stored(path, projection).items()}
            found.append((path, projection, entry.packed(parts)))
    return found


def test_an_interrupted_repack_goes_on_to_the_same_files(small: Made, tmp_path: Path):
    list(repack(small.folder, tmp_path / "whole", "fast"))
    for event in repack(small.folder, tmp_path / "again", "fast"):
        if type(event).__name__ == "BlockDone":
            break
    with pytest.raises(OutputError, match="holds another run"):
        list(repack(small.folder, tmp_path / "again", "compact"))
    events = list(repack(small.folder, tmp_path / "again", "fast"))
    assert events[0].resumed == 1  # type: ignore[union-attr]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_what_cannot_be_repacked_is_said(small: Made, tmp_path: Path):
    with pytest.raises(UnknownName, match="layout 'small'; known: compact, fast"):
        next(repack(small.folder, tmp_path / "out", "small"))
    with pytest.raises(OutputError, match="is the source"):
        next(repack(small.folder, small.folder, "fast"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in small.folder.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    shard = next(copy.glob("model-block*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FormatError, match="differs from what was written"):
        list(repack(copy, tmp_path / "out", "fast"))
    edit_manifest(copy, lambda manifest: manifest.update(complete=False))
    with pytest.raises(FormatError, match="has not finished"):
        next(repack(copy, tmp_path / "out", "fast"))


OPTIONS = """
[[rules]]
match = "*experts*"
bits = 3.2
[[rules.options]]
grid = { name = "deadzone" }
codec = { name = "runlength", rotated = true }
[[rules.options]]
grid = { name = "affine", bits = 3, group = 16 }
codec = { name = "grouped", bits = 3, group = 16 }
"""


def test_a_recipe_in_a_layout_has_other_codecs_for_ternary_matrices_and_no_other_change():
    for rules in (MANY, OPTIONS):
        recipe = chosen(rules)
        fast = recipe.in_layout("fast")
        assert not any(isinstance(codec, RunLength | QMoE) for codec in codecs_of(fast))
        assert any(isinstance(codec, Quads) for codec in codecs_of(fast))
        assert any(isinstance(codec, Grouped) for codec in codecs_of(fast))
        back = fast.in_layout("compact")
        assert back.to_toml() == recipe.in_layout("compact").to_toml()
        assert fast.to_toml() == back.in_layout("fast").to_toml()
    with pytest.raises(UnknownName, match="layout 'small'; known: compact, fast"):
        chosen(MANY).in_layout("small")


def codecs_of(recipe: Recipe) -> list[Codec]:
    rules = [r for rule in recipe.rules for r in (rule.options or (rule,))]
    return [rule.codec for rule in rules if rule.codec is not None]


def test_compressed_in_a_layout_is_what_a_repack_makes_of_it(small: Made, tmp_path: Path):
    events = list(compress(str(small.source), tmp_path / "fast", chosen(MANY).in_layout("fast"), text(small.source)))
    assert type(events[-1]).__name__ == "Finished"
    list(repack(small.folder, tmp_path / "repacked", "fast"))
    one, other = (read_manifest(tmp_path / name) for name in ("fast", "repacked"))
    assert one["packed"] == other["packed"]
    assert one["tensors"] == other["tensors"]
    assert one["matrices"] == other["matrices"]
    assert not [found for found in verify(tmp_path / "fast") if isinstance(found, Problem)]


def test_bits_are_counted_in_the_layout_that_is_written(small: Made, tmp_path: Path):
    recipe = chosen(OPTIONS).in_layout("fast")
    for event in compress(str(small.source), tmp_path / "out", recipe, text(small.source), accept=["all"]):
        if type(event).__name__ == "BlockDone":
            break
    # an interrupted run is one of its layout
    with pytest.raises(OutputError, match="recipe"):
        list(compress(str(small.source), tmp_path / "out", chosen(OPTIONS), text(small.source)))
    list(compress(str(small.source), tmp_path / "out", recipe, text(small.source), accept=["all"]))
    packed = packed_of(tmp_path / "out")
    assert {codec.name for _, _, p in packed for codec in getattr(p.codec, "codecs", (p.codec,))} <= {
        "quads",
        "grouped",
    }
    stored = 8 * sum(t.nbytes for _, _, p in packed for t in p.tensors.values())
    # matrices this small have few rates to choose from
    assert stored / sum(p.shape[0] * p.shape[1] for _, _, p in packed) == pytest.approx(3.2, rel=0.1)
