"""The command line: what it prints, what it writes, and one clear sentence for every kind of bad input."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import edit_manifest, load
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from halfbit import cli
from halfbit.errors import FormatError
from halfbit.folder import part_of
from halfbit.manifest import header_checksum, read_manifest, tensor_entry, text_of, unverified

TINY = Path(__file__).parent.parent / "examples" / "tiny-moe"


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def told(*arguments: object) -> str:
    """Stdout of one command that does what it should."""
    code, out, err = call(*arguments)
    assert code == 0, err
    return out


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """tiny-moe, compressed by the command line."""
    out = tmp_path_factory.mktemp("cli") / "out"
    report = json.loads(
        told(
            "compress", TINY, out, "--calibration", TINY / "calibration.txt", "--samples", 16, "--sequence-length", 128,
            "--recipe", "qmoe", "--json",
        )
    )  # fmt: skip
    assert report["complete"]
    assert report["packed_weights"] == 4 * 8 * (2 * 192 * 128 + 128 * 192)
    return out


def test_bits_are_counted_from_the_files(folder) -> None:
    report = json.loads(told("inspect", folder, "--json"))
    packed = 0
    for path in folder.glob("*.safetensors"):
        packed += sum(t.numel() * t.element_size() for n, t in load_file(path).items() if ".packed_" in n)
    assert report["bits_per_packed_weight"] == 8 * packed / report["packed_weights"]
    assert report["parts"]["experts"]["bytes"] == packed
    assert report["total_bytes"] == sum(f.stat().st_size for f in folder.iterdir())
    # 64 bits of metadata per row cost QMoE 1.816 on this model
    assert 1.0 < report["bits_per_packed_weight"] < 1.76
    layer = report["layers"]["model.layers.2.mlp.experts"]
    assert set(layer["projections"]) == {"gate_up_proj", "down_proj"}
    assert sum(layer["coverage"]["routed"]) == 16 * 128 * 2


def test_it_evaluates(folder) -> None:
    figures = json.loads(
        told(
            "eval", folder, "--text", TINY / "test.txt", "--sequence-length", 128, "--max-tokens", 2560,
            "--against", TINY, "--json",
        )
    )  # fmt: skip
    assert figures["windows"] == 20
    assert figures["tokens"] == 20 * 127
    assert 45 < figures["original_perplexity"] < 75
    assert figures["original_perplexity"] < figures["perplexity"] < 2.2 * figures["original_perplexity"]
    assert 0 < figures["kl_divergence"] < 1
    assert 0.4 < figures["top1_agreement"] < 1


def test_a_fresh_process_generates_the_same_text(folder) -> None:
    """Nothing that this process has imported or compressed is needed to load the folder."""
    arguments = ["generate", str(folder), "--prompt", "The old house", "--max-new-tokens", "12"]
    done = subprocess.run([sys.executable, "-m", "halfbit.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stdout.split()) >= 4
    assert done.stdout == told(*arguments)


def test_steps_of_tuning_on_the_command_line_win_over_the_recipe(tmp_path) -> None:
    some = tmp_path / "text.txt"
    some.write_text((TINY / "calibration.txt").read_text("utf-8")[:2000], "utf-8")
    told(
        "compress", TINY, tmp_path / "out", "--calibration", some, "--recipe", "runlength", "--samples", 2,
        "--sequence-length", 32,        "--tune", 1, "--tune-groups", 2, "--json",
    )  # fmt: skip
    tuning = tomllib.loads((tmp_path / "out" / "recipe.toml").read_text())["tuning"]
    assert (tuning["steps"], tuning["group_steps"]) == (1, 2)


def test_verify_passes_and_names_what_is_damaged(folder, tmp_path) -> None:
    assert "0 problems" in told("verify", folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "model-block-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last byte of the file belongs to its last tensor
    path.write_bytes(data)
    code, out, _ = call("verify", copy, "--json")
    problems = json.loads(out)["problems"]
    assert code == 1
    assert problems
    assert problems[0]["where"] in json.loads((copy / "manifest.json").read_text())["tensors"]
    assert "checksum" in problems[0]["message"]


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda f: (f / "model-block-00000.safetensors").unlink(), "model-block-00000.safetensors"),
        (lambda f: os.truncate(f / "model-block-00000.safetensors", 5000), "model-block-00000.safetensors"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json"),
        (lambda f: save_file({"x": torch.ones(1)}, f / "foreign.safetensors"), "foreign.safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "index.json"),
    ],
)
def test_verify_finds_every_kind_of_damage(damage, names: str, folder, tmp_path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copy)
    code, out, _ = call("verify", copy, "--json")
    assert code == 1
    assert any(names in p["where"] for p in json.loads(out)["problems"])


def with_shifted_rows(folder: Path, copy: Path) -> tuple[Path, str, torch.Tensor]:
    """A copy whose rows begin one row off; the tensor that says so, by name and value."""
    shutil.copytree(folder, copy)
    path = copy / "model-block-00000.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.experts.packed_down_proj.row_lengths"
    tensors[name] = tensors[name].to(torch.int32).roll(1).to(torch.uint16)
    save_file(tensors, path, metadata={"format": "pt"})
    return copy, name, tensors[name]


def test_verify_finds_codes_that_break_the_format(folder, tmp_path) -> None:
    """A checksum made to fit the damage: the format's own rules still hold."""
    copy, name, tensor = with_shifted_rows(folder, tmp_path / "copy")
    shard = copy / "model-block-00000.safetensors"

    def edit(manifest: dict[str, Any]) -> None:
        manifest["tensors"][name] = tensor_entry(shard.name, tensor)
        manifest["headers"][shard.name] = header_checksum(shard)

    edit_manifest(copy, edit)
    code, out, _ = call("verify", copy, "--json")
    assert code == 1
    assert [p["where"] for p in json.loads(out)["problems"]] == ["model.layers.0.mlp.experts.down_proj"]


