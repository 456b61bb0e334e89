"""Text that comes with secateur: prompts that a model answers to learn by, prompts and documents that judge it.

In: the name of a file beside this one. Out: its texts.
"""

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import torch
import yaml

from secateur.data.blocks import Block
from secateur.model.stock import Tokenizer


@cache
def shipped(file: str) -> tuple[str, ...]:
    """Return a file's texts, kinds by turns."""
    kinds = yaml.safe_load(resources.files("secateur").joinpath("data", file).read_bytes()).values()
    longest = max(map(len, kinds))
    return tuple(kind[number] for number in range(longest) for kind in kinds if number < len(kind))


# Of a block; no document has more in a tokenizer of words.
MOST_TOKENS = 512


def other_text(documents: Sequence[str], tokenizer: Tokenizer, config: Any) -> list[Block]:
    """Return blocks of one document each. `config`: of a model, which may read no more tokens of one."""
    length = min(MOST_TOKENS, getattr(config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS)
    blocks: list[Block] = []
    for number, text in enumerate(documents):
        ids_T = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        # The first token of a block is context alone.
        blocks += [Block(part, torch.full_like(part, number)) for part in ids_T.split(length) if len(part) > 1]
    return blocks
