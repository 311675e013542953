"""Columns mixed by random signs and Hadamard blocks, so that no column, and no weight in a row, stands out.

    R = blockdiag(H, H, ...) diag(s)    H: Hadamard matrix of b columns over sqrt(b); s: signs
    W x = (W R^T) (R x)                 W R^T is what is solved and stored, x is rotated when it is multiplied

b is the largest power of two that divides the columns, 256 at most. Signs are bits of splitmix64 (Steele et al. 2014,
https://doi.org/10.1145/2660193.2660195) of the column's number, the same for all matrices, so nothing is stored.
Incoherence by Hadamard matrices: Tseng et al. 2024, QuIP#, https://arxiv.org/abs/2402.04396, section 3.
"""

from functools import lru_cache

import torch
from torch import Tensor

LARGEST = 256
WORD = (1 << 64) - 1


def rotate(x: Tensor) -> Tensor:
    """R applied to each row of `x` `[..., columns]`, float32 or float64: additions in a fixed order, one rounding each,
    so that the result is the same on every machine."""
    return _mixed(x * signs(x.shape[-1]).to(x))


def undo(y: Tensor) -> Tensor:
    """The inverse, R^T, of each row."""
    return _mixed(y) * signs(y.shape[-1]).to(y)


def both_sides(h: Tensor) -> Tensor:
    """R H R^T of symmetric `h` `[..., columns, columns]`."""
    return rotate(rotate(h).mT).mT


def rotated_input(x: Tensor) -> Tensor:
    """As `rotate` of `x` `[tokens, columns]`, by one matrix product, in float32: what GPUs do."""
    hadamard, turned = _matrix(x.shape[1], x.device)
    return ((x.to(torch.float32) * turned).view(-1, hadamard.shape[0]) @ hadamard).view(x.shape)


def block(columns: int) -> int:
    """Columns that are mixed with each other."""
    return min(columns & -columns, LARGEST)


def _mixed(x: Tensor) -> Tensor:
    size = block(x.shape[-1]) if x.shape[-1] else 1
    y, half = x, 1
    while half < size:
        a, b = y.reshape(*x.shape[:-1], -1, 2, half).unbind(-2)
        y = torch.stack([a + b, a - b], -2)
        half *= 2
    # of float64, so that it is rounded to the dtype of x once
    return y.reshape(x.shape) * torch.tensor(size**-0.5, dtype=x.dtype, device=x.device)


@lru_cache(maxsize=64)
def signs(columns: int) -> Tensor:
    """int8 `[columns]`, 1 and -1."""
    return torch.tensor([1 - 2 * (_splitmix(j) >> 63) for j in range(columns)], dtype=torch.int8)


def _splitmix(counter: int) -> int:
    z = ((counter + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


@lru_cache(maxsize=64)
def _matrix(columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """H `[b, b]` and the signs, float32."""
    return _mixed(torch.eye(block(columns))).to(device), signs(columns).to(device, torch.float32)
