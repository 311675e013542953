"""A Mixture-of-Experts layer in two launches, straight from compressed weights; for few tokens.

    _up      each item times the rows of gate and up that belong together, then bias and gate
    _down    each item times the rows of the down projection; who comes last to some columns of a token weighs and adds
             the outputs of all its experts, in the order in which the token names them

With one token its choices are the items. With more, choices are sorted by expert before, and x laid out by items: three
small launches. Nothing waits for the device, and the sum is the same in every run. For formats whose module has `plan`;
the two projections may be in different formats. Where the experts of a projection are in several, each has a launch
of its own, in which the others' items are empty.
"""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# what Triton compiles is given plain numbers

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbit.formats import _triton_items
from halfbit.formats._triton_items import ONE_TOKEN, TABLE, Plan, item
from halfbit.rotation import rotated_input

# columns of the result that are added at once
COLUMNS = 64


@triton.jit
def _activation(x, NAME: tl.constexpr):
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_pytorch_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif NAME == "relu":
        return tl.maximum(x, 0.0)
    elif NAME == "relu2":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif NAME == "sigmoid":
        return tl.sigmoid(x)
    else:
        tl.static_assert(NAME == "tanh")
        return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _up(
    h, u, x, items, own, operands, bias, unadded, places, experts, out_features, columns, counters, alpha, limit,
    MULTIPLY: tl.constexpr, SHAPE: tl.constexpr, TOKENS: tl.constexpr, ITEMS: tl.constexpr,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h `[items, width, TOKENS]` of x `[items, columns, TOKENS]`; u `[places, out_features]` is between. Float32.

    What `_down` counts in is set to 0. `own` int32 `[experts]`: which matrix of the operands is an expert's, -1: none;
    None: they are in the order of the experts.
    """
    number, block = tl.program_id(0), tl.program_id(1)
    counter = (number * tl.num_programs(1) + block) * BLOCK + tl.arange(0, BLOCK)
    while tl.min(counter) < counters:
        tl.store(unadded + counter, 0, counter < counters)
        counter += tl.num_programs(0) * tl.num_programs(1) * BLOCK
    expert, place, tokens = item(number, items, places, experts, TOKENS, ITEMS)
    matrix = expert
    if own is not None:
        matrix = tl.load(own + expert)
        tokens = tl.where(matrix < 0, 0, tokens)
    if tokens > 0:
        t = tl.arange(0, TOKENS)
        to = u + (place + t).to(tl.int64) * out_features
        # one token is the x of all items
        x_own = x if ITEMS == 1 else x + number.to(tl.int64) * columns * TOKENS
        HALVES: tl.constexpr = 2 if KIND == "glu" else 1
        first, count = MULTIPLY(
            to, t < tokens, x_own, operands, matrix, out_features, columns, block, HALVES, SHAPE, TOKENS
        )
        # what follows reads what other threads of this program wrote
        tl.debug_barrier()
        if KIND == "clamped-swiglu":
            first, count = first // 2, count // 2
        width = out_features if KIND == "plain" else out_features // 2
        there = (t < tokens)[None, :]
        n = tl.arange(0, BLOCK)[:, None]
        while tl.min(n) < count:
            row = first + n
            gate_row = 2 * row if KIND == "clamped-swiglu" else row
            gate = tl.load(to[None, :] + gate_row, (n < count) & there, 0.0)
            if bias is not None:
                of_expert = bias + expert.to(tl.int64) * out_features
                gate += tl.load(of_expert + gate_row, n < count, 0.0).to(tl.float32)
            if KIND == "plain":
                value = _activation(gate, ACTIVATION)
            else:
                up_row = 2 * row + 1 if KIND == "clamped-swiglu" else row + width
                up = tl.load(to[None, :] + up_row, (n < count) & there, 0.0)
                if bias is not None:
                    up += tl.load(of_expert + up_row, n < count, 0.0).to(tl.float32)
                if KIND == "glu":
                    value = _activation(gate, ACTIVATION) * up
                else:
                    gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
                    value = (up + 1) * (gate * tl.sigmoid(gate * alpha))
            at = (number.to(tl.int64) * width + row) * TOKENS + t[None, :]
            tl.store(h + at, tl.where(there, value, 0.0), n < count)
            n += BLOCK


@triton.jit
def _down(
    y, d, h, items, order, own, operands, bias, index, weights, unadded, places, experts, out_features, columns, top_k,
    MULTIPLY: tl.constexpr, SHAPE: tl.constexpr, TOKENS: tl.constexpr, ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y `[tokens, out_features]` of h; d `[tokens * top_k, out_features]`, float32, is between.

    `unadded` `[tokens, blocks of BLOCK columns]` counts the columns of a token's experts that are in d. `own` as above.
    """
    number = tl.program_id(0)
    matrix, place, tokens = item(number, items, places, experts, TOKENS, ITEMS)
    if own is not None:
        matrix = tl.load(own + matrix)
        tokens = tl.where(matrix < 0, 0, tokens)
    if tokens > 0:
        t = tl.arange(0, TOKENS)
        there = t < tokens
        choice = place + t
        if order is not None:
            choice = tl.load(order + place + t, there, 0)
        first, count = MULTIPLY(
            d + choice.to(tl.int64) * out_features, there, h + number.to(tl.int64) * columns * TOKENS,
            operands, matrix, out_features, columns, tl.program_id(1), 1, SHAPE, TOKENS,
        )  # fmt: skip
        token = choice // top_k
        blocks = (out_features + BLOCK - 1) // BLOCK
        # all of this program is written before it is counted, and what is read was counted before
        tl.debug_barrier()
        block = first // BLOCK
        while block * BLOCK < first + count:
            begin, end = block * BLOCK, tl.minimum(block * BLOCK + BLOCK, out_features)
            written = tl.minimum(end, first + count) - tl.maximum(begin, first)
            before = tl.atomic_add(unadded + token * blocks + block, written, there)
            last = there & (before + written == top_k * (end - begin))
            tl.debug_barrier()
            if tl.max(last.to(tl.int32)) > 0:
                column = begin + tl.arange(0, BLOCK)[None, :]
                inside = last[:, None] & (column < end)
                total = tl.zeros([TOKENS, BLOCK], tl.float32)
                k = 0
                while k < top_k:
                    from_ = (token * top_k + k)[:, None].to(tl.int64)
                    expert = tl.load(index + from_, last[:, None], -1)
                    taken = (expert >= 0) & (expert < experts)
                    value = tl.load(d + from_ * out_features + column, inside & taken, 0.0, cache_modifier=".cg")
                    if bias is not None:
                        value += tl.load(bias + expert * out_features + column, inside & taken, 0.0).to(tl.float32)
                    weight = tl.load(weights + from_, last[:, None] & taken, 0.0).to(tl.float32)
                    total += weight * value
                    k += 1
                tl.store(y + token[:, None].to(tl.int64) * out_features + column, total, inside)
            block += 1


class Member(NamedTuple):
    """Matrices of one format.

    Attributes:
        plan: for (halves, TOKENS).
        own: int32 `[experts]`, see `_up`; None: every expert has one.
    """

    plan: Callable[[int, int], Plan]
    own: Tensor | None = None


def experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Sequence[Member],
    down: Sequence[Member],
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    num_experts: int,
    features: list[int],
    gate: str,
    gate_arguments: list[float],
) -> Tensor:
    """See `nn.experts_forward`; `gate` is a name of `nn.GATES`."""
    tokens, top_k = index.shape
    kind, _, activation = gate.partition(":")
    width = features[0] if kind == "plain" else features[0] // 2
    y = hidden.new_empty(tokens, features[1])
    if not y.numel() or not top_k or not width or not hidden.shape[1]:
        return y.zero_()
    places, index, weights = tokens * top_k, index.contiguous(), weights.contiguous()
    up_bias, down_bias = (bias if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    at_once = 1 if tokens == 1 else min(_triton_items.tokens_at_once(places, num_experts), _power(tokens))
    first = [(member.plan(2 if kind == "glu" else 1, at_once), member.own) for member in up]
    second = [(member.plan(1, at_once), member.own) for member in down]
    if tokens == 1:
        items, order, count, mode = index, None, places, ONE_TOKEN
    else:
        order, starts = _triton_items.sort(index.view(-1), num_experts)
        items = _triton_items.cut(starts, places, at_once)
        count, mode = items.shape[0], TABLE

    def given(rotated: bool) -> Tensor:
        x = rotated_input(hidden) if rotated else hidden
        if tokens == 1:
            return x.contiguous()
        return _triton_items.pack(x, items, places, num_experts, at_once, order, top_k)

    f32 = {"dtype": torch.float32, "device": hidden.device}
    h, u = torch.empty(count, width, at_once, **f32), torch.empty(places, features[0], **f32)
    d = torch.empty(places, features[1], **f32)
    unadded = torch.empty(tokens, triton.cdiv(features[1], COLUMNS), dtype=torch.int32, device=hidden.device)
    alpha, limit = gate_arguments if gate_arguments else (0.0, 0.0)
    x = {rotated: given(rotated) for rotated in {plan.rotated for plan, _ in first}}
    for plan, own in first:
        _up[(count, plan.blocks)](
            h, u, x[plan.rotated], items, own, plan.operands, up_bias, unadded, places, num_experts, features[0],
            hidden.shape[1], unadded.numel(), alpha, limit, MULTIPLY=plan.multiply, SHAPE=plan.shape, TOKENS=at_once,
            ITEMS=mode, KIND=kind, ACTIVATION=activation, BLOCK=32, num_warps=plan.num_warps,
        )  # fmt: skip
    inner = {False: h}
    if any(plan.rotated for plan, _ in second):
        inner[True] = rotated_input(h.mT.reshape(-1, width)).view(count, at_once, width).mT.contiguous()
    for plan, own in second:
        _down[(count, plan.blocks)](
            y, d, inner[plan.rotated], items, order, own, plan.operands, down_bias, index, weights, unadded, places,
            num_experts, features[1], width, top_k, MULTIPLY=plan.multiply, SHAPE=plan.shape, TOKENS=at_once,
            ITEMS=mode, BLOCK=COLUMNS, num_warps=plan.num_warps,
        )  # fmt: skip
    return y


def _power(tokens: int) -> int:
    return max(4, triton.next_power_of_2(tokens))
