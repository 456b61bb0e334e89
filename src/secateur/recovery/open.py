"""A recovery until it trains: both models and the recipe checked, then weights mapped, text drawn.

In: references of both models, changes to the recipe. Out: a `Job`, before a weight is read; of it a
`Work` to train, for which the dense model was asked.
"""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.blocks import block_length
from secateur.errors import RecipeError
from secateur.log import versions
from secateur.model.bind import bind
from secateur.model.checkpoint import (
    Checkpoint,
    check_weights,
    load_model,
    load_tokenizer,
    meta_model,
    open_checkpoint,
    weight_digests,
)
from secateur.model.identity import check_dense
from secateur.ranks import launched_size
from secateur.recipe import RECIPE_FILE, Recipe, RecoverySettings, load_recipe, recipe_over
from secateur.recovery.judge import Judge
from secateur.recovery.text import recovery_text, shared_out
from secateur.recovery.train import Work
from secateur.recovery.weights import check_training, scratch_bytes, wants_shards
from secateur.store import Services
from secateur.vocabulary.kept import Trim, keep_tokens, trim_between


@dataclass(frozen=True, slots=True)
class Job:
    """A recovery before any weight is read: both checkpoints, the shape of the one that is trained,
    the whole recipe, its part on recovery.

    `trim`: what took tokens from the teacher's; None if both have the same. `notes`: sentences on
    the teacher and on steps.
    """

    pruned: Checkpoint
    teacher: Checkpoint
    pruned_shape: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    settings: RecoverySettings
    trim: Trim | None = None
    notes: tuple[str, ...] = ()

    def load_teacher(self, *, whole: bool = False) -> PreTrainedModel:
        """Return the teacher, its weights mapped from disk, with the tokens of the pruned model
        alone.

        Its predictions are the whole teacher's over these tokens, renormalised. `whole`: with all
        tokens.
        """
        teacher = load_model(self.teacher, mapped=True)
        if self.trim is not None and not whole:
            keep_tokens(teacher, self.trim.kept)
        return teacher


def open_job(
    pruned: str | Path, teacher: str | Path, changes: Recipe, *, other_dense: bool = False
) -> Job:
    """Open both models and the recipe, the pruned model's with the keys of `changes` that were
    given; read no weights.

    Raises CheckpointError if a model cannot be opened, if the teacher is not the model that was
    pruned and `other_dense` is False, or if it reads other tokens; RecipeError for a bad recipe.
    """
    wants_shards()  # a launcher's mistake is told before all else
    student, dense = open_checkpoint(pruned), open_checkpoint(teacher)
    notes = check_dense(student, dense, "--teacher", other=other_dense)
    student_shape = meta_model(student.config)
    dense_shape = meta_model(copy.deepcopy(dense.config))  # whose tokens may go
    trim = trim_between(student, dense, "--teacher")
    check_weights(student, student_shape)
    check_weights(dense, dense_shape)
    bind(dense_shape)  # a teacher of an unknown family is told before its weights are read
    if trim is not None:
        keep_tokens(dense_shape, trim.kept)  # or it is told that it cannot be trimmed

    # How to train, and on which text.
    path = student.directory / RECIPE_FILE
    if not path.is_file() and "calibration" not in changes.model_fields_set:
        raise RecipeError(
            f"{pruned}: has no {RECIPE_FILE}, so its domains are not known; say what to train on "
            "with --domain NAME[=FILE] or --recipe FILE."
        )
    if given := sorted({"remove", "choose", "repair"} & changes.model_fields_set):
        raise RecipeError(
            f"{given[0]}: says how to prune, and {pruned} is pruned already; leave it out of "
            "recover."
        )
    recipe = recipe_over(load_recipe(path) if path.is_file() else {}, changes)
    length = block_length(recipe.calibration.sequence_length, student_shape.config)
    asked, num_ranks = recipe.recover or RecoverySettings(), launched_size()
    check_training(asked, "recover")
    settings = shared_out(asked, length, num_ranks)
    if num_ranks > 1 and settings.batch_tokens != asked.batch_tokens:
        notes += (
            f"recover.batch_tokens: {settings.batch_tokens:,} in place of {asked.batch_tokens:,}, "
            f"so that each of {num_ranks} processes has whole blocks of {length} tokens.",
        )
    if trim is not None:
        notes += (
            f"recover: the teacher predicts {trim.kept.num_kept:,} of its "
            f"{trim.kept.num_dense:,} tokens, those that the model has.",
        )
    return Job(
        pruned=student,
        teacher=dense,
        pruned_shape=student_shape,
        tokenizer=load_tokenizer(student) if trim is None else trim.tokenizer,
        recipe=recipe.filled(calibration={"sequence_length": length}).model_copy(
            update={"recover": settings}
        ),
        settings=settings,
        trim=trim,
        notes=notes,
    )


def inputs_of(job: Job) -> dict[str, Any]:
    """Return what the trained weights depend on before one is read; the tokens that stay by their
    digest.
    """
    kept = job.trim and job.trim.kept.dense_ids
    return {
        "recipe": job.recipe.model_dump(mode="json"),
        "model file": weight_digests(job.pruned),
        "teacher file": weight_digests(job.teacher),
        "list of tokens": hashlib.sha256(str(kept).encode()).hexdigest(),
        "version of": versions(),
    }


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
        pruned=load_model(job.pruned, mapped=True),
        teacher=dense,
        text=text,
        judge=judge,
        settings=settings,
        seed=job.recipe.seed,
        directory=directory,
        services=services,
    )
