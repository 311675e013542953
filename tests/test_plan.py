"""What `halfbit plan` predicts, against published totals, whole models and folders that were really written."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import tiny_models
import torch
from compressed import EVERYTHING, Made, chosen
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from halfbit import recipe
from halfbit.blueprint import Blueprint
from halfbit.cli import app
from halfbit.errors import CheckpointError, FormatError, RecipeError, Unsupported
from halfbit.families import open_family
from halfbit.machine import Rates, Room, measure
from halfbit.parts import FEEDBACK, matrices, stored_bits
from halfbit.plan import Plan, budgeted, plan
from halfbit.plan_memory import Peak
from halfbit.plan_time import HALF, Clock, Work
from halfbit.reader import Reader
from halfbit.types import Solution

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "configs"
TINY = ROOT / "examples" / "tiny-moe"
PLENTY = Room(1 << 50, 1 << 50, 1 << 50)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("switch-c-2048", 1571.3),
        ("qwen3-30b-a3b", 30.53),
        ("qwen3-235b-a22b", 235.09),
        ("deepseek-v3", 671.03),  # without the layer that predicts a second token
        ("mixtral-8x7b", 46.70),
        ("llama-3-70b", 70.55),
    ],
)
def test_configs_have_as_many_weights_as_published(name: str, billions: float) -> None:
    blueprint = Blueprint.of(CONFIGS / f"{name}.json")
    assert blueprint.parameters() / 1e9 == pytest.approx(billions, rel=1e-4)


def test_c2048_is_planned_in_seconds_and_fits_the_published_size() -> None:
    begin, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = plan(CONFIGS / "switch-c-2048.json", recipe.load("qmoe"), timed=False, free=PLENTY)
    assert time.process_time() - begin < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 << 10
    assert found.before / 1e9 == pytest.approx(3142, rel=1e-3)
    assert 130e9 < found.after < 158.6e9
    # 16 Hessians of 6144 columns, and their factors in float64 some at a time
    assert 8e9 < found.host_bytes < 40e9
    assert found.device_bytes == 0


def test_experts_that_are_modules_are_counted_as_the_whole_model_has_them(tmp_path: Path) -> None:
    config = tiny_models.CONFIGS["switch"]
    config = type(config)(**{**config.to_dict(), "num_experts": 9})
    config.save_pretrained(tmp_path)
    blueprint = Blueprint.of(tmp_path)
    assert len(next(iter(blueprint.family.experts.values())).members) < 9
    with torch.device("meta"):
        whole = AutoModelForSeq2SeqLM.from_config(config)
    assert blueprint.parameters() == sum(p.numel() for p in whole.parameters())
    shapes = {n: tuple(p.shape) for n, p in whole.named_parameters() if ".experts." not in n}
    assert {n: shape for n, (shape, _) in blueprint.weights.items()} == shapes
    assert {s.num_experts for s in blueprint.stacks.values()} == {9}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-tied", "deepseek-v3", "gpt-oss", "llama4", "switch", "falcon"])
def test_weights_are_those_of_the_checkpoint(saved: Callable[[str], Path], name: str) -> None:
    blueprint, family = Blueprint.of(saved(name)), open_family(Reader(saved(name)))
    sources = family.claims().sources
    streamed = {n for stack in family.experts.values() for p in stack.projections for n in stack.parameters(p)}
    kept = [n for n in sources if n not in streamed]
    assert set(blueprint.weights) == set(kept)
    for n in kept:
        assert blueprint.weights[n][0] == tuple(family.model.get_parameter_or_buffer(n).shape)


@pytest.mark.parametrize(
    ("name", "rules", "within"),
    [("qwen3-moe", "grouped", 0.02), ("llama", "grouped", 0.02), ("qwen3-moe", "qmoe", 0.15), ("switch", "qmoe", 0.15)],
)
def test_bytes_of_tensors(made: Callable[..., Made], saved: Callable[..., Path], name: str, rules: str, within: float):
    folder = made(name, rules).folder
    found = plan(saved(name), chosen(EVERYTHING.get(rules, rules)), timed=False, free=PLENTY)
    written = sum(_tensor_bytes(file) for file in folder.glob("*.safetensors"))
    tensors = sum(p.after for p in found.parts if p.weights)
    assert tensors == pytest.approx(written, rel=within)
    about = sum((folder / f).stat().st_size for f in ("manifest.json", "config.json", "model.safetensors.index.json"))
    assert next(p.after for p in found.parts if p.name == "manifest and index") == pytest.approx(about, rel=0.5)


def _tensor_bytes(file: Path) -> int:
    length = int.from_bytes(file.read_bytes()[:8], "little")
    return file.stat().st_size - 8 - length


# what is planned and what is then run, in one process, so that both hold the same libraries
RUN = """
import json, sys
from halfbit import recipe
from halfbit.compress import compress
from halfbit.plan import plan
chosen = recipe.load("qmoe").calibrated(samples=128, sequence_length=256)
found = plan(sys.argv[1], chosen, timed=False)
for _ in compress(sys.argv[1], sys.argv[2], chosen, sys.argv[3]):
    pass
