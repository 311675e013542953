"""Tuning group by group: the aim, the order of the tokens, and that nothing gets worse or lost."""

from typing import Any

import pytest
import torch
from compressed import chosen, text
from torch import Tensor

from halfbit.activations import Routed
from halfbit.compress import compress
from halfbit.events import BlockBegan, Noticed
from halfbit.expert_groups import Group, SolvedGroup, solve
from halfbit.folder import Problem, verify
from halfbit.formats.runlength import RunLength
from halfbit.formats.spqr import SpQR
from halfbit.grids.deadzone import Deadzone
from halfbit.recipe import Recipe, Rule, Tuning
from halfbit.tune_group import LEAST, Roles, aim, draw, tune_group
from halfbit.types import Packed

EXPERTS, WIDTH, INNER = 4, 24, 16
TERNARY = Rule("*", grid=Deadzone(5, spread=3.0), codec=RunLength())


def given(rule: Rule = TERNARY, tokens: int = 3000) -> tuple[Group, SolvedGroup, Roles, Routed]:
    """The last expert gets hardly any token."""
    random = torch.Generator().manual_seed(0)
    up, down = (torch.randn(EXPERTS, *shape, generator=random) for shape in ((INNER, WIDTH), (WIDTH, INNER)))
    group = Group(range(EXPERTS), list("abcd"), up, down, None, None, torch.relu, None)
    routed = Routed(EXPERTS, tokens)
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=random)[:2] for _ in range(tokens)])
    index[: LEAST // 2, 0] = EXPERTS - 1
    x = torch.randn(tokens, WIDTH, generator=random) @ torch.randn(WIDTH, WIDTH, generator=random)
    routed.add(x, index, torch.rand(tokens, 2, generator=random), torch.ones(tokens, dtype=torch.bool))
    routed.close()
    rules = [rule] * EXPERTS
    solved = solve(group, (rules, rules), Recipe("", (rule,)), routed)
    assert rule.codec is not None
    up_packed, down_packed = ([rule.codec.encode(s) for s in role] for role in (solved.up, solved.down))
    return group, solved, (up_packed, down_packed), routed


def aims(group: Group, packed: Roles, solved: SolvedGroup, routed: Routed, theirs: Tensor, held: float) -> list[float]:
    """In float64, on the held-back tokens of the experts that have enough."""
    assert solved.training is not None
    found = []
    for e, (rows, gates) in enumerate(zip(solved.training.rows, solved.training.gates, strict=True)):
        if len(rows) < LEAST:
            continue
        some = slice(len(rows) - max(1, round(held * len(rows))), None)
        up, down = (p[e].codec.decode(p[e]).double() for p in packed)
        t = torch.relu(theirs[rows[some]].double() @ group.up[e].double().T) @ group.down[e].double().T * gates[some]
        y = torch.relu(routed.hidden[rows[some]].double() @ up.T) @ down.T * gates[some]
        yy, yt, tt = float((y * y).sum()), float((y * t).sum()), float((t * t).sum())
        found.append(yy * tt / yt**2 - 1 + (yt / tt - 1) ** 2)
    return found


@pytest.mark.parametrize("followed", [False, True])
def test_what_is_kept_is_better_on_held_back_tokens_and_told_truly(followed: bool) -> None:
    group, solved, packed, routed = given()
    theirs = routed.hidden + 0.1 * torch.randn(routed.hidden.shape, generator=torch.Generator().manual_seed(1))
    theirs = theirs if followed else None
    how = Tuning(group_steps=60, held_back=0.1)
    tuned, gain = tune_group(group, solved, packed, routed, theirs, how)
    assert gain is not None
    seen = routed.hidden if theirs is None else theirs
    assert gain.before == pytest.approx(aims(group, packed, solved, routed, seen, 0.1), rel=1e-4)
    kept = [min(pair) for pair in zip(gain.before, gain.after, strict=True)]
    assert aims(group, tuned, solved, routed, seen, 0.1) == pytest.approx(kept, rel=1e-4)
    assert gain.kept == EXPERTS - 1
    assert sum(gain.after) < 0.9 * sum(gain.before)
    # too few tokens
    assert tuned[0][-1] is packed[0][-1]
    assert tuned[1][-1] is packed[1][-1]
    # as many zeros as before, so as many bytes, but for a few per cent
    size: Any = [sum(p.nbytes for role in roles for p in role) for roles in (packed, tuned)]
    assert size[1] == pytest.approx(size[0], rel=0.03)


def test_what_is_no_better_is_not_kept() -> None:
    group, solved, packed, routed = given()
    # steps that can only do harm
    tuned, gain = tune_group(group, solved, packed, routed, None, Tuning(group_steps=2, learning_rate=0.99))
    assert gain is not None
    assert gain.kept < EXPERTS - 1
    for e, (before, after) in enumerate(zip(gain.before, gain.after, strict=True)):
        assert (tuned[0][e] is packed[0][e]) == (after >= before)


def test_codes_may_be_told_to_stay() -> None:
    group, solved, packed, routed = given()
    tuned, gain = tune_group(group, solved, packed, routed, None, Tuning(group_steps=40, codes=False))
    assert gain is not None
    assert gain.kept

    def signs(roles: tuple[list[Packed], list[Packed]]) -> list[Tensor]:
        return [p.codec.decode(p).sign() for role in roles for p in role]

    assert all(torch.equal(a, b) for a, b in zip(signs(tuned), signs(packed), strict=True))


def test_where_nothing_can_learn_nothing_is_done() -> None:
    codec = SpQR(bits=3, group=8)
    group, solved, packed, routed = given(Rule("*", grid=codec.grid, codec=codec), tokens=300)
    assert tune_group(group, solved, packed, routed, None, Tuning(group_steps=3)) == (packed, None)


def test_the_aim_is_noise_whatever_the_size_and_the_size() -> None:
    y, t = torch.randn(2, 50, generator=torch.Generator().manual_seed(2))

    def of(y: Tensor) -> float:
        return float(aim(torch.stack([y @ y, y @ t, t @ t])))

    noise = float((y @ y) * (t @ t) / (y @ t) ** 2 - 1)
    for size in (0.5, 1.0, 2.0):
        gain = float(size * (y @ t) / (t @ t))
        assert of(size * y) == pytest.approx(noise + (gain - 1) ** 2, rel=1e-4)
    assert of(t) == pytest.approx(0, abs=1e-5)
    assert float(aim(torch.zeros(3))) == 0


def test_every_token_has_its_turn_in_each_pass() -> None:
    passes = [torch.cat([draw(1024, 4 * n + k, seed=5) for k in range(4)]) for n in range(2)]
    for order in passes:
        assert sorted(order.tolist()) == list(range(1024))
    assert not torch.equal(*passes)
    assert torch.equal(draw(1024, 6, 5), draw(1024, 6, 5))
    assert len(draw(100, 3, 5)) == 100


@pytest.mark.parametrize("asymmetric", ["false", "true"])
def test_a_tuned_run_continues_to_the_identical_files(asymmetric: str, saved, tmp_path) -> None:
    source = saved("qwen3-moe")
    plain = chosen("runlength", samples=16).to_toml()
    how = Recipe.from_toml(
        plain.replace("group_steps = 0", "group_steps = 5").replace("asymmetric = false", f"asymmetric = {asymmetric}")
    )
    # few tokens reach an expert of a tiny model
    words = text(source, 400)
    events = list(compress(str(source), tmp_path / "whole", how, words))
    notices = [e.message for e in events if isinstance(e, Noticed)]
    assert any("tuned group by group; noise against signal on held-back tokens" in n for n in notices), notices
    steps: Any = compress(str(source), tmp_path / "out", how, words)
    next(event for event in steps if isinstance(event, BlockBegan) and event.number == 1)
    steps.close()
    list(compress(str(source), tmp_path / "out", how, words))
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert not [found for found in verify(tmp_path / "out") if isinstance(found, Problem)]
