"""The fixed dictionary of QMoE: the 65536 most probable runs of ternary weights, one 16-bit codeword each.

Weights are taken in pairs, r = first + 3 * second, of independent symbols: 0 with probability p0, 1 and 2 with
(1 - p0) / 2 each. Runs are popped from a heap in order of falling probability; each becomes the next codeword and, up
to 14 pairs, is pushed again with each of the nine pairs after it (Frantar and Alistarh 2023,
https://arxiv.org/abs/2310.16795, algorithm 1; `sub1.py` of IST-DASLab/qmoe). So every prefix of a codeword is a
codeword, and greedy encoding can stop anywhere.

Many runs have equal probability, and rounding decides between them: the published codes need the products in exactly
this running order, in IEEE doubles. With p0 = 0.885 the SHA-256 of `dec` is the published one, `PUBLISHED_SHA256`.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from heapq import heappop, heappush

import torch
from torch import Tensor

from halfbit.errors import RecipeError

CODEWORDS = 1 << 16
ROOT = CODEWORDS
LONGEST_PAIRS = 14
PUBLISHED_P0 = 0.885
PUBLISHED_SHA256 = "c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45"


@dataclass(frozen=True, eq=False)
class Dictionary:
    """One dictionary in the three forms that its users want.

    Attributes:
        p0: the probability of symbol 0 that it is made for.
        dec: int32 `[131072]`, as published: words 2c and 2c + 1 belong to codeword c, pairs 0-6 and 7-13
            (bits 0-3: pairs in the whole codeword | 4 + 4j: first symbol of pair j | 6 + 4j: second symbol of pair j).
        trie: int32 `[65537, 9]`, the encoder's: row c, column r is the codeword of run c followed by pair r, or -1.
            Row 65536 is the empty run.
        entries: int64 `[65536]`, the decoder's: one word per codeword, never negative
            (bits 0-31: symbols 0..15, two bits each | 32-55: symbols 16..27 | 56-63: number of symbols, even, 2..28).
        sha256: of `dec` as little-endian bytes.
    """

    p0: float
    dec: Tensor
    trie: Tensor
    entries: Tensor
    sha256: str


def check_p0(p0: float) -> None:
    """Below 1/3 symbol 0 is not the most frequent one, and single pairs of it may miss the dictionary."""
    if not 1 / 3 <= p0 < 1:
        raise RecipeError(f"the probability of a zero, p0, must be at least 1/3 and below 1, got {p0}")


@cache
def dictionary(p0: float = PUBLISHED_P0) -> Dictionary:
    """Built in under a second, once per process and p0."""
    check_p0(p0)
    runs = _most_probable_runs(p0)
    pairs = torch.tensor([len(run) for run in runs], dtype=torch.int64)
    padded = b"".join(run.ljust(LONGEST_PAIRS, b"\0") for run in runs)
    r = torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(CODEWORDS, LONGEST_PAIRS).to(torch.int64)
    # four bits per pair: first symbol, second symbol
    nibbles = (r % 3) | ((r // 3) << 2)
    at = 4 * torch.arange(7)
    first, second = (nibbles[:, :7] << at).sum(1), (nibbles[:, 7:] << at).sum(1)
    # the entries are the same 28 + 28 bits without a gap; the count moves from words of pairs to words of weights
    entries = first | (second << 28) | ((2 * pairs) << 56)
    dec = torch.stack([(first << 4) | pairs, (second << 4) | pairs], 1).flatten()
    # the upper half of the unsigned words becomes negative, the bits stay
    dec = torch.where(dec >= 1 << 31, dec - (1 << 32), dec).to(torch.int32)
    words = dec.tolist()
    digest = sha256(b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in words)).hexdigest()
    return Dictionary(p0, dec, _trie(runs), entries, digest)


def _most_probable_runs(p0: float) -> list[bytes]:
    p = [p0, (1 - p0) / 2, (1 - p0) / 2]
    pair_probability = [(1.0 * p[second]) * p[first] for second in range(3) for first in range(3)]
    extensions = [(bytes([r]), probability) for r, probability in enumerate(pair_probability)]
    # bytes compare like the lists of the reference, so ties fall the same way
    heap = [(-1.0, b"")]
    runs: list[bytes] = []
    while len(runs) < CODEWORDS:
        probability, run = heappop(heap)
        if run:
            runs.append(run)
        if len(run) < LONGEST_PAIRS:
            for pair, share in extensions:
                heappush(heap, (probability * share, run + pair))
    return runs


def _trie(runs: list[bytes]) -> Tensor:
    codeword = {run: c for c, run in enumerate(runs)}
    codeword[b""] = ROOT
    parents = torch.tensor([codeword[run[:-1]] for run in runs])
    pairs = torch.tensor([run[-1] for run in runs])
    trie = torch.full((CODEWORDS + 1, 9), -1, dtype=torch.int32)
    trie[parents, pairs] = torch.arange(CODEWORDS, dtype=torch.int32)
    return trie
