"""Compressed experts as modules that learn: scales and levels, and on request the codes too.

A ternary matrix is codes times the scales of its rows. With the codes as they are, its scales have a gradient like any
weight. To let codes change, each weight has a latent value that is rounded anew in every step and takes the gradient of
the rounded one (straight-through; Bengio et al. 2013, https://arxiv.org/abs/1308.3432); the threshold follows the
latent values, so that a matrix keeps its number of non-zeros, and with it its size. Matrices of other formats are
constants, decoded: what lies before them learns through them.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from halfbit import formats
from halfbit.formats._layouts import TERNARY
from halfbit.formats._levels import grid_of as stored_grid
from halfbit.formats.mixed import Mixed
from halfbit.formats.qmoe import QMoE
from halfbit.formats.quads import Quads
from halfbit.formats.runlength import RunLength
from halfbit.grids.deadzone import Deadzone
from halfbit.grids.ternary import Ternary
from halfbit.nn import PackedExperts, PackedLinear
from halfbit.rotation import rotate, undo
from halfbit.types import Codec, Packed, Solution

T = TypeVar("T")

# steps between two looks at the thresholds of codes that may change
DENSITY_EVERY = 10


class _Ternarized(torch.autograd.Function):
    """Codes of latent values times their levels; the latent values get the gradient of the weights."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, low: Tensor, high: Tensor, least: Tensor, most: Tensor) -> Tensor:
        codes = _codes(latent, least, most)
        ctx.save_for_backward(codes)
        return _levels(codes, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        below, above = ((grads[0] * side).sum(-1, keepdim=True) for side in (codes < 0, codes > 0))
        return grads[0], below, above, None, None


def _ternarized(latent: Tensor, low: Tensor, high: Tensor, least: Tensor, most: Tensor) -> Tensor:
    return _Ternarized.apply(latent, low, high, least, most)  # pyright: ignore[reportReturnType]


def _levels(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (codes > 0) * high + (codes < 0) * low


def _undone(make: Callable[[], Tensor]) -> Tensor:
    return undo(make())


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _codes(values: Tensor, least: Tensor | float, most: Tensor | float) -> Tensor:
    """int8: -1 below `least`, 1 above `most`, otherwise 0."""
    return (values > most).to(torch.int8) - (values < least).to(torch.int8)


class TunableMatrix(nn.Module):
    """A stack of ternary matrices `[experts, out, in]`, float32.

    Attributes:
        low, high: `[experts, out, 1]`, what the codes -1 and 1 stand for; of a symmetric grid low is None.
        codes: int8 `[experts, out, in]`; None where there are latent values.
        latent: float32 `[experts, out, in]` or None.
        rotated: codes and latent values are of matrices with rotated columns.

    Args:
        packed: the tall matrix.
        experts: how many matrices it holds.
        original: `[experts, out, in]`, the weights before they were compressed, to let codes change; None: they stay.
    """

    least: Tensor
    most: Tensor
    factor: Tensor

    def __init__(self, packed: Packed, experts: int, original: Tensor | None = None):
        super().__init__()
        self.codec: Codec = packed.codec
        assert isinstance(packed.codec, TERNARY)
        self.rotated = not isinstance(packed.codec, QMoE) and packed.codec.rotated
        if not isinstance(packed.codec, QMoE):
            # the same bytes as a matrix whose columns are what they are
            packed = replace(packed, codec=replace(packed.codec, rotated=False))
        if self.rotated and original is not None:
            original = rotate(original)
        dense = packed.codec.decode(packed).view(experts, -1, packed.shape[1])
        codes = _codes(dense, 0.0, 0.0)
        high, low = dense.amax(-1, keepdim=True).clamp(min=0), dense.amin(-1, keepdim=True).clamp(max=0)
        symmetric = isinstance(grid_of(packed.codec), Deadzone)
        if symmetric:
            high = torch.maximum(high, -low)
            # a row of zeros has lost its scale; the mean of the others' is no worse than any
            high = torch.where(high > 0, high, high.mean((1, 2), keepdim=True))
            low = -high
        self.high = nn.Parameter(high)
        self.low = None if symmetric else nn.Parameter(low)
        self.register_buffer("codes", codes if original is None else None)
        self.register_parameter("latent", None)
        if original is not None:
            # half way to each level; a level of 0 is never reached
            most, least = (
                torch.where(level == 0, level + inf, level / 2) for level, inf in ((high, math.inf), (low, -math.inf))
            )
            edge, sizes = torch.where(original > 0, most, -least), original.abs()
            # where the solver chose otherwise than the nearest, mirrored at the threshold: on the side of its code, and
            # no nearer to changing it than the weight was
            zero = torch.where(sizes < edge, original, original.sign() * (2 * edge - sizes).clamp(min=0))
            edge, along = torch.where(codes > 0, most, -least), codes * original
            other = codes * torch.where(along > edge, along, 2 * edge - along)
            self.latent = nn.Parameter(torch.where(codes == 0, zero, other))
            self.register_buffer("least", least)
            self.register_buffer("most", most)
            self.register_buffer("factor", torch.ones(experts, 1, 1))
            self.nonzeros = codes.ne(0).sum((1, 2)).tolist()

    @torch.no_grad()
    def keep_density(self) -> None:
        """Move the thresholds of each matrix to where it has as many non-zeros as it began with."""
        if self.latent is None:
            return
        for e, count in enumerate(self.nonzeros):
            sizes = torch.maximum(self.latent[e] / self.most[e], self.latent[e] / self.least[e]).flatten()
            if 0 < count < sizes.numel():
                self.factor[e] = sizes.kthvalue(sizes.numel() - count).values

    def current(self) -> Tensor:
        """int8 `[experts, out, in]`, -1, 0 and 1."""
        if self.latent is None:
            return self.get_buffer("codes")
        return _codes(self.latent.detach(), self.factor * self.least, self.factor * self.most)

    def weights(self) -> list[Callable[[], Tensor]]:
        """What makes each matrix, `[out, in]`, when it is wanted."""
        found = self.stored()
        return [partial(_undone, make) for make in found] if self.rotated else found

    def stored(self) -> list[Callable[[], Tensor]]:
        """The same with rotated columns, where they are."""
        # taken apart once: the gradient of one slice is a stack of zeros around it
        high = self.high.unbind(0)
        low = [-h for h in high] if self.low is None else self.low.unbind(0)
        if self.latent is not None:
            edges = ((self.factor * edge).unbind(0) for edge in (self.least, self.most))
            return [partial(_ternarized, *part) for part in zip(self.latent.unbind(0), low, high, *edges, strict=True)]
        return [partial(_levels, *part) for part in zip(self.get_buffer("codes"), low, high, strict=True)]

    @torch.no_grad()
    def packed(self) -> list[Packed]:
        """The matrices as the codec stores them, scales and levels rounded to what is stored."""
        codes = self.current()
        codes = torch.where(codes < 0, 1, 2 * codes).to(torch.uint8)
        found = []
        for e in range(codes.shape[0]):
            high = self.high[e, :, 0].clamp(min=0)
            grid = grid_of(self.codec)
            if isinstance(grid, Deadzone):
                params = {k: v.unsqueeze(1) for k, v in grid.store(high).items()}
            else:
                assert self.low is not None
                levels = torch.stack([self.low[e, :, 0].clamp(max=0), high], -1)
                params = {"levels": levels[:, None].to(torch.bfloat16)}
            found.append(self.codec.encode(Solution(grid, codes[e], params, rotated=self.rotated)))
        return found


class ConstantMatrix(nn.Module):
    """A stack of matrices `[experts, out, in]` of any codec, decoded to float32; nothing learns.

    Args:
        packed: the tall matrix.
        experts: how many matrices it holds.
    """

    dense: Tensor
    rotated = False

    def __init__(self, packed: Packed, experts: int):
        super().__init__()
        self._parts = [packed.codec.part(packed, e, experts) for e in range(experts)]
        dense = packed.codec.decode(packed).view(experts, packed.shape[0] // experts, packed.shape[1])
        self.register_buffer("dense", dense)

    def weights(self) -> list[Callable[[], Tensor]]:
        """See `TunableMatrix.weights`."""
        return [partial(_as_it_is, w) for w in self.dense]

    def stored(self) -> list[Callable[[], Tensor]]:
        """The same: nothing is rotated."""
        return self.weights()

    def packed(self) -> list[Packed]:
        """The matrices as they were given."""
        return self._parts


class TunableStack(nn.Module):
    """The matrices of a projection, `[experts, out, in]`: the ternary ones learn, the others hand the gradient on.

    Attributes:
        codec: of the whole.
        members: matrices of one codec each, `TunableMatrix` or `ConstantMatrix`.

    Args:
        packed, experts, original: see `TunableMatrix`.
    """

    def __init__(self, packed: Packed, experts: int, original: Tensor | None = None):
        super().__init__()
        self.codec: Codec = packed.codec
        self._correction = packed.correction
        self._out = packed.shape[0] // experts
        self.members = nn.ModuleList()
        # of each expert, which member it is in, and where there
        self._places: dict[int, tuple[int, int]] = {}
        for n, (numbers, stack) in enumerate(formats.by_codec(packed, experts)):
            self._places |= {e: (n, place) for place, e in enumerate(numbers)}
            if is_tunable(stack.codec):
                own = original if original is None or len(numbers) == experts else original[numbers]
                self.members.append(TunableMatrix(stack, len(numbers), own))
            else:
                self.members.append(ConstantMatrix(stack, len(numbers)))

    @property
    def tunable(self) -> list[TunableMatrix]:
        """The members that learn."""
        return [m for m in self.members if isinstance(m, TunableMatrix)]

    @property
    def constant(self) -> int:
        """How many matrices do not learn."""
        return sum(m.dense.shape[0] for m in self.members if isinstance(m, ConstantMatrix))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """Grouped product, see `Codec.product`; differentiable."""
        members = self._members()
        makers = self._in_order([[(m.rotated, make) for make in m.stored()] for m in members])
        # x is rotated once, which is less work than to rotate the matrices back
        given = {False: x, True: rotate(x) if any(m.rotated for m in members) else x}
        bounds = zip(makers, pairwise(starts.tolist()), strict=True)
        parts = [given[rotated][first:last] @ make().T for (rotated, make), (first, last) in bounds if last > first]
        return torch.cat(parts) if parts else x.new_empty(0, self._out)

    def weights(self) -> list[Callable[[], Tensor]]:
        """See `TunableMatrix.weights`."""
        return self._in_order([m.weights() for m in self._members()])

    def packed(self) -> list[Packed]:
        """The matrices as they are stored; what learned is rounded to that."""
        found = self._in_order([m.packed() for m in self._members()])
        own = [None] * len(found) if self._correction is None else self._correction.cpu().split(1)
        return [replace(packed, correction=c) for packed, c in zip(found, own, strict=True)]

    def _members(self) -> list[TunableMatrix | ConstantMatrix]:
        return [m for m in self.members if isinstance(m, TunableMatrix | ConstantMatrix)]

    def _in_order(self, of_members: list[list[T]]) -> list[T]:
        places = (self._places[e] for e in range(len(self._places)))
        return [of_members[member][place] for member, place in places]


def is_tunable(codec: Codec) -> bool:
    """Whether a stack of this codec has ternary matrices."""
    return isinstance(codec, TERNARY) or (isinstance(codec, Mixed) and any(map(is_tunable, codec.codecs)))


def grid_of(codec: Codec) -> Deadzone | Ternary:
    """The ternary grid whose solutions a codec stores."""
    return Ternary() if not isinstance(codec, RunLength | Quads) else stored_grid(codec.scale_bits)


class TunableExperts(nn.Module):
    """Takes the place of `PackedExperts` while it is tuned; same call, differentiable."""

    def __init__(self, packed: PackedExperts, up: TunableStack, down: TunableStack):
        super().__init__()
        self.experts, self.up, self.down = packed, up, down

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        hidden, index, weights = self.experts.stack.route(args, kwargs)
        out = self.experts.run(hidden, index, weights, self.up, self.down)
        given = args[0] if args else kwargs[self.experts.stack.arguments[0]]
        return out.view_as(given)


def frozen(layer: PackedLinear) -> nn.Linear:
    """A packed layer, decoded, that hands the gradient on to its input."""
    matrix = layer.matrix
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(matrix.codec.decode(matrix.packed()), requires_grad=False)
    dense.register_parameter("bias", layer.get_parameter("bias") if layer.bias is not None else None)
    correction = matrix.added(None)
    if correction is not None:
        dense.register_forward_hook(lambda _module, _given, y: y + correction.to(y))
    return dense
