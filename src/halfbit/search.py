"""The smallest model that a loss allows: compress at several rates, measure, take the lowest rate that passes.

The loss is measured on the end of the calibration text, which neither the solver nor the tuning has learned from. It
rises steadily as the rate falls, so the rate is found by halving; each try is a whole run, which continues where it was
killed like any other.
"""

import math
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from halfbit.compress import calibration_samples, compress, with_length
from halfbit.errors import GateError, RecipeError
from halfbit.evaluate import load, measure
from halfbit.events import Event, Finished, Noticed
from halfbit.families import open_family
from halfbit.reader import Reader
from halfbit.recipe import Recipe
from halfbit.samples import Sample
from halfbit.sizes import Account
from halfbit.tune import held_back
from halfbit.writer import delete_run

TRIALS = ".trials"
# ratio of two rates that are not worth telling apart
FINE = 1.04


def compress_to_loss(
    source: str,
    folder: str | Path,
    recipe: Recipe,
    calibration: str | None,
    most: float,
    *,
    device: str = "cpu",
    restart: bool = False,
    offload: str | Path | None = None,
    accept: Collection[str] = (),
    ray: str | None = None,
    workers: int = 0,
) -> Iterator[Event]:
    """Compress with the fewest bits at which the loss rises by no more than the share `most` (0.02: 2 %).

    Arguments and gates are as of `compress`; a rate at which one fails is too low, unless it is the highest.

    Raises:
        RecipeError: not even the highest rate keeps the loss, or the recipe has no rule that takes bits.
    """
    same: Any = {"device": device, "offload": offload, "accept": accept, "ray": ray, "workers": workers}
    folder = Path(folder)
    if restart:
        delete_run(folder)
        shutil.rmtree(folder / TRIALS, ignore_errors=True)
    if (folder / "config.json").is_file():
        yield Finished(folder)
        return
    reader = Reader(source)
    family = open_family(reader)
    recipe = with_length(recipe, family)
    _, samples = calibration_samples(reader, family, recipe, calibration, every=True)
    held = samples[-held_back(len(samples), recipe.tuning) :]
    if len(samples) - len(held) < recipe.calibration.samples:
        raise RecipeError(
            f"--max-loss: {len(samples)} samples of text are too few to solve with {recipe.calibration.samples} and "
            f"hold {len(held)} back; give more text or fewer --samples"
        )
    first = device.split(",")[0]
    allowed = _loss(source, held, first) * (1 + most)
    account = Account.of(source, recipe)
    low, high, best = account.least, account.most, None
    bits = high
    while best is None or high / low > FINE:
        trial = folder / TRIALS / f"{bits:.4f}"
        how = recipe.budgeted("bits", bits, account.free)
        curves = folder / TRIALS / "curves.json"
        try:
            steps = compress(source, trial, how, calibration, curves=curves, **same)
            yield from (event for event in steps if not isinstance(event, Finished))
            loss = _loss(str(trial), held, first)
        except GateError as e:
            if best is None:
                raise
            # fewer bits than before: too few
            yield Noticed(f"{bits:.3f} bits: {e}")
            loss = math.inf
        passed = loss <= allowed
        yield Noticed(f"{bits:.3f} bits: loss {loss:.4f}, {allowed:.4f} allowed: {'enough' if passed else 'too few'}")
        if passed:
            if best is not None:
                shutil.rmtree(best)
            high, best = bits, trial
        elif best is None:
            raise RecipeError(
                f"--max-loss {most:g}: with {account.most:.3g} bits, the most this recipe has, the loss rises by "
                f"{loss / allowed * (1 + most) - 1:.4f}; allow more, tune it (--tune), or use a recipe with more bits"
            )
        else:
            low = bits
            shutil.rmtree(trial)
        bits = math.sqrt(low * high)
    # the config last: a folder without it is no model
    for path in sorted(best.iterdir(), key=lambda p: p.name == "config.json"):
        path.replace(folder / path.name)
    shutil.rmtree(folder / TRIALS)
    yield Finished(folder)


def _loss(source: str, samples: list[Sample], device: str) -> float:
    return measure(load(source, device=device), samples, device=device).loss
