"""The two models of a recovery and its text, checked before anything runs.

In: references of both models; a recipe. Out: `Candidates`; blocks to train on and held-out blocks.
"""

import copy
import random
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.answers import with_answers
from secateur.errors import CheckpointError
from secateur.formats.run_text import run_text_again
from secateur.log import Progress, silent
from secateur.model.bind import Arch, bind
from secateur.model.checkpoint import (
    Checkpoint,
    check_weights,
    load_model,
    load_tokenizer,
    meta_model,
    open_checkpoint,
)
from secateur.model.identity import check_dense
from secateur.model.kept_tokens import Trim, keep_tokens, trim_between
from secateur.model.kept_units import KEEP_FILE, read_keeps
from secateur.recipe import Recipe, RecoverySettings
from secateur.recovery.answers import answers_of
from secateur.recovery.text import RecoveryText, blocks_of, whole_steps
from secateur.store import Store


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


def open_pair(pruned: str | Path, teacher: str | Path, *, other_dense: bool = False) -> Candidates:
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


def recovery_text(
    directory: Path,
    recipe: Recipe,
    settings: RecoverySettings,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    progress: Progress = silent,
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
