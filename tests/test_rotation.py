"""Rotated columns: the rotation itself, what is solved, stored, multiplied and tuned with it."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed import chosen, decoded, inputs, largest_difference, load, run, text
from torch import Tensor

from halfbit.compress import compress
from halfbit.errors import Unsupported
from halfbit.events import Tuned
from halfbit.folder import Problem, verify
from halfbit.formats.grouped import Grouped
from halfbit.formats.qmoe import QMoE
from halfbit.formats.runlength import RunLength
from halfbit.formats.spqr import SpQR
from halfbit.grids.deadzone import Deadzone
from halfbit.recipe import Recipe, Rule, Solving
from halfbit.rotation import block, both_sides, rotate, rotated_input, signs, undo
from halfbit.solve.loss import relative_loss
from halfbit.solve.rtn import rtn
from halfbit.solving import solve
from halfbit.tunable import TunableMatrix, TunableStack

ROTATED = "rotated = false -> rotated = true"
SIZES = [1, 2, 7, 24, 96, 256, 768]


def matrix(columns: int) -> Tensor:
    """R in float64, Hadamard by Sylvester's rule."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block(columns):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    whole = torch.block_diag(*[h / len(h) ** 0.5] * (columns // len(h)))
    return whole * signs(columns)


@pytest.mark.parametrize("columns", SIZES)
def test_it_is_an_orthogonal_matrix_and_all_its_forms_are_that_one(columns: int) -> None:
    r = matrix(columns)
    assert torch.allclose(r @ r.T, torch.eye(columns, dtype=torch.float64), atol=1e-12)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(rotate(x), x @ r.T, atol=1e-12)
    assert torch.allclose(undo(x), x @ r, atol=1e-12)
    assert torch.allclose(both_sides(x.T @ x), r @ (x.T @ x) @ r.T, atol=1e-10)
    assert torch.allclose(rotated_input(x.float()).double(), x @ r.T, atol=1e-5)
    assert torch.allclose(rotated_input(x.half()).double(), x.half().double() @ r.T, atol=1e-5)


def test_the_block_is_the_largest_power_of_two_that_fits_andsigns_never_change() -> None:
    assert [block(n) for n in (*SIZES, 2048, 2080, 6144)] == [1, 2, 1, 8, 32, 256, 256, 256, 32, 256]
    # files depend on them
    text = "".join("-+"[int(s > 0)] for s in signs(32))
    assert text == "-++-+++-+-+-----+-+----+--++---+"
    assert abs(int(signs(4096).sum())) < 200


@pytest.mark.parametrize(("bits", "solver"), [(None, "gptq"), (0.8, "gptq"), (None, "rtn")])
def test_solving_is_solving_the_rotated_matrix(bits: float | None, solver: str) -> None:
    random = torch.Generator().manual_seed(0)
    w, x = torch.randn(2, 24, 48, generator=random), torch.randn(2, 300, 48, generator=random)
    x = x @ torch.randn(48, 48, generator=random)
    h = x.mT @ x
    plain = Rule("*", solver, Deadzone(), RunLength(), bits=bits)
    rotated = replace(plain, codec=RunLength(rotated=True))
    found = solve(w, h, [rotated] * 2, Solving(), ["a", "b"], [])
    r = matrix(48).float()
    expected = solve(w @ r.T, r @ h @ r.T, [plain] * 2, Solving(), ["a", "b"], [])
    for e, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.rotated
        assert (one.codes != other.codes).float().mean() < 0.01
        # errors are measured where they are made, in the inputs that the layer is given
        assert one.loss == pytest.approx(relative_loss(w[e], one.dense(), h[e]), rel=1e-3)
        packed = RunLength(rotated=True).encode(one)
        assert torch.equal(packed.codec.decode(packed), one.dense())


@pytest.mark.parametrize("codec", [RunLength(), QMoE(), Grouped(), SpQR()], ids=repr)
def test_no_other_codec_takes_rotated_columns_for_plain_ones(codec: Any) -> None:
    (solution,) = rtn(torch.randn(1, 8, 16), None, Deadzone(), names=["w"])
    with pytest.raises(Unsupported, match="rotated"):
        codec.encode(replace(solution, rotated=True))
    with pytest.raises(Unsupported, match="not rotated"):
        RunLength(rotated=True).encode(solution)


