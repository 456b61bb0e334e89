"""How often a text has each token. In: the ids of its documents. Out: counts by id."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from secateur.data.blocks import Blocks


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """How often a text has each token.

    `damped_V`: each document counts as the square root of how often it has the token.
    """

    tokens_V: Int64[Tensor, " V"]
    damped_V: Float64[Tensor, " V"]


def count_tokens(documents: Iterable[Tensor], num_rows: int) -> TokenCounts:
    """Return the counts of the ids in the documents, a tensor each. V: `num_rows`, of the embedding."""
    tokens_V, damped_V = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.float64)
    for ids_T in documents:
        ids_U, counts_U = ids_T.unique(return_counts=True)
        tokens_V[ids_U] += counts_U
        damped_V[ids_U] += counts_U.double().sqrt()
    return TokenCounts(tokens_V, damped_V)


def counted_documents(blocks: Blocks) -> Iterator[Int64[Tensor, " T"]]:
    """Yield each document's ids that count: of answers those of the answer, none of its prompt."""
    counts_NT = torch.ones_like(blocks.ids_NT, dtype=torch.bool) if blocks.counted_NT is None else blocks.counted_NT
    for number in sorted(blocks.documents):
        yield blocks.ids_NT[counts_NT & (blocks.document_NT == number)]
