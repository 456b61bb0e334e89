"""A run judged by what the dense model answers: asked before anything goes, and held against the result.

In: what was opened, the run. Out: `OwnAnswers`, or None for a model that is not asked.
"""

from dataclasses import asdict, replace
from typing import Any

from secateur.data.answers import Speaker
from secateur.pruning.open import Opened, tokenizer_of
from secateur.pruning.run import Run
from secateur.ranks import from_first
from secateur.stream.offload import Placement
from secateur.stream.own_answers import AnswerSheet, OwnAnswers, ask, judge, judging_prompts

# A run that names the tokens that judge it is asked a prompt for so many of a domain's: as it is by default.
TOKENS_PER_PROMPT = 21


def asked(opened: Opened, run: Run, placement: Placement) -> AnswerSheet | None:
    """Return what the dense model answers to prompts that no run learns by.

    None without a chat template, if nothing is to be judged, or if not all weights are in memory: a
    token of an answer then moves all of them. Raises NumericsError if a logit is not finite.
    """
    has_template = tokenizer_of(replace(opened, trim=None)).chat_template is not None
    if not (run.resolved.recipe.output.evaluate and has_template):
        return None
    if run.weights_on_disk or placement.one_at_a_time:
        return None
    evaluate, prompts = run.resolved.recipe.output.evaluate, judging_prompts()
    if evaluate is not True:
        prompts = prompts[: max(1, evaluate // TOKENS_PER_PROMPT)]

    def written() -> dict[str, Any]:
        speaker = _speaker(replace(opened, trim=None), run)
        return ask(speaker, prompts, run.services.progress, once=from_first).plain()

    with run.services.log.time("evaluate"):
        return AnswerSheet.of(prompts, run.services.store.value("answers of the dense model", written))


def judged(opened: Opened, run: Run, sheet: AnswerSheet | None) -> OwnAnswers | None:
    """Return what the run cost on the sheet's answers; None without a sheet."""
    if sheet is None:
        return None
    speaker = _speaker(opened, run)
    dense_tokenizer = speaker.tokenizer if opened.trim is None else opened.trim.dense_tokenizer

    def stood() -> dict[str, Any]:
        return asdict(judge(speaker, sheet, dense_tokenizer, run.services.progress, once=from_first))

    with run.services.log.time("evaluate"):
        return OwnAnswers.of(run.services.store.value("answers of the pruned model", stood))


def _speaker(opened: Opened, run: Run) -> Speaker:
    return Speaker(
        model=run.model,
        arch=run.arch,
        tokenizer=tokenizer_of(opened),
        seed=str(run.resolved.recipe.seed),
        length=run.text.sequence_length,
    )
