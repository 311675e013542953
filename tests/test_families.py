"""Block by block equals the whole model, for every family and every layout of its checkpoint."""

import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, PreTrainedModel

from halfbit.blocks import Stack, find_blocks
from halfbit.errors import CheckpointError, NonFinite, UnclaimedWeight, Unsupported
from halfbit.experts import ExpertStack, expert_forward, experts_forward, find_experts
from halfbit.families import open_family
from halfbit.family import Family
from halfbit.reader import Reader

LENGTH, DECODER_LENGTH = 17, 13

# what is loaded and what is computed are the same; only the order of the experts' sums may differ, which changes the
# last bits of float32 (2^-24 relative). 1e-5 of the largest logit leaves room for that through a few layers, and is far
# below what one wrong row does
TOLERANCE = 1e-5

MIXTURES = [n for n, c in tiny_models.CONFIGS.items() if any(k in c.to_dict() for k in ("num_experts_per_tok", "d_kv"))]


@pytest.fixture(params=sorted(tiny_models.CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model as transformers loads it. "eager" is the experts' own definition, which takes odd sizes.

    Loaded once; tests leave it as it is.
    """
    kind = AutoModelForSeq2SeqLM if "switch" in (folder / "config.json").read_text() else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def tokens(length: int, seed: int = 0, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_models.VOCABULARY, (batch, length), generator=generator)


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    decoder = {"decoder_input_ids": tokens(DECODER_LENGTH, 1)} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens(LENGTH), **decoder}


def answer_with_experts(family: Family, stack: ExpertStack) -> None:
    """Let an experts module, whose own weights are not loaded, answer with the definition on streamed weights."""
    module = family.model.get_submodule(stack.path)
    weights = {p: family.expert_weights(stack, p, 0, stack.num_experts).float() for p in stack.projections}
    biases = {p: b.float() for p, b in family.expert_biases(stack, 0, stack.num_experts).items()}
    module.forward = lambda *args, **kwargs: experts_forward(
        stack, module, weights, biases, *stack.route(args, kwargs)
    ).view_as(args[0])


def through(family: Family, stack: Stack, ids: Tensor, **given: Tensor) -> Tensor:
    """One stack, with one block in memory at a time."""
    hidden, context = stack.begin(ids, **given)
    for path in stack.blocks:
        block = family.load_block(path)
        for experts in family.experts_of(path):
            answer_with_experts(family, experts)
        hidden = stack.run(path, hidden, context)
        family.unload_block(path)
        assert all(t.is_meta for n, t in block.state_dict().items() if f"{path}.{n}" not in family.pinned())
    return stack.end(hidden, context)


def block_by_block(family: Family, **given: Tensor) -> Tensor:
    family.load_outer()
    first, *rest = family.stacks()
    result = through(family, first, tokens(LENGTH), **given)
    for stack in rest:
        result = through(family, stack, tokens(DECODER_LENGTH, 1), encoder_hidden_states=result, **given)
    return result


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


# the whole


# models without experts are written as they are built
@pytest.mark.parametrize("source", [*sorted(tiny_models.CONFIGS), *(f"{name} as built" for name in MIXTURES)])
def test_block_by_block_equals_the_whole_model(source, saved):
    folder = saved(source)
    whole = reference(folder)
    with torch.no_grad():
        expected = whole(**inputs(whole)).logits
    assert_same(block_by_block(open_family(Reader(folder))), expected)


@pytest.mark.parametrize("name", ["qwen3-moe", "opt", "switch"])
def test_a_sharded_checkpoint_gives_the_same(name, tmp_path):
    folder = tiny_models.save(name, tmp_path / name, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    whole = reference(folder)
    with torch.no_grad():
        expected = whole(**inputs(whole)).logits
    assert_same(block_by_block(open_family(Reader(folder))), expected)


@pytest.mark.parametrize("name", ["mixtral", "switch-untied"])
def test_padding_reaches_every_block(name, saved):
    folder = saved(name)
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[1, -5:] = 0
    whole = reference(folder)
    with torch.no_grad():
        expected = whole(**inputs(whole), attention_mask=mask).logits
    got = block_by_block(open_family(Reader(folder)), attention_mask=mask)
    assert_same(got, expected)
    assert not torch.allclose(got[1], block_by_block(open_family(Reader(folder)))[1])


@pytest.mark.parametrize("save", [tiny_models.save_mxfp4, tiny_models.save_fp8])
def test_a_quantized_checkpoint_equals_the_model_with_its_dequantized_weights(save, tmp_path):
    folder = save(tmp_path / "quantized")
    reader = Reader(folder)
    family = open_family(reader)
    whole = type(family.model)(family.config).eval()
    whole.set_experts_implementation("eager")
    claims = family.claims()
    weights = {n: s.read(reader.tensor, family.model)[n].float() for n, s in claims.sources.items()}
    whole.load_state_dict(weights)
    with torch.no_grad():
        expected = whole(tokens(LENGTH)).logits
    assert_same(block_by_block(family), expected)
    assert not any(n.endswith(("_blocks", "_scales", "_scale_inv")) for n in claims.tensors)


def test_the_example_equals_the_whole_model():
    folder = Path(__file__).parents[1] / "examples" / "tiny-moe"
    whole = reference(folder)
    with torch.no_grad():
        expected = whole(**inputs(whole)).logits
    assert_same(block_by_block(open_family(Reader(folder))), expected)


# some weights stay in float32 where the others become float16, and not where they become bfloat16
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_loaded_is_what_from_pretrained_loads(name, dtype, saved):
    folder = saved(name)
    family = open_family(Reader(folder))
    family.load_outer(dtype=dtype)
    for stack in family.stacks():
        for path in stack.blocks:
            family.load_block(path, dtype=dtype)
    whole = reference(folder, dtype)
    expected = dict(whole.named_parameters(remove_duplicate=False)) | dict(whole.named_buffers())
    got = dict(family.model.named_parameters(remove_duplicate=False)) | dict(family.model.named_buffers())
    assert got.keys() == expected.keys()
    streamed = {n for stack in family.experts.values() for n in stack.streamed()}
    for key, value in expected.items():
        if key not in streamed:
            assert got[key].dtype == value.dtype, key
            torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=key)
            assert not got[key].requires_grad


# experts


def calls_of_experts(model: PreTrainedModel) -> list[Any]:
    """(path, module, args, kwargs, result) of every call of an experts module in one pass of `inputs`."""
    calls: list[Any] = []
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda m, args, kwargs, result, path=path: calls.append((path, m, args, kwargs, result)), with_kwargs=True
        )
        for path in find_experts(model)
    ]
    with torch.no_grad():
        model(**inputs(model))
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("layout", ["", " as built"])
@pytest.mark.parametrize("name", MIXTURES)
def test_expert_weights_are_those_of_the_module_in_out_in(name, layout, saved):
    folder = saved(name + layout)
    family, whole = open_family(Reader(folder)), reference(folder)
    assert family.experts
    for stack in family.experts.values():
        for projection, (out, columns) in stack.projections.items():
            expected = torch.stack([whole.get_parameter(n) for n in stack.parameters(projection)])
            expected = expected if stack.members else expected[0]
            expected = expected.transpose(1, 2) if stack.transposed else expected
            assert expected.shape == (stack.num_experts, out, columns)
            n = stack.num_experts
            parts = [family.expert_weights(stack, projection, i, min(i + 2, n)) for i in range(0, n, 2)]
            assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_forward_equals_the_modules_own(name, saved):
    whole = reference(saved(name))
    stacks, calls = find_experts(whole), calls_of_experts(whole)
    assert len(calls) == len(stacks)
    for path, module, args, kwargs, expected in calls:
        stack = stacks[path]
        weights = {p: torch.stack([whole.get_parameter(n) for n in stack.parameters(p)]) for p in stack.projections}
        weights = weights if stack.members else {p: w[0] for p, w in weights.items()}
        weights = {p: w.transpose(1, 2) for p, w in weights.items()} if stack.transposed else weights
        biases = {p: module.get_parameter(n) for p, n in stack.biases.items() if n is not None}
        hidden, index, gates = stack.route(args, kwargs)
        with torch.no_grad():
            got = experts_forward(stack, module, weights, biases, hidden, index, gates)
        assert_same(got.view_as(expected), expected)


def test_llama4_tokens_of_other_experts_are_skipped(saved):
    """Every token is given to each of the five experts, multiplied by zero for all but one."""
    whole = reference(saved("llama4"))
    stacks, calls = find_experts(whole), calls_of_experts(whole)
    indices = [stacks[path].route(args, kwargs)[1] for path, _, args, kwargs, _ in calls]
    assert {stack.form for stack in stacks.values()} == {"sorted"}
    taken = sum(int((index < 5).sum()) for index in indices)
    assert taken > 0
    assert sum(int((index == 5).sum()) for index in indices) == 4 * taken


def test_switch_tokens_beyond_the_capacity_are_skipped(saved):
    """Their one-hot row is all zeros. Not every version of transformers drops tokens, so the zeros are put in here."""
    whole = reference(saved("switch-untied"))
    stacks, calls = find_experts(whole), calls_of_experts(whole)
    path, _, (hidden, chosen, weights), _, _ = calls[0]
    assert stacks[path].form == "one_hot"
    dropped = chosen.clone()
    dropped[[0, 2, 5]] = 0
    before = stacks[path].route((hidden, chosen, weights), {})[1]
    after = stacks[path].route((hidden, dropped, weights), {})[1]
    assert (after[[0, 2, 5]] == 5).all()
    kept = [i for i in range(len(after)) if i not in (0, 2, 5)]
    assert torch.equal(after[kept], before[kept])


def test_experts_with_a_learned_activation_are_refused_by_name():
    config = deepcopy(tiny_models.CONFIGS["mixtral"])
    config.hidden_act = "xielu"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Unsupported, match=r"model\.layers\.0\.mlp\.experts\.act_fn\.\w+: a weight"):
        find_experts(model)


def test_an_index_outside_the_experts_is_skipped(saved):
    whole = reference(saved("gpt-oss"))
    (path, stack), *_ = find_experts(whole).items()
    module = whole.get_submodule(path)
    weights = {p: module.get_parameter(p).transpose(1, 2) for p in stack.projections}
    biases = {p: module.get_parameter(n) for p, n in stack.biases.items() if n is not None}
    hidden, gates = torch.randn(2, 36), torch.ones(2, 2)
    with torch.no_grad():
        got = experts_forward(stack, module, weights, biases, hidden, torch.tensor([[1, 5], [5, 7]]), gates)
        one = {p: w[1] for p, w in weights.items()}, {p: b[1] for p, b in biases.items()}
        assert torch.equal(got[0], expert_forward(stack, module, *one, hidden[:1])[0])
    assert torch.equal(got[1], torch.zeros(36))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama4", "switch"])
def test_load_block_leaves_experts_unloaded_and_streaming_reads_only_what_is_asked(name, saved):
    reader = Reader(saved(name))
    family = open_family(reader)
    stack = next(iter(family.experts.values()))
    block = family.block_of(stack.path)
    assert block is not None
    read: list[str] = []
    tensor, part = reader.tensor, reader.slice
    reader.tensor = lambda n: (read.append(n), tensor(n))[1]  # pyright: ignore[reportAttributeAccessIssue]
    reader.slice = lambda n, a, b: (read.append(f"{n}[{a}:{b}]"), part(n, a, b))[1]  # pyright: ignore[reportAttributeAccessIssue]
    family.load_block(block)
    assert all(family.model.get_parameter(n).is_meta for n in stack.streamed())
    claims = family.claims()
    assert read
    assert all(claims.tensors[n].kind == "block" and claims.tensors[n].block == block for n in read)
    read.clear()
    family.expert_weights(stack, stack.down, 1, 3)
    numbers = {claims.tensors[n].expert for n in read if n in claims.tensors}
    assert numbers == {1, 2} or read == [f"{stack.path}.{stack.down}[1:3]"]


class Strange(nn.Module):
    """3-D parameters, and nothing that says what they do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(3, 5, 7))
        self.second = nn.Parameter(torch.zeros(3, 7, 5))


class StrangeGate(nn.Module):
    """The right names, called in an unknown way."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 10, 7))
        self.down_proj = nn.Parameter(torch.zeros(3, 7, 5))

    def forward(self, hidden: Tensor, index: Tensor) -> Tensor:
        return hidden


@pytest.mark.parametrize("module", [Strange(), StrangeGate()])
def test_experts_that_cannot_be_understood_are_named(module):
    with pytest.raises(Unsupported, match=rf"^layer.mlp \({type(module).__name__}\): looks like experts"):
        find_experts(nn.ModuleDict({"layer": nn.ModuleDict({"mlp": module})}))


def test_convolutions_are_not_experts():
    assert find_experts(nn.ModuleList([nn.Conv1d(4, 4, 3), nn.Linear(3, 5)])) == {}


# claims


def test_every_tensor_is_claimed_once_and_every_weight_given_once(name, saved):
    reader = Reader(saved(name))
    family = open_family(reader)
    claims = family.claims()
    assert list(claims.tensors) == reader.names()
    assert claims.ignored() == []
    blocks = [b for s in family.stacks() for b in s.blocks]
    parts = [*(claims.tensors_of(b) for b in blocks), *claims.outer_shards()]
    assert sorted(n for part in parts for n in part) == sorted(reader.names())
    weights = set(family.model.state_dict())
    assert set(claims.sources) | set(claims.tied) == weights
    assert not set(claims.sources) & set(claims.tied)
    for tensor, found in claims.tensors.items():
        assert (found.kind == "experts") == (claims.experts_module(tensor) in family.experts)


def test_an_extra_tensor_is_named(tmp_path):
    folder = tiny_models.save("mixtral", tmp_path / "m")
    tiny_models.edit(folder, lambda t: t.update({"model.layers.1.mlp.adapter.weight": torch.zeros(3, 5)}))
    with pytest.raises(
        UnclaimedWeight, match=r"^model.layers.1.mlp.adapter.weight \[3, 5\]: no module of Mixtral"
    ) as e:
        open_family(Reader(folder)).claims()
    assert e.value.tensor == "model.layers.1.mlp.adapter.weight"


def test_a_tensor_that_the_models_own_rule_leaves_out_is_listed(tmp_path):
    folder = tiny_models.save("deepseek-v3", tmp_path / "m")
    extra = "model.layers.61.eh_proj.weight"
    tiny_models.edit(folder, lambda t: t.update({extra: torch.zeros(3, 5)}))
    claims = open_family(Reader(folder)).claims()
    assert claims.ignored() == [extra]
    assert claims.tensors[extra].where == r"model\.layers\.61.*"


@pytest.mark.parametrize(
    ("name", "gone", "named"),
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("deepseek-v3", "model.layers.1.mlp.gate.e_score_correction_bias", "e_score_correction_bias"),
        ("qwen3-moe", "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"),
        ("qwen3-moe", "model.layers.1.mlp.experts.12.up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
        ("switch", "shared.weight", "shared.weight"),
    ],
)
def test_a_missing_tensor_is_named(name, gone, named, tmp_path):
    folder = tiny_models.edit(tiny_models.save(name, tmp_path / name), lambda t: [t.pop(gone)])
    with pytest.raises(CheckpointError, match=re.escape(named)):
        open_family(Reader(folder)).claims()


def test_a_shape_that_does_not_fit_is_named(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "m")
    wrong = "model.layers.2.mlp.down_proj.weight"
    tiny_models.edit(folder, lambda t: t.update({wrong: torch.zeros(36, 40)}))
    with pytest.raises(CheckpointError, match=rf"^{wrong}: expected \[36, 41\] by config.json, got \[36, 40\]"):
        open_family(Reader(folder)).claims()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value, tmp_path):
    folder = tiny_models.save("mixtral", tmp_path / "m")
    norm, expert = "model.layers.1.input_layernorm.weight", "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    assert expert in load_file(folder / "model.safetensors")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[norm][2] = value
        tensors[expert][1, 1] = value

    family = open_family(Reader(tiny_models.edit(folder, spoil)))
    family.load_block("model.layers.0")
    with pytest.raises(NonFinite, match=rf"^{norm}: 1 of 36"):
        family.load_block("model.layers.1")
    stack = family.experts["model.layers.0.mlp.experts"]
    family.expert_weights(stack, "down_proj", 0, 3)
    with pytest.raises(NonFinite, match=r"down_proj\[3:5\]"):
        family.expert_weights(stack, "down_proj", 3, 5)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_weight_that_is_there_twice_is_tied_only_if_equal(equal, tmp_path):
    folder = tiny_models.save("qwen3-moe-tied", tmp_path / "m")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    tiny_models.edit(folder, lambda t: t.update({"lm_head.weight": embedding.clone() if equal else embedding * 2}))
    family = open_family(Reader(folder))
    assert (family.claims().tensors["lm_head.weight"].kind == "tied") == equal
    whole = reference(folder)
    with torch.no_grad():
        expected = whole(**inputs(whole)).logits
    assert_same(block_by_block(family), expected)
    assert (family.model.lm_head.weight is family.model.model.embed_tokens.weight) == equal


def test_a_tied_weight_may_be_there_under_its_other_name(tmp_path):
    folder = tiny_models.save("switch", tmp_path / "m")
    whole = reference(folder)
    with torch.no_grad():
        expected = whole(**inputs(whole)).logits

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    assert_same(block_by_block(open_family(Reader(tiny_models.edit(folder, rename)))), expected)


# blocks


def test_batches_of_one_shape_share_their_masks_but_not_their_states(saved):
    family = open_family(Reader(saved("switch")))
    family.load_outer()
    decoder = family.stacks()[1]
    encoded = [torch.randn(3, LENGTH, 36) for _ in range(2)]
    _, first = decoder.begin(tokens(DECODER_LENGTH, 1), encoder_hidden_states=encoded[0])
    _, second = decoder.begin(tokens(DECODER_LENGTH, 2), encoder_hidden_states=encoded[1])
    _, shorter = decoder.begin(tokens(7, 2), encoder_hidden_states=encoded[1])
    for path in decoder.blocks:
        masks = [context.calls[path][0][0] for context in (first, second, shorter)]
        assert masks[0] is masks[1]
        assert masks[0].shape[-1] == DECODER_LENGTH
        assert masks[2].shape[-1] == 7
        states = [context.calls[path][0][2] for context in (first, second)]
        assert torch.equal(states[0], encoded[0])
        assert torch.equal(states[1], encoded[1])


class Chain(nn.Module):
    """A model that treats what its blocks return in one of four ways."""

    def __init__(self, way: str, blocks: int = 3):
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(blocks))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = input_ids[..., None].expand(-1, -1, 5).float()
        for layer in self.layers:
            if self.way == "indexed":
                hidden = layer(hidden)[0]
            elif self.way == "unpacked":
                hidden, _ = layer(hidden)
            elif self.way == "changed":
                hidden = layer(hidden) + 1
            else:
                hidden = layer(hidden)
        return hidden * 2


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("way", ["indexed", "plain"])
def test_what_a_block_returns_is_found_out(way, blocks):
    chain = Chain(way, blocks)
    stack = Stack("decoder", chain, find_blocks(chain, blocks), lambda inputs: chain(**inputs))
    ids = torch.arange(8).view(2, 4)
    hidden, context = stack.begin(ids)
    assert torch.equal(hidden, ids[..., None].expand(-1, -1, 5).float())
    assert torch.equal(stack.end(hidden + 7, context), (hidden + 7) * 2)


@pytest.mark.parametrize(
    ("way", "message"), [("unpacked", "more than hidden states"), ("changed", "between two blocks")]
)
def test_a_model_that_does_more_between_its_blocks_is_named(way, message):
    chain = Chain(way)
    stack = Stack("decoder", chain, find_blocks(chain, 3), lambda inputs: chain(**inputs))
    with pytest.raises(Unsupported, match=message):
        stack.begin(torch.arange(8).view(2, 4))
    assert all("forward" not in layer.__dict__ for layer in chain.layers)


def test_blocks_are_the_outermost_list_and_ambiguity_is_named():
    inner = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])})
    model = nn.ModuleDict({"layers": nn.ModuleList([inner, inner])})
    assert find_blocks(model, 2, "model.") == ["model.layers.0", "model.layers.1"]
    with pytest.raises(Unsupported, match=r"expected one list of 2 blocks, found layers, other"):
        find_blocks(nn.ModuleDict({"layers": model["layers"], "other": nn.ModuleList([inner, inner])}), 2)
    with pytest.raises(Unsupported, match="found none"):
        find_blocks(model, 3)


# configs


def test_encoder_decoders_other_than_switch_and_unknown_models_are_named(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "m")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(Unsupported, match="no family takes model_type 't5'"):
        open_family(Reader(folder))
    (folder / "config.json").write_text(config.replace('"llama"', '"no-such-model"'))
    with pytest.raises(Unsupported, match="does not know model_type 'no-such-model'"):
        open_family(Reader(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no model_type"):
        open_family(Reader(folder))
    GPT2Config(n_layer=2, n_embd=36, n_head=6, vocab_size=tiny_models.VOCABULARY).save_pretrained(folder)
    with pytest.raises(UnclaimedWeight, match=r"^model\..*: no module of GPT2LMHeadModel takes this tensor"):
        open_family(Reader(folder)).claims()
