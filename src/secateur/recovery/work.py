"""The work of a recovery: its text drawn, the dense model asked, both models' weights mapped; and what judges it.

In: a `Job`. Out: a `Work` to train.
"""

import random
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import secateur.stream.judge as stream_judge
from secateur.data.answers import with_answers
from secateur.facts import Judgement
from secateur.formats.run_text import run_text_again
from secateur.log import Progress
from secateur.model.bind import bind
from secateur.recipe import Recipe, RecoverySettings
from secateur.recovery.answers import answers_of
from secateur.recovery.cost import scratch_bytes
from secateur.recovery.judge import Judge
from secateur.recovery.open import Job
from secateur.recovery.text import RecoveryText, blocks_of, whole_steps
from secateur.recovery.train import Work
from secateur.store import Services, Store


def prepare(job: Job, directory: Path, services: Services) -> Work:
    """Open both models, draw the text and evaluate the dense model. `directory`: for what the training leaves.

    Weights are mapped from disk, so that only those that training changes fill memory.

    Raises CalibrationError for too little text, CheckpointError for too little disk.
    """
    candidates, recipe, settings = job
    log, progress = services.log, services.progress
    dense = candidates.load_teacher()
    text = recovery_text(candidates.pruned.directory, recipe, settings, candidates.tokenizer, dense, progress)
    services.store.check_input("text", text.content_hash)
    services.check_space(scratch_bytes(candidates.pruned_shape, settings))
    for note in candidates.notes:
        log.note(note)
    if candidates.trim is not None:
        text_of = f"{len(candidates.trim.kept.dense_ids):,} of its {candidates.trim.kept.num_dense:,} tokens"
        log.note(f"recover: the teacher predicts {text_of}, those that the model has.")
    for sentence in text.notes:
        log.note(sentence)
    with log.time("judge"):
        judge = Judge(dense, candidates.teacher_arch, text.held_out, progress)
    return Work(
        pruned=candidates.load_pruned(),
        teacher=dense,
        text=text,
        judge=judge,
        settings=settings,
        seed=recipe.seed,
        directory=directory,
        services=services,
    )


def recovery_text(
    directory: Path,
    recipe: Recipe,
    settings: RecoverySettings,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    progress: Progress,
) -> RecoveryText:
    """Draw the text: domains by their shares, shuffled by the seed, in whole steps.

    `directory`: of the pruned model. What judged its run is left alone, and what guarded it guards.

    Raises CalibrationError if the domains have too little text, RecipeError if `num_tokens` does
    not fill one step.
    """
    recipe = recipe.filled(calibration={"num_tokens": recipe.calibration.num_tokens or settings.num_tokens})
    split = run_text_again(
        directory,
        recipe,
        tokenizer,
        progress,
        num_training_tokens=settings.num_tokens,
        least_held_out=settings.held_out_blocks,
        key="recover.num_tokens",
    )
    length = split.learning.text.sequence_length
    answers = answers_of(recipe, length, teacher, bind(teacher), tokenizer, settings.num_tokens, {}, Store(), progress)
    # Questions of their own judge answers.
    judged = {name: blocks for name, blocks in split.judged.blocks.items() if not blocks.is_meta}
    text, _ = with_answers(split.learning.text, split.judged, answers)
    blocks = blocks_of(text.training(settings.num_tokens))
    random.Random(f"{recipe.seed}:recover").shuffle(blocks)
    return RecoveryText(
        tuple(whole_steps(blocks, settings, length, "recover")),
        {name: part[: settings.held_out_blocks] for name, part in text.held_out.items()},
        length,
        text.content_hash,
        (*text.notes, *split.judged.notes),
        judged,
    )


class Judgements(NamedTuple):
    """What judges models by the text that judged the pruning, None if nothing is to; what it said of each so far."""

    judge: stream_judge.Judge | None
    by_model: dict[str, Judgement]


def judged_first(job: Job, work: Work) -> Judgements:
    """Judge the dense and the pruned model."""
    candidates, teacher, length = job.candidates, work.teacher, work.text.sequence_length
    if not job.recipe.output.evaluate or teacher is None:
        return Judgements(None, {})
    services, trim = work.services, candidates.trim
    judge = stream_judge.Judge(
        work.text.judged, candidates.tokenizer, work.pruned.config, services.store, services.progress, trim=trim
    )
    dense = teacher if trim is None else candidates.load_teacher(whole=True)
    with services.log.time("judge"):
        by_model = {"dense": judge.dense(stream_judge.ToJudge.of(dense, "dense", length))}
        by_model["pruned"] = judge.pruned(stream_judge.ToJudge.of(work.pruned, "pruned", length))
    return Judgements(judge, by_model)


def judged_last(work: Work, judgements: Judgements, *, held: bool) -> dict[str, Judgement]:
    """Judge the model that is written, too, if models are judged. `held`: whether the training changed it."""
    judge, by_model = judgements
    if judge is None:
        return by_model
    after = by_model["pruned"]
    with work.services.log.time("judge"):
        if held:
            after = judge.pruned(stream_judge.ToJudge.of(work.pruned, "recovered", work.text.sequence_length))
    return {**by_model, "recovered": after}
