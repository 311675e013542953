"""`halfbit bench`: what it prints is complete, a wrong product is found and not timed, nonsense is refused by name."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from halfbit import bench, native
from halfbit.bench import llama, matrices, rows
from halfbit.bench.matrices import Statistics
from halfbit.cli import app
from halfbit.errors import Unsupported

TINY = ["bench", "--shapes", "48x64", "--memory", "200kB", "--repetitions", "3", "--threads", "1"]
FORMATS = ["qmoe", "quads", "runlength", "runlength-rotated", "spqr-3bit", "grouped-4-g64"]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*TINY, *arguments])


def test_json_is_complete() -> None:
    found = invoke("--formats", ",".join(FORMATS), "--tokens", "1,3", "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["torch"] == torch.__version__
    assert told["machine"].endswith(native.isa())
    assert [(r["shape"], r["tokens"], r["threads"]) for r in told["results"]] == [("48x64", 1, 1), ("48x64", 3, 1)]
    for result in told["results"]:
        products = {p["what"]: p for p in result["products"]}
        assert list(products) == ["torch bf16", "torch fp32", *FORMATS]
        assert products["torch bf16"]["bytes"] == 2 * 48 * 64
        best = min(products[f"torch {kind}"]["seconds"]["median"] for kind in ("bf16", "fp32"))
        for what, p in products.items():
            assert p["correct"], what
            assert p["bits_per_weight"] == 8 * p["bytes"] / (48 * 64)
            times = p["seconds"]
            assert times["repetitions"] == 5
            assert 0 < times["best"] <= times["p10"] + 1e-12 or times["best"] <= times["median"]
            assert p["speedup_over_torch"] == best / times["median"]
            assert p["bytes_per_second"] == p["bytes"] / times["median"]
            assert p["share_of_read"] == p["bytes_per_second"] / result["read_bytes_per_second"]
            assert set(p["speedup_over"]) == set(products) - {what}
        # without VNNI SpQR sums in float32; everywhere below a thousandth
        assert all(products[name]["error"] < 1e-3 for name in FORMATS)


def test_the_weights_of_one_turn_are_more_than_asked_for() -> None:
    (result,) = bench.run([(48, 64)], ["qmoe"], memory=10**6, repetitions=1)
    assert result.copies * sum(p.nbytes for p in result.products) >= 10**6


def test_several_experts_are_one_call() -> None:
    (result,) = bench.run([(40, 64)], ["qmoe", "runlength", "spqr-4bit"], tokens=[2], experts=3, memory=1 << 17)
    (alone,) = bench.run([(40, 64)], ["qmoe", "runlength", "spqr-4bit"], tokens=[2], memory=1 << 17)
    for three, one in zip(result.products, alone.products, strict=True):
        assert three.correct
        assert three.nbytes > 2.9 * one.nbytes


def test_a_table_and_rows_of_results(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    found = invoke("--formats", "qmoe,spqr-3bit", "--csv", str(file))
    assert found.exit_code == 0, found.output
    shown = " ".join(found.stdout.split())
    assert all(words in shown for words in ("48x64, 1 token, 1 thread", "torch bf16", "spqr-3bit", "error")), shown
    with file.open() as stream:
        told = list(csv.DictReader(stream))
    assert list(told[0]) == rows.COLUMNS
    with (Path(__file__).parent.parent / "bench" / "results.csv").open() as stream:
        assert next(csv.reader(stream)) == rows.COLUMNS
    assert [row["what"] for row in told] == ["torch bf16", "torch fp32", "qmoe", "spqr-3bit"]
    for row in told:
        assert float(row["ratio_to_bf16"]) > 0
        assert "middle" not in row["note"]
        assert "88.5% zeros" in row["note"]


def test_a_wrong_product_is_an_error_and_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.Compressed.calls

    def wrong(self: bench.Compressed, x: torch.Tensor) -> list[Any]:
        return [lambda c=call: c() * 1.001 for call in right(self, x)]

    monkeypatch.setattr(bench.Compressed, "calls", wrong)
    found = invoke("--formats", "qmoe", "--json")
    assert found.exit_code == 1
    products = {p["what"]: p for p in json.loads(found.stdout)["results"][0]["products"]}
    assert not products["qmoe"]["correct"]
    assert products["qmoe"]["seconds"] is None
    assert products["torch fp32"]["seconds"] is not None
    assert "wrong result: qmoe" in found.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    contestant = bench.Compressed("qmoe", matrices.codec_of("qmoe"), 8, 16, 1, Statistics())
    x = torch.randn(2, 16)
    contestant.hold(1)
    y = contestant.calls(x)[0]()
    assert bench.Measured("", 0, 0, *bench.errors(contestant, x, y), []).correct
    y[1, 3] = value
    assert not bench.Measured("", 0, 0, *bench.errors(contestant, x, y), []).correct


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "64"], "ROWSxCOLUMNS"),
        (["--shapes", "0x64"], "ROWSxCOLUMNS"),
        (["--shapes", "-4x64"], "ROWSxCOLUMNS"),
        (["--shapes", "48x64,"], "with commas"),
        (["--shapes", "100000x100000"], "weights"),
        (["--formats", "qmo"], "unknown format 'qmo'"),
        (["--formats", "spqr-9bit"], "unknown format"),
        (["--tokens", "many"], "numbers"),
        (["--threads", "0"], "numbers"),
        (["--against", "cublas"], "expected torch, llama.cpp"),
        (["--dtype", "int8"], "expected float32"),
        (["--memory", "much"], "number and a unit"),
    ],
)
def test_nonsense_is_refused_by_name(arguments: list[str], message: str) -> None:
    found = invoke(*arguments)
    assert found.exit_code == 2
    assert message in found.stderr


def test_threads_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    list(bench.run([(8, 16)], ["qmoe"], threads=[before + 1], memory=1000, repetitions=1))
    assert torch.get_num_threads() == before


def test_without_llama_cpp_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "find_spec", lambda _: None)
    llama.library.cache_clear()
    with pytest.raises(Unsupported, match="pip install llama-cpp-python"):
        list(bench.run([(8, 256)], ["qmoe"], against=["llama.cpp"]))
    llama.library.cache_clear()


def _library() -> bool:
    try:
        return llama.library() is not None
    except Unsupported:
        return False


@pytest.mark.skipif(not _library(), reason="llama-cpp-python is not installed")
def test_llama_cpp_multiplies_by_what_it_says() -> None:
    (result,) = bench.run([(48, 512)], ["qmoe"], tokens=[3], experts=2, against=["llama.cpp"], memory=1 << 20)
    told = {p.what: p for p in result.products}
    for name in llama.TYPES:
        product = told[f"llama.cpp {name}"]
        # x is rounded to 8 bits in blocks
        assert 0 < product.error < 0.02, name
        assert product.nbytes * 8 == product.bits * 2 * 48 * 512
    with pytest.raises(Unsupported, match="multiple of 256"):
        list(bench.run([(48, 100)], ["qmoe"], against=["llama.cpp"]))