def test_loading_a_damaged_folder_names_the_module(folder, tmp_path) -> None:
    copy, _, _ = with_shifted_rows(folder, tmp_path / "copy")
    code, _, err = call("generate", copy, "--prompt", "x")
    assert code == 2
    assert "model.layers.0.mlp.experts.packed_down_proj" in err


def test_loading_a_folder_that_lacks_a_weight_names_it(folder, tmp_path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "model-block-00002.safetensors"
    tensors = load_file(path)
    name = "model.layers.2.self_attn.k_norm.weight"
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    code, _, err = call("generate", copy, "--prompt", "x")
    assert code == 2
    assert f"tensor {name} is missing" in err
    with unverified(), pytest.raises(FormatError, match=f"{name}: no file of this folder has this weight"):
        load(copy)


def test_checksums_are_left_out_where_that_is_asked_for(folder, tmp_path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "model-block-00001.safetensors"
    name = "model.layers.1.input_layernorm.weight"
    tensors = load_file(path)
    tensors[name][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    text = ("--text", TINY / "test.txt", "--sequence-length", 32, "--max-tokens", 32, "--json")
    for command in (("generate", copy, "--prompt", "x", "--max-new-tokens", 1), ("eval", copy, *text)):
        code, _, err = call(*command)
        assert code == 2
        assert f"{name}: checksum differs" in err
        assert call(*command, "--no-verify")[0] == 0
    # both models are compared, or neither
    code, _, err = call("eval", folder, *text, "--against", copy)
    assert f"{name}: checksum differs" in err
    assert call("eval", folder, *text, "--against", copy, "--no-verify")[0] == 0


def model_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def test_an_empty_place_is_no_model(tmp_path) -> None:
    code, _, err = call("compress", tmp_path / "nothing", tmp_path / "out")
    assert code == 2
    assert "nothing" in err
    (tmp_path / "empty").mkdir()
    code, _, err = call("compress", tmp_path / "empty", tmp_path / "out")
    assert code == 2
    assert "config.json is missing" in err
    assert not (tmp_path / "out").exists()


def test_bad_input_exits_with_2_and_one_message(folder, tmp_path) -> None:
    model, text, out = model_copy(tmp_path), TINY / "calibration.txt", tmp_path / "out"
    cases = {
        ("compress", model, out, "--recipe", "qmo", "--calibration", text): "unknown recipe 'qmo'",
        ("compress", model, out): "give --calibration",
        ("compress", model, out, "--calibration", "nowhere.txt"): "no such text file",
        ("compress", model, out, "--calibration", text, "--samples", "99999"): "asked for 99999 samples",
        ("compress", model, out, "--calibration", text, "--samples", "0"): "greater than or equal to 1",
        ("compress", model, out, "--calibration", text, "--device", "tpu"): "expected cpu, cuda, cuda:NUMBER or auto",
        ("compress", model, model, "--calibration", text, "--samples", "8"): "not empty",
        ("compress", folder, out, "--calibration", text): "already compressed",
        ("eval", tmp_path / "nothing", "--text", text): "nothing",
        ("eval", folder, "--text", "nowhere.txt"): "no such text file",
        ("eval", folder, "--text", text, "--sequence-length", "900", "--max-tokens", "800"): "less than one window",
        ("inspect", model): "no manifest.json",
        ("inspect",): "give a FOLDER",
        ("verify", tmp_path / "nothing"): "no such folder",
        ("generate", folder, "--prompt", ""): "gives no tokens",
        ("generate", folder, "--prompt", "x", "--max-new-tokens", "0"): "max-new-tokens",
        ("generate", folder, "--prompt", "x", "--temperature", "nan"): "temperature",
        ("eval", folder, "--text", text, "--sequence-length", "1"): "too short",
        ("eval", folder, "--text", text, "--max-tokens", "-5"): "max-tokens",
        ("compress", model, out, "--calibration", text, "--seed", "99999999999999999999"): "seed",
        ("compress", model, out, "--calibration", "once upon a time " * 40): "not a file",
    }
    for arguments, says in cases.items():
        code, _, err = call(*arguments)
        assert code == 2, (arguments, err)
        assert says in " ".join(err.split()), (arguments, err)
        assert not out.exists() or not (out / "config.json").exists()


def test_another_model_in_the_output_folder_is_refused(folder, tmp_path) -> None:
    text = TINY / "calibration.txt"
    code, _, err = call("compress", TINY, folder, "--calibration", text, "--samples", 8)
    assert code == 2
    assert "holds another run" in " ".join(err.split())
    assert "0 problems" in told("verify", folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t["model.layers.1.mlp.experts.3.up_proj.weight"].fill_(float("nan")), "layers.1.mlp.experts"),
        (lambda t: t["model.layers.2.self_attn.q_proj.weight"][0].fill_(float("inf")), "layers.2.self_attn.q_proj"),
        (lambda t: t.update(stranger=torch.ones(2)), "stranger"),
        (lambda t: t.pop("model.layers.3.mlp.gate.weight"), "model.layers.3.mlp.gate.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(5)}), "model.norm.weight"),
    ],
)
def test_bad_weights_are_named(change, says: str, tmp_path) -> None:
    model = model_copy(tmp_path)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    code, _, err = call(
        "compress", model, out, "--calibration", TINY / "calibration.txt", "--samples", 2, "--sequence-length", 32
    )
    assert code == 2
    assert says in "".join(err.split())
    assert not (out / "config.json").exists()


def test_activations_that_overflow_are_named(tmp_path) -> None:
    model = model_copy(tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].fill_(3e38)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, _, err = call(
        "compress", model, tmp_path / "out", "--calibration", TINY / "calibration.txt", "--samples", 2,
        "--sequence-length", 32, "--recipe", "qmoe",
    )  # fmt: skip
    assert code == 2
    assert "model.layers.1" in err
    assert "NaN or infinity" in " ".join(err.split())


def test_truncated_weights_and_a_wrong_model_type(tmp_path) -> None:
    model = model_copy(tmp_path)
    os.truncate(model / "model.safetensors", 1_000_000)
    text = TINY / "calibration.txt"
    code, _, err = call("compress", model, tmp_path / "out", "--calibration", text)
    assert code == 2
    assert "model.safetensors" in err
    shutil.copy(TINY / "model.safetensors", model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "not_a_model"}))
    code, _, err = call("compress", model, tmp_path / "out", "--calibration", text)
    assert code == 2
    assert "not_a_model" in err


