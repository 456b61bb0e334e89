"""Polish: the last steps of a prune, end to end, on the text that it measured the model on.

In: the dense model before the cut, for `learn`; the pruned one after it, for `polish`. Out: the
trained model, in place, and its record. The dense model is asked once, block by block: its head's
inputs and its head stand for it, so that it need not be in memory beside the pruned one. Where the
prune's walk carries the dense stream of the same text, that stream answers, and nothing is asked.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.data.blocks import Block, LearningText
from secateur.model.bind import Arch
from secateur.model.stock import CausalLM
from secateur.ranks import size
from secateur.recipe import Recipe, RecoverySettings
from secateur.recovery.judge import Judge
from secateur.recovery.text import RecoveryText, shared_out, whole_steps
from secateur.recovery.train import Work, train_guarded, training_folder
from secateur.recovery.weights import polish_settings
from secateur.report.records import PolishRecord
from secateur.store import Services
from secateur.stream.losses import head_inputs, states_for_head
from secateur.stream.walk import Batch, Walk

STAGE = "polish"


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the dense model leaves for the training. `states`: what its head reads, by block of
    text.

    `places`: which of these, by domain and number of its calibration block, come from a walk: see
    `take_states`.
    """

    text: RecoveryText
    judge: Judge
    states: list[Tensor]
    settings: RecoverySettings
    places: dict[tuple[str, int], int]

    def take_states(self, model: CausalLM, walk: Walk) -> None:
        """Take what the head reads from the dense stream of a walk, which has left the last layer.

        Embedding and last norm are still the dense model's. The stream goes, batch by batch.
        """
        for position, batch in enumerate(walk.batches):
            stream_BTD, walk.dense_BTD[position] = walk.dense_BTD[position], torch.empty(0)
            for offset, (ids_T, hidden_TD) in enumerate(zip(batch.ids_BT, stream_BTD, strict=True)):
                place = self.places.get((batch.domain, batch.first_block + offset))
                if place is None and not batch.held_out:
                    continue
                block = Batch(batch.domain, batch.held_out, ids_T[None])
                states_PD = states_for_head(model, walk.arch, block, hidden_TD[None]).cpu()
                if batch.held_out:
                    self.judge.states[batch.domain].append(states_PD)
                elif place is not None:
                    self.states[place] = states_PD


def learn(
    dense: CausalLM,
    arch: Arch,
    text: LearningText,
    recipe: Recipe,
    services: Services,
    *,
    walked: bool,
) -> Lesson | None:
    """Ask the dense model for all that the polish needs; None if the recipe asks for no polish.

    `text`: has the blocks to train on; its held-out ones guard. `walked`: calibration and held-out
    text need not be asked for, since `Lesson.take_states` will be called. Raises RecipeError for
    too few tokens to make a step.
    """
    settings, progress = polish_settings(recipe), services.progress
    if settings is None:
        return None
    order = _to_train_on(text, settings.num_tokens)
    random.Random(f"{recipe.seed}:{STAGE}").shuffle(order)
    settings = shared_out(settings, text.sequence_length, size(), len(order))
    order = whole_steps(order, settings, text.sequence_length, STAGE)
    places = {
        number: place for place, (_, number) in enumerate(order) if walked and number is not None
    }
    blocks, in_walk = tuple(block for block, _ in order), set(places.values())
    lesson = RecoveryText(blocks, text.held_out, text.sequence_length, text.content_hash)
    with services.log.time(STAGE):
        judge = Judge(dense, arch, text.held_out, progress, asked=not walked)
        judge.own_head()  # the model's own is trained, or cut
        asked = [block for place, block in enumerate(blocks) if place not in in_walk]
        dense_states = head_inputs(dense, arch, asked, progress, "ask for the polish")
        states = [
            torch.empty(0) if place in in_walk else next(dense_states)
            for place in range(len(blocks))
        ]
    return Lesson(lesson, judge, states, settings, places)


def _to_train_on(text: LearningText, num_tokens: int) -> list[tuple[Block, tuple[str, int] | None]]:
    """Return the training blocks, each with its domain and its number among the calibration's; None
    if it is none.
    """
    blocks = []
    for domain, of_domain in zip(text.domains, text.training(num_tokens).values(), strict=True):
        for number, block in enumerate(of_domain, start=domain.first_to_train):
            place = (domain.name, number) if number < domain.num_calibration else None
            blocks.append((block, place))
    return blocks


def polish(
    model: CausalLM, lesson: Lesson, seed: int, services: Services, device: torch.device
) -> PolishRecord:
    """Train the pruned model, which is in host memory, in place; the weights never get worse.

    `device`: the run's; other accelerators than CUDA's leave the training to the CPU. With a store
    an interrupted training goes on from its last checkpoint.
    """
    settings, text = lesson.settings, lesson.text
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with training_folder(services, settings, STAGE) as place, services.log.time(STAGE):
        work = Work(
            pruned=model,
            teacher=None,
            text=text,
            judge=lesson.judge,
            settings=settings,
            seed=seed,
            directory=place,
            services=services,
            states=lesson.states,
            name=STAGE,
            on_cpu=device.type != "cuda",
        )
        before, training = train_guarded(work)
    for parameter in learning:
        parameter.requires_grad_()
    return PolishRecord(
        settings=settings.model_dump(mode="json"),
        num_held_out_tokens=text.num_held_out_tokens,
        dense=lesson.judge.dense(),
        before=before,
        training=training,
    )
