"""Text as a run draws it, in one call."""

from typing import Any

from torch import Tensor

from secateur.data.blocks import LearningText
from secateur.data.pool import Amounts, CalibrationText, Split, TextPool
from secateur.evaluation.parts import measured_by
from secateur.log import Progress, silent
from secateur.model.bind import bind
from secateur.report.records import Quality
from secateur.store import Store
from secateur.stream.judge import Judge, ToJudge


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


def learning_text(
    calibration: CalibrationText,
    num_tokens: int,
    tokenizer: Any,
    seed: int = 0,
    progress: Progress = silent,
    **amounts: int,
) -> LearningText:
    """Return what may be learnt by."""
    return split_text(calibration, num_tokens, tokenizer, seed, progress, **amounts).learning.text


def quality_of(model: Any, ids_NT: Tensor, tokenizer: Any) -> Quality:
    """Return what `evaluate` says of a model on blocks that are a document each."""
    judge = Judge({"mine": ids_NT}, tokenizer, model.config, Store())
    scores = judge.pruned(ToJudge("pruned", lambda: (model, bind(model)), 32))
    return measured_by(scores, judge.text, tokenizer, {}).domains["mine"]
