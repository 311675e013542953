"""The fused experts layer against float64 from decoded weights: on a GPU, or interpreted (`test_triton.py`)."""

# pyright: reportCallIssue=false
# tuples of arguments, and torch's description of an operator

import json
from functools import partial

import pytest
import torch
from torch import Tensor
from triton_kernels import DEVICE, poisoned, stacked

from halfbit import nn, triton_support
from halfbit.formats import stack, to_config
from halfbit.formats.grouped import Grouped
from halfbit.formats.mixed import Mixed
from halfbit.formats.qmoe import QMoE
from halfbit.formats.runlength import RunLength
from halfbit.formats.spqr import SpQR
from halfbit.types import Codec, Packed

if triton_support.why_not():
    pytest.skip(triton_support.why_not(), allow_module_level=True)

__all__ = ["poisoned"]

EXPERTS, TOP_K = 3, 2
FEW, ALL = (3,), (0, 1, 2, 3, 17, 33)
# odd widths, lanes of several rows and of parts of a row, halves that begin inside of a band of tiles
LAYERS = {
    "qmoe": (QMoE(), QMoE(), "glu:silu", [], False, 30, 9, ALL),
    "runlength and qmoe": (RunLength(lane=256), QMoE(), "clamped-swiglu", [1.7, 0.8], True, 12, 5, FEW),
    "qmoe and rotated runlength": (QMoE(), RunLength(rotated=True), "plain:gelu", [], True, 5, 24, FEW),
    "runlength in segments": (RunLength(lane=256), RunLength(lane=256), "glu:relu", [], False, 270, 33, (1,)),
    # halves that begin inside of a tile of rows, more than one block of columns and of rows
    "spqr": (SpQR(bits=3), SpQR(bits=3), "glu:silu", [], True, 70, 21, (1, 3)),
    "spqr and grouped": (SpQR(bits=4, group=8), Grouped(3), "clamped-swiglu", [1.7, 0.8], True, 37, 40, FEW),
    "grouped": (Grouped(4, group=32, symmetric=True), Grouped(2, group=16), "glu:gelu", [], False, 40, 33, (12,)),
    "mixed": (
        Mixed((QMoE(), SpQR(bits=3))), Mixed((RunLength(rotated=True), Grouped(3))), "glu:silu", [], True, 24, 9, (2,)
    ),
    "mixed and rotated": (Mixed((RunLength(rotated=True), QMoE())), QMoE(), "plain:relu", [], False, 12, 5, FEW),
}  # fmt: skip


def some(codec: Codec, rows: int, columns: int) -> tuple[Packed, list[Tensor]]:
    """A stack, and what its matrices decode to; the experts of a mixed one take its codecs in turn."""
    if not isinstance(codec, Mixed):
        return stacked(codec, rows, columns, EXPERTS)
    found = [stacked(member, rows, columns, EXPERTS) for member in codec.codecs]
    turns = [found[e % len(found)] for e in range(EXPERTS)]
    whole = stack([packed.codec.part(packed, e, EXPERTS) for e, (packed, _) in enumerate(turns)])
    return whole, [dense[e] for e, (_, dense) in enumerate(turns)]


def dense(x: Tensor, starts: Tensor, matrices: Tensor) -> Tensor:
    """A grouped product, `[tokens, out]`."""
    y = x.new_empty(len(x), matrices.shape[1])
    for g, w in enumerate(matrices):
        those = slice(int(starts[g]), int(starts[g + 1]))
        y[those] = x[those] @ w.T.to(x.dtype)
    return y


def check_layer(
    up: Codec, down: Codec, gate: str, numbers: list[float], biased: bool, hidden: int, width: int, tokens: int
) -> None:
    """The error is at most twice that of the layer in plain torch, in the same dtype, plus two roundings."""
    features = [width if gate.startswith("plain") else 2 * width, hidden]
    (first, ups), (second, downs) = some(up, features[0], hidden), some(down, hidden, width)
    random = torch.Generator().manual_seed(tokens)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[tokens % 3]
    x = torch.randn(tokens, hidden, generator=random).to(DEVICE, dtype) / 8
    # outside on both sides, and one expert twice
    index = torch.randint(-1, EXPERTS + 1, (tokens, TOP_K), generator=random).to(DEVICE)
    index[1:2] = 3
    weights = torch.rand(tokens, TOP_K, generator=random).to(DEVICE)
    biases = [torch.randn(EXPERTS, n, generator=random).to(DEVICE, dtype) if biased else None for n in features]
    codecs = [json.dumps(to_config(codec)) for codec in (up, down)]
    operands = up.runtime(first), down.runtime(second)
    y = nn.experts_op(x, index, weights, *operands, *biases, *codecs, EXPERTS, features, gate, numbers)
    assert (y.dtype, y.shape) == (dtype, x.shape)

    act = partial(_gate, gate, numbers)
    products = [partial(dense, matrices=torch.stack(m)) for m in (ups, downs)]
    plain = nn.experts_forward(x, index, weights.to(dtype), EXPERTS, *products, act, *biases).double()
    exact = torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
    for token, k in torch.nonzero((index >= 0) & (index < EXPERTS)).tolist():
        e = int(index[token, k])
        b = [bias[e].double() if bias is not None else 0 for bias in biases]
        inner = act(ups[e].double() @ x[token].double() + b[0])
        exact[token] += weights[token, k].double() * (downs[e].double() @ inner + b[1])
    if tokens:
        allowed = 2 * (plain - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert float((y.double() - exact).abs().max()) <= float(allowed)  # false for NaN


def _gate(name: str, numbers: list[float], x: Tensor) -> Tensor:
    return nn.GATES[name](x, *numbers)


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_equals_its_definition(layer: str):
    *what, tokens = LAYERS[layer]
    for number in tokens:
        check_layer(*what, number)


@pytest.mark.parametrize("gate", [name for name in nn.GATES if name.startswith("plain")])
def test_every_activation(gate: str):
    check_layer(QMoE(), QMoE(), gate, [], True, 12, 7, 1)
