"""The smallest model that a loss allows, and sizes as budgets."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from compressed import add_tokenizer, text
from torch import Tensor
from typer.testing import CliRunner

from halfbit import recipe, search
from halfbit.cli import app
from halfbit.compress import calibration_samples
from halfbit.errors import RecipeError, UnknownName
from halfbit.evaluate import load, measure
from halfbit.events import Event, Finished, Noticed
from halfbit.families import open_family
from halfbit.reader import Reader
from halfbit.recipe import Recipe
from halfbit.sizes import parse_size, with_model_bits, with_size
from halfbit.tune import held_back

LENGTH, SAMPLES = 12, 24
EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-moe"


def source(root: Path) -> Path:
    return add_tokenizer(tiny_models.save("qwen3-moe", root / "source"))


def chosen() -> recipe.Recipe:
    return recipe.load("runlength").calibrated(samples=6, sequence_length=LENGTH)


# --- loss


class Fake:
    """Compresses to a folder that says its bits; the loss is 2 + slope / bits, that of the original 2."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slope: float):
        self.slope, self.tried = slope, []
        monkeypatch.setattr(search, "compress", self.compress)
        monkeypatch.setattr(search, "_loss", self.loss)

    def compress(
        self, source: str, folder: Path, how: recipe.Recipe, text: str, *, device: str, curves: Path, **others: Any
    ) -> Iterator[Event]:
        assert curves.name == "curves.json"
        assert others == {"offload": None, "accept": (), "ray": None, "workers": 0}
        assert not (folder / "config.json").exists()
        folder.mkdir(parents=True)
        self.tried.append(how.rules[0].bits)
        (folder / "config.json").write_text(json.dumps(how.rules[0].bits))
        (folder / "weights").write_text("w")
        yield Finished(folder)

    def loss(self, folder: str, samples: list, device: str) -> float:
        said = Path(folder) / "config.json"
        bits = json.loads(said.read_text())
        return 2.0 if isinstance(bits, dict) else 2.0 + self.slope / bits


def test_the_lowest_rate_that_passes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source(tmp_path)
    fake = Fake(monkeypatch, 0.03)
    events = list(search.compress_to_loss(str(model), tmp_path / "out", chosen(), text(model, SAMPLES * LENGTH), 0.02))
    bits = json.loads((tmp_path / "out" / "config.json").read_text())
    # 2 + 0.03 / bits <= 2.04 from 0.75 bits on
    assert 0.75 <= bits <= 0.75 * search.FINE
    assert events[-1] == Finished(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "weights"]
    assert len(fake.tried) <= 8
    # done: nothing is tried again
    list(search.compress_to_loss(str(model), tmp_path / "out", chosen(), text(model, SAMPLES * LENGTH), 0.02))
    assert len(fake.tried) <= 8


def test_the_length_of_samples_may_be_automatic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source(tmp_path)
    fake = Fake(monkeypatch, 0.03)
    how = chosen().calibrated(sequence_length=0)
    # the model's longest is 64 tokens
    list(search.compress_to_loss(str(model), tmp_path / "out", how, text(model, 8 * 64), 0.02))
    assert fake.tried


def test_a_loss_that_no_rate_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = source(tmp_path)
    Fake(monkeypatch, 3.0)
    with pytest.raises(RecipeError, match=r"with 1.5 bits, the most this recipe has, the loss rises by 1\.0000"):
        list(search.compress_to_loss(str(model), tmp_path / "out", chosen(), text(model, SAMPLES * LENGTH), 0.02))


def test_too_little_text_to_hold_some_back(tmp_path: Path) -> None:
    model = source(tmp_path)
    with pytest.raises(RecipeError, match="too few to solve with 6"):
        list(search.compress_to_loss(str(model), tmp_path / "out", chosen(), text(model, 6 * LENGTH), 0.02))


