"""The list buffer, and what experts were given."""

import errno
import os
from pathlib import Path

import pytest
import torch
import torture
from compressed import text

from halfbit.activations import Activations, Routed, room
from halfbit.compress import compress
from halfbit.errors import OutputError
from halfbit.recipe import Recipe


def test_the_list_buffer_gives_views_of_one_tensor() -> None:
    buffer = torch.arange(40.0).view(20, 2)
    flow = Activations(buffer, [0, 4, 8, 12, 20], torch.ones(20, dtype=torch.bool))
    assert flow.batches(8) == [range(0, 2), range(2, 3), range(3, 4)]
    assert flow.batches(1) == [range(i, i + 1) for i in range(4)]
    flow.view(range(1, 3)).fill_(-1)
    assert (buffer[4:12] == -1).all()
    assert (buffer[:4] >= 0).all()
    assert (buffer[12:] >= 0).all()


@pytest.mark.parametrize("capacity", [1, 6, 100])
def test_routing_is_gathered_by_expert_and_replayed_in_place(capacity: int) -> None:
    routed = Routed(num_experts=3, capacity=capacity)
    first = torch.arange(8.0).view(4, 2)
    routed.add(
        first, torch.tensor([[0, 2], [3, 3], [2, 1], [9, 0]]), torch.rand(4, 2), torch.tensor([1, 1, 0, 1]).bool()
    )
    routed.add(first + 100, torch.tensor([[-1, 1], [0, 1], [3, -1], [2, 0]]), torch.rand(4, 2), torch.ones(4).bool())
    routed.close()
    assert routed.hidden[:, 0].tolist() == [0, 4, 6, 100, 102, 106]  # rows that no expert takes are not kept
    assert routed.keep.tolist() == [True, False, True, True, True, True]
    assert (routed.places.tolist(), routed.called) == ([0, 2, 3, 4, 5, 7], 8)
    for expert in range(3):
        rows, weights = routed.tokens_of(expert)
        at = (routed.index == expert).nonzero()
        assert rows.tolist() == at[:, 0].tolist()
        assert torch.equal(weights, routed.weights[at[:, 0], at[:, 1]])
    routed.outputs += routed.hidden * 10
    routed.forget_inputs()
    one, two = routed.answer(0), routed.answer(1)
    assert one.tolist() == [[0, 10], [0, 0], [40, 50], [60, 70]]
    assert two.tolist() == [[1000, 1010], [1020, 1030], [0, 0], [1060, 1070]]


def test_a_module_given_every_token_once_per_expert_masks_by_token() -> None:
    """Llama 4 repeats the tokens for each expert; row r is token r modulo the number of tokens."""
    routed = Routed(num_experts=2, capacity=3)
    index = torch.tensor([[0], [2], [0], [2], [1], [1]])
    routed.add(torch.rand(6, 2), index, torch.ones(6, 1), torch.tensor([True, False, False]))
    assert routed.close().keep.tolist() == [True, False, False, False]


def test_rows_that_no_expert_takes_are_kept_where_every_row_is_asked_for() -> None:
    routed = Routed(num_experts=2, capacity=3, every=True)
    x = torch.arange(6.0).view(3, 2)
    routed.add(x, torch.tensor([[0], [2], [1]]), torch.ones(3, 1), torch.ones(3).bool())
    routed.close()
    assert torch.equal(routed.hidden, x)
    assert [routed.tokens_of(e)[0].tolist() for e in range(2)] == [[0], [2]]
    routed.outputs += 1
    assert routed.answer(0).tolist() == [[1, 1], [1, 1], [1, 1]]


def test_rows_may_lie_in_a_file_without_a_name(tmp_path, monkeypatch) -> None:
    rows = room(1000, 300, torch.bfloat16, tmp_path / "new")
    rows.fill_(2)
    assert rows.shape == (1000, 300)
    assert rows.float().sum() == 600_000
    assert not list((tmp_path / "new").iterdir())
    mapped = Path("/proc/self/maps")
    if mapped.is_file():
        assert str(tmp_path / "new") in mapped.read_text()
        del rows
        assert str(tmp_path / "new") not in mapped.read_text()
    assert room(0, 300, torch.float32, tmp_path).shape == (0, 300)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        room(1000, 300, torch.float32, tmp_path)


@pytest.mark.parametrize("name", ["qwen3-moe", "switch"])
def test_activations_in_files_change_nothing(name: str, saved, tmp_path) -> None:
    """Of the original too, which is followed."""
    source, how = saved(name), Recipe.from_toml(torture.RECIPE).gated(model=False)
    for out, offload in (("memory", None), ("files", tmp_path / "offload")):
        list(compress(str(source), tmp_path / out, how, text(source), offload=offload))
    for path in (tmp_path / "memory").iterdir():
        assert path.read_bytes() == (tmp_path / "files" / path.name).read_bytes(), path.name
    assert not list((tmp_path / "offload").iterdir())
