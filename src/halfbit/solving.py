"""Rules of a recipe applied to matrices of one shape: which solver, with what damping, order, outliers and rate."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halfbit.errors import NonFinite, RecipeError, Unsupported
from halfbit.formats.quads import Quads
from halfbit.formats.runlength import RunLength
from halfbit.grids.bilevel import Bilevel
from halfbit.grids.deadzone import LEAST, MOST, Deadzone
from halfbit.recipe import Rule, Solving
from halfbit.rotation import both_sides, rotate
from halfbit.solve.budget import gptq_with_share
from halfbit.solve.gptq import gptq, prepare
from halfbit.solve.gptq import solve as solve_problem
from halfbit.solve.hessian import Repair
from halfbit.solve.loss import measured
from halfbit.solve.rate import at_rate, guess
from halfbit.solve.rows import unequal
from halfbit.solve.rtn import rtn
from halfbit.types import Solution

# of the bits asked for
CLOSE_ENOUGH = 0.003
ATTEMPTS = 3
# what a budget may be missed by without a word
TOLD = 0.01


def solve(
    w: Tensor,
    hessian: Tensor | None,
    rules: Sequence[Rule],
    solving: Solving,
    names: list[str],
    notices: list[str],
    *,
    order_is_stored: bool = True,
    widths: Tensor | None = None,
) -> list[Solution]:
    """One Solution per matrix, on the CPU.

    Args:
        w: `[matrices, out, in]`.
        hessian: `[matrices, in, in]`, undamped; None, for rules that round to nearest: the loss is that of the weights.
        rules: one per matrix, each with a grid and a codec. Those that are alike but for the rate are solved together.
        names: of the matrices.
        notices: repaired Hessians are told here.
        order_is_stored: False: another matrix of the same input stores the column order, so it costs nothing.
        widths: `[matrices, out]`, of the rows' grids where that is deadzone, see `solve/rows.py`; None: all are alike.

    Raises what grids and solvers raise, with the name of the first matrix.
    """
    batches: dict[object, list[int]] = {}
    for i, rule in enumerate(rules):
        # a spread is no part of a grid's equality
        rate = None if isinstance(rule.grid, Deadzone) else rule.bits
        key = rule.solver, rule.grid, rule.codec, rule.order, rule.damping, rule.tau, rule.outliers, rate
        batches.setdefault(key, []).append(i)
    found: dict[int, Solution] = {}
    for members in batches.values():
        some = slice(None) if len(members) == len(rules) else torch.tensor(members, device=w.device)
        part = _solve(
            w[some],
            None if hessian is None else hessian[some],
            [rules[i] for i in members],
            solving,
            [names[i] for i in members],
            notices,
            order_is_stored,
            None if widths is None else widths[some],
        )
        found |= dict(zip(members, part, strict=True))
    return [found[i] for i in range(len(rules))]


def _solve(
    w: Tensor,
    hessian: Tensor | None,
    rules: list[Rule],
    solving: Solving,
    names: list[str],
    notices: list[str],
    order_is_stored: bool,
    widths: Tensor | None,
) -> list[Solution]:
    """Of rules that are alike but for the rate."""
    rule = rules[0]
    grid = rule.grid
    assert grid is not None
    if isinstance(rule.codec, RunLength | Quads) and rule.codec.rotated:
        plain = replace(rule.codec, rotated=False)
        inside = [replace(r, codec=plain) for r in rules]
        w, hessian = rotate(w), None if hessian is None else both_sides(hessian)
        found = _solve(w, hessian, inside, solving, names, notices, order_is_stored, widths)
        return [replace(s, rotated=True) for s in found]
    if rule.solver == "rtn":
        with _naming(names):
            return [on_cpu(s) for s in rtn(w, hessian, grid, names=names)]

    assert hessian is not None

    def told(repair: Repair) -> None:
        text = f"{repair.name}: its Hessian needed repair: {repair.action}, damping {repair.damping:g}"
        if text not in notices:
            notices.append(text)

    shared = {
        "names": names,
        "damping": solving.damping if rule.damping is None else rule.damping,
        "order": rule.order,
        "on_repair": told,
    }

    def with_share(share: float) -> list[Solution]:
        return gptq_with_share(w, hessian, grid, share, **shared)

    with _naming(names):
        if rule.outliers is not None:
            found = with_share(rule.outliers)
        elif rule.bits is not None and isinstance(grid, Deadzone):
            found = _at_rate(w, hessian, rules, shared, notices, widths)
        elif rule.bits is not None:
            found = _within(rule.bits, with_share, (w.shape[1], w.shape[2]), rule, names, notices, order_is_stored)
        else:
            found = gptq(w, hessian, unequal(grid, widths), outliers=rule.tau, **shared)
            found = [replace(s, grid=grid) for s in found]
    return [on_cpu(s) for s in found]


@contextmanager
def _naming(names: list[str]) -> Iterator[None]:
    """Grids do not know which matrix they are fitted to: their errors get the first name."""
    try:
        yield
    except NonFinite as e:
        if e.tensor is not None:
            raise
        others = " and others" if len(names) > 1 else ""
        raise NonFinite(
            f"{names[0]}{others}: {e}; what was read is finite, so error feedback went too far: are these weights?",
            tensor=names[0],
        ) from e
    except Unsupported as e:
        raise Unsupported(f"{names[0]}{' and others' if len(names) > 1 else ''}: {e}") from e


def _at_rate(
    w: Tensor,
    hessian: Tensor,
    rules: list[Rule],
    shared: dict[str, Any],
    notices: list[str],
    widths: Tensor | None,
) -> list[Solution]:
    """With the spreads at which the batch takes the rules' bits on the mean. Rules that say nothing else share one."""
    grids = [rule.grid for rule in rules if isinstance(rule.grid, Deadzone)]
    bits = sum(rule.bits for rule in rules if rule.bits is not None) / len(rules)
    own = [grid.spread for grid in grids if not isinstance(grid.spread, tuple)]
    spread = sum(own) / len(own)
    if set(own) == {Deadzone().spread}:
        own = [1.0] * len(own)
        spread = guess(bits)
    else:
        own = [s / spread for s in own]
    problem = prepare(w, hessian, fallback="identity", **shared)

    def at(spread: float) -> list[Solution]:
        grid = replace(grids[0], spread=tuple(min(max(spread * s, LEAST), MOST) for s in own))
        answer = solve_problem(problem, unequal(grid, widths), None)
        return [answer.solution(problem, grid, e) for e in range(w.shape[0])]

    found, used = at_rate(bits, at, lambda s: _bits(s, rules[0], True), spread, CLOSE_ENOUGH)
    if abs(used - bits) > TOLD * bits:
        names = shared["names"]
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notices.append(f"{names[0]}{others}: {used:.3f} stored bits per weight where {bits:g} were asked for")
    return [measured(s, w[e], hessian[e]) for e, s in enumerate(found)]


