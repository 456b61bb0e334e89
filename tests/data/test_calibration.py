"""The calibration set: counted no further than is asked, and without a warning of a short context."""

import json
import logging
from pathlib import Path

import pytest
from texts import learning_text, split_text
from tiny_tokenizer import tiny_tokenizer

from secateur.recipe import Calibration, Domain

LENGTH = 32
TOKENIZER = tiny_tokenizer()


def letters(path: Path, num_documents: int, num_characters: int) -> Domain:
    """Each document repeats one character, so that a token tells which document it comes from."""
    rows = [json.dumps({"text": chr(ord("0") + number) * num_characters}) for number in range(num_documents)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return Domain(files=(str(path),))


@pytest.mark.parametrize("num_characters", [50, 5000])
def test_counting_stops_at_the_most(tmp_path: Path, num_characters: int) -> None:
    calibration = Calibration(domains={"a": letters(tmp_path / "a.jsonl", 40, num_characters)}, sequence_length=LENGTH)
    (documents,) = split_text(calibration, 20 * LENGTH, TOKENIZER).learning.documents(most=420).values()
    assert sum(map(len, documents)) == 420  # a character is a token


def test_a_short_model_context_gives_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    domain = letters(tmp_path / "a.jsonl", 40, 500)
    learning_text(Calibration(domains={"a": domain}, sequence_length=LENGTH), 20 * LENGTH, tokenizer, 0)
    assert not caplog.records
