"""The text of a training: blocks in their order, and how many of them make a step.

In: blocks by domain, and settings. Out: a `RecoveryText` of whole steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Bool, Int64
from torch import Tensor

from secateur.data.blocks import Blocks
from secateur.errors import RecipeError
from secateur.recipe import RecoverySettings


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


def blocks_per_step(batch_tokens: int, sequence_length: int) -> int:
    """Return how many blocks make one step of `batch_tokens` tokens, at least one."""
    return max(1, batch_tokens // sequence_length)


def shared_out(
    settings: RecoverySettings, length: int, num_ranks: int, num_blocks: int | None = None
) -> RecoverySettings:
    """Return settings of steps that ranks share out, each at least a block of `length` tokens.

    `num_blocks`: of the text. A step has no more, but for a block of each rank.
    """
    num_asked = blocks_per_step(settings.batch_tokens, length)
    per_rank = -(-min(num_asked, num_blocks or num_asked) // num_ranks)
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
