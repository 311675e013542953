"""Published QMoE checkpoints: experts bit for bit, the model by its logits, every damage by name, no pickle is run."""

import io
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from published import EPSILON, GOLDEN, QMOE, Edit, change, problems, put, qmoe_with, run
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

import halfbit
from halfbit.errors import FormatError
from halfbit.importers.qmoe import _unpickle
from halfbit.nn import PackedExperts
from halfbit.reader import Folder


@pytest.fixture(scope="module")
def qmoe(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("qmoe") / "out"
    run(QMOE, out)
    return out


def test_published_experts_are_taken_over_bit_for_bit(qmoe) -> None:
    expected = load_file(GOLDEN / "qmoe" / "expected_experts.safetensors")
    model = halfbit.load(str(qmoe))
    seen = 0
    for path, module in model.named_modules():
        if isinstance(module, PackedExperts):
            for projection in ("wi", "wo"):
                matrix = module.matrix(projection)
                dense = matrix.codec.decode(matrix.packed()).view(matrix.shape)
                for expert in range(16):
                    assert torch.equal(dense[expert], expected[f"{path}.expert_{expert}.{projection}.weight"].float())
                    seen += 1
    assert seen == len(expected) == 96
    logits = load_file(GOLDEN / "qmoe" / "expected_logits.safetensors")
    with torch.no_grad():
        found = model(input_ids=logits["input_ids"], decoder_input_ids=logits["decoder_input_ids"]).logits
    assert (found - logits["logits"]).abs().max() <= 16 * EPSILON * logits["logits"].abs().max()


def test_the_qmoe_folder_loads_generates_verifies_and_saves(qmoe, tmp_path) -> None:
    assert problems(qmoe) == []
    assert AutoModelForSeq2SeqLM.from_pretrained(qmoe).dtype == torch.bfloat16
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(qmoe, dtype=torch.float32)
    given = load_file(GOLDEN / "qmoe" / "expected_logits.safetensors")
    ids = {"input_ids": given["input_ids"], "decoder_input_ids": given["decoder_input_ids"]}
    with torch.no_grad():
        logits = model(**ids).logits
    written = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(written[:, 11], logits[:, -1].argmax(-1))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(**ids).logits, logits)


def test_codewords_and_other_weights_are_as_published(qmoe) -> None:
    source = torch.load(QMOE / "noexp.pt", weights_only=True)
    experts = torch.load(QMOE / "exp01.pt", weights_only=True)
    written = {n: t for f in qmoe.glob("*.safetensors") for n, t in load_file(f).items()}
    path = "encoder.block.3.layer.1.mlp.experts"
    codewords = torch.cat([experts[f"{path}.expert_{e}.wo.w_comp"] for e in range(16)])
    assert torch.equal(written[f"{path}.packed_wo.codewords"].view(torch.int16), codewords)
    # copies of the embedding are stored once
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    plain = {n: t for n, t in written.items() if ".packed_" not in n}
    assert set(plain) == set(source) - copies
    assert all(torch.equal(t, source[n]) and t.dtype == source[n].dtype for n, t in plain.items())


