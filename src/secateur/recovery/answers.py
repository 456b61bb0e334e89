"""The dense model's answers as text of a run: shared out over ranks, and kept in the run's store.

In: the dense model and the recipe. Out: its answers, written as far as they are asked for.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

from torch import Tensor

from secateur.data.answers import Answers, Speaker, Steps, Written
from secateur.data.sources import documents
from secateur.log import Progress
from secateur.model.bind import Arch
from secateur.model.stock import CausalLM, Tokenizer
from secateur.ranks import from_first, size, spread
from secateur.recipe import Domain, Recipe
from secateur.store import Store

# Prompts that are read for each block; a conversation seldom has fewer than a tenth of its tokens.
PROMPTS_PER_BLOCK = 10


def answers_of(
    recipe: Recipe,
    length: int,
    model: CausalLM,
    arch: Arch,
    tokenizer: Tokenizer,
    num_tokens: int,
    written: Written,
    store: Store,
    progress: Progress,
) -> Answers:
    """Return what the dense model answers in the domains that have answers. All ranks call it together.

    `length`: of a block. `num_tokens`: of the whole text. `written`: what an earlier one has written. Raises
    CalibrationError for prompts that are unreadable.
    """
    prompts: dict[str, list[str]] = {}
    for name, domain in recipe.calibration.answered.items():
        prompts[name] = from_first(partial(_prompts, name, domain, tokenizer, recipe.seed, num_tokens // length))
    # What is answered is kept by its number, whatever was asked.
    store.check_input("set of prompts", hashlib.sha256(json.dumps(prompts).encode()).hexdigest())
    speaker = Speaker(model, arch, tokenizer, str(recipe.seed), length)
    return Answers(speaker, prompts, in_steps(store), progress, written)


def _prompts(name: str, source: Domain, tokenizer: Tokenizer, seed: int, num_blocks: int) -> list[str]:
    """Return the source's first prompts, each once."""
    read = islice(documents(name, source, tokenizer, seed), num_blocks * PROMPTS_PER_BLOCK)
    return list(dict.fromkeys(read))


def in_steps(store: Store) -> Steps:
    """Return what does named steps: those that `store` has are read, the others shared out and kept."""

    def do(steps: Sequence[tuple[str, Callable[[], dict[str, Tensor]]]]) -> list[dict[str, Tensor]]:
        done = {name: kept[0] for name, _ in steps if (kept := store.find(name)) is not None}
        missing = [step for step in steps if step[0] not in done]
        # So many at a time as there are ranks: what is finished is kept at once.
        for start in range(0, len(missing), size()):
            part = missing[start : start + size()]
            for (name, _), tensors in zip(part, spread(lambda step: step[1](), part), strict=True):
                store.save(name, tensors, {})
                done[name] = tensors
        return [done[name] for name, _ in steps]

    return do
