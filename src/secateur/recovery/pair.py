"""The two models of a recovery and its text, checked before anything runs.

In: references of both models; a recipe. Out: `Candidates`; blocks to train on and held-out blocks.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.answers import with_answers
from secateur.data.blocks import Blocks
from secateur.errors import CheckpointError, RecipeError
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
from secateur.recovery.cost import blocks_per_step
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


class Block(NamedTuple):
    """A block of a domain. `counted_T`: which tokens count, of the dense model's answers; None: all."""

    domain: str
    ids_T: Int64[Tensor, " T"]
    counted_T: Bool[Tensor, " T"] | None = None


def blocks_of(text: Mapping[str, Blocks]) -> list[Block]:
    """Return all domains' blocks."""
    return [Block(name, block.ids_T, block.counted_T) for name, part in text.items() for block in part]


@dataclass(frozen=True, slots=True)
class RecoveryText:
    """`blocks`: to train on, in order. `held_out`: what guards, by domain. `content_hash`: of both.

    `judged`: what judged the pruning, without answers. `notes`: sentences on what was left out.
    """

    blocks: tuple[Block, ...]
    held_out: dict[str, Blocks]
    sequence_length: int
    content_hash: str
    notes: tuple[str, ...] = ()
    judged: dict[str, Blocks] = field(default_factory=dict[str, Blocks])

    @property
    def num_tokens(self) -> int:
        """Return the tokens to train on."""
        return sum(len(block.ids_T) for block in self.blocks)

    @property
    def is_masked(self) -> bool:
        """Whether some tokens count for nothing."""
        return any(block.counted_T is not None for block in self.blocks)

    @property
    def num_held_out_tokens(self) -> int:
        """Return the tokens that guard."""
        return sum(blocks.num_tokens for blocks in self.held_out.values())


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


def shared_out(
    settings: RecoverySettings, length: int, num_ranks: int, num_blocks: int | None = None
) -> RecoverySettings:
    """Return settings of steps that ranks share out, each at least a block of `length` tokens.

    `num_blocks`: of the text. A step has no more, but for a block of each rank.
    """
    asked = blocks_per_step(settings.batch_tokens, length)
    per_rank = -(-min(asked, num_blocks or asked) // num_ranks)
    at_once = max(count for count in range(1, settings.blocks_per_device + 1) if per_rank % count == 0)
    return settings.model_copy(update={"batch_tokens": per_rank * num_ranks * length, "blocks_per_device": at_once})


def whole_steps(blocks: Sequence[Block], settings: RecoverySettings, length: int, key: str) -> Sequence[Block]:
    """Return as many blocks as whole steps take. Raises RecipeError, naming the recipe's `key`, for none."""
    size = blocks_per_step(settings.batch_tokens, length)
    num_blocks = min(len(blocks), settings.num_tokens // length) // size * size
    if num_blocks == 0:
        raise RecipeError(
            f"{key}.num_tokens: {settings.num_tokens:,} leave less than one step of {size} blocks of {length} "
            f"tokens; raise it, or lower {key}.batch_tokens."
        )
    return blocks[:num_blocks]
