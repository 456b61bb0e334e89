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
def fuzz(tmp_path_factory) -> Any:
    tool = SimpleNamespace(**run_path(str(TOOL)))
    tool.makers = tool.kinds(tmp_path_factory.mktemp("seeds"))
    assert tool.makers.keys() == INPUTS.keys()
    return tool


@pytest.mark.filterwarnings("ignore")  # of transformers and numpy on values that make no sense
@pytest.mark.parametrize("name", INPUTS)
def test_damaged_files_end_in_a_sentence(name, fuzz):
    counts, findings = fuzz.run(fuzz.makers[name](), INPUTS[name], float("inf"), seed=0)
    assert not findings
    assert counts.total() == INPUTS[name] and min(counts["accepted"], counts["refused"]) >= INPUTS[name] // 20
