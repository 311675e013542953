"""Recipes: what they say is what is stored, and nonsense is refused with its place."""

import re

import pytest
import torch

from halfbit import recipe
from halfbit.errors import HalfbitError, RecipeError, UnknownName
from halfbit.formats.runlength import RunLength
from halfbit.recipe import Recipe, Solving
from halfbit.solving import solve

SPQR = "grid = { name = 'bilevel' }, codec = { name = 'spqr' }"
TERNARY = "grid = { name = 'ternary' }, codec = { name = 'qmoe' }"


@pytest.mark.parametrize("name", [*recipe.names(), "rtn-4-g64", "gptq-3-g128", "gptq-2-g32-noact"])
def test_a_recipe_survives_being_written_with_all_defaults(name: str) -> None:
    first = recipe.load(name)
    text = first.to_toml()
    assert Recipe.from_toml(text) == first
    for filled_in in ("damping", "experts_per_batch", "undersampled", "shrink_tokens", "mask_special", "seed"):
        assert f"{filled_in} = " in text


def test_the_named_recipes() -> None:
    assert recipe.names() == [
        "halfbit", "mixed", "qmoe", "qmoe-2bit", "rtn-ternary", "runlength", "spqr-3bit",
        "spqr-near-lossless", "spqr-under-4",
    ]  # fmt: skip
    rule = recipe.load("qmoe").rule("model.layers.0.mlp.experts.down_proj")
    assert rule is not None
    assert (rule.solver, repr(rule.grid), repr(rule.codec)) == ("gptq", "Ternary(dtype='bfloat16')", "QMoE(p0=0.885)")
    assert recipe.load("qmoe").rule("model.layers.0.self_attn.q_proj") is None
    assert recipe.load("qmoe").rule("model.layers.0.mlp.shared_experts.down_proj") is None


def test_baselines_by_name() -> None:
    path = "model.layers.0.self_attn.q_proj"
    found = recipe.load("gptq-3-g64").rule(path)
    assert found is not None
    assert found.codec is not None
    assert (found.solver, found.order, found.damping) == ("gptq", "act_order", 0.01)
    assert repr(found.codec) == "Grouped(bits=3, group=64, symmetric=False)"
    plain, nearest = recipe.load("gptq-3-g64-noact").rule(path), recipe.load("rtn-8-g32").rule(path)
    assert plain is not None
    assert plain.order == "identity"
    assert nearest is not None
    assert nearest.solver == "rtn"
    for name in ("model.layers.0.mlp.gate", "model.layers.0.mlp.router", "lm_head", "model.embed_tokens"):
        assert recipe.load("gptq-3-g64").rule(name) is None
    for unknown in ("gptq-9-g64", "gptq-4-g0", "rtn-4-g64-noact", "gptq-4"):
        with pytest.raises(UnknownName, match="gptq-BITS-gGROUP"):
            recipe.load(unknown)


def test_a_codec_takes_the_grids_fields_and_keeps_its_own() -> None:
    text = "rules = [{ match = '*', grid = { name = 'bilevel', bits = 4, group = 8 }, codec = { name = 'spqr' } }]"
    (rule,) = Recipe.from_toml(text).rules
    assert "bits=4, group=8" in repr(rule.codec)


def test_a_budget_replaces_the_one_before() -> None:
    found = recipe.load("spqr-near-lossless").budgeted("outliers", 0.005)
    rule = found.rule("model.layers.0.self_attn.q_proj")
    assert rule is not None
    assert (rule.tau, rule.outliers, rule.bits) == (None, 0.005, None)
    # the rules that store no outliers stay as they were
    mixed = recipe.load("mixed").budgeted("bits", 4.6)
    assert mixed.rule("model.layers.0.mlp.experts.down_proj") == recipe.load("mixed").rules[3]
    text = f"rules = [{{ match = '*embed*', solver = 'rtn', {SPQR} }}, {{ match = '*', {SPQR} }}]"
    rules = Recipe.from_toml(text).budgeted("tau", 0.2).rules
    assert [r.tau for r in rules] == [None, 0.2]
    with pytest.raises(RecipeError, match="no rule that could keep it"):
        recipe.load("qmoe").budgeted("bits", 4.6)


