"""Tokens sorted by expert and the weighted sum of their outputs: C++ and torch against loops, with hostile choices."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from halfbit import native
from halfbit.routing import Sorted, by_expert, weighted_sum

CHOICES = {
    "one token": torch.tensor([[3, 0, 2]]),
    "the same expert twice": torch.tensor([[1, 1], [0, 1]]),
    "none in reach": torch.tensor([[-1, 4], [1 << 40, -(1 << 63)]]),
    "some in reach": torch.tensor([[2, 9, -1], [2, 0, 2], [-5, 3, 2]]),
    "no token": torch.empty(0, 2, dtype=torch.int64),
    "no choice": torch.empty(3, 0, dtype=torch.int64),
    "not contiguous": torch.randint(-1, 6, (8, 37), generator=torch.Generator().manual_seed(0)).T,
}
EXPERTS = 4


@contextmanager
def by_torch() -> Iterator[None]:
    """Without the extension."""
    found, native.extension = native.extension, None
    try:
        yield
    finally:
        native.extension = found


def obvious(index: Tensor) -> list[tuple[int, int, int]]:
    """(expert, choice, token), sorted."""
    k = index.shape[1]
    flat = enumerate(index.reshape(-1).tolist())
    return sorted((expert, choice, choice // k) for choice, expert in flat if 0 <= expert < EXPERTS)


def rows(found: Sorted) -> list[tuple[int, int, int]]:
    return list(zip(found.expert.tolist(), found.choice.tolist(), found.token.tolist(), strict=True))


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_sorted_by_expert(name: str) -> None:
    index = CHOICES[name]
    expected = obvious(index)
    starts = [sum(expert < e for expert, _, _ in expected) for e in range(EXPERTS + 1)]
    found = by_expert(index, EXPERTS)
    with by_torch():
        plain = by_expert(index, EXPERTS)
    for told in (found, plain):
        assert rows(told) == expected
        assert told.starts.tolist() == starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHOICES)
def test_the_sum_is_weighted(name: str, dtype: torch.dtype) -> None:
    index = CHOICES[name]
    places = by_expert(index, EXPERTS)
    random = torch.Generator().manual_seed(1)
    y = torch.randn(len(places.choice), 515, generator=random).to(dtype)
    weights = torch.rand(index.shape[1], index.shape[0], generator=random).T.to(dtype)
    expected = torch.zeros(index.shape[0], 515, dtype=torch.float64)
    for row, (_, choice, token) in zip(y, rows(places), strict=True):
        expected[token] += row.double() * weights[token, choice % index.shape[1]].double()
    found = weighted_sum(y, places, weights)
    with by_torch():
        plain = weighted_sum(y, places, weights)
    assert found.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, plain)


def test_any_number_of_threads_gives_the_same_sum() -> None:
    index = torch.randint(0, EXPERTS, (65, 3), generator=torch.Generator().manual_seed(0))
    places = by_expert(index, EXPERTS)
    y, weights = torch.randn(len(places.choice), 1030), torch.rand(65, 3)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(weighted_sum(y, places, weights))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_gradients_go_through_the_sum() -> None:
    places = by_expert(CHOICES["some in reach"], EXPERTS)
    y = torch.randn(len(places.choice), 8, requires_grad=True)
    weighted_sum(y, places, torch.rand(3, 3)).sum().backward()
    assert y.grad is not None
    assert y.grad.abs().sum() > 0


@pytest.mark.skipif(native.extension is None, reason="no C++ extension")
def test_what_does_not_fit_is_refused() -> None:
    assert native.extension is not None
    index, starts, places = torch.zeros(2, 2, dtype=torch.int64), torch.empty(5, dtype=torch.int64), torch.empty(3, 3)
    with pytest.raises(ValueError, match="fit"):
        native.extension.experts_sort(index, starts, places.long())
    y, weights, total = torch.zeros(1, 4), torch.zeros(2, 2), torch.zeros(2, 4)
    for choice in (-1, 4):
        with pytest.raises(ValueError, match="fit"):
            native.extension.experts_sum(y, torch.tensor([choice]), weights, total, 1)
