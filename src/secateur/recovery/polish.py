"""Polish: the last steps of a prune, end to end, on the text that it measured the model on.

In: the dense model before the cut, for `learn`; the pruned one after it, for `polish`. Out: the
trained model, in place, and its record. The dense model is asked once, block by block: its head's
inputs and its head stand for it, so that it need not be in memory beside the pruned one.
"""

import hashlib
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.data.blocks import LearningText
from secateur.model.bind import Arch
from secateur.model.modules import CausalLM
from secateur.ranks import from_first, size
from secateur.recipe import Recipe, RecoverySettings
from secateur.recovery.attention import attention_in_training
from secateur.recovery.judge import Judge
from secateur.recovery.pair import RecoveryText, blocks_of, shared_out, whole_steps
from secateur.recovery.train import Work, train_guarded
from secateur.report.measured import PolishRecord
from secateur.store import Services
from secateur.stream.losses import head_inputs

STAGE, FOLDER = "polish", "polish"


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the dense model leaves for the training. `states`: what its head reads, by block of text."""

    text: RecoveryText
    judge: Judge
    states: tuple[Tensor, ...]
    settings: RecoverySettings


def polish_settings(recipe: Recipe) -> RecoverySettings | None:
    """Return how a resolved recipe trains; None if it does not."""
    return RecoverySettings(**recipe.polish.model_dump()) if recipe.polish.num_tokens else None


def learn(
    dense: CausalLM,
    arch: Arch,
    text: LearningText,
    recipe: Recipe,
    services: Services,
) -> Lesson | None:
    """Ask the dense model for all that the polish needs; None if the recipe asks for no polish.

    `text`: has the blocks to train on; its held-out ones guard. Raises RecipeError for too few tokens
    to make a step.
    """
    settings, progress = polish_settings(recipe), services.progress
    if settings is None:
        return None
    assert recipe.calibration.num_tokens is not None, "resolve fills it in"
    blocks = blocks_of(text.training(settings.num_tokens))
    random.Random(f"{recipe.seed}:{STAGE}").shuffle(blocks)
    settings = shared_out(settings, text.sequence_length, size(), len(blocks))
    blocks = list(whole_steps(blocks, settings, text.sequence_length, STAGE))
    lesson = RecoveryText(tuple(blocks), text.held_out, text.sequence_length, text.content_hash)
    with services.log.time(STAGE):
        judge = Judge(dense, arch, text.held_out, progress)
        judge.own_head()  # the model's own is trained, or cut
        with attention_in_training(settings.gradient_checkpointing):  # an uncut model has nothing to learn, to the bit
            ids = [block.ids_T for block in blocks]
            states = tuple(head_inputs(dense, arch, ids, progress, "ask the dense model"))
    return Lesson(lesson, judge, states, settings)


def polish(model: CausalLM, lesson: Lesson, seed: int, services: Services, device: torch.device) -> PolishRecord:
    """Train the pruned model, which is in host memory, in place; the weights never get worse.

    `device`: the run's; other accelerators than CUDA's leave the training to the CPU. With a store
    an interrupted training goes on from its last checkpoint.
    """
    settings, text = lesson.settings, lesson.text
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    with _folder(services, settings) as place, services.log.time(STAGE):
        work = Work(
            pruned=model,
            teacher=None,
            text=text,
            judge=lesson.judge,
            settings=settings,
            seed=seed,
            directory=place,
            log=services.log,
            progress=services.progress,
            tell=services.store.tell,
            states=lesson.states,
            name=STAGE,
            on_cpu=device.type != "cuda",
        )
        before, training = train_guarded(work)
    model.requires_grad_(True)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return PolishRecord(
        settings=settings.model_dump(mode="json"),
        num_held_out_tokens=text.num_held_out_tokens,
        dense=lesson.judge.dense(),
        before=before,
        training=training,
    )


@contextmanager
def _folder(services: Services, settings: RecoverySettings) -> Iterator[Path]:
    """Yield the directory of the training, the same for all ranks: in the store if there is one.

    Each has its settings in its name: what memory allows may have changed when a run goes on.
    """
    name = f"{FOLDER}-{hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]}"
    with tempfile.TemporaryDirectory(prefix="polish-", dir=services.scratch) as own:
        store = services.store.directory
        yield from_first(lambda: Path(own) if store is None else store / name)
