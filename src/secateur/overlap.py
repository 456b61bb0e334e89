"""Overlap: how much of the evaluation text the calibration text has already shown, counted in n-grams of tokens.

In: token blocks by domain, those measured on and those held out. Out: one share per domain. Exact, not hashed. N-grams
lie within a block, as the model sees them. Not handled: text that says the same in other words or other tokens.

N: blocks, T: tokens per block.
"""

from collections.abc import Iterator

from jaxtyping import Int64
from torch import Tensor

# As GPT-3 and much since count contamination (Brown et al., arXiv 2005.14165, appendix C), in tokens instead of words.
from secateur.facts import NGRAM_TOKENS


def ngram_overlap(
    calibration_NT: dict[str, Tensor], evaluation_NT: dict[str, Tensor], num_tokens: int = NGRAM_TOKENS
) -> dict[str, float | None]:
    """Return, per evaluation domain, the share of its n-grams that occur in calibration blocks of any domain.

    Every position counts, repeats included. None where no evaluation block is `num_tokens` long.
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