def test_weights_in_float32_stay_in_float32(tmp_path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "norm" in name or "shared" in name or "embed" in name or "lm_head" in name or "bias" in name:
                tensors[name] = tensors[name].float()

    source = qmoe_with(tmp_path / "source", "noexp.pt", edit)
    run(source, tmp_path / "out")
    assert problems(tmp_path / "out") == []
    written = {n: t for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items()}
    assert written["shared.weight"].dtype == written["encoder.final_layer_norm.weight"].dtype == torch.float32
    assert written["encoder.block.0.layer.0.SelfAttention.q.weight"].dtype == torch.bfloat16
    halfbit.load(str(tmp_path / "out"))


WI = "encoder.block.1.layer.1.mlp.experts.expert_5.wi"
WO = "decoder.block.1.layer.2.mlp.experts.expert_0.wo"
# file, change, what the message must say; the file is in every message
DAMAGED_QMOE: dict[str, tuple[str, Edit, str]] = {
    "a matrix without codewords": ("exp00.pt", lambda t: t.pop(f"{WI}.w_comp"), f"{WI}.w_comp is missing"),
    "a matrix is missing": (
        "exp02.pt",
        lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{WO}.")],
        f"{WO}.row_off is missing",
    ),
    "a tensor too much": ("exp00.pt", lambda t: t.update({f"{WI}.bias": torch.ones(1)}), f"{WI}.bias is no part"),
    "experts of another module": ("exp00.pt", lambda t: t.update({f"{WO}.x": torch.ones(1)}), f"{WO}.x is no part"),
    "something else than a tensor": ("exp00.pt", lambda t: t.update({f"{WI}.w_comp": 3}), "expected a tensor, got int"),
    "codewords of another dtype": (
        "exp00.pt", change(f"{WI}.w_comp", lambda t: t.int()), f"{WI}.w_comp: expected torch.int16"),
    "codewords of two dimensions": ("exp00.pt", change(f"{WI}.w_comp", lambda t: t[None]), f"{WI}.w_comp: expected"),
    "too few offsets": ("exp00.pt", change(f"{WI}.row_off", lambda t: t[1:]), "row_off: expected torch.int32 [97]"),
    "offsets that fall": ("exp00.pt", change(f"{WI}.row_off", put(4, 300)), "and falling in between"),
    "offsets that begin later": ("exp00.pt", change(f"{WI}.row_off", put(0, 1)), "got 1 to"),
    "levels of too few rows": ("exp00.pt", change(f"{WI}.ter_minmax", lambda t: t[:95]), "ter_minmax: expected"),
    "a level that is infinite": (
        "exp00.pt", change(f"{WI}.ter_minmax", put(3, float("inf"))), f"{WI}: qmoe: a level is NaN"),  # pyright: ignore[reportArgumentType]
    "a codeword cut off": ("exp00.pt", change(f"{WI}.w_comp", lambda t: t[:-1]), "offsets must rise"),
    "rows of other widths": ("exp00.pt", change(f"{WI}.w_comp", lambda t: t.flip(0)), f"{WI}: qmoe:"),
    "a size that is another": ("sizes.pt", lambda t: t.update({WI: 7}), f"{WI}: says 7 codewords"),
    "a size that is no number": ("sizes.pt", lambda t: t.update({WI: "many"}), f"{WI}: says 'many'"),
    "a size that is missing": ("sizes.pt", lambda t: t.pop(WO), f"{WO} is missing"),
    "a size of nothing": ("sizes.pt", lambda t: t.update({"x": 1}), "x is not among the experts"),
    "a tensor larger than its bytes": (
        "exp00.pt", change(f"{WI}.w_comp", lambda t: t[:1].expand(1 << 40)), f"{WI}.w_comp: is not a plain tensor"),
    "a tensor in two files": ("noexp.pt", lambda t: t.update({f"{WI}.w_comp": torch.ones(1)}), "is in noexp.pt too"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED_QMOE)
def test_damaged_qmoe_checkpoints_are_named(damage: str, tmp_path) -> None:
    file, edit, says = DAMAGED_QMOE[damage]
    source = qmoe_with(tmp_path / "source", file, edit)
    with pytest.raises(FormatError) as error:
        run(source, tmp_path / "out")
    assert says in str(error.value)
    assert file in str(error.value) or damage == "a tensor in two files"
    assert not (tmp_path / "out" / "config.json").exists()


def test_qmoe_files_too_many_or_too_few_are_named(tmp_path) -> None:
    changes: list[tuple[Callable[[Path], object], str]] = [
        (lambda f: (f / "exp02.pt").unlink(), "exp02.pt"),
        (lambda f: (f / "noexp.pt").unlink(), "noexp.pt"),
        (lambda f: (f / "sizes.pt").unlink(), "sizes.pt"),
        (lambda f: torch.save({"x": torch.ones(1)}, f / "exp03.pt"), "exp03.pt: holds x"),
        (lambda f: os.truncate(f / "exp01.pt", 5000), "exp01.pt"),
        (lambda f: (f / "exp01.pt").write_bytes(b"no pickle"), "exp01.pt"),
        (lambda f: torch.save([1, 2], f / "sizes.pt"), "expected a dictionary by name"),
    ]
    for number, (edit, says) in enumerate(changes):
        source = Path(shutil.copytree(QMOE, tmp_path / f"source-{number}"))
        edit(source)
        with pytest.raises(FormatError) as error:
            run(source, tmp_path / "out")
        assert says in str(error.value)


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_is_run(tmp_path) -> None:
    for file in ("noexp.pt", "sizes.pt", "exp01.pt"):
        source = Path(shutil.copytree(QMOE, tmp_path / file))
        torch.save({"x": Hostile(tmp_path / "run")}, source / file)
        with pytest.raises(FormatError, match=file):
            run(source, tmp_path / "out")
    assert not (tmp_path / "run").exists()


def in_zip(program: bytes | bytearray) -> bytes:
    """A file of torch.save with this pickle in it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, content in (
            ("data.pkl", program),
            ("version", b"3\n"),
            ("byteorder", b"little"),
            ("data/0", b"1234"),
        ):
            file.writestr(f"a/{name}", content)
    return made.getvalue()


def saved(content: object, **options: bool) -> bytes:
    made = io.BytesIO()
    torch.save(content, made, **options)
    return made.getvalue()


TENSORS = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bfloat16), "c": 7}
WHOLE = (saved(TENSORS), saved(TENSORS, _use_new_zipfile_serialization=False), pickle.dumps({"a": 1}, 2))
# pickles that make torch.load raise what random damage seldom does
CRAFTED = {
    "more bytes than there are": in_zip(b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + b"\xff" * 7 + b"\x0f\x85R."),
    "more bytes than a number": in_zip(b"\x80\x02cbuiltins\nbytearray\n\x8a\x09" + b"\xff" * 8 + b"\x0f\x85R."),
    "nothing on the stack": in_zip(b"\x80\x02R."),
    "an encoding of no name": in_zip(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x01\x00\x00\x00b\x86R."),
    "a call of no function": in_zip(b"\x80\x02ctorch\nfloat32\n)R."),
    "a memo without an entry": in_zip(b"\x80\x02h\x01."),
    "a parameter of a number": in_zip(b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\x01\x89}\x87R."),
    "lists in lists": in_zip(b"(" * 5000 + b"t" * 5000 + b"."),
    "an end too early": in_zip(b"\x80\x02X\xff\xff"),
    "an archive whose end is lost": saved({"a": torch.ones(3000)})[:-5],
    "no zip after all": b"PK\x03\x04" + WHOLE[0][4:100],
}  # fmt: skip


def damaged_at_random(count: int) -> Iterator[bytes | bytearray]:
    """Cut off, bits flipped, a piece lost, other bytes in the pickle of a whole archive, garbage."""
    chance = random.Random(0)
    with zipfile.ZipFile(io.BytesIO(WHOLE[0])) as file:
        inner = next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))
    for _ in range(count):
        whole = bytearray(chance.choice(WHOLE))
        start, stop = sorted(chance.choices(range(len(whole)), k=2))
        for _ in range(chance.choice([1, 3, 30])):
            whole[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        program = bytearray(inner)
        program[chance.randrange(len(program))] = chance.randrange(256)
        yield chance.choice(
            [whole, whole[:stop], whole[:start] + whole[stop:], in_zip(program), chance.randbytes(stop)]
        )


# torch.load itself warns of pickles of other protocols
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles_are_named_whatever_torch_makes_of_them(tmp_path) -> None:
    path, told = tmp_path / "exp00.pt", {}
    for name, content in (*CRAFTED.items(), *enumerate(damaged_at_random(500))):
        path.write_bytes(content)
        try:
            _unpickle(Folder(tmp_path), path.name)
        except FormatError as error:
            told[name] = str(error)
    assert CRAFTED.keys() <= told.keys()
    assert len(told) > 400
    assert all(message.startswith(f"{path}: ") for message in told.values())
