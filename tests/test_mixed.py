"""Stacks whose matrices are in several formats: bytes, products, hostile configs and tensors, and a whole model."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import conformance
import pytest
import torch
from compressed import largest_difference, load, with_experts
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbit import formats, recipe
from halfbit.compress import compress
from halfbit.errors import FormatError, HalfbitError, RecipeError, Unsupported
from halfbit.evaluate import evaluate
from halfbit.events import Noticed
from halfbit.folder import Problem, inspect, verify
from halfbit.formats.grouped import Grouped
from halfbit.formats.mixed import Mixed
from halfbit.formats.qmoe import QMoE
from halfbit.formats.runlength import RunLength
from halfbit.formats.spqr import SpQR
from halfbit.layout import Entry, stored_name
from halfbit.manifest import read_manifest, unverified
from halfbit.nn import PackedExperts, PackedMatrix
from halfbit.reader import Reader
from halfbit.recipe import Recipe, Tuning
from halfbit.samples import causal_samples, load_tokenizer
from halfbit.tune import tune
from halfbit.types import Codec, Packed
from halfbit.writer import Writer

TINY = Path(__file__).parent.parent / "examples" / "tiny-moe"

# what the experts of a module may lie in, and the codec of each
STACKS: dict[str, list[Codec]] = {
    "ternary and spqr": [RunLength(), SpQR(bits=2, group=8), RunLength(), RunLength(), SpQR(bits=4), RunLength()],
    "the odd one first": [SpQR(), RunLength(), RunLength()],
    "the odd one last": [RunLength(), RunLength(), Grouped(bits=4, group=5, symmetric=True)],
    "fields differ": [RunLength(scale_bits=3), RunLength(scale_bits=5), RunLength(scale_bits=0)],
    "all": [QMoE(), Grouped(), SpQR(bits=8, group=None), RunLength(), Grouped(), QMoE()],
}
stacks = pytest.mark.parametrize("codecs", STACKS.values(), ids=STACKS)


def matrices(codecs: list[Codec], rows: int = 17, columns: int = 37, kind: int = -1) -> list[Packed]:
    """One per codec; of kind -1 with orders and outliers where a codec stores such."""
    return [
        codec.encode(list(conformance.solutions_for(codec, rows, columns, seed=n))[kind])
        for n, codec in enumerate(codecs)
    ]


def mixed(codecs: list[Codec]) -> Mixed:
    return Mixed(tuple(dict.fromkeys(codecs)))


# --- bytes


@stacks
@pytest.mark.parametrize("kind", [0, -1])
@pytest.mark.parametrize(("rows", "columns"), [(17, 37), (1, 1), (33, 300)])
def test_every_matrix_comes_back_as_it_was(codecs: list[Codec], kind: int, rows: int, columns: int) -> None:
    parts = matrices(codecs, rows, columns, kind)
    whole = conformance.check_cuts(mixed(codecs), parts)
    again = formats.stack(parts)
    assert again.codec == whole.codec
    assert again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(again.tensors[k], whole.tensors[k]) for k in whole.tensors)
    assert whole.tensors["which"].tolist() == [mixed(codecs).codecs.index(c) for c in codecs]
    # stacks of each codec, and one byte per matrix; an order that all share is stored once
    assert whole.nbytes <= sum(part.nbytes for part in parts) + len(parts)


def test_empty_matrices_too() -> None:
    for rows, columns in ((0, 5), (3, 0), (0, 0)):
        parts = matrices([RunLength(), Grouped()], 4, 32)
        parts = [p.codec.encode(_cut(p.codec, rows, columns)) for p in parts]
        conformance.check_cuts(mixed([RunLength(), Grouped()]), parts)


def _cut(codec: Codec, rows: int, columns: int) -> conformance.Solution:
    whole = next(iter(conformance.solutions_for(codec, 4, 32)))
    params = {k: v[:rows] if v.shape[0] == 4 else v for k, v in whole.params.items()}
    return replace(whole, codes=whole.codes[:rows, :columns], params=params)


def test_one_codec_is_not_mixed() -> None:
    parts = matrices([SpQR(), SpQR(), SpQR()])
    whole, own = formats.stack(parts), SpQR().stack(parts)
    assert whole.codec == SpQR()
    assert all(torch.equal(whole.tensors[k], own.tensors[k]) for k in own.tensors)


def test_mixed_stacks_are_stacked_matrix_by_matrix() -> None:
    first, second = matrices([RunLength(), SpQR(), RunLength()]), matrices([SpQR(), Grouped()])
    whole = formats.stack([formats.stack(first), formats.stack(second), first[0]])
    flat = formats.stack([*first, *second, first[0]])
    assert whole.codec == flat.codec == mixed([RunLength(), SpQR(), Grouped()])
    assert whole.shape == flat.shape == (6 * 17, 37)
    assert all(torch.equal(whole.tensors[k], flat.tensors[k]) for k in flat.tensors)
    # two mixed ones whose matrices are of one codec each
    ternary = [formats.stack(first).codec.part(formats.stack(first), n, 3) for n in (0, 2)]
    assert formats.stack(ternary).codec == RunLength()


def test_what_does_not_fit_is_not_stacked() -> None:
    codec = mixed([RunLength(), SpQR()])
    with pytest.raises(ValueError, match="one shape"):
        codec.stack([*matrices([RunLength()], 3, 8), *matrices([SpQR()], 4, 8)])
    with pytest.raises(ValueError, match=r"of each, got RunLength\(.*\)$"):
        codec.stack(matrices([RunLength(), RunLength()]))
    with pytest.raises(ValueError, match=r"got .*Grouped"):
        codec.stack(matrices([RunLength(), SpQR(), Grouped()]))
    with pytest.raises(ValueError, match="has 3 matrices, not 2"):
        codec.part(codec.stack(matrices([RunLength(), SpQR(), SpQR()])), 0, 2)
    with pytest.raises(Unsupported, match="encode each with its own codec"):
        codec.encode(next(iter(conformance.solutions_for(SpQR(), 3, 8))))
    with pytest.raises(Unsupported, match="not looked up"):
        codec.lookup(torch.tensor([0]), [], 37)
    with pytest.raises(RecipeError, match="2 to 16 codecs, got 17"):
        formats.stack(matrices([Grouped(bits=4, group=g) for g in range(1, 18)]))


# --- products


@stacks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens",
    [
        [0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 1],
        [5, 1, 2, 0, 3, 1],
        [1, 40, 0, 17, 2, 0],
        [0, 0, 40, 0, 0, 33],
    ],
    ids=str,
)
def test_the_product_is_as_exact_as_torch(codecs: list[Codec], tokens: list[int], dtype: torch.dtype) -> None:
    parts = matrices(codecs, 21, 63)
    dense = [part.codec.decode(part) for part in parts]
    conformance.check_product_of(formats.stack(parts), dense, tokens[: len(parts)], dtype)


def test_tokens_of_one_codec_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    codecs = [RunLength(), RunLength(), SpQR(), RunLength()]
    whole = formats.stack(matrices(codecs))
    operands = whole.codec.runtime(whole)
    seen = []
    product = RunLength.product
    monkeypatch.setattr(RunLength, "product", lambda self, x, *rest: seen.append(x) or product(self, x, *rest))
    x = torch.randn(7, 37)
    # the empty group between them is another codec's
    y = whole.codec.product(x, torch.tensor([0, 0, 4, 4, 7]), operands, 17)
    assert [(t.data_ptr(), t.shape) for t in seen] == [(x.data_ptr(), x.shape)]
    assert y.shape == (7, 17)
    # neighbours are one slice, and a slice is no copy
    whole.codec.product(x, torch.tensor([0, 2, 4, 7, 7]), operands, 17)
    assert (seen[1].data_ptr(), len(seen[1])) == (x.data_ptr(), 4)


@pytest.mark.parametrize("starts", [[0, 3], [0, 1, 2, 5], [1, 2, 3, 7], [0, 5, 2, 7], [0, 1, 2, 3, 7]], ids=str)
def test_starts_that_fit_no_stack_are_refused(starts: list[int]) -> None:
    whole = formats.stack(matrices([RunLength(), SpQR(), RunLength()]))
    with pytest.raises(ValueError, match="starts must rise from 0 to the number of tokens, 7"):
        whole.codec.product(torch.randn(7, 37), torch.tensor(starts), whole.codec.runtime(whole), 17)


# --- hostile configs and tensors


@stacks
def test_a_codec_is_its_configuration(codecs: list[Codec]) -> None:
    codec = mixed(codecs)
    kinds = {type(c).__name__: type(c) for c in (codec, *codecs)}
    assert eval(repr(codec), kinds) == codec
    assert formats.from_config(json.loads(json.dumps(formats.to_config(codec)))) == codec
    assert formats.to_config(codec)["codecs"] == [formats.to_config(c) for c in codec.codecs]
    assert len(set(codec.parts)) == len(codec.parts)
    assert not [part for part in codec.parts if "." in part]


RUNLENGTH, SPQR = formats.to_config(RunLength()), formats.to_config(SpQR())


@pytest.mark.parametrize(
    ("codecs", "says"),
    [
        (None, "codecs must be a list, got None"),
        ({"0": RUNLENGTH, "1": SPQR}, "must be a list"),
        ("spqr", "must be a list"),
        ([], "2 to 16 codecs, got 0"),
        ([RUNLENGTH], "2 to 16 codecs, got 1"),
        ([{"name": "grouped", "group": g} for g in range(1, 18)], "2 to 16 codecs, got 17"),
        ([RUNLENGTH, SPQR, RUNLENGTH], r"different, got RunLength\(.*\) twice"),
        # the same codec, said in two ways
        ([RUNLENGTH, {"name": "runlength"}], r"different, got RunLength\(.*\) twice"),
        ([RUNLENGTH, "spqr"], "expected an object with a name, got 'spqr'"),
        ([RUNLENGTH, ["spqr"]], "expected an object with a name"),
        ([RUNLENGTH, {"name": "nothing"}], "unknown format 'nothing'"),
        ([RUNLENGTH, {"name": "spqr", "bits": 3.5}], "SpQR: bits must be int"),
        ([RUNLENGTH, {"name": "spqr", "bits": 1}], "SpQR: bits"),
        ([RUNLENGTH, {"name": "mixed", "codecs": [RUNLENGTH, SPQR]}], "Mixed: cannot be inside"),
    ],
)
def test_damaged_configs_are_refused(codecs: object, says: str) -> None:
    with pytest.raises(HalfbitError, match=says):
        formats.from_config({"name": "mixed", "codecs": codecs})
    with pytest.raises(FormatError, match=says):
        Entry.parse({"codec": {"name": "mixed", "codecs": codecs}, "shape": [2, 3, 4], "tensors": {}}, "here")


def test_damaged_configs_of_other_shapes() -> None:
    for config in ({"name": "mixed"}, {"name": "mixed", "codecs": [RUNLENGTH, SPQR], "codec": SPQR}):
        with pytest.raises(FormatError):
            formats.from_config(config)
    deep: dict = {"name": "mixed", "codecs": []}
    for _ in range(5000):
        deep = {"name": "mixed", "codecs": [RUNLENGTH, deep]}
    with pytest.raises(FormatError, match="cannot be inside"):
        formats.from_config(deep)
    with pytest.raises(RecipeError, match="mixed itself"):
        Mixed((RunLength(), mixed([RunLength(), SpQR()])))


def test_no_rule_of_a_recipe_can_ask_for_it() -> None:
    text = """
        [[rules]]
        match = "*"
        grid = { name = "affine", bits = 2 }
        codec = { name = "mixed", codecs = [{ name = "grouped", bits = 2 }, { name = "grouped", bits = 3 }] }
        """
    with pytest.raises(RecipeError, match="do not fit together: mixed"):
        recipe.Recipe.from_toml(text)


@stacks
def test_damage_is_an_error_or_another_matrix_never_a_crash(codecs: list[Codec]) -> None:
    whole = formats.stack(matrices(codecs))
    assert conformance.check_damage_never_crashes(whole.codec, whole) > 0


@pytest.mark.parametrize(
    ("part", "damage", "tensor", "says"),
    [
        ("which", lambda t: t + 1, "which", r"each of 2 codecs and no other, got \[1, 2\]"),
        ("which", lambda t: torch.tensor([0, 1, 2]).to(t), "which", r"no other, got \[0, 1, 2\]"),
        ("which", lambda t: t * 0, "which", "each of 2 codecs"),
        ("which", lambda t: t * 0 + 255, "which", "each of 2 codecs"),
        ("which", lambda t: t[:0], "which", "each of 2 codecs"),
        ("which", lambda t: t[:2], "which", "51 rows are not 2"),
        ("which", lambda t: t[None], "which", r"uint8 \[matrices\], got torch.uint8 \[1, 3\]"),
        ("which", lambda t: t.int(), "which", "got torch.int32"),
        ("which", lambda t: 1 - t, "0_exponents", "mixed: codec 0: runlength: "),
        ("0_exponents", lambda t: t + 9, "0_exponents", "mixed: codec 0: runlength: exponents must be"),
        ("0_stream", lambda t: t[:-1], "0_tile_bytes", "mixed: codec 0: runlength: the tiles have"),
        ("1_codes", lambda t: t.float(), "1_codes", "mixed: codec 1: spqr: "),
        ("1_order", lambda t: t * 0, "1_order", "mixed: codec 1: spqr: .*no permutation"),
    ],
)
def test_damaged_tensors_are_named(part: str, damage: Callable[[Tensor], Tensor], tensor: str, says: str) -> None:
    whole = formats.stack(matrices([RunLength(), SpQR(), RunLength()]))
    damaged = Packed(whole.codec, whole.shape, whole.tensors | {part: damage(whole.tensors[part])})
    for look in (whole.codec.check, whole.codec.decode):
        with pytest.raises(FormatError, match=says) as caught:
            look(damaged)
        assert caught.value.tensor == tensor


def test_orders_of_another_number_of_matrices_are_found() -> None:
    """Two matrices of 16 rows, and four orders of which each could be that of 8 rows."""
    first, second, third, fourth = matrices([Grouped()] * 4, 16, 24)
    whole = formats.stack([first, *matrices([RunLength()], 16, 24), second])
    four = Grouped().stack([first, second, third, fourth]).tensors["order"]
    assert len(four) == 4
    with pytest.raises(FormatError, match="mixed: codec 0: expected a stack of 2: 4 orders"):
        whole.codec.check(Packed(whole.codec, whole.shape, whole.tensors | {"0_order": four}))


def test_a_packed_matrix_runs_it_and_moves_it() -> None:
    parts = matrices([RunLength(), SpQR(), RunLength()])
    whole = formats.stack(parts)
    entry = Entry.parse(json.loads(json.dumps(Entry.of(whole, 3).to_config())), "here")
    module = PackedMatrix(entry)
    module.load_state_dict({k: v.clone() for k, v in whole.tensors.items()})
    module.prepare()
    assert set(module.state_dict()) == set(whole.codec.parts)
    x, starts = torch.randn(6, 37), torch.tensor([0, 2, 5, 6])
    expected = torch.cat([x[a:b] @ p.codec.decode(p).T for p, a, b in zip(parts, (0, 2, 5), (2, 5, 6), strict=True)])
    assert torch.allclose(module(x, starts), expected, atol=1e-4)
    assert torch.allclose(module.half()(x, starts), expected, atol=1e-4)
    wrong = Entry.of(whole, 3)
    with pytest.raises(FormatError, match="expected a stack of"):
        replace(wrong, shape=(1, 51, 37)).check(whole)


# --- a whole model


TERNARY = """
    [[rules]]
    match = "*.experts.*"
    solver = "rtn"
    grid = { name = "deadzone" }
    codec = { name = "runlength" }
    """


def _compressed(out: Path, rules: str) -> None:
    found = Recipe.from_toml(rules) if "[[rules]]" in rules else recipe.load(rules)
    list(compress(str(TINY), out, found.calibrated(samples=8, sequence_length=64), str(TINY / "test.txt")))


def by_hand(first: Path, second: Path, out: Path, experts: list[bool]) -> Path:
    """A folder as `first`, in which some experts of one module are those of `second`."""
    path, manifests = "model.layers.1.mlp.experts", [read_manifest(f) for f in (first, second)]
    sources = [Writer(f, m["fingerprint"], m["about"]) for f, m in zip((first, second), manifests, strict=True)]
    writer = Writer(out, "by hand", manifests[0]["about"])
    for block, entry in manifests[0]["blocks"].items():
        tensors = sources[0].read(block)
        other = sources[1].read(block)
        for name, tensor in tensors.items():
            if not name.startswith(f"{path}.packed_"):
                writer.put(name, tensor)
        for module, projections in manifests[0]["packed"].items():
            if module != path or not any(name.startswith(f"{path}.") for name in tensors):
                if any(name.startswith(f"{module}.") for name in tensors):
                    writer.record("packed", module, projections)
                continue
            entries = {}
            for projection in projections:
                wholes = []
                for manifest, given in zip(manifests, (tensors, other), strict=True):
                    stored = Entry.parse(manifest["packed"][path][projection], projection)
                    parts = {part: given[stored_name(path, projection, part)] for part in stored.tensors}
                    wholes.append(stored.packed(parts))
                count = len(experts)
                chosen = [wholes[e].codec.part(wholes[e], n, count) for n, e in enumerate(experts)]
                # in the other order than `formats.stack` has, once
                codecs = [w.codec for w in (reversed(wholes) if projection == "down_proj" else wholes)]
                whole = Mixed(tuple(codecs)).stack(chosen)
                for part, tensor in whole.tensors.items():
                    writer.put(stored_name(path, projection, part), tensor)
                entries[projection] = Entry.of(whole, count).to_config()
            writer.record("packed", path, entries)
        writer.commit(block, entry["file"])
    for kind in ("matrices", "coverage"):
        writer.manifest[kind].update(manifests[0][kind])
    config = json.loads((first / "config.json").read_text("utf-8"))
    config["quantization_config"]["modules"] = writer.manifest["packed"]
    writer.finish(config, [first / n for n in manifests[0]["files"] if n.startswith("tokenizer")], TERNARY)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    _compressed(root / "ternary", TERNARY)
    _compressed(root / "four", "rtn-4-g32")
    return by_hand(root / "ternary", root / "four", root / "out", [n in (1, 6) for n in range(8)])


def test_a_model_with_a_mixed_module_gives_the_logits_of_its_decoded_weights(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert isinstance(experts, PackedExperts)
    assert experts.matrix("gate_up_proj").codec == mixed([RunLength(), Grouped(bits=4, group=32)])
    assert experts.matrix("down_proj").codec == mixed([Grouped(bits=4, group=32), RunLength()])
    ids = torch.randint(3, 4000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = with_experts(TINY, model)(ids, use_cache=False).logits
        found = model(ids, use_cache=False).logits
        one = model(ids[:1, :1], use_cache=False).logits
    assert largest_difference(found, expected) < 1e-4
    assert largest_difference(one, expected[:1, :1]) < 1e-4
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(ids, use_cache=False).logits, found)
    with torch.no_grad():
        # as near in bfloat16 as the decoded weights themselves; the median, since a router may send a token elsewhere
        halves, plain = (
            (m.bfloat16()(ids, use_cache=False).logits.float() - expected).abs().median()
            for m in (load(folder, torch.bfloat16), with_experts(TINY, model))
        )
    assert halves < 1.5 * plain


def test_a_folder_with_a_mixed_module_is_verified_counted_and_evaluated(folder: Path, tmp_path: Path) -> None:
    assert not [p for p in verify(folder) if isinstance(p, Problem)]
    told = inspect(folder)
    plain = inspect(folder.parent / "ternary")
    assert told["packed_weights"] == plain["packed_weights"]
    stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items() if ".packed_" in n}
    assert told["packed"]["experts"]["bytes"] == sum(t.nbytes for t in stored.values())
    assert told["bits_per_packed_weight"] > plain["bits_per_packed_weight"]
    figures = evaluate(str(folder), str(TINY / "test.txt"), sequence_length=64, max_tokens=512)
    assert figures.tokens == 8 * 63
    assert math.isfinite(figures.loss)
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    manifest = read_manifest(damaged)
    name = "model.layers.1.mlp.experts.packed_down_proj.which"
    file = damaged / manifest["tensors"][name]["file"]
    tensors = load_file(file)
    tensors[name] = 1 - tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    problems = [p for p in verify(damaged) if isinstance(p, Problem)]
    assert any("checksum differs" in p.message for p in problems)
    assert any("mixed: " in p.message for p in problems)
    with pytest.raises(FormatError, match="checksum differs"):
        load(damaged)
    with unverified(), pytest.raises(FormatError, match="mixed: "):
        load(damaged)


def test_ternary_experts_of_a_mixed_module_are_tuned_and_the_others_stay(folder: Path, tmp_path: Path) -> None:
    ids = load_tokenizer(str(TINY))((TINY / "calibration.txt").read_text("utf-8")[:20000])["input_ids"]
    samples = causal_samples(torch.tensor(ids[: 20 * 32]).view(20, 32), [])
    how = Tuning(steps=4, batch_tokens=4 * 32, held_back=0.2)
    writer = Writer(tmp_path / "out", "tuned", {})
    events = list(tune(Reader(str(TINY)), folder, writer, samples, how))
    notices = "\n".join(e.message for e in events if isinstance(e, Noticed))
    assert "layers.1.mlp.experts.down_proj: 2 of 8 experts are not ternary; they stay as they are" in notices
    assert "nats; kept" in notices
    assert not [p for p in verify(tmp_path / "out") if isinstance(p, Problem)]
    before, after = (load(f).get_submodule("model.layers.1.mlp.experts") for f in (folder, tmp_path / "out"))
    for name in ("gate_up_proj", "down_proj"):
        old, new = (m.matrix(name).packed() for m in (before, after))
        assert old.codec == new.codec
        for e in range(8):
            a, b = (p.codec.part(p, e, 8) for p in (old, new))
            assert a.codec == b.codec
            same = all(torch.equal(a.tensors[part], b.tensors[part]) for part in a.tensors)
            assert same == (e in (1, 6))
