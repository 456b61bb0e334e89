"""Text as a run draws it, in one call."""

from typing import Any

from secateur.data.blocks import LearningText
from secateur.data.pool import Amounts, CalibrationText, Split, TextPool
from secateur.log import Progress, silent


def split_text(
    calibration: CalibrationText,
    num_tokens: int,
    tokenizer: Any,
    seed: int = 0,
    progress: Progress = silent,
    **amounts: int,
) -> Split:
    """Return the parts of a text."""
    pool = TextPool(calibration, tokenizer, seed, progress)
    return pool.split(calibration, Amounts(num_tokens=num_tokens, **amounts))


def learning_text(*given: Any, **amounts: Any) -> LearningText:
    """Return what may be learnt by, of the arguments of `split_text`."""
    return split_text(*given, **amounts).learning.text