def test_the_first_matching_rule_wins_and_a_rule_without_codec_keeps() -> None:
    text = """
    rules = [
      { match = "model.layers.0.*" },
      { match = "*.experts.*", solver = "rtn", grid = { name = "ternary" }, codec = { name = "qmoe" } },
    ]
    """
    found = Recipe.from_toml(text)
    assert found.rule("model.layers.0.mlp.experts.down_proj") is None
    assert found.rule("model.layers.1.mlp.experts.down_proj") is found.rules[1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = 3 =", "not valid TOML"),
        ("name = 'x'", "needs at least one"),
        ("rules = [{ match = '*', width = 3 }]", "unknown field 'width'"),
        ("rules = [{ solver = 'gptq' }]", "needs match"),
        ("rules = [{ match = '*', grid = { name = 'ternary' } }]", "a grid needs a codec"),
        ("rules = [{ match = '*', grid = { name = 'ternary' }, codec = { name = 'grouped' } }]", "do not fit together"),
        (
            "rules = [{ match = '*', grid = { name = 'affine', bits = 3 }, codec = { name = 'grouped', bits = 2 } }]",
            "do not fit together",
        ),
        (f"rules = [{{ match = '*', {SPQR}, tau = 0.2, bits = 4.5 }}]", "tau and bits are ways to say one thing"),
        (f"rules = [{{ match = '*', {SPQR}, outliers = 1.5 }}]", "outliers is a share below 1"),
        (f"rules = [{{ match = '*', {SPQR}, tau = -0.2 }}]", "out of range"),
        (f"rules = [{{ match = '*', {SPQR}, bits = '4.5' }}]", "bits must be a number"),
        (f"rules = [{{ match = '*', {SPQR}, damping = 0 }}]", "damping must be > 0"),
        (f"rules = [{{ match = '*', {SPQR}, order = 'random' }}]", "order must be one of identity, act_order"),
        (f"rules = [{{ match = '*', solver = 'rtn', {SPQR}, tau = 0.2 }}]", "rtn has neither outliers nor"),
        (f"rules = [{{ match = '*', {TERNARY}, outliers = 0.01 }}]", "stores no outliers; use codec 'spqr'"),
        (f"rules = [{{ match = '*', {TERNARY}, order = 'act_order' }}]", "stores no column order"),
        ("rules = [{ match = '*', grid = { name = 'affine', bits = 2.5 } }]", "bits must be int"),
        ("rules = [{ match = '*', grid = { name = 'affine', symmetric = 'no' } }]", "symmetric must be bool"),
        ("rules = [{ match = '*' }]\n[solving]\ndamping = nan", "damping must be > 0"),
        ("rules = [{ match = '*' }]\n[coverage]\nmax_tokens = inf", "max_tokens must be > 0"),
        ("rules = [{ match = '*' }]\n[calibration]\ncorruption = 'x'", "corruption must be t5 or fixed"),
        ("rules = [{ match = '*' }]\n[solving]\ndamping = -1.0", "damping must be > 0"),
        ("rules = [{ match = '*' }]\n[solving]\nexperts_per_batch = 'big'", "experts_per_batch must be int"),
        ("rules = [{ match = '*' }]\n[solving]\ntrue_sequential = 1", "true_sequential must be bool"),
        ("rules = [{ match = '*' }]\n[coverage]\nundersampled = 'zero'", "undersampled must be one of"),
        ("rules = [{ match = '*' }]\n[calibration]\nsamples = 0", "samples must be >= 1"),
        ("rules = [{ match = '*' }]\n[calibration]\nnoise = 1.0", "noise must be in"),
        ("rules = [{ match = '*' }]\nspeed = 'fast'", "unknown field 'speed'"),
    ],
)
def test_nonsense_is_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)):
        Recipe.from_toml(text)


@pytest.mark.parametrize(
    "text",
    [
        "rules = [{ match = '*', grid = { name = 'ternary' }, codec = { name = 'os' } }]",
        "rules = [{ match = '*', grid = { name = 'sys' }, codec = { name = 'qmoe' } }]",
        "rules = [{ match = '*', solver = 'magic' }]",
    ],
)
def test_names_are_looked_up_among_the_registered_never_imported(text: str) -> None:
    with pytest.raises(UnknownName, match="known: "):
        Recipe.from_toml(text)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="qmoe, qmoe-2bit, rtn-ternary, runlength, spqr-3bit"):
        recipe.load("qmo")
    with pytest.raises(HalfbitError, match=r"my\.toml does not exist"):
        recipe.load("my.toml")


def test_a_recipe_file(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(recipe.load("qmoe").to_toml().replace("damping = 0.1", "damping = 0.01"), "utf-8")
    assert recipe.load(str(path)).solving.damping == 0.01


def test_qmoes_grid_in_our_code_survives_its_file() -> None:
    toml = """
        [[rules]]
        match = "*.experts.*"
        grid = { name = "ternary" }
        codec = { name = "runlength", scale_bits = 0 }
        """
    found = Recipe.from_toml(toml)
    assert found.rules[0].codec == RunLength(scale_bits=0)
    assert Recipe.from_toml(found.to_toml()).rules == found.rules


def test_a_whole_number_will_do_for_a_spread() -> None:
    toml = (
        '[[rules]]\nmatch = "*"\ngrid = { name = "deadzone", spread = 4 }\ncodec = { name = "runlength" }\nbits = 0.8\n'
    )
    (rule,) = Recipe.from_toml(toml).rules
    w = torch.randn(1, 96, 64, generator=torch.Generator().manual_seed(0))
    (found,) = solve(w, torch.eye(64)[None], [rule], Solving(), ["a"], [])
    assert RunLength().encode(found).bits_per_weight == pytest.approx(0.8, rel=0.01)
