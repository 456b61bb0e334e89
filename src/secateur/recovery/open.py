"""The start of a recovery: both models opened, the recipe completed, the text drawn.

In: references of both models, changes to the recipe. Out: a `Work` to train.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from secateur.data.blocks import block_length
from secateur.errors import RecipeError
from secateur.files import check_free_space, disk_errors
from secateur.log import Progress, RunLog, Tell, mute, silent
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
from secateur.recovery.text import RecoveryText, shared_out
from secateur.recovery.train import Work
from secateur.recovery.weights import check_training, wants_shards


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


def prepare(
    job: Job,
    out: Path,
    progress: Progress = silent,
    tell: Tell = mute,
) -> Work:
    """Open both models, draw the text, evaluate the dense model, make the hidden directory.

    Weights are mapped from disk, so that only those that training changes fill memory.

    Raises CalibrationError for too little text, CheckpointError for too little disk.
    """
    candidates, recipe, settings = job
    dense = candidates.load_teacher()
    directory = candidates.pruned.directory
    text = recovery_text(directory, recipe, settings, candidates.tokenizer, dense, progress)
    scratch = out.absolute().with_name(f".{out.name}.recover-{_fingerprint(candidates, recipe, text)}")
    with disk_errors(out):
        scratch.mkdir(parents=True, exist_ok=True)
    for line in _left_behind(scratch, out):
        tell(line)
    check_free_space(scratch, scratch_bytes(candidates.pruned_shape, settings))
    log = RunLog()
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
        directory=scratch,
        log=log,
        progress=progress,
        tell=tell,
    )


def _left_behind(scratch: Path, out: Path) -> Iterator[str]:
    """Yield a line per directory of an interrupted run: this run continues it, or nobody will."""
    for place in sorted(path for path in scratch.parent.iterdir() if path.name.startswith(f".{out.name}.recover-")):
        num_bytes = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        if num_bytes:
            found = f"{place}: {num_bytes / 1e6:,.1f} MB that an interrupted run left"
            end = "this one goes on from there" if place == scratch else "of other inputs; delete it if you are done"
            yield f"{found}, {end}."


def _fingerprint(candidates: Candidates, recipe: Recipe, text: RecoveryText) -> str:
    """Return a short hash of what the trained weights depend on: recipe, text, both models, tokens."""
    digests = [weight_digests(checkpoint) for checkpoint in (candidates.pruned, candidates.teacher)]
    kept = candidates.trim and candidates.trim.kept.dense_ids
    inputs = [recipe.model_dump(mode="json"), text.content_hash, *digests, kept]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
