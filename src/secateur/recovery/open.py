"""The start of a recovery: both models opened, the recipe completed, the text drawn.

In: references of both models, changes to the recipe. Out: a `Work` to train.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from secateur.data.blocks import block_length
from secateur.errors import RecipeError
from secateur.log import versions
from secateur.model.checkpoint import weight_digests
from secateur.ranks import launched_size
from secateur.recipe import (
    RECIPE_FILE,
    Keys,
    Recipe,
    RecoverySettings,
    load_recipe,
    merged,
    merged_over,
    over_preset,
    parse_recipe,
)
from secateur.recovery.cost import scratch_bytes
from secateur.recovery.judge import Judge
from secateur.recovery.pair import Candidates, open_pair, recovery_text
from secateur.recovery.text import shared_out
from secateur.recovery.train import Work
from secateur.recovery.weights import check_training, wants_shards
from secateur.store import Services


class Job(NamedTuple):
    """A recovery before any weight is read: both checkpoints, the whole recipe, its part on recovery."""

    candidates: Candidates
    recipe: Recipe
    settings: RecoverySettings


def changes_of(recipe: Keys | Path | str | None, tokens: int | None) -> Keys:
    """Return the changes to the pruned model's recipe: a mapping or a file, and `tokens`."""
    changes = load_recipe(Path(recipe)) if isinstance(recipe, Path | str) else recipe or {}
    if "preset" in changes:
        changes = over_preset(changes, "recipe")
    return changes if tokens is None else merged(changes, {"recover": {"num_tokens": tokens}})


def open_job(pruned: str | Path, teacher: str | Path, changes: Keys | None, *, other_dense: bool = False) -> Job:
    """Return both checkpoints, the whole recipe and its recovery settings; read no weights.

    Raises CheckpointError for models that do not fit each other, RecipeError for a bad recipe.
    """
    wants_shards()  # a launcher's mistake is told before all else
    candidates = open_pair(pruned, teacher, other_dense=other_dense)
    changes = changes or {}
    path = candidates.pruned.directory / RECIPE_FILE
    if not path.is_file() and "calibration" not in changes:
        raise RecipeError(
            f"{pruned}: has no {RECIPE_FILE}, so its domains are not known; say what to train on with --domain "
            "NAME[=FILE] or --recipe FILE."
        )
    base = load_recipe(path) if path.is_file() else {}
    recipe = parse_recipe(merged_over(base, changes), "recover")
    length = block_length(recipe.calibration.sequence_length, candidates.pruned_shape.config.get_text_config())
    calibration = recipe.calibration.model_copy(update={"sequence_length": length})
    asked, num_ranks = recipe.recover or RecoverySettings(), launched_size()
    check_training(asked, "recover")
    settings = shared_out(asked, length, num_ranks)
    if num_ranks > 1 and settings.batch_tokens != asked.batch_tokens:
        note = (
            f"recover.batch_tokens: {settings.batch_tokens:,} in place of {asked.batch_tokens:,}, so that each of "
            f"{num_ranks} processes has whole blocks of {length} tokens."
        )
        candidates = replace(candidates, notes=(*candidates.notes, note))
    return Job(candidates, recipe.model_copy(update={"calibration": calibration, "recover": settings}), settings)


def inputs_of(job: Job) -> dict[str, Any]:
    """Return what the trained weights depend on before one is read; the tokens that stay by their digest."""
    candidates = job.candidates
    kept = candidates.trim and candidates.trim.kept.dense_ids
    return {
        "recipe": job.recipe.model_dump(mode="json"),
        "model file": weight_digests(candidates.pruned),
        "teacher file": weight_digests(candidates.teacher),
        "list of tokens": hashlib.sha256(str(kept).encode()).hexdigest(),
        "version of": versions(),
    }


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