@pytest.mark.parametrize("learning", [False, True])
def test_an_opened_matrix_is_what_was_stored(learning: bool) -> None:
    w = torch.randn(3, 10, 40, generator=torch.Generator().manual_seed(3))
    codec = RunLength(rotated=True)
    solutions = rtn(rotate(w), None, Deadzone(5, spread=2.4), names=["a", "b", "c"])
    stack = codec.stack([codec.encode(replace(s, rotated=True)) for s in solutions])
    opened = TunableMatrix(stack, 3, w if learning else None)
    dense = codec.decode(stack).view(3, 10, 40)
    assert torch.equal(torch.stack([weight() for weight in opened.weights()]), dense)
    again = codec.decode(codec.stack(opened.packed())).view(3, 10, 40)
    assert torch.allclose(again, dense, rtol=0.05, atol=0.02)
    # latent values are the rotated weights where these would be rounded to what they are
    if opened.latent is not None:
        assert torch.allclose(opened.latent, rotate(w), atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss", "switch"])
def test_models_run_and_are_tuned_from_rotated_columns(name: str, saved, tmp_path) -> None:
    source = saved(name)
    run(source, tmp_path / "out", "runlength", ROTATED)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert all(entry["codec"]["rotated"] for module in config["modules"].values() for entry in module.values())
    assert not [found for found in verify(tmp_path / "out") if isinstance(found, Problem)]
    model = load(tmp_path / "out")
    with torch.no_grad():
        got, expected = (m(**inputs(m)).logits for m in (model, decoded(source, model)))
    assert largest_difference(got, expected) < 2e-5
    how = Recipe.from_toml(chosen("runlength").to_toml().replace(*ROTATED.split(" -> ")))
    how = how.tuned(steps=4, batch_tokens=48, held_back=0.2, group_steps=2)
    events = list(compress(str(source), tmp_path / "tuned", how, text(source, 300)))
    assert sum(isinstance(e, Tuned) for e in events) == 4
    assert not [found for found in verify(tmp_path / "tuned") if isinstance(found, Problem)]


@pytest.mark.parametrize("columns", [1, 7, 24, 768])
@pytest.mark.parametrize("counts", [[1], [1, 0, 3], [40, 2, 0]])
def test_x_is_rotated_as_the_definition_says(columns: int, counts: list[int]) -> None:
    w = torch.randn(len(counts), 50, columns, generator=torch.Generator().manual_seed(3))
    codec, plain = RunLength(rotated=True), RunLength()
    solutions = rtn(w, None, Deadzone(5, spread=2.4), names=[str(n) for n in range(len(w))])
    starts = torch.tensor([0, *counts]).cumsum(0)
    x = torch.randn(sum(counts), columns, generator=torch.Generator().manual_seed(1))
    operands = codec.runtime(codec.stack([codec.encode(replace(s, rotated=True)) for s in solutions]))
    of_plain = plain.runtime(plain.stack([plain.encode(s) for s in solutions]))
    y, expected = codec.product(x, starts, operands, 50), plain.product(rotate(x), starts, of_plain, 50)
    few = torch.tensor(counts).repeat_interleave(torch.tensor(counts)) <= 32
    # to the bit; many tokens are rotated by a matrix product, which rounds otherwise
    assert torch.equal(y[few], expected[few])
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
    half = codec.product(x.bfloat16(), starts, operands, 50)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half[few], plain.product(rotate(x.bfloat16().float()), starts, of_plain, 50).bfloat16()[few])


def test_a_stack_multiplies_by_what_it_stands_for_and_hands_the_gradient_on() -> None:
    w = torch.randn(3, 10, 40, generator=torch.Generator().manual_seed(3))
    codec = RunLength(rotated=True)
    solutions = rtn(rotate(w), None, Deadzone(5, spread=2.4), names=["a", "b", "c"])
    stack = codec.stack([codec.encode(replace(s, rotated=True)) for s in solutions])
    opened, starts = TunableStack(stack, 3, w), torch.tensor([0, 2, 2, 6])
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = opened(x, starts)
    dense = codec.decode(stack).view(3, 10, 40)
    expected = torch.cat([x[:2] @ dense[0].T, x[2:] @ dense[2].T])
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    y.backward(upstream)
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.cat([upstream[:2] @ dense[0], upstream[2:] @ dense[2]]), rtol=1e-4, atol=1e-4)
    (matrix,) = opened.tunable
    assert matrix.latent is not None
    assert matrix.latent.grad is not None
    # the gradient of a weight, rotated as the weight is
    assert torch.allclose(matrix.latent.grad[2], rotate(upstream[2:].T @ x[2:].detach()), rtol=1e-4, atol=1e-4)
