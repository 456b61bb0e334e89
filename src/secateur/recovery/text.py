"""The text of a training: what the dense model answers, blocks in their order, and how many of them
make a step.

In: the dense model and the recipe. Out: its answers, written as far as they are asked for. In:
blocks, and settings. Out: a `RecoveryText` of whole steps.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

from torch import Tensor

from secateur.data.answers import Answers, Speaker, Steps, Written
from secateur.data.blocks import Block, Blocks
from secateur.data.sources import documents
from secateur.errors import RecipeError
from secateur.log import Progress
from secateur.model.stock import Tokenizer
from secateur.ranks import from_first, size, spread
from secateur.recipe import Domain, Recipe, RecoverySettings
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
