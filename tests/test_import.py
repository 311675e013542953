"""`halfbit import` and `import_checkpoint`: what they print, and what they refuse."""

import json
from pathlib import Path

import pytest
from published import QMOE, SPQR, run
from typer.testing import CliRunner

from halfbit import cli
from halfbit.errors import HalfbitError, Unsupported


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_imports_and_reports(tmp_path) -> None:
    code, out, err = call("import", SPQR, tmp_path / "spqr", "--outliers", "replace", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["complete"]
    assert report["about"]["outliers"] == "replace"
    assert report["packed_weights"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
    assert "of 790 outliers" in err
    assert "written:" in err
    code, out, err = call("import", QMOE, tmp_path / "qmoe")
    assert code == 0, err
    assert "compressed weights:" in out
    for name in ("spqr", "qmoe"):
        assert call("verify", tmp_path / name)[0] == 0
        assert call("inspect", tmp_path / name)[0] == 0


def test_bad_input_is_one_sentence(tmp_path) -> None:
    tiny = Path(__file__).parent.parent / "examples" / "tiny-moe"
    out = tmp_path / "out"
    arguments = {
        ("import", tiny, out): "not a checkpoint of qmoe or spqr_quant",
        ("import", tmp_path / "nothing", out): "no such folder",
        ("import", SPQR, out, "--outliers", "both"): "expected add or replace",
        ("import", QMOE, out, "--outliers", "add"): "has no outliers",
        ("import", SPQR, tiny): "not empty",
        ("compress", SPQR, out): "`halfbit import` takes it over",
        ("compress", QMOE, out): "`halfbit import` takes it over",
    }
    for given, says in arguments.items():
        code, _, err = call(*given)
        assert code == 2, (given, err)
        assert says in " ".join(err.split()), (given, err)
        assert not out.exists()


def test_the_help_tells_the_two_meanings_apart() -> None:
    code, out, _ = call("import", "--help")
    told = " ".join(out.split())
    assert code == 0
    assert "add: an outlier is added to the weight under it, as in the published kernel" in told
    assert "replace: it takes the weight's place" in told


def test_the_library_refuses_what_the_command_refuses(tmp_path) -> None:
    with pytest.raises(Unsupported, match="expected add or replace"):
        run(SPQR, tmp_path / "out", outliers="")
    with pytest.raises(HalfbitError):
        run(tmp_path, tmp_path / "out")