def test_a_measured_loss_is_kept_with_fewer_bits_than_the_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained model; the loss on the end of the text, measured here again, and once with the next lower rate."""
    monkeypatch.setattr(search, "FINE", 1.5)
    how = recipe.load("runlength").calibrated(samples=8, sequence_length=64)
    how = how.tuned(held_back=0.005)
    losses: dict[float, float] = {}
    for event in search.compress_to_loss(str(EXAMPLE), tmp_path / "out", how, str(EXAMPLE / "calibration.txt"), 0.3):
        if isinstance(event, Noticed) and (
            found := re.match(r"([\d.]+) bits: loss ([\d.]+), ([\d.]+) allowed", event.message)
        ):
            losses[float(found[1])] = float(found[2])
            allowed = float(found[3])
    bits = Recipe.from_toml((tmp_path / "out" / "recipe.toml").read_text()).rules[0].bits
    assert bits is not None
    assert losses[round(bits, 3)] <= allowed
    assert all(loss > allowed for other, loss in losses.items() if other < round(bits, 3))
    assert len(losses) > 2
    reader = Reader(str(EXAMPLE))
    _, samples = calibration_samples(reader, open_family(reader), how, str(EXAMPLE / "calibration.txt"), every=True)
    held = samples[-held_back(len(samples), how.tuning) :]
    assert measure(load(str(tmp_path / "out")), held).loss == pytest.approx(losses[round(bits, 3)], abs=1e-3)


def test_what_the_solver_sees_has_noise_and_what_the_loss_is_measured_on_has_none() -> None:
    reader = Reader(str(EXAMPLE))
    family = open_family(reader)
    plain = recipe.load("qmoe").calibrated(samples=4, sequence_length=64)
    noisy = plain.calibrated(noise=0.25)

    def ids(how: Recipe, every: bool) -> Tensor:
        _, found = calibration_samples(reader, family, how, str(EXAMPLE / "calibration.txt"), every=every)
        return torch.stack([s.ids for s in found[:4]])

    changed = (ids(noisy, False) != ids(plain, False)).sum(1).tolist()
    assert changed[0] == changed[2] == 0
    assert min(changed[1], changed[3]) > 6
    assert torch.equal(ids(noisy, True), ids(plain, True))


# --- size


@pytest.mark.parametrize(
    ("said", "bytes"), [("12GB", 12 * 10**9), ("1.5 GiB", 3 << 29), ("900mb", 9 * 10**8), ("7", 7)]
)
def test_sizes_are_read(said: str, bytes: int) -> None:
    assert parse_size(said) == bytes


def test_sizes_that_are_none() -> None:
    with pytest.raises(RecipeError, match="expected a number and a unit"):
        parse_size("much")
    with pytest.raises(UnknownName, match="GiB"):
        parse_size("12 bananas")


@pytest.mark.parametrize("name", ["runlength", "halfbit"])
@pytest.mark.parametrize("option", [["--size", "2MB"], ["--bits", "4.4", "--bits-of", "model"]])
def test_a_folder_has_the_size_that_was_asked_for(name: str, option: list[str], tmp_path: Path) -> None:
    """Counted from the files, within one percent; where rules have options, those for other layers keep their bits."""
    out = tmp_path / "out"
    given = ["--calibration", str(EXAMPLE / "calibration.txt"), "--samples", "4", "--sequence-length", "64", "--json"]
    done = CliRunner().invoke(app, ["compress", str(EXAMPLE), str(out), "--recipe", name, *option, *given])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    if name == "halfbit":
        assert report["packed"]["attention"]["bits_per_weight"] == pytest.approx(4.0, rel=0.01)
    if option[0] == "--size":
        assert sum(p.stat().st_size for p in out.iterdir()) == pytest.approx(2e6, rel=0.01)
    else:
        assert report["bits_per_weight"] == pytest.approx(4.4, rel=0.01)


def test_impossible_sizes_are_answered_with_what_is_possible() -> None:
    with pytest.raises(RecipeError, match=r"possible with this recipe are 1,8.* to 2,2.* bytes \(0.3 to 1.5 bits\)"):
        with_size(str(EXAMPLE), recipe.load("runlength"), 1000)
    with pytest.raises(RecipeError, match="whose rate can be chosen"):
        with_size(str(EXAMPLE), recipe.load("qmoe"), 2_000_000)
    bits = with_model_bits(str(EXAMPLE), recipe.load("runlength"), 4.4).rules[0].bits
    assert bits is not None
    assert 0.3 < bits < 1.5