def test_a_model_without_experts_is_told_what_the_recipe_compresses(tmp_path) -> None:
    import tiny_models

    model = tiny_models.save("llama", tmp_path / "llama")
    code, _, err = call("compress", model, tmp_path / "out", "--recipe", "rtn-ternary")
    assert code == 2
    assert "no experts modules" in " ".join(err.split())


def test_backends_say_what_runs_and_why() -> None:
    code, out, _ = call("inspect", "--backends", "--json")
    backends = json.loads(out)["backends"]
    assert code == 0
    assert backends["reference (torch)"][0] is True
    from halfbit import native

    active, reason = backends["cpu (C++)"]
    assert active == (native.extension is not None)
    assert (native.isa() in reason) if active else reason == native.reason


def test_help_teaches() -> None:
    for command in ([], ["compress"], ["eval"], ["generate"], ["inspect"], ["verify"]):
        code, out, _ = call(*command, "--help")
        assert code == 0
        assert len(out.split()) > 25


def test_parts_of_a_model() -> None:
    names = {
        "model.layers.0.mlp.experts.packed_down_proj.codewords": "experts",
        "encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight": "experts",
        "model.layers.0.mlp.shared_experts.down_proj.weight": "shared experts",
        "model.layers.0.self_attn.q_norm.weight": "attention",
        "decoder.block.0.layer.1.EncDecAttention.k.weight": "attention",
        "model.layers.0.mlp.gate.weight": "router",
        "model.layers.0.input_layernorm.weight": "norms",
        "shared.weight": "embeddings",
        "model.embed_tokens.weight": "embeddings",
        "lm_head.weight": "head",
        "model.layers.0.mlp.up_proj.weight": "dense feed-forward",
    }
    assert {n: part_of(n) for n in names} == names


