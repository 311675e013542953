"""Tuning when asked: whatever is tried gives right results, the fastest is kept, and later launches use it."""

import json
from pathlib import Path

import pytest
import torch
from triton_kernels import check, poisoned, stacked
from typer.testing import CliRunner

from halfbit import triton_support
from halfbit.bench import tuning
from halfbit.cli import app
from halfbit.formats.grouped import Grouped
from halfbit.formats.qmoe import QMoE
from halfbit.formats.runlength import RunLength
from halfbit.formats.spqr import SpQR
from halfbit.types import Codec

if triton_support.why_not():
    pytest.skip(triton_support.why_not(), allow_module_level=True)

__all__ = ["poisoned"]


@pytest.mark.parametrize("codec", [QMoE(), RunLength(lane=256), SpQR(bits=3), Grouped(2, group=16)], ids=repr)
def test_every_candidate_gives_right_results(codec: Codec):
    several = codec.name in ("spqr", "grouped")
    # what is decoded one symbol after another takes long to interpret
    rows, columns = (21, 40) if several else (3, 25)
    packed, (w,) = stacked(codec, rows, columns)
    operands = codec.runtime(packed)
    for tokens in (1, 6) if several else (1,):
        x, starts = torch.randn(tokens, columns, device=w.device), torch.tensor([0, tokens])
        with triton_support.trying({}) as asked:
            codec.product(x, starts, operands, rows)
        ((entry, kernel),) = asked.items()
        for candidate in tuning.CANDIDATES[kernel]:
            with triton_support.trying({entry: candidate}):
                check(codec.product(x, starts, operands, rows), x, w)


def test_the_fastest_is_kept_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    triton_support._known.cache_clear()
    third = [candidates[2] for candidates in tuning.CANDIDATES.values()]

    def seconds(*_: object) -> float:
        trial = triton_support._trial.get()
        assert trial is not None
        return 1e-6 if next(iter(trial.chosen.values())) in third else 2e-6

    monkeypatch.setattr(tuning, "_seconds", seconds)
    given = ["bench", "--tune", "--shapes", "8x32", "--formats", "qmoe,spqr-3bit", "--experts", "2", "--json"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    kernels = {next(name for name in tuning.CANDIDATES if row["entry"].startswith(name)) for row in told["tuned"]}
    assert kernels == {"qmoe", "grid few", "grid experts"}
    kept = json.loads(triton_support.user_file().read_text())["interpreter"]
    assert told["kept"] == str(triton_support.user_file())
    for row in told["tuned"]:
        kernel = next(name for name in tuning.CANDIDATES if row["entry"].startswith(name))
        assert kept[row["entry"]] == row["best"] == tuning.CANDIDATES[kernel][2]
    entry = next(row["entry"] for row in told["tuned"] if row["entry"].startswith("qmoe"))
    kernel, *key = entry.split(" ")
    assert triton_support.launch(kernel, key, {"ROWS": 4}, torch.device("cpu"))["ROWS"] == 8
    triton_support._known.cache_clear()


def test_what_cannot_be_tuned_is_said():
    done = CliRunner().invoke(app, ["bench", "--tune", "--shapes", "8x256", "--formats", "quads"])
    assert done.exit_code == 2
    assert "quads has no Triton kernels" in done.output
