"""As accurate as the published SpQR quantizer, on a matrix that it has quantized (`golden/spqr/README.md`)."""

import json
from functools import cache
from math import ceil, log2
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from halfbit.grids.bilevel import Bilevel
from halfbit.solve.budget import gptq_with_share
from halfbit.solve.gptq import gptq
from halfbit.types import Solution

FILE = Path(__file__).parent / "golden" / "spqr" / "accuracy.safetensors"
CONFIGURATIONS = ["w3-g16-qq16-tau02", "w4-g16-qq16-tau02", "w3-g8-qq64-tau03"]
configurations = pytest.mark.parametrize("name", CONFIGURATIONS)
dampings = pytest.mark.parametrize("damping", ["1.0", "0.01"])


@cache
def matrix() -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load_file(FILE)
    x = tensors["inputs"].float()
    return tensors["weight"].float()[None], (2 * x.T @ x)[None]


@cache
def results() -> dict:
    with safe_open(FILE, "pt") as file:
        return json.loads(file.metadata()["results"])


def grid(name: str, **fields) -> Bilevel:
    of = results()[name]
    return Bilevel(of["bits"], of["groupsize"], 3, 3, of["qq_groupsize"], **fields)


def bits(solution: Solution, name: str) -> float:
    """Stored bits per weight: codes, statistics, outliers with their counts per 4096 weights, column order."""
    of = results()[name]
    rows, columns = solution.shape
    base = of["bits"] + 6 / of["groupsize"] + 64 / (of["groupsize"] * of["qq_groupsize"])
    return base + share(solution) * 28 + 16 / 4096 + ceil(log2(columns)) / rows


def share(solution: Solution) -> float:
    return 0.0 if solution.outliers is None else len(solution.outliers) / solution.codes.numel()


@configurations
@dampings
def test_min_max_with_the_published_threshold_is_the_published_quantizer(name: str, damping: str):
    """The same method up to where a zero is put for a rounded scale, so the figures agree as two seeds would."""
    w, h = matrix()
    reference = results()[name]["by_percdamp"][damping]
    published = {"names": ["w"], "damping": float(damping), "order": "act_order"}
    (solution,) = gptq(w, h, grid(name, fitting="min-max"), outliers=results()[name]["tau"], **published)
    assert solution.order is not None
    assert torch.equal(solution.order, load_file(FILE)["perm"].long())
    assert solution.loss == pytest.approx(reference["error_saved"], rel=0.04)
    assert share(solution) == pytest.approx(reference["outlier_rate"], rel=0.12)
    (without,) = gptq(w, h, grid(name, fitting="min-max"), **published)
    assert without.loss == pytest.approx(reference["error_no_outliers"], rel=0.04)


@configurations
@dampings
def test_search_has_a_sixth_less_error_at_no_more_bits(name: str, damping: str):
    w, h = matrix()
    reference = results()[name]["by_percdamp"][damping]
    base = bits(gptq(w, h, grid(name, fitting="min-max"), names=["w"], order="act_order")[0], name)
    # a search for a share may end 3 % above it
    affordable = (reference["average_bits_unrounded"] - base) / 28 / 1.03
    (solution,) = gptq_with_share(w, h, grid(name), affordable, names=["w"], damping=float(damping), order="act_order")
    assert bits(solution, name) <= reference["average_bits_unrounded"]
    assert solution.loss < 5 / 6 * reference["error_saved"]
