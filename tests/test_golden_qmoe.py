"""Our dictionary, code and solver against what the published implementation wrote. See golden/qmoe/README.md."""

import hashlib
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from halfbit.formats.qmoe import QMoE, kernels, reference
from halfbit.formats.qmoe.dictionary import PUBLISHED_SHA256, ROOT, dictionary
from halfbit.grids.affine import Affine
from halfbit.grids.ternary import Ternary
from halfbit.solve.gptq import gptq
from halfbit.types import Grid, Packed, Solution

GOLDEN = Path(__file__).parent / "golden" / "qmoe"


@cache
def whole(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def read(name: str, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): tensor for k, tensor in whole(name).items() if k.startswith(f"{prefix}.")}


@cache
def described() -> dict[str, dict]:
    with safe_open(GOLDEN / "cases.safetensors", "pt") as file:
        return json.loads(file.metadata()["cases"])


all_cases = pytest.mark.parametrize("case", described())
implementations = pytest.mark.parametrize("implementation", [kernels, reference], ids=["kernels", "reference"])


def published(case: str) -> Packed:
    """The case in our layout: the same codewords, lengths instead of offsets."""
    golden = read("cases", case)
    rows, columns = golden["shape"].tolist()
    return Packed(
        QMoE(),
        (rows, columns),
        {
            "codewords": golden["w_comp"].view(torch.uint16),
            "row_lengths": golden["row_off"].diff().to(torch.uint16),
            "levels": golden["ter_minmax"].view(rows, 2),
            "pivots": torch.empty(0, dtype=torch.int64),
        },
    )


def published_symbols(case: str) -> Tensor:
    """As the reference assigns them: for `make` from the dense matrix, for `pack` as they were chosen."""
    packed = published(case)
    if described()[case]["made_by"] == "pack":
        codewords, offsets, _, entries = QMoE().runtime(packed)
        return reference.decode(codewords, offsets, entries, packed.shape[1])
    dense = QMoE().decode(packed)
    low, high = dense.amin(1, keepdim=True), dense.amax(1, keepdim=True)
    return torch.where(dense == high, 2, torch.where(dense == low, 1, 0)).to(torch.uint8)


def test_the_dictionary_is_the_published_one():
    built = dictionary()
    assert built.sha256 == PUBLISHED_SHA256
    with safe_open(GOLDEN / "dictionary.safetensors", "pt") as file:
        assert torch.equal(built.dec, file.get_tensor("dec"))


def test_the_three_forms_of_the_dictionary_agree():
    built = dictionary()
    words = built.dec.view(-1, 2).to(torch.int64) & 0xFFFFFFFF
    shifts = 4 + 2 * torch.arange(14)
    symbols = torch.cat([(words[:, :1] >> shifts) & 3, (words[:, 1:] >> shifts) & 3], 1)
    assert torch.equal((built.entries[:, None] >> (2 * torch.arange(28))) & 3, symbols)
    counts = built.entries >> 56
    assert torch.equal(counts, 2 * (words[:, 0] & 15))
    assert (counts.min(), counts.max()) == (2, 28)
    # walking the trie along each codeword ends at the codeword
    pairs = symbols[:, 0::2] + 3 * symbols[:, 1::2]
    at = torch.full((1 << 16,), ROOT)
    for j in range(14):
        at = torch.where(j < counts // 2, built.trie[at, pairs[:, j]].to(torch.int64), at)
    assert torch.equal(at, torch.arange(1 << 16))


@pytest.mark.parametrize("p0", [1 / 3, 0.95, 1 - 1e-9])
def test_every_dictionary_can_encode_every_pair_and_is_prefix_closed(p0: float):
    built = dictionary(p0)
    assert (built.trie[ROOT] >= 0).all()
    children = built.trie[built.trie >= 0]
    assert torch.equal(children.sort().values, torch.arange(1 << 16, dtype=torch.int32))


@all_cases
def test_published_bytes_decode_bit_for_bit(case: str):
    packed, golden, about = published(case), read("cases", case), described()[case]
    QMoE().check(packed)
    dense = QMoE().decode(packed)
    as_stored = dense.to(torch.bfloat16)
    assert torch.equal(as_stored.float(), dense)
    if "dense" in golden:
        assert torch.equal(as_stored, golden["dense"])
    if "symbols" in golden:
        symbols = ((golden["symbols"][..., None] >> torch.arange(0, 8, 2)) & 3).flatten(1)
        levels = torch.nn.functional.pad(golden["ter_minmax"].view(-1, 2).float(), (1, 0))
        assert torch.equal(dense, levels.gather(1, symbols.to(torch.int64)))
    assert hashlib.sha256(as_stored.view(torch.int16).numpy().tobytes()).hexdigest() == about["dense_sha256"]


@implementations
@all_cases
def test_the_encoder_gives_the_published_codewords(case: str, implementation):
    packed, symbols = published(case), published_symbols(case)
    table = dictionary() if implementation is kernels else dictionary().trie
    codewords, counts = implementation.encode(symbols, table)
    assert torch.equal(codewords, packed.tensors["codewords"])
    assert torch.equal(counts.to(torch.int64), packed.tensors["row_lengths"].to(torch.int64))


@implementations
@all_cases
def test_the_decoder_gives_the_published_symbols(case: str, implementation):
    packed = published(case)
    codewords, offsets, _, entries = QMoE().runtime(packed)
    assert torch.equal(implementation.decode(codewords, offsets, entries, packed.shape[1]), published_symbols(case))


@all_cases
def test_our_encoding_of_the_same_matrix_is_smaller(case: str):
    """Also where the published one is wasteful: rows without negatives, without positives, without zeros."""
    packed, about = published(case), described()[case]
    dense = QMoE().decode(packed)
    if about["made_by"] == "pack":
        levels = packed.tensors["levels"]
        solution = Solution(Ternary(), published_symbols(case), {"levels": levels[:, None]})
    else:
        params = Ternary().fit(dense)
        codes = Ternary().nearest(dense, params)
        solution = Solution(Ternary(), codes, {"levels": params["levels"][:, None]})
    ours = QMoE().encode(solution)
    assert torch.equal(QMoE().decode(ours), dense)
    # a row of one column is the exception: its one codeword is saved by nothing, and a pivot costs 64 bits
    if packed.shape[1] > 1:
        assert ours.bits_per_weight < about["bits_per_weight"]


@pytest.mark.parametrize(
    ("case", "grid"),
    [
        ("ternary", Ternary("float32")),
        ("ternary_few_tokens", Ternary("float32")),
        ("two_bit", Affine(2, dtype="float32")),
    ],
)
def test_the_solver_gives_the_published_weights(case: str, grid: Grid):
    golden = read("solver_cases", case)
    names = [f"{case} {e}" for e in range(golden["w"].shape[0])]
    solved = gptq(golden["w"], golden["h"], grid, names=names)
    for e, solution in enumerate(solved):
        assert solution.loss == pytest.approx(float(golden["relative_error"][e]), rel=1e-3)
        # other summation orders may flip a weight that lies on a threshold; here none does
        assert (solution.dense() == golden["q"][e]).float().mean() > 0.999
