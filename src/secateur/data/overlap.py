"""How much of the text that judges a model stands in the text that it was measured on.

In: blocks of token ids by domain. Out: shares of n-grams.
"""

from collections.abc import Iterator

from jaxtyping import Int64
from torch import Tensor

from secateur.facts import NGRAM_TOKENS


def ngram_overlap(
    calibration_NT: dict[str, Tensor], evaluation_NT: dict[str, Tensor], num_tokens: int = NGRAM_TOKENS
) -> dict[str, float | None]:
    """Return, per evaluation domain, the share of its n-grams that occur in any calibration block.

    Repeats count. None if no evaluation block has `num_tokens` tokens.
    """
    wanted = {ngram for blocks in evaluation_NT.values() for ngram in _ngrams(blocks, num_tokens)}
    seen = {ngram for blocks in calibration_NT.values() for ngram in _ngrams(blocks, num_tokens) if ngram in wanted}
    found = {domain: [n in seen for n in _ngrams(blocks, num_tokens)] for domain, blocks in evaluation_NT.items()}
    return {domain: sum(hits) / len(hits) if hits else None for domain, hits in found.items()}


def _ngrams(blocks_NT: Int64[Tensor, "N T"], num_tokens: int) -> Iterator[bytes]:
    for ids_T in blocks_NT.cpu().numpy().astype("<i4"):
        data = ids_T.tobytes()
        for start in range(0, len(data) - 4 * num_tokens + 1, 4):
            yield data[start : start + 4 * num_tokens]