def test_damaged_manifests_are_told_without_a_traceback(folder, tmp_path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    good = read_manifest(copy)
    name = next(iter(good["tensors"]))
    damages = [
        {"format": 1},
        {**good, "tensors": {"a": 1}},
        {**good, "tensors": {name: {**good["tensors"][name], "dtype": "os"}}},
        {**good, "tensors": {name: {**good["tensors"][name], "file": "../config.json"}}},
        {**good, "packed": {"x": {"y": {"shape": [1, 2]}}}},
        {**good, "matrices": {"x": {"loss": "low"}}},
    ]
    for damage in damages:
        (copy / "manifest.json").write_text(text_of(damage))
        assert call("inspect", copy)[0] == 2
        code, out, _ = call("verify", copy, "--json")
        assert (code, json.loads(out)["problems"][0]["where"]) == (1, "manifest.json")


def test_inspect_says_that_a_run_has_not_finished(folder, tmp_path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    empty = {k: {} for k in ("blocks", "tensors", "packed", "matrices", "coverage", "files")}
    edit_manifest(copy, lambda manifest: manifest.update({**empty, "complete": False}))
    code, out, _ = call("inspect", copy)
    assert code == 0
    assert "has not finished" in out


def test_verify_checks_the_small_files_too(folder, tmp_path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text().replace("the", "teh"))
    code, out, _ = call("verify", copy, "--json")
    assert code == 1
    assert [p["where"] for p in json.loads(out)["problems"]] == ["tokenizer.json"]