def _within(
    bits: float,
    with_share: Callable[[float], list[Solution]],
    shape: tuple[int, int],
    rule: Rule,
    names: list[str],
    notices: list[str],
    order_is_stored: bool,
) -> list[Solution]:
    """As many outliers as `bits` per weight leave room for, counted from what the codec stores."""
    alone = _bits([_blank(shape, rule)], rule, order_is_stored)
    if alone > bits * (1 + CLOSE_ENOUGH):
        raise RecipeError(
            f"{names[0]}: the grid alone takes {alone:.3f} bits per weight of the {bits:g} allowed; allow more, or use "
            "fewer bits or larger groups in the rule's grid"
        )
    # 16 bits of value and 12 of place; what it comes to exactly is seen afterwards
    per_outlier = 28.0
    found, used = [], alone
    for _ in range(ATTEMPTS):
        share = max(0.0, (bits - alone) / per_outlier)
        if share > 1:
            raise RecipeError(f"{names[0]}: {bits:g} bits per weight are more than every weight in 16 bits takes")
        found = with_share(share)
        used = _bits(found, rule, order_is_stored)
        if abs(used - bits) <= CLOSE_ENOUGH * bits or used <= alone:
            break
        per_outlier = (used - alone) / share
    if abs(used - bits) > TOLD * bits:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notices.append(
            f"{names[0]}{others}: {used:.3f} stored bits per weight where {bits:g} were asked for; too small"
        )
    return found


def blank_bits(shape: tuple[int, int], rule: Rule) -> float:
    """Stored bits per weight of a matrix `[out, in]` under a rule whose codec has one size, without outliers."""
    return _bits([_blank(shape, rule)], rule, True)


def _blank(shape: tuple[int, int], rule: Rule) -> Solution:
    """What takes as many bits as any solution of this shape without outliers.

    How statistics are found changes none of the sizes, so they are found the quick way.
    """
    grid = rule.grid
    assert grid is not None
    if isinstance(grid, Bilevel):
        grid = replace(grid, fitting="min-max")
    (nothing,) = rtn(torch.zeros(1, *shape), None, grid, names=["zeros"])
    return nothing if rule.order == "identity" else replace(nothing, order=torch.arange(shape[1]).flip(0))


def _bits(solutions: list[Solution], rule: Rule, order_is_stored: bool) -> float:
    """Mean stored bits per weight."""
    assert rule.codec is not None
    stored = [on_cpu(s) if order_is_stored else replace(on_cpu(s), order=None) for s in solutions]
    packed = [rule.codec.encode(s) for s in stored]
    return 8 * sum(p.nbytes for p in packed) / sum(p.shape[0] * p.shape[1] for p in packed)


def on_cpu(solution: Solution) -> Solution:
    """The same solution with its tensors on the CPU."""
    outliers = solution.outliers
    if outliers is not None:
        outliers = replace(
            outliers, rows=outliers.rows.cpu(), columns=outliers.columns.cpu(), values=outliers.values.cpu()
        )
    return replace(
        solution,
        codes=solution.codes.cpu(),
        params={k: v.cpu() for k, v in solution.params.items()},
        outliers=outliers,
        order=None if solution.order is None else solution.order.cpu(),
    )
