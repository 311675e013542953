"""Loading: what the loader fills in itself, and what a hostile folder must not reach."""

import pytest
import tiny_models
import torch
from test_dense import EVERYTHING, expected, run
from test_end_to_end import add_tokenizer, inputs, largest_difference, load

from halfbit.nn import PackedLinear

TABLE = """
        [[rules]]
        match = "*wte"
        solver = "rtn"
        grid = { name = "affine", bits = 8, group = 16 }
        codec = { name = "grouped" }
"""


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", tiny_models.FILLED)
def test_what_no_file_has_is_filled_in(name: str, tmp_path) -> None:
    source = add_tokenizer(tiny_models.save(name, tmp_path / "source"))
    run(source, tmp_path / "out", TABLE + EVERYTHING["grouped"])
    model, plain = load(tmp_path / "out"), load(source)
    assert any(isinstance(m, PackedLinear) for m in model.modules())
    buffers = dict(model.named_buffers())
    for path, buffer in plain.named_buffers():
        assert torch.equal(buffers[path], buffer), path
    dense, given = expected(source, model), inputs(model)
    with torch.no_grad():
        wanted, got = dense(**given, use_cache=False).logits, model(**given, use_cache=False).logits
    assert largest_difference(got, wanted) < 2e-5
