"""The work of a recovery: its text drawn, the dense model asked, both models' weights mapped; and
what judges it.

In: a `Job`. Out: a `Work` to train.
"""

import random
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import secateur.stream.judge as stream_judge
from secateur.data.answers import Speaker, with_answers
from secateur.facts import Judgement
from secateur.formats.run_text import run_text_again
from secateur.log import Progress
from secateur.model.bind import bind
from secateur.recipe import Recipe, RecoverySettings
from secateur.recovery.judge import Judge
from secateur.recovery.open import Job
from secateur.recovery.text import RecoveryText, answers_of, whole_steps
from secateur.recovery.train import Work
from secateur.recovery.weights import scratch_bytes
from secateur.store import Services, Store


def prepare(job: Job, directory: Path, services: Services) -> Work:
    """Open both models, draw the text and evaluate the dense model. `directory`: for what the
    training leaves.

    Weights are mapped from disk, so that only those that training changes fill memory.

    Raises CalibrationError for too little text, CheckpointError for too little disk.
    """
    settings, log, progress = job.settings, services.log, services.progress
    dense = job.load_teacher()
    text = recovery_text(job.pruned.directory, job.recipe, settings, job.tokenizer, dense, progress)
    services.store.check_input("text", text.content_hash)
    services.check_space(scratch_bytes(job.pruned_shape, settings))
    for note in (*job.notes, *text.notes):
        log.note(note)
    with log.time("judge"):
        judge = Judge(dense, bind(dense), text.held_out, progress)
    return Work(
        pruned=job.load_pruned(),
        teacher=dense,
        text=text,
        judge=judge,
        settings=settings,
        seed=job.recipe.seed,
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
    recipe = recipe.filled(
        calibration={"num_tokens": recipe.calibration.num_tokens or settings.num_tokens}
    )
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
    speaker = Speaker(teacher, bind(teacher), tokenizer, str(recipe.seed), length)
    answers = answers_of(recipe, speaker, settings.num_tokens, Store(), progress, {})
    # Questions of their own judge answers.
    judged = {name: blocks for name, blocks in split.judged.blocks.items() if not blocks.is_meta}
    text, _ = with_answers(split.learning.text, split.judged, answers)
    blocks = [
        block for of_domain in text.training(settings.num_tokens).values() for block in of_domain
    ]
    random.Random(f"{recipe.seed}:recover").shuffle(blocks)
    return RecoveryText(
        tuple(whole_steps(blocks, settings, length, "recover")),
        {name: part[: settings.held_out_blocks] for name, part in text.held_out.items()},
        length,
        text.content_hash,
        (*text.notes, *split.judged.notes),
        judged,
    )


def judged_first(job: Job, work: Work) -> tuple[stream_judge.Judge | None, dict[str, Judgement]]:
    """Judge the dense and the pruned model by the text that judged the pruning; return what judges,
    None if nothing.
    """
    teacher, length = work.teacher, work.text.sequence_length
    if not job.recipe.output.evaluate or teacher is None:
        return None, {}
    services = work.services
    judge = stream_judge.Judge(
        work.text.judged,
        job.tokenizer,
        work.pruned.config,
        services.store,
        services.progress,
        trim=job.trim,
    )
    dense = teacher if job.trim is None else job.load_teacher(whole=True)
    with services.log.time("judge"):
        first = stream_judge.ToJudge.of(dense, "dense", length)
        judged = {"dense": judge.dense(first, asks=bind(dense).caches)}
        judged["pruned"] = judge.pruned(stream_judge.ToJudge.of(work.pruned, "pruned", length))
    return judge, judged


def judged_last(
    work: Work, judge: stream_judge.Judge, before: Judgement, *, held: bool
) -> Judgement:
    """Judge the model that is written: as it was `before`, unless the training changed it and was
    `held`.
    """
    with work.services.log.time("judge"):
        if not held:
            return before
        return judge.pruned(
            stream_judge.ToJudge.of(work.pruned, "recovered", work.text.sequence_length)
        )