# the peak that getrusage tells begins with that of the process that started this one
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) << 10
print(json.dumps([found.host_bytes, found.after, peak]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="bytes of memory are counted in other units")
def test_memory_and_size_of_a_run(tmp_path: Path) -> None:
    arguments = [str(TINY), str(tmp_path / "out"), str(TINY / "calibration.txt")]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, capture_output=True, timeout=600)
    host, after, peak = json.loads(done.stdout.splitlines()[-1])
    assert host == pytest.approx(peak, rel=0.15)
    written = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert after == pytest.approx(written, rel=0.1)


def test_bits_of_data_dependent_codes_are_those_of_the_codec() -> None:
    rule = recipe.load("qmoe").rules[0]
    bits, why = stored_bits(rule, (6144, 2080))
    assert why is not None
    assert 0.70 < bits < 0.81
    # one row more costs as much as one row
    assert stored_bits(rule, (64, 2080))[0] == pytest.approx(bits, rel=0.02)


def test_bits_follow_the_weights_where_there_are_some() -> None:
    rule, random = recipe.load("qmoe").rules[0], torch.Generator().manual_seed(0)
    assert rule.grid is not None
    assert rule.codec is not None
    w = torch.randn(512, 300, generator=random)
    w += 0.1 * w**3
    params = rule.grid.fit(w)
    codes = rule.grid.nearest(FEEDBACK * w, rule.grid.ready(params))
    whole = rule.codec.encode(Solution(rule.grid, codes, {k: v[:, None] for k, v in params.items()}))
    assert stored_bits(rule, (512, 300), w[::4])[0] == pytest.approx(whole.bits_per_weight, rel=0.03)
    assert stored_bits(rule, (512, 300))[0] > 1.15 * whole.bits_per_weight
    here, alone = (plan(path, recipe.load("qmoe"), timed=False).assumptions for path in (TINY, TINY / "config.json"))
    assert sum("as of 128 rows of an expert" in told for told in here) == 2
    assert sum("as of normal ones" in told for told in alone) == 2


