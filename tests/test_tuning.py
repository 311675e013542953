"""Tuning: the divergence, what learns, that it is stored as it was learned, and that a killed run loses nothing."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from compressed import EVERYTHING, add_tokenizer, decoded, inputs, load, text
from safetensors.torch import load_file
from torch import Tensor

from halfbit import formats, recipe
from halfbit import tune as tuning_module
from halfbit.compress import UNTUNED, compress
from halfbit.errors import RecipeError
from halfbit.events import Event, Noticed, Tuned
from halfbit.families import open_family
from halfbit.folder import Problem, verify
from halfbit.formats.grouped import Grouped
from halfbit.formats.qmoe import QMoE
from halfbit.formats.quads import Quads
from halfbit.formats.runlength import RunLength
from halfbit.formats.spqr import SpQR
from halfbit.grids.deadzone import Deadzone
from halfbit.grids.ternary import Ternary
from halfbit.reader import Reader
from halfbit.recipe import Recipe
from halfbit.samples import causal_samples, with_noise
from halfbit.solve.rtn import rtn
from halfbit.teacher import K, ask, divergence
from halfbit.tunable import TunableMatrix, TunableStack
from halfbit.tune import Student
from halfbit.types import Codec, Grid, Packed
from halfbit.writer import Writer

SAMPLES, LENGTH = 24, 12


def source(root: Path, name: str = "qwen3-moe") -> Path:
    return add_tokenizer(tiny_models.save(name, root / "source"))


def chosen(name: str = "runlength", **fields) -> Recipe:
    found = recipe.load(name).calibrated(samples=6, sequence_length=LENGTH)
    return found.tuned(**{"steps": 12, "batch_tokens": 4 * LENGTH, "held_back": 0.2, **fields})


def run(model: Path, out: Path, how: Recipe) -> list[Event]:
    return list(compress(str(model), out, how, text(model, SAMPLES * LENGTH)))


def notices(events: list[Event]) -> str:
    return "\n".join(e.message for e in events if isinstance(e, Noticed))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# --- what is learned


def test_divergence_is_that_of_the_top_tokens_and_one_class_for_the_rest() -> None:
    random = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(5, 200, generator=random, dtype=torch.float64)).softmax(-1)
    q = torch.randn(5, 200, generator=random, dtype=torch.float64)
    logs, ids = p.log().topk(K, dim=-1)
    expected = 0.0
    for row in range(5):
        others = [i for i in range(200) if i not in ids[row].tolist()]
        q_row = q[row].softmax(-1)
        for i in ids[row].tolist():
            expected += float(p[row, i] * (p[row, i] / q_row[i]).log())
        expected += float(p[row, others].sum() * (p[row, others].sum() / q_row[others].sum()).log())
    assert float(divergence(q, ids, logs)) == pytest.approx(expected / 5, rel=1e-9)


def test_divergence_from_itself_is_nothing() -> None:
    logits = torch.randn(7, 90)
    logs, ids = logits.log_softmax(-1).topk(K, dim=-1)
    assert abs(float(divergence(logits, ids, logs))) < 1e-6


@pytest.mark.parametrize("name", ["qwen3-moe", "switch"])
def test_the_original_is_asked_block_by_block(name: str, tmp_path: Path) -> None:
    """What is kept are the model's own logits, of each of its tokens."""
    model = source(tmp_path, name)
    given = inputs(load(model))
    logits = load(model)(**given).logits
    ids = given["input_ids"]
    samples = causal_samples(ids, [])
    if name == "switch":
        decoder = given["decoder_input_ids"]
        samples = [
            type(s)(s.ids, s.keep, d, torch.ones_like(d, dtype=torch.bool), d)
            for s, d in zip(samples, decoder, strict=True)
        ]
    tokens, logs = ask(open_family(Reader(str(model))), samples, "cpu", torch.float32)
    expected = logits.log_softmax(-1).reshape(-1, logits.shape[-1])
    assert tokens.shape == (expected.shape[0], min(K, expected.shape[1]))
    found = expected.gather(1, tokens.long())
    assert torch.allclose(found, logs.float(), atol=2e-2, rtol=2e-3)
    assert torch.allclose(found, expected.topk(tokens.shape[1], dim=-1).values, atol=1e-4)


def test_noise_is_in_every_second_sample_and_follows_the_seed() -> None:
    samples = causal_samples(torch.zeros(4, 400, dtype=torch.int64), [])
    noisy = with_noise(samples, 0.25, 1000, seed=3)
    changed = [int((s.ids != 0).sum()) for s in noisy]
    assert changed[0] == changed[2] == 0
    assert all(60 < n < 140 for n in changed[1::2])
    assert all(int(s.ids.max()) < 1000 for s in noisy)
    assert torch.equal(with_noise(samples, 0.25, 1000, seed=3)[1].ids, noisy[1].ids)
    assert not torch.equal(with_noise(samples, 0.25, 1000, seed=4)[1].ids, noisy[1].ids)


