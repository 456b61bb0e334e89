"""Text of other sources than a run's: a few kinds of prose that come with the package, to judge by alone.

In: a tokenizer. Out: blocks, each of one document.
"""

from collections.abc import Sequence
from functools import cache
from importlib import resources
from itertools import zip_longest
from typing import Any

import torch
import yaml

from secateur.data.blocks import Block
from secateur.model.checkpoint import Tokenizer

# Of a block; no document has more in a tokenizer of words.
MOST_TOKENS = 512


@cache
def other_documents() -> tuple[str, ...]:
    """Return the documents, kinds by turns."""
    kinds = yaml.safe_load(resources.files("secateur").joinpath("data", "other_text.yaml").read_bytes())
    return tuple(text for turn in zip_longest(*kinds.values()) for text in turn if text is not None)


def other_text(documents: Sequence[str], tokenizer: Tokenizer, config: Any) -> list[Block]:
    """Return blocks of one document each. `config`: of a model, which may read no more tokens of one."""
    length = min(MOST_TOKENS, getattr(config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS)
    blocks: list[Block] = []
    for number, text in enumerate(documents):
        ids_T = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        # The first token of a block is context alone.
        blocks += [Block(part, torch.full_like(part, number)) for part in ids_T.split(length) if len(part) > 1]
    return blocks
