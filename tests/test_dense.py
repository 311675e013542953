"""Linear layers, embeddings and heads, compressed and run: tiny random models of every family, dense and mixed.

The oracle is the same model with every compressed weight replaced by what the stored codes decode to.
"""

import json
from pathlib import Path

import pytest
import torch
from compressed import EVERYTHING, chosen, inputs, largest_difference, load, run, text
from torch import nn

import halfbit
from halfbit import recipe
from halfbit.compress import compress
from halfbit.errors import FormatError, RecipeError
from halfbit.events import Began, Noticed, Solved
from halfbit.families import open_family
from halfbit.folder import Problem
from halfbit.linear_groups import choose
from halfbit.linears import is_linear
from halfbit.manifest import unverified
from halfbit.nn import PackedExperts, PackedLinear
from halfbit.reader import Reader
from halfbit.recipe import Recipe

# routers, layers outside the blocks, and the head that is tied to an embedding which scales what it looks up (Gemma)
KEPT = ("classifier", "project_in", "project_out", "lm_head")


DENSE = ("llama", "gemma3", "falcon", "opt", "nemotron-h")
CASES = [
    *((name, "spqr") for name in (*DENSE, "qwen2-moe", "qwen3-moe-tied", "deepseek-v3", "llama4", "phimoe", "switch")),
    *((name, "grouped") for name in ("opt", "qwen2-moe")),
]


@pytest.mark.parametrize(("name", "codec"), CASES)
def test_the_compressed_model_gives_the_logits_of_the_decoded_one(name: str, codec: str, made) -> None:
    model, events = made(name, codec).model, made(name, codec).events
    linears = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert linears
    # nothing that can be compressed was left: only what no rule can reach is a plain linear layer
    assert not [p for p, m in model.named_modules() if type(m) is nn.Linear and not p.endswith(KEPT)]
    with torch.no_grad():
        got = model(**inputs(model), use_cache=False).logits
    assert largest_difference(got, made(name, codec).logits) < 2e-5
    solved = [e for e in events if isinstance(e, Solved)]
    began = next(e for e in events if isinstance(e, Began))
    assert began.matrices == len(solved) == len({e.matrix for e in solved})
    assert all(0 <= e.loss < 0.2 for e in solved)


# dense models, one with biases; experts; tied embeddings; two stacks
@pytest.mark.parametrize(
    ("name", "codec"),
    [("llama", "spqr"), ("opt", "grouped"), ("qwen2-moe", "grouped"), ("qwen3-moe-tied", "spqr"), ("switch", "spqr")],
)
def test_the_folder_is_whole_and_saves_and_loads_again(name: str, codec: str, made, tmp_path) -> None:
    source, folder, model = made(name, codec).source, made(name, codec).folder, made(name, codec).model
    assert not [p for p in halfbit.verify(folder) if isinstance(p, Problem)]
    manifest = json.loads((folder / "manifest.json").read_text())
    reader = Reader(source)
    # every weight of the checkpoint is there, as it was or packed, and none twice
    family = open_family(reader)
    chosen = choose(Recipe.from_toml(EVERYTHING[codec]), family)
    left = {n for n in reader.names() if n not in manifest["tensors"]}
    packed = {f"{p}.weight" for linear, _ in chosen.values() for p in (linear.path, *linear.twins)}
    claims = family.claims().tensors
    assert not [n for n in left if claims[n].kind != "experts" and claims[n].where not in packed]
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    first, second = model.state_dict(), again.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[n], second[n]) for n in first)
    given = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, again(**given).logits)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("opt", torch.float16),
        ("falcon", torch.bfloat16),
        ("qwen2-moe", torch.float16),
        ("qwen2-moe", torch.bfloat16),
        ("switch", torch.float16),
    ],
)
def test_it_runs_in_half_precision(name: str, dtype: torch.dtype, made) -> None:
    model = load(made(name, "spqr").folder, dtype)
    with torch.no_grad():
        got = model(**inputs(model)).logits
    assert got.dtype == dtype
    assert largest_difference(got.float(), made(name, "spqr").logits) < 0.1