# --- the matrices


def packed(codec: Codec, experts: int = 3) -> tuple[Packed, Tensor]:
    """A stack, and the weights that it was made of."""
    w = torch.randn(experts, 10, 40, generator=torch.Generator().manual_seed(3))
    # a row in which nothing but zeros is left
    w[1, 4] = 0.0
    grid = Deadzone(5, spread=2.4) if getattr(codec, "scale_bits", 0) else Ternary()
    parts = [codec.encode(s) for s in rtn(w, None, grid, names=["a", "b", "c"])]
    return codec.stack(parts), w


CODECS = [RunLength(), RunLength(scale_bits=0), QMoE(), Quads(), Quads(scale_bits=0)]


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_an_opened_matrix_is_what_was_stored(codec: Codec) -> None:
    stack, _ = packed(codec)
    dense = codec.decode(stack).view(3, 10, 40)
    matrix = TunableMatrix(stack, 3)
    assert torch.equal(torch.stack([weight() for weight in matrix.weights()]), dense)
    again = codec.stack(matrix.packed())
    # the grid of scales may have moved by its own rounding, the codes may not
    assert torch.equal(codec.decode(again).sign(), dense.flatten(0, 1).sign())
    assert torch.allclose(codec.decode(again), dense.flatten(0, 1), rtol=0.05)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_latent_values_round_to_the_codes_they_were_made_of(codec: Codec) -> None:
    stack, w = packed(codec)
    matrix = TunableMatrix(stack, 3, w)
    dense = codec.decode(stack).view(3, 10, 40)
    assert torch.equal(matrix.current().sign(), dense.sign())
    assert torch.equal(torch.stack([weight() for weight in matrix.weights()]), dense)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_gradients_are_those_of_the_weights_and_of_the_scales(codec: Codec) -> None:
    stack, w = packed(codec)
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    starts = torch.tensor([0, 2, 2, 6])
    opened = TunableStack(stack, 3, w)
    (matrix,) = opened.tunable
    y = opened(x, starts)
    (y * torch.arange(60.0).view(6, 10)).sum().backward()
    upstream = torch.arange(60.0).view(6, 10)
    assert matrix.latent is not None
    assert matrix.latent.grad is not None
    assert matrix.high.grad is not None
    for e, rows in ((0, slice(0, 2)), (2, slice(2, 6))):
        by_weight = upstream[rows].T @ x[rows]
        assert torch.allclose(matrix.latent.grad[e], by_weight, rtol=1e-5)
        # of a symmetric grid one number is both levels
        up, down = ((by_weight * matrix.current()[e].eq(sign)).sum(1, keepdim=True) for sign in (1, -1))
        if matrix.low is None:
            up, down = up - down, torch.zeros(10, 1)
        else:
            assert matrix.low.grad is not None
            assert torch.allclose(matrix.low.grad[e], down, rtol=1e-4, atol=1e-3)
        assert torch.allclose(matrix.high.grad[e], up, rtol=1e-4, atol=1e-3)
    assert not matrix.latent.grad[1].any()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_the_number_of_non_zeros_stays(codec: Codec) -> None:
    stack, w = packed(codec)
    matrix = TunableMatrix(stack, 3, w)
    before = matrix.current().ne(0).sum((1, 2))
    assert matrix.latent is not None
    with torch.no_grad():
        matrix.latent.mul_(1.7).add_(
            0.05 * torch.randn(matrix.latent.shape, generator=torch.Generator().manual_seed(5))
        )
    assert not torch.equal(matrix.current().ne(0).sum((1, 2)), before)
    matrix.keep_density()
    # a value at the threshold may fall on either side
    assert (matrix.current().ne(0).sum((1, 2)) - before).abs().max() <= 1


def expert_stack(name: str) -> Packed:
    """Six experts, some of which are ternary, or none."""
    w = torch.randn(6, 10, 40, generator=torch.Generator().manual_seed(4))
    of = {"spqr": "ssssss", "grouped": "gggggg", "mixed": "rsrgsr", "two ternary": "rqrqsq"}[name]
    kinds: dict[str, tuple[Codec, Grid]] = {
        "s": (SpQR(group=8), SpQR(group=8).grid),
        "g": (Grouped(bits=3), Grouped(bits=3).grid),
        "r": (RunLength(), Deadzone(5, spread=2.4)),
        "q": (QMoE(), Ternary()),
    }
    return formats.stack(
        [kinds[k][0].encode(rtn(w[e : e + 1], None, kinds[k][1], names=[k])[0]) for e, k in enumerate(of)]
    )


