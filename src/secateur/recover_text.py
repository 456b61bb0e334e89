"""The text of a recovery: blocks to train on and held-out blocks, of the domains that the model was calibrated on.

In: a recipe, a tokenizer, how many tokens to use. Out: a `RecoveryText`. Held-out documents are drawn first and by the
same seed as when the model was pruned, so that nothing is trained on text that judged the pruning.

N: blocks, M: held-out blocks, T: tokens per block.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.calibration import CALIBRATION_BLOCKS_PER_HELD_OUT, build_calibration
from secateur.calibration_sampled import with_sampled
from secateur.errors import RecipeError
from secateur.progress import Progress, silent
from secateur.recipe import Recipe
from secateur.recover_recipe import RecoverySettings

# A block and the domain that it is of.
Block = tuple[str, Int64[Tensor, " T"]]


@dataclass(frozen=True, slots=True)
class RecoveryText:
    """`blocks`: to train on, in the order of use. `content_hash`: of all text."""

    blocks: tuple[Block, ...]
    held_out_NT: dict[str, Int64[Tensor, "M T"]]
    sequence_length: int
    content_hash: str

    @property
    def num_tokens(self) -> int:
        """Return the tokens to train on."""
        return sum(len(ids_T) for _, ids_T in self.blocks)

    @property
    def num_held_out_tokens(self) -> int:
        """Return the tokens to judge by."""
        return sum(blocks.numel() for blocks in self.held_out_NT.values())


def recovery_text(
    recipe: Recipe,
    settings: RecoverySettings,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    progress: Progress = silent,
) -> RecoveryText:
    """Draw the text. Domains have the shares that the recipe gives them; they are mixed in a seeded order.

    No more tokens are used than `settings` says: blocks that do not fill a step are left out.

    Raises CalibrationError if the domains have less text, RecipeError if there are too few tokens for one step.
    """
    calibration, length = recipe.calibration.model_copy(update={"rotate": False}), recipe.calibration.sequence_length
    assert length is not None
    built = build_calibration(
        calibration,
        settings.num_tokens,
        tokenizer,
        recipe.seed,
        progress,
        more_held_out=_more_held_out(recipe, settings),
    )
    built = with_sampled(built, teacher, tokenizer, recipe.seed, progress)
    blocks = [(domain.name, ids_T) for domain in built.domains for ids_T in domain.calibration_NT]
    random.Random(f"{recipe.seed}:recover").shuffle(blocks)
    return RecoveryText(
        tuple(_whole_steps(blocks, settings, length)),
        {domain.name: domain.held_out_NT[: settings.held_out_blocks] for domain in built.domains},
        length,
        built.content_hash,
    )


def blocks_per_step(batch_tokens: int, sequence_length: int) -> int:
    """Return how many blocks make one step of `batch_tokens` tokens; at least one."""
    return max(1, batch_tokens // sequence_length)


def _whole_steps(blocks: Sequence[Block], settings: RecoverySettings, length: int) -> Sequence[Block]:
    size = blocks_per_step(settings.logits.batch_tokens, length)
    num_blocks = min(len(blocks), settings.num_tokens // length) // size * size
    if num_blocks == 0:
        raise RecipeError(
            f"recover.num_tokens: {settings.num_tokens:,} leave less than one step of {size} blocks of {length} "
            "tokens; raise it, or lower recover.logits.batch_tokens."
        )
    return blocks[:num_blocks]


def _more_held_out(recipe: Recipe, settings: RecoverySettings) -> int:
    """Return how many blocks to hold out beyond a tenth, so that all that judged the pruning are held out again."""
    calibration, length = recipe.calibration, recipe.calibration.sequence_length
    assert length is not None
    total = sum(domain.share for domain in calibration.domains.values())
    missing = 0
    for domain in calibration.domains.values():
        pruning, recovery = (
            -(-max(1, round(domain.share / total * num_tokens / length)) // CALIBRATION_BLOCKS_PER_HELD_OUT)
            for num_tokens in (calibration.num_tokens or 0, settings.num_tokens)
        )
        missing = max(missing, max(pruning, settings.held_out_blocks) - recovery)
    return missing