@pytest.mark.parametrize("name", ["llama", "opt", "falcon", "qwen3-moe"])
def test_greedy_text_is_that_of_the_decoded_model(name: str, made) -> None:
    model, dense = made(name, "spqr").model, made(name, "spqr").decoded
    ids = inputs(model)["input_ids"]
    wanted = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(ids, **wanted), dense.generate(ids, **wanted))


def test_layers_of_one_input_store_their_order_once(made) -> None:
    folder, model = made("llama", "spqr").folder, made("llama", "spqr").model
    manifest = json.loads((folder / "manifest.json").read_text())
    attention = "model.layers.1.self_attn"
    assert f"{attention}.q_proj.packed_weight.order" in manifest["tensors"]
    assert f"{attention}.k_proj.packed_weight.order" not in manifest["tensors"]
    entry = manifest["packed"][f"{attention}.k_proj"]["weight"]["tensors"]["order"]
    assert entry[2] == f"{attention}.q_proj"
    q, k = (model.get_submodule(f"{attention}.{p}").matrix for p in ("q_proj", "k_proj"))
    assert torch.equal(q.order, k.order)
    # gate and up see one input, down another
    assert "model.layers.1.mlp.up_proj.packed_weight.order" not in manifest["tensors"]
    assert "model.layers.1.mlp.down_proj.packed_weight.order" in manifest["tensors"]


def test_an_order_that_its_owner_lacks_is_an_error(made, tmp_path) -> None:
    folder = made("llama", "spqr").folder
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules["model.layers.1.self_attn.k_proj"]["weight"]["tensors"]["order"][2] = "model.norm"
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config))
    with unverified(), pytest.raises(FormatError, match=r"shares with model\.norm"):
        load(copy)


@pytest.mark.parametrize("name", ["qwen3-moe-tied", "opt", "switch"])
def test_a_tied_head_is_the_embedding(name: str, made) -> None:
    model = made(name, "spqr").model
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, PackedLinear)
    assert head.matrix is table.matrix
    assert not [n for n in model.state_dict() if n.startswith("lm_head.")]


def test_an_embedding_cannot_be_solved(saved, tmp_path) -> None:
    source = saved("llama")
    with pytest.raises(RecipeError, match=r'embed_tokens: .* give it a rule with solver = "rtn"'):
        run(source, tmp_path / "out", EVERYTHING["spqr"].replace('solver = "rtn"', 'solver = "gptq"'))


def test_an_interrupted_run_continues_to_the_same_bytes(made, tmp_path) -> None:
    source, folder = made("qwen2-moe", "spqr").source, made("qwen2-moe", "spqr").folder
    for stop_after in (1, 30):
        out = tmp_path / f"out-{stop_after}"
        solved = 0
        for event in compress(str(source), out, chosen(EVERYTHING["spqr"]), text(source)):
            solved += isinstance(event, Solved)
            if solved == stop_after:
                break
        run(source, out, EVERYTHING["spqr"])
        for path in folder.iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_layer_that_never_runs_is_told_and_kept(saved, tmp_path, monkeypatch) -> None:
    source = saved("llama")
    from halfbit.flow import Flow

    observe = Flow.observe
    gone = "model.layers.0.mlp.up_proj"

    def without(self, block, module, paths, doors):
        return observe(self, block, module, [p for p in paths if p != gone], doors)

    monkeypatch.setattr(Flow, "observe", without)
    events = run(source, tmp_path / "out", EVERYTHING["spqr"])
    assert [e for e in events if isinstance(e, Noticed) and e.message.startswith(f"{gone}: never runs")]
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    assert gone not in manifest["packed"]
    assert f"{gone}.weight" in manifest["tensors"]
    assert torch.equal(load(out).get_submodule(gone).weight, Reader(source).tensor(f"{gone}.weight"))
    # also where the block is read back
    (out / "config.json").unlink()
    run(source, out, EVERYTHING["spqr"])
    assert (out / "config.json").is_file()