def test_what_does_not_fit_is_named_with_an_option_that_helps() -> None:
    source, qmoe = CONFIGS / "qwen3-30b-a3b.json", recipe.load("qmoe").calibrated(sequence_length=512)
    gated = plan(source, qmoe, timed=False, free=PLENTY)
    # beside the finished model, all that is not compressed in float32
    tight = Room(int(gated.host_bytes * 0.9), 1 << 50, None)
    assert (plan(source, qmoe, timed=False, free=tight).verdicts[0].advice or "").startswith("[gates] model = false")
    qmoe = qmoe.gated(model=False)
    whole = plan(source, qmoe, timed=False, free=PLENTY)
    assert all(v.fits and v.advice is None for v in whole.verdicts)
    tight = Room(int(whole.host_bytes * 0.85), whole.after // 2, None)
    memory, disk = plan(source, qmoe, timed=False, free=tight).verdicts
    assert not memory.fits
    assert memory.advice is not None
    assert memory.advice.startswith("[solving] experts_per_batch = ")
    batch = int(memory.advice.split(" = ")[1].split()[0])
    smaller = replace(qmoe, solving=replace(qmoe.solving, experts_per_batch=batch))
    assert plan(source, smaller, timed=False, free=tight).verdicts[0].fits
    assert not disk.fits
    assert disk.advice is not None
    hopeless = plan(source, qmoe, timed=False, free=Room(1000, 1 << 50, None)).verdicts[0]
    assert not hopeless.fits
    assert hopeless.advice is not None
    assert hopeless.advice.startswith("neither")


def test_a_device_takes_the_work_and_the_host_the_activations() -> None:
    qmoe = recipe.load("qmoe").calibrated(sequence_length=512)
    on_cpu = plan(CONFIGS / "mixtral-8x7b.json", qmoe, timed=False, free=PLENTY)
    found = plan(CONFIGS / "mixtral-8x7b.json", qmoe, device="cuda", timed=False, free=PLENTY)
    assert found.device_bytes > 1e9
    assert found.host_bytes + found.device_bytes == pytest.approx(on_cpu.host_bytes, rel=0.02)
    assert [v.limit for v in found.verdicts] == ["memory", "device memory", "disk"]
    # four of them held back for gates
    assert of_phase(found, "solving").host["activations of the samples"] == 4 * 4096 * (128 + 4) * 512


def of_phase(found: Plan, phase: str) -> Peak:
    (peak,) = (p for p in found.memory if p.phase == phase)
    return peak


def test_gates_are_counted() -> None:
    """Four samples of 512 tokens and a vocabulary of 151,936: 883 of these tokens are judged, in five tensors."""
    source, qmoe = CONFIGS / "qwen3-30b-a3b.json", recipe.load("qmoe").calibrated(sequence_length=512)
    found = plan(source, qmoe, timed=False, free=PLENTY)
    assert of_phase(found, "gates").host["logits"] == 5 * 4 * 883 * 151936
    without = plan(source, qmoe.gated(held_back=0), timed=False, free=PLENTY)
    assert [peak.phase for peak in without.memory] == ["solving"]
    more, less = (of_phase(f, "solving") for f in (found, without))
    assert more.host["activations of the samples"] * 128 == less.host["activations of the samples"] * 132
    assert "held-back samples, for gates" in more.host
    # rounded to nearest nothing is calibrated, and nothing held back
    assert [p.phase for p in plan(source, recipe.load("rtn-ternary"), timed=False, free=PLENTY).memory] == ["solving"]


def test_time_of_gates_is_the_arithmetic_of_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense model: held-back samples go along, through the original block, and through the compressed one."""
    rates = Rates(1e9, 1e9, (0.0, 0.0), 0.0, None, 0.0)
    blueprint = Blueprint.of(CONFIGS / "llama-3-70b.json")
    chosen = recipe.load("gptq-4-g128").calibrated(samples=2, sequence_length=1024).gated(held_back=3)
    clock = Clock(rates, chosen.solving, "cpu")
    monkeypatch.setattr(clock, "solver", lambda *_: (1.0, 0.25, 0.25))
    work = Work(blueprint, chosen, matrices(blueprint, chosen), 2, clock)
    d, inner, kv = 8192, 28672, 1024
    each = 2 * d * d + 2 * d * kv + 3 * d * inner + 2 * 64 * 128 * 1024
    assert work.solving().by["forward passes"] == pytest.approx(80 * 2 * (2 + 3) * 1024 * 2 * each / 1e9)
    assert work.solving().by["gates"] == pytest.approx(80 * 2 * 3 * 1024 * 2 * each / 1e9)
    last = work.judging()
    assert last is not None
    # of 1,046 tokens one sample is heard, and what was written after its beginning
    heard, head = 1024 + 32 + 24, 2 * (1046 + 32 + 24) * d * 128256 / 1e9
    assert last.by["the original"] == pytest.approx(80 * 2 * heard * (each) / 1e9 + head, rel=0.05)


def test_budgets_are_those_of_compress() -> None:
    source, halfbit = CONFIGS / "qwen3-30b-a3b.json", recipe.load("halfbit")
    found = plan(source, budgeted(source, halfbit, 0.8, None), timed=False, free=PLENTY)
    experts = next(p for p in found.parts if p.name == "experts")
    assert 8 * experts.after / experts.weights == pytest.approx(0.8)
    sized = plan(source, budgeted(source, halfbit, None, 6 * 10**9), timed=False, free=PLENTY)
    assert sized.after == pytest.approx(6e9, rel=1e-3)
    with pytest.raises(RecipeError, match="leaves"):
        budgeted(source, halfbit, None, 10**9)
    with pytest.raises(RecipeError, match="rate"):
        budgeted(source, recipe.load("qmoe"), 0.8, None)


def test_times_are_the_arithmetic_of_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense model rounded by GPTQ: products and Hessians of one block, counted by hand."""
    rates = Rates(1e9, 1e9, (0.0, 0.0), 0.0, None, 0.0)
    blueprint = Blueprint.of(CONFIGS / "llama-3-70b.json")
    chosen = recipe.load("gptq-4-g128").calibrated(samples=2, sequence_length=1024).gated(held_back=0)
    clock = Clock(rates, chosen.solving, "cpu")
    monkeypatch.setattr(clock, "solver", lambda *_: (1.0, 0.25, 0.25))
    spent = Work(blueprint, chosen, matrices(blueprint, chosen), 2, clock).solving()
    d, inner, kv, tokens = 8192, 28672, 1024, 2048
    weights = 2 * d * d + 2 * d * kv + 3 * d * inner
    attention = 2 * 64 * 128 * 1024
    # once to observe, once to go on
    assert spent.by["forward passes"] == pytest.approx(80 * 2 * tokens * 2 * (weights + attention) / 1e9)
    # query, key and value share one; gate and up; output; down
    assert spent.by["Hessians"] == pytest.approx(80 * 2 * HALF * tokens * (3 * d * d + inner * inner) / 1e9)
    assert spent.by["solver"] == 80 * 7
    assert spent.by["encoding and decoding"] == 80 * 7 / 2


def test_rates_are_positive_and_a_larger_sample_takes_longer() -> None:
    rates = measure("cpu", TINY / "model.safetensors")
    assert min(rates.flops, rates.double_flops) > 1e6
    assert min(rates.factored(1024), rates.factored(512)) > 0
    assert rates.read is not None
    assert rates.read > 1e6
    few, many = (
        plan(TINY, recipe.load("qmoe").calibrated(samples=n, sequence_length=64).gated(held_back=0), free=PLENTY)
        for n in (8, 128)
    )
    assert [spent.phase for spent in few.time] == ["starting", "solving"]
    assert many.time[-1].by["forward passes"] > 4 * few.time[-1].by["forward passes"]
    # what the process has already taken is another amount each time
    of_samples = [p.memory[-1].host["activations of the samples"] for p in (few, many)]
    assert of_samples[1] == 16 * of_samples[0]


def test_options_are_measured_first() -> None:
    found = plan(TINY, recipe.load("halfbit"), timed=False, free=PLENTY)
    assert [peak.phase for peak in found.memory] == ["measuring options", "solving", "gates"]
    assert "measured curves, until the end" in found.disk
    assert prod(n > 0 for peak in found.memory for n in peak.host.values())


def test_the_command_prints_json_and_tables() -> None:
    source = str(CONFIGS / "mixtral-8x7b.json")
    done = CliRunner().invoke(app, ["plan", source, "--recipe", "qmoe", "--no-measure", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["parameters"] == 46_702_792_704
    assert told["seconds"] is None
    assert told["after"] == sum(p["after"] for p in told["parts"])
    shown = CliRunner().invoke(app, ["plan", source, "--recipe", "qmoe", "--no-measure"])
    assert shown.exit_code == 0
    for word in ("experts", "embeddings", "peak memory", "verdict", "assumed"):
        assert word in shown.stdout


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("{", FormatError, "JSON"),
        ("{}", CheckpointError, "model_type"),
        ('{"model_type": "nothing-known"}', Unsupported, "nothing-known"),
        ('{"model_type": "llama", "dtype": "float3"}', CheckpointError, "float3"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', Unsupported, "awq"),
    ],
)
def test_a_config_that_says_no_model(tmp_path: Path, text: str, error: type[Exception], told: str) -> None:
    (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(error, match=told):
        plan(tmp_path, recipe.load("spqr-3bit"), timed=False, free=PLENTY)


def test_a_recipe_that_says_nothing_of_the_model() -> None:
    with pytest.raises(RecipeError, match="no weight matches"):
        plan(CONFIGS / "llama-3-70b.json", recipe.load("qmoe"), timed=False, free=PLENTY)


def test_offloaded_activations_are_on_the_disk_and_advised_where_memory_is_short() -> None:
    chosen = recipe.load("qmoe").calibrated(samples=4096, sequence_length=512)
    inside, outside = (plan(TINY, chosen, timed=False, offload=offload) for offload in (False, True))
    moved = outside.disk["activations"]
    # what enters a block and its experts, and what these answer, each 128 columns in float32
    assert moved >= 3 * 4096 * 512 * 128 * 4
    assert inside.host_bytes - outside.host_bytes == pytest.approx(moved, rel=0.05)
    room = Room(memory=(inside.host_bytes + outside.host_bytes) // 2, device=None, disk=10**12)
    (memory, _) = plan(TINY, chosen, timed=False, free=room).verdicts
    assert not memory.fits
    assert (memory.advice or "").startswith("--offload DIR")
