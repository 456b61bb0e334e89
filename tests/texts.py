"""Text as a run draws it, in one call."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from secateur.data.blocks import Block, Blocks, LearningText
from secateur.data.pool import Amounts, Split, TextPool
from secateur.log import silent
from secateur.recipe import Calibration


def split_text(
    calibration: Calibration, num_tokens: int, tokenizer: Any, seed: int = 0, progress: Any = silent, **amounts: int
) -> Split:
    """Return the parts of a text."""
    assert calibration.sequence_length is not None
    pool = TextPool(calibration.sequence_length, tokenizer, seed, progress)
    return pool.split(calibration.domains, Amounts(num_tokens=num_tokens, **amounts))


def learning_text(*given: Any, **amounts: Any) -> LearningText:
    """Return what may be learnt by, of the arguments of `split_text`."""
    return split_text(*given, **amounts).learning.text


def documents_of(ids_NT: Tensor) -> Blocks:
    """Return blocks that are a document each."""
    return Blocks(ids_NT, torch.arange(len(ids_NT))[:, None].expand(ids_NT.shape))


def blocks_of(ids: Iterable[Tensor]) -> list[Block]:
    """Return blocks of any lengths that are a document each."""
    return [Block(ids_T, torch.full_like(ids_T, number)) for number, ids_T in enumerate(ids)]