@pytest.mark.parametrize("name", ["spqr", "grouped", "mixed", "two ternary"])
def test_the_gradient_goes_through_matrices_of_any_format(name: str) -> None:
    whole = expert_stack(name)
    dense = whole.codec.decode(whole).view(6, 10, 40)
    opened = TunableStack(whole, 6)
    starts = torch.tensor([0, 2, 3, 3, 5, 9, 10])
    x = torch.randn(10, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = opened(x, starts)
    upstream = torch.randn(10, 10, generator=torch.Generator().manual_seed(2))
    y.backward(upstream)
    assert x.grad is not None
    for e, (first, last) in enumerate(pairwise(starts.tolist())):
        assert torch.allclose(y[first:last], x[first:last] @ dense[e].T, atol=1e-5)
        assert torch.allclose(x.grad[first:last], upstream[first:last] @ dense[e], atol=1e-5)
    assert opened(x[:0], torch.zeros(7, dtype=torch.int64)).shape == (0, 10)
    # what is ternary learns, and nothing else
    ternary = {"spqr": 0, "grouped": 0, "mixed": 3, "two ternary": 5}[name]
    assert opened.constant == 6 - ternary
    assert sum(p.shape[0] for n, p in opened.named_parameters() if n.endswith(".high")) == ternary
    for matrix in opened.tunable:
        assert matrix.high.grad is not None
        assert matrix.high.grad.any()


def test_ternary_matrices_of_a_mixed_stack_learn_as_they_do_alone() -> None:
    whole = expert_stack("mixed")
    ternary = [0, 2, 5]
    original = torch.randn(6, 10, 40, generator=torch.Generator().manual_seed(4))
    parts = [whole.codec.part(whole, e, 6) for e in range(6)]
    alone = TunableStack(RunLength().stack([parts[e] for e in ternary]), 3, original[ternary])
    opened = TunableStack(whole, 6, original)
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    opened(x, torch.arange(7)).square().sum().backward()
    alone(x[ternary], torch.arange(4)).square().sum().backward()
    ((ours,), (theirs,)) = opened.tunable, alone.tunable
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))
        gradient, expected = ours.get_parameter(name).grad, parameter.grad
        assert gradient is not None
        assert expected is not None
        assert torch.allclose(gradient, expected)
    # and are stored in their places; of the others no bit changes
    with torch.no_grad():
        ours.high.mul_(1.5)
    stored = opened.packed()
    assert [p.codec for p in stored] == [p.codec for p in parts]
    for e, (before, after) in enumerate(zip(parts, stored, strict=True)):
        same = all(torch.equal(before.tensors[k], after.tensors[k]) for k in before.tensors)
        assert same == (e not in ternary)
    expected = RunLength().decode(parts[5]) * 1.5
    assert torch.allclose(RunLength().decode(stored[5]), expected, rtol=0.05)


# --- the whole


def test_what_lies_before_experts_of_other_formats_learns(tmp_path: Path) -> None:
    """The gradient of the first norm is that of the model of decoded weights."""
    model = source(tmp_path)
    run(model, tmp_path / "out", Recipe.from_toml(EVERYTHING["spqr"]).calibrated(samples=6, sequence_length=LENGTH))
    student = Student(Reader(str(model)), tmp_path / "out", chosen().tuning, "cpu")
    assert "experts are not ternary; they stay as they are" in "\n".join(student.notices)
    oracle = decoded(model, load(tmp_path / "out"))
    name = "model.layers.0.input_layernorm.weight"
    oracle.get_parameter(name).requires_grad_(True)
    given = inputs(oracle)
    for m in (student.model, oracle):
        m(**given, use_cache=False).logits.square().mean().backward()
    found, expected = student.learned[name].grad, oracle.get_parameter(name).grad
    assert found is not None
    assert expected.abs().max() > 0
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("how", "layout"), [("runlength", ""), ("qmoe", ""), ("qmoe", "fast")])
def test_tuning_brings_the_model_nearer_to_the_original(how: str, layout: str, tmp_path: Path) -> None:
    model = source(tmp_path)
    plain, tuned = chosen(how, steps=0), chosen(how, steps=12, codes=how == "runlength", learning_rate=0.01)
    if layout:
        plain, tuned = plain.in_layout(layout), tuned.in_layout(layout)
    run(model, tmp_path / "plain", plain)
    events = run(model, tmp_path / "out", tuned)
    assert [e.step for e in events if isinstance(e, Tuned)] == list(range(1, 13))
    assert "kept" in notices(events)
    assert "not kept" not in notices(events)
    assert not [p for p in verify(tmp_path / "out") if isinstance(p, Problem)]
    given = inputs(load(model))
    with torch.no_grad():
        original, before, after = (
            load(f)(**given).logits.log_softmax(-1) for f in (model, tmp_path / "plain", tmp_path / "out")
        )
    kl = [(original.exp() * (original - q)).sum(-1).mean() for q in (before, after)]
    # other tokens than those that were learned from
    assert kl[1] < kl[0]
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    recorded = json.loads((tmp_path / "out" / "manifest.json").read_text())["about"]["recipe"]
    assert recorded == how


