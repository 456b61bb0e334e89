"""The text of a training: a finished run's, drawn again, and what the dense model answers.

In: a pruned model's directory, its recipe and tokenizer, and the dense model. Out: the same parts
of the same documents, and a `RecoveryText` of whole steps.
"""

import hashlib
import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from secateur.data.answers import Answers, Speaker, Steps, Written, with_answers
from secateur.data.blocks import Block, Blocks
from secateur.data.pool import Allotted, Amounts, Split, TextPool, judging_tokens
from secateur.data.sources import documents
from secateur.errors import RecipeError
from secateur.facts import parse_json
from secateur.log import Progress
from secateur.model.bind import bind
from secateur.model.stock import CausalLM, Tokenizer
from secateur.ranks import from_first, size, spread
from secateur.recipe import RECIPE_FILE, Domain, Recipe, RecoverySettings
from secateur.report.records import CalibrationFacts
from secateur.result_directory import RESULT_FILE
from secateur.store import Store

# Prompts that are read for each block; a conversation seldom has fewer than a tenth of its tokens.
PROMPTS_PER_BLOCK = 10

Item = TypeVar("Item")


def answers_of(
    recipe: Recipe,
    speaker: Speaker,
    num_tokens: int,
    store: Store,
    progress: Progress,
    written: Written,
) -> Answers:
    """Return what the dense model answers in the domains that have answers. All ranks call it
    together.

    `num_tokens`: of the whole text. `written`: what an earlier one has written. Raises
    CalibrationError for prompts that are unreadable.
    """
    prompts: dict[str, list[str]] = {}
    num_blocks = num_tokens // speaker.length
    for name, domain in recipe.calibration.answered.items():
        prompts[name] = from_first(
            partial(_prompts, name, domain, speaker.tokenizer, recipe.seed, num_blocks)
        )
    # What is answered is kept by its number, and by what was asked: a measurement may be of other
    # prompts.
    store.check_input(
        "set of prompts", digest := hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    )
    return Answers(speaker, prompts, in_steps(store, digest), progress, written)


def _prompts(
    name: str, source: Domain, tokenizer: Tokenizer, seed: int, num_blocks: int
) -> list[str]:
    """Return the source's first prompts, each once."""
    read = islice(documents(name, source, tokenizer, seed), num_blocks * PROMPTS_PER_BLOCK)
    return list(dict.fromkeys(read))


def in_steps(store: Store, asked: str) -> Steps:
    """Return what does named steps: those that `store` has are read, the others shared out and
    kept.

    `asked`: what they rest on, as part of their names.
    """

    def do(steps: Sequence[tuple[str, Callable[[], dict[str, Tensor]]]]) -> list[dict[str, Tensor]]:
        done = {
            name: kept[0]
            for name, _ in steps
            if (kept := store.find(f"{name}-{asked}")) is not None
        }
        missing = [step for step in steps if step[0] not in done]
        # So many at a time as there are ranks: what is finished is kept at once.
        for start in range(0, len(missing), size()):
            part = missing[start : start + size()]
            for (name, _), tensors in zip(part, spread(lambda step: step[1](), part), strict=True):
                store.save(f"{name}-{asked}", tensors, {})
                done[name] = tensors
        return [done[name] for name, _ in steps]

    return do


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
    def num_held_out_tokens(self) -> int:
        """Return the tokens that guard."""
        return sum(blocks.num_tokens for blocks in self.held_out.values())


@dataclass(frozen=True, slots=True)
class _Result:
    calibration: CalibrationFacts


def text_facts(directory: Path) -> CalibrationFacts | None:
    """Return what a result says of its text; None for a model that no run made. Raises
    CheckpointError.
    """
    path = directory / RESULT_FILE
    return parse_json(_Result, path.read_bytes(), str(path)).calibration if path.is_file() else None


def run_text_again(
    directory: Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    progress: Progress,
    *,
    num_training_tokens: int = 0,
    least_held_out: int = 0,
    only: Collection[str] | None = None,
    key: str = "polish.num_tokens",
) -> Split:
    """Return the parts of a run's text. `recipe`: the run's, with `num_tokens` and
    `sequence_length`.

    `num_training_tokens`, `key`: to learn by, if more than the run's calibration, and what asks for
    them. `least_held_out`: blocks of a domain; more than the run's come from what it learnt by.
    `only`: the domains to read, None for all. Raises CalibrationError for text that is unreadable
    or too short, RecipeError for a recipe that no run wrote.
    """
    calibration, facts = recipe.calibration, text_facts(directory)
    if calibration.num_tokens is None:
        raise RecipeError(
            f"recipe {directory / RECIPE_FILE}: calibration.num_tokens is missing; use the "
            "recipe.yaml that the run wrote."
        )
    amounts = Amounts(
        num_tokens=calibration.num_tokens,
        num_training_tokens=num_training_tokens,
        num_judged_tokens=judging_tokens(recipe.output.evaluate),
        least_held_out=least_held_out,
    )
    allotted = (
        {}
        if facts is None
        else {name: Allotted(*numbers) for name, numbers in facts.allotted.items()}
    )
    if least_held_out:
        allotted = {name: Allotted(numbers.judged, None) for name, numbers in allotted.items()}
    assert calibration.sequence_length is not None, "a run writes it"
    pool = TextPool(calibration.sequence_length, tokenizer, recipe.seed, progress)
    return pool.split(calibration.domains, amounts, allotted=allotted, only=only, key=key)


def recovery_text(
    directory: Path,
    recipe: Recipe,
    settings: RecoverySettings,
    tokenizer: Tokenizer,
    teacher: CausalLM,
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


def shared_out(
    settings: RecoverySettings, length: int, num_ranks: int, num_blocks: int | None = None
) -> RecoverySettings:
    """Return settings of steps that ranks share out, each at least a block of `length` tokens.

    `num_blocks`: of the text. A step has no more, but for a block of each rank.
    """
    num_asked = settings.blocks_per_step(length)
    per_rank = -(-min(num_asked, num_blocks or num_asked) // num_ranks)
    at_once = max(
        count for count in range(1, settings.blocks_per_device + 1) if per_rank % count == 0
    )
    return settings.model_copy(
        update={"batch_tokens": per_rank * num_ranks * length, "blocks_per_device": at_once}
    )


def whole_steps(
    blocks: Sequence[Item], settings: RecoverySettings, length: int, key: str
) -> Sequence[Item]:
    """Return as many blocks as whole steps take. Raises RecipeError, naming the recipe's `key`, for
    none.
    """
    size = settings.blocks_per_step(length)
    num_blocks = min(len(blocks), settings.num_tokens // length) // size * size
    if num_blocks == 0:
        raise RecipeError(
            f"{key}.num_tokens: {settings.num_tokens:,} leave less than one step of {size} blocks "
            f"of {length} tokens; raise it, or lower {key}.batch_tokens."
        )
    return blocks[:num_blocks]
