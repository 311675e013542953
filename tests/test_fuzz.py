"""Some seconds of `fuzz.py` with the extension as it is installed; `make fuzz` is the same under sanitizers, longer."""

import random

import fuzz
import pytest


def test_every_mutation_is_a_typed_error_or_a_correct_result() -> None:
    outcomes = fuzz.run(150, 0, folders=False)
    assert outcomes.total() == 150
    # both happen, or the mutations are no good
    for outcome in ("right", "error"):
        assert sum(n for said, n in outcomes.items() if said.endswith(outcome)) > 15


@pytest.mark.filterwarnings("ignore")
def test_every_mutation_of_a_folder_is_a_typed_error_or_a_correct_result(made, tmp_path) -> None:
    folders = fuzz.Folders(tmp_path, [("llama", "spqr")])
    outcomes = {folders.mutate(random.Random(number)).rpartition(" ")[2] for number in range(15)}
    assert outcomes == {"right", "error", "found"} or outcomes == {"error", "found"}
