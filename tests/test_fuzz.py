"""A short slice of `make fuzz`, the same on each run: damaged files end in success or in one sentence."""

from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "fuzz.py"
# A few seconds in all on two idle cores.
INPUTS = {"recipes": 60, "configs": 20, "headers": 30, "gguf": 40, "jsonl": 60, "tokenizers": 30, "journals": 40}


@pytest.fixture(scope="module")
def fuzz() -> Any:
    return SimpleNamespace(**run_path(str(TOOL)))


@pytest.fixture(scope="module")
def makers(fuzz, tmp_path_factory) -> Any:
    return fuzz.kinds(tmp_path_factory.mktemp("seeds"))


def test_every_kind_has_its_inputs(makers):
    assert makers.keys() == INPUTS.keys()


@pytest.mark.filterwarnings("ignore")  # of transformers and numpy on values that make no sense
@pytest.mark.parametrize("name", INPUTS)
def test_damaged_files_end_in_a_sentence(name, fuzz, makers):
    counts, findings = fuzz.run(makers[name](), INPUTS[name], float("inf"), seed=0)
    assert not findings
    assert counts.total() == INPUTS[name] and min(counts["accepted"], counts["refused"]) >= INPUTS[name] // 20