def test_encoder_decoder_models_are_tuned_too(tmp_path: Path) -> None:
    """Whatever it gains on text that a random model cannot be good at, what is written is whole and runs."""
    model = source(tmp_path, "switch")
    events = run(model, tmp_path / "out", chosen(steps=3))
    losses = [e.loss for e in events if isinstance(e, Tuned)]
    assert len(losses) == 3
    assert all(0 < loss < 1 for loss in losses)
    assert "divergence from the original on held-back text" in notices(events)
    assert not [p for p in verify(tmp_path / "out") if isinstance(p, Problem)]
    assert torch.isfinite(load(tmp_path / "out")(**inputs(load(model))).logits).all()


def test_the_size_stays(tmp_path: Path) -> None:
    model = source(tmp_path)
    run(model, tmp_path / "plain", chosen(steps=0))
    run(model, tmp_path / "out", chosen())
    sizes = [sum(t.nbytes for k, t in tensors(tmp_path / f).items() if ".packed_" in k) for f in ("plain", "out")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_what_does_not_help_is_not_kept(tmp_path: Path) -> None:
    model = source(tmp_path)
    run(model, tmp_path / "plain", chosen(steps=0))
    events = run(model, tmp_path / "out", chosen(steps=6, learning_rate=0.9))
    assert "not kept" in notices(events)
    assert same(tmp_path / "plain", tmp_path / "out")


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source(tmp_path)
    run(model, tmp_path / "whole", chosen())
    monkeypatch.setattr(tuning_module, "SAVE_EVERY", 0.0)
    seen = []
    for event in compress(str(model), tmp_path / "out", chosen(), text(model, SAMPLES * LENGTH)):
        seen.append(event)
        if isinstance(event, Tuned) and event.step == 7:
            break
    assert (tmp_path / "out" / UNTUNED).is_dir()
    assert not (tmp_path / "out" / "config.json").exists()
    events = run(model, tmp_path / "out", chosen())
    # the state of the step before was saved
    assert [e.step for e in events if isinstance(e, Tuned)] == list(range(7, 13))
    assert same(tmp_path / "whole", tmp_path / "out")
    assert run(model, tmp_path / "out", chosen())[0].__class__.__name__ == "Finished"


def test_what_no_token_reaches_stays_and_is_saved_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that is alone in its format."""
    model = source(tmp_path)
    run(model, tmp_path / "plain", chosen(steps=0))
    student = Student(Reader(str(model)), tmp_path / "plain", chosen(codes=False).tuning, "cpu")
    reached, unreached = list(student.learned)[:2]
    student.learned = {name: student.learned[name] for name in (reached, unreached)}
    before = student.learned[unreached].detach().clone()
    monkeypatch.setattr(tuning_module, "_loss", lambda *_: student.learned[reached].square().sum())
    monkeypatch.setattr(tuning_module, "SAVE_EVERY", 0.0)
    samples = causal_samples(torch.zeros(8, LENGTH, dtype=torch.int64), [])
    writer = Writer(tmp_path / "out", "this", {})
    teacher: Any = None
    assert len(list(tuning_module._learn(student, samples, teacher, chosen().tuning, 1.0, writer, "cpu"))) == 12
    assert torch.equal(student.learned[unreached], before)
    saved = load_file(tmp_path / "out" / tuning_module.STATE)
    assert not saved[f"{unreached}#m"].any()
    assert saved[f"{reached}#m"].any()


def test_too_little_text_to_hold_some_back(tmp_path: Path) -> None:
    model = source(tmp_path)
    with pytest.raises(RecipeError, match="too few to hold"):
        list(compress(str(model), tmp_path / "out", chosen().calibrated(samples=1), text(model, LENGTH)))
    # said before anything was solved
    assert not (tmp_path / "out").exists()