def test_the_solver_sees_what_a_layer_was_given(saved, tmp_path) -> None:
    """The loss in the manifest, again from plain hooks on the original model."""
    source = saved("one-block")
    out = tmp_path / "out"
    run(source, out, '[[rules]]\nmatch = "*embed*"\n' + EVERYTHING["spqr"])
    facts = json.loads((out / "manifest.json").read_text())["matrices"]
    model, packed = load(source), load(out)
    # with the head too, whose input comes from the compressed block
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "lm_head"):
        given: list[torch.Tensor] = []
        seen_by = packed if name == "lm_head" else model
        hook = seen_by.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, given=given: given.append(args[0])
        )
        tokens = calibration_tokens(source)
        with torch.no_grad():
            seen_by(tokens)
        hook.remove()
        x = given[0].reshape(-1, given[0].shape[-1]).double()
        matrix = packed.get_submodule(name).matrix
        w = model.get_submodule(name).weight.detach().double()
        error = x @ (matrix.codec.decode(matrix.packed()).double() - w).T
        assert facts[f"{name}.weight"]["loss"] == pytest.approx(
            float(error.pow(2).sum() / (x @ w.T).pow(2).sum()), rel=1e-3
        )


def calibration_tokens(source: Path) -> torch.Tensor:
    """The first 6 windows of 12 tokens, as `run` takes them."""
    from halfbit.samples import load_tokenizer, read_text, tokenize, windows

    rows = windows(tokenize(load_tokenizer(str(source)), read_text(text(source))), 6, 12, -1, origin="text")
    return torch.stack(list(rows))


def test_mixed_rules(made) -> None:
    """The recipe `mixed`: experts ternary, other linear layers SpQR, routers, embeddings and norms as they were."""
    model = made("qwen2-moe", "mixed").model
    experts = [m for m in model.modules() if isinstance(m, PackedExperts)]
    assert {m.matrix(m._up).codec.name for m in experts} == {"qmoe"}
    linears = {p: m.matrix.codec.name for p, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert set(linears.values()) == {"spqr"}
    assert not [p for p in linears if p.endswith((".gate", "shared_expert_gate", "lm_head"))]
    assert [p for p in linears if "shared_expert." in p]
    with torch.no_grad():
        got = model(**inputs(model), use_cache=False).logits
    assert largest_difference(got, made("qwen2-moe", "mixed").logits) < 2e-5


def test_matrices_that_are_no_linear_layers_are_told(saved, tmp_path) -> None:
    source = saved("qwen3-moe")
    events = run(source, tmp_path / "out", EVERYTHING["grouped"])
    told = [e.message for e in events if isinstance(e, Noticed) and "cannot be compressed" in e.message]
    assert len(told) == 1
    assert "mlp.gate and " in told[0]


def test_a_rule_that_keeps_the_embedding_keeps_the_tied_head(saved, tmp_path) -> None:
    source = saved("qwen3-moe-tied")
    keep = '[[rules]]\nmatch = "*embed_tokens"\n' + EVERYTHING["grouped"]
    run(source, tmp_path / "out", keep)
    model = load(tmp_path / "out")
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_is_rounded_without_calibration_has_its_loss(saved, tmp_path) -> None:
    source = saved("one-block")
    list(compress(str(source), tmp_path / "out", recipe.load("rtn-4-g16")))
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())["matrices"]
    matrix = load(tmp_path / "out").get_submodule("model.layers.0.mlp.up_proj").matrix
    w = Reader(source).tensor("model.layers.0.mlp.up_proj.weight").double()
    error = matrix.codec.decode(matrix.packed()).double() - w
    loss = float(error.square().sum() / w.square().sum())
    assert facts["model.layers.0.mlp.up_proj.weight"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert loss > 1e-4


def test_subclasses_of_linear_layers() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    assert is_linear(nn.Linear)
    assert is_linear(FalconLinear)
    assert not is_linear(Llama4Router)
    assert not is_linear(Scaled)
    assert not is_linear(nn.Embedding)
