"""Whole outputs, line by line, beside texts in `tests/shown/` that somebody has read.

`WRITE_SHOWN=1` writes these anew, and the test then fails, so that the difference is read.
"""

import os
import re
from collections.abc import Callable, Mapping
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SecateurError

SHOWN = Path(__file__).with_name("shown")


def assert_shown(name: str, text: str) -> None:
    """Compare a text with the one that was read, which is in the file of that name."""
    file, lines = SHOWN / f"{name}.txt", [line.rstrip() for line in text.rstrip("\n").splitlines()]
    if os.environ.get("WRITE_SHOWN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        pytest.fail(f"{file} is written anew: read it")
    before = file.read_text(encoding="utf-8").splitlines()
    differs = list(unified_diff(before, lines, "read", "shown now", n=2, lineterm=""))
    if differs:
        said = f"{file}; if this is meant, WRITE_SHOWN=1 writes it anew:"
        pytest.fail("\n".join([said, *differs[:60]]), pytrace=False)


def refusal(function: Callable[..., object], *given: Any, **options: Any) -> str:
    """Return the one sentence, and its error's class, by which a call is refused."""
    with pytest.raises(SecateurError) as refused:
        function(*given, **options)
    assert "\n" not in str(refused.value)
    return f"{type(refused.value).__name__}: {without_reason(str(refused.value))}"


def without_reason(sentence: str) -> str:
    """Leave out what another library, of any version, gives as its reason."""
    return re.sub(r"(safetensors|unknown kind|from it|use it|loaded) \(.*\)", r"\1 (...)", sentence)


def assert_sentences(name: str, sentences: Mapping[str, str], *places: Path) -> None:
    """Compare sentences, by what each is about, with those that were read; of the places PLACE is said."""
    text = "\n".join(f"{about}\n    {sentence}" for about, sentence in sentences.items())
    for place in places:
        text = text.replace(str(place), "PLACE")
    assert_shown(name, text)
