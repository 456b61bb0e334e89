"""The two models of a recovery and its recipe, checked before a weight is read.

In: references of both models, changes to the recipe. Out: a `Job`.
"""

import copy
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.blocks import block_length
from secateur.errors import CheckpointError, RecipeError
from secateur.log import versions
from secateur.model.bind import Arch, bind
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
from secateur.model.kept_tokens import Trim, keep_tokens, trim_between
from secateur.model.kept_units import KEEP_FILE, read_keeps
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
from secateur.recovery.text import shared_out
from secateur.recovery.weights import check_training, wants_shards


@dataclass(frozen=True, slots=True)
class Candidates:
    """Both checkpoints and their shapes; the teacher's without the tokens that the pruned model lacks.

    `trim`: what took them; None if both have the same. `notes`: on which model the teacher is.
    """

    pruned: Checkpoint
    teacher: Checkpoint
    pruned_shape: PreTrainedModel
    teacher_arch: Arch
    tokenizer: PreTrainedTokenizerBase
    trim: Trim | None = None
    notes: tuple[str, ...] = ()

    def load_pruned(self) -> PreTrainedModel:
        """Return the pruned model, its weights mapped from disk."""
        return load_model(self.pruned, mapped=self.pruned.gguf_file is None)

    def load_teacher(self, *, whole: bool = False) -> PreTrainedModel:
        """Return the teacher, its weights mapped from disk, with the tokens of the pruned model alone.

        Its predictions are the whole teacher's over these tokens, renormalised. `whole`: with all tokens.
        """
        teacher = load_model(self.teacher, mapped=self.teacher.gguf_file is None)
        if self.trim is not None and not whole:
            keep_tokens(teacher, self.trim.kept)
        return teacher


def open_pair(pruned: str | Path, teacher: str | Path, *, other_dense: bool) -> Candidates:
    """Open both models and check that one can teach the other.

    Raises CheckpointError if either cannot be opened, if the teacher is not the model that was
    pruned and `other_dense` is False, or if vocabulary, tokenizer, family, hidden size or layers
    differ.
    """
    student, dense = open_checkpoint(pruned), open_checkpoint(teacher)
    notes = check_dense(student, dense, "--teacher", other=other_dense)
    shapes = meta_model(student.config), meta_model(copy.deepcopy(dense.config))  # whose tokens may go
    archs = bind(shapes[0]), bind(shapes[1])
    trim = trim_between(student, dense, "--teacher")
    if archs[0].family != archs[1].family:
        raise CheckpointError(
            f"--teacher {teacher}: is a {archs[1].family} model and {pruned} a {archs[0].family} one; give the model "
            "that was pruned."
        )
    hidden, other = (shape.config.get_text_config().hidden_size for shape in shapes)
    if hidden != other:
        raise CheckpointError(
            f"--teacher {teacher}: its hidden size is {other} and that of {pruned} {hidden}; give the model that was "
            "pruned."
        )
    _check_layers(student, archs[0].num_layers, archs[1].num_layers, str(teacher))
    for checkpoint, shape in zip((student, dense), shapes, strict=True):
        check_weights(checkpoint, shape)
    if trim is not None:
        keep_tokens(shapes[1], trim.kept)
    tokenizer = load_tokenizer(student) if trim is None else trim.tokenizer
    return Candidates(student, dense, shapes[0], archs[1], tokenizer, trim, notes)


def _check_layers(student: Checkpoint, num_layers: int, num_dense: int, teacher: str) -> None:
    """Check that the pruned model has the layers that keep.json names, by default all."""
    path, layers = student.directory / KEEP_FILE, tuple(range(num_dense))
    if path.is_file():
        layers, _ = read_keeps(student.directory, num_dense)
    if len(layers) != num_layers or max(layers) >= num_dense:
        says = f"no {KEEP_FILE} says that any went"
        if layers != tuple(range(num_dense)):
            says = f"{path} names {len(layers)} that stayed"
        raise CheckpointError(
            f"--teacher {teacher}: has {num_dense} layers and {student.reference} {num_layers}, and {says}; give the "
            "model that was pruned."
        )


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
