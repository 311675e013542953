"""Matrices of one stack in several formats, each in its own: most experts in few bits, some in more.

    which     uint8 [matrices]   the codec of each matrix, counted in the order of `codecs`
    0_PART    of codec 0         the stack of the matrices that are in codec 0, in their order, part by part
    1_PART    of codec 1         and so on

A matrix costs one byte more than in its own format. Nothing is encoded here: single matrices have codecs of their own,
`formats.stack` puts them together, and `part` gives back what was put in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from halfbit.errors import FormatError, RecipeError, Unsupported
from halfbit.formats._shapes import check_stack, one_shape
from halfbit.types import Codec, Packed, Solution

MOST = 16


@dataclass(frozen=True)
class Mixed:
    """Matrices of one shape in two or more formats.

    Attributes:
        codecs: 2 to 16, all different, none of them mixed; each has a matrix or more in every stack.
    """

    codecs: tuple[Codec, ...]

    name: ClassVar[str] = "mixed"

    def __post_init__(self) -> None:
        if not 2 <= len(self.codecs) <= MOST:
            raise RecipeError(f"Mixed: expected 2 to {MOST} codecs, got {len(self.codecs)}")
        for number, codec in enumerate(self.codecs):
            if isinstance(codec, Mixed):
                raise RecipeError("Mixed: one of its codecs is mixed itself; give the codecs of that one instead")
            if codec in self.codecs[:number]:
                raise RecipeError(f"Mixed: its codecs must all be different, got {codec!r} twice")

    @property
    def rotated(self) -> bool:
        return False

    @property
    def parts(self) -> tuple[str, ...]:
        return "which", *(f"{n}_{part}" for n, codec in enumerate(self.codecs) for part in codec.parts)

    def encode(self, solution: Solution) -> Packed:
        raise Unsupported("mixed: holds matrices that are encoded; encode each with its own codec and stack them")

    def decode(self, packed: Packed) -> Tensor:
        members = self.members(packed)
        which = packed.tensors["which"]
        rows, columns = packed.shape[0] // len(which), packed.shape[1]
        dense = torch.empty(len(which), rows, columns, dtype=torch.float32, device=which.device)
        for n, member in enumerate(members):
            own = torch.nonzero(which == n).flatten()
            with _naming(n):
                dense[own] = member.codec.decode(member).view(len(own), rows, columns)
        return dense.view(packed.shape)

    def check(self, packed: Packed) -> None:
        for n, member in enumerate(self.members(packed)):
            with _naming(n):
                check_stack(member, int((packed.tensors["which"] == n).sum()))

    def stack(self, parts: list[Packed]) -> Packed:
        """See `Codec.stack`; a part that is mixed counts as the matrices that it holds. Every codec must be used."""
        matrices = separate(parts)
        rows, columns = one_shape(matrices)
        groups = [[m for m in matrices if m.codec == codec] for codec in self.codecs]
        if not all(groups) or sum(map(len, groups)) != len(matrices):
            given = ", ".join(map(repr, dict.fromkeys(m.codec for m in matrices)))
            raise ValueError(f"mixed: expected matrices of {', '.join(map(repr, self.codecs))}, of each, got {given}")
        which = torch.tensor([self.codecs.index(m.codec) for m in matrices], dtype=torch.uint8)
        tensors = {"which": which.to(matrices[0].tensors[matrices[0].codec.parts[0]].device)}
        for n, (codec, group) in enumerate(zip(self.codecs, groups, strict=True)):
            whole = codec.stack(group)
            tensors |= {f"{n}_{part}": whole.tensors[part] for part in codec.parts}
        return Packed(self, (len(matrices) * rows, columns), tensors)

    def part(self, packed: Packed, number: int, count: int) -> Packed:
        """See `Codec.part`; the matrix is of its own codec, as it was given to `stack`."""
        members = self.members(packed)
        which = packed.tensors["which"].tolist()
        if len(which) != count:
            raise ValueError(f"mixed: the stack has {len(which)} matrices, not {count}")
        own = which[number]
        member = members[own]
        return member.codec.part(member, which[:number].count(own), which.count(own))

    def runtime(self, packed: Packed) -> list[Tensor]:
        """[own, extent, operands of codec 0, operands of codec 1, ...]; own int32 [codecs, matrices]: the
        number of each matrix among those of a codec, or -1; extent: empty [0, how many operands each codec has]."""
        operands = []
        for n, member in enumerate(self.members(packed)):
            with _naming(n):
                operands.append(member.codec.runtime(member))
        members = packed.tensors["which"] == torch.arange(len(operands), device=packed.tensors["which"].device)[:, None]
        own = torch.where(members, members.cumsum(1) - 1, -1).to(torch.int32)
        extent = torch.empty(0, *map(len, operands), device=own.device)
        return [own, extent, *(t for of_codec in operands for t in of_codec)]

    def separated(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        """Of the tensors of `runtime`, the operands of each codec."""
        found, rest = [], tensors[2:]
        for length in tensors[1].shape[1:]:
            found.append(rest[:length])
            rest = rest[length:]
        return found

    def product(self, x: Tensor, starts: Tensor, tensors: list[Tensor], out_features: int) -> Tensor:
        operands, bounds = self.separated(tensors), starts.tolist()
        which = (tensors[0] >= 0).to(torch.uint8).argmax(0).tolist()
        if len(bounds) != len(which) + 1 or bounds[0] != 0 or bounds[-1] != x.shape[0] or bounds != sorted(bounds):
            raise ValueError(
                f"starts must rise from 0 to the number of tokens, {x.shape[0]}, one group for each of {len(which)} "
                f"matrices, got {len(bounds) - 1} groups from {bounds[0]} to {bounds[-1]}"
            )
        # of each codec: its own starts, and the tokens that are its own, neighbours as one slice
        own_starts, own_tokens = [[0] for _ in operands], [[] for _ in operands]
        for n, (start, stop) in zip(which, pairwise(bounds), strict=True):
            own_starts[n].append(own_starts[n][-1] + stop - start)
            slices = own_tokens[n]
            if slices and slices[-1].stop == start:
                slices[-1] = slice(slices[-1].start, stop)
            elif stop > start:
                slices.append(slice(start, stop))
        y = x.new_empty(x.shape[0], out_features)
        for codec, own, begins, slices in zip(self.codecs, operands, own_starts, own_tokens, strict=True):
            if not slices:
                continue
            tokens = x[slices[0]] if len(slices) == 1 else torch.cat([x[s] for s in slices])
            found = codec.product(tokens, torch.tensor(begins), own, out_features)
            if len(found) == len(x):
                return found
            for s, rows in zip(slices, found.split([s.stop - s.start for s in slices]), strict=True):
                y[s] = rows
        return y

    def lookup(self, rows: Tensor, tensors: list[Tensor], columns: int) -> Tensor:
        raise Unsupported("mixed: single rows are not looked up; store an embedding in 'grouped' or 'spqr'")

    def members(self, packed: Packed) -> list[Packed]:
        """The stack of each codec, without decoding. Raises FormatError where the tensors cannot be that."""
        t = packed.tensors
        if set(t) != set(self.parts):
            raise FormatError(f"mixed: expected the tensors {', '.join(self.parts)}, got {', '.join(t)}")
        which = t["which"]
        if which.dtype != torch.uint8 or which.ndim != 1:
            raise _damaged(f"must be uint8 [matrices], got {which.dtype} {list(which.shape)}")
        counts = which.to(torch.int64).bincount(minlength=len(self.codecs)).tolist()
        if len(counts) > len(self.codecs) or 0 in counts:
            raise _damaged(
                f"must name each of {len(self.codecs)} codecs and no other, got {sorted(set(which.tolist()))}"
            )
        rows, rest = divmod(packed.shape[0], len(which))
        if rest:
            raise _damaged(f"{packed.shape[0]} rows are not {len(which)} matrices of one shape")
        return [
            Packed(codec, (count * rows, packed.shape[1]), {part: t[f"{n}_{part}"] for part in codec.parts})
            for n, (codec, count) in enumerate(zip(self.codecs, counts, strict=True))
        ]


def separate(parts: list[Packed]) -> list[Packed]:
    """The same matrices, in order, with those of mixed parts one by one in their own codecs."""
    found = []
    for packed in parts:
        if isinstance(packed.codec, Mixed):
            count = len(packed.tensors["which"])
            found += [packed.codec.part(packed, number, count) for number in range(count)]
        else:
            found.append(packed)
    return found


def by_codec(packed: Packed, count: int) -> list[tuple[list[int], Packed]]:
    """For each codec of a stack of `count`, which of its matrices are in it, and these as a stack of that codec."""
    if not isinstance(packed.codec, Mixed):
        return [(list(range(count)), packed)]
    which = packed.tensors["which"].tolist()
    members = enumerate(packed.codec.members(packed))
    return [([number for number, own in enumerate(which) if own == n], member) for n, member in members]


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Name the codec, and the tensor by what it is called here, in what its own codec raises."""
    try:
        yield
    except FormatError as e:
        tensor = None if e.tensor is None else f"{number}_{e.tensor}"
        raise FormatError(f"mixed: codec {number}: {e}", tensor=tensor) from e


def _damaged(what: str) -> FormatError:
    return FormatError(f"mixed: which: {what}; the file is damaged, compress the block again", tensor="which")


CODEC = Mixed
