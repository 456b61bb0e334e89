"""A SentencePiece tokenizer as llama.cpp wants it: pieces with scores, where transformers keeps a list of merges.

In: the tokenizers library's JSON of a BPE with byte fallback (Llama 2, Mistral, Gemma). Out: a score by piece, and
whether text gets a space in front. llama.cpp merges two neighbours whenever both together are a piece, best score
first, which is what the merges say if none is missing and those into one piece follow each other; this is checked.
llama.cpp adds the space as SentencePiece does; transformers' Metaspace leaves it out where text begins with a space,
and in its scheme `first` behind special tokens. Not handled: Unigram models, other normalisation.
"""

from collections import Counter
from itertools import groupby
from typing import Any

from secateur.errors import CheckpointError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how pieces spell a space
_ESCAPE, _NO_SPLIT = ("Replace", " ", SPACE), ("Split", " ", "MergedWithPrevious")

# steps of normalizer and pre-tokenizer -> whether text gets a space in front
PREFIXES = {
    (("Prepend", SPACE), _ESCAPE): True,  # transformers 4's files for Llama and Mistral
    (_ESCAPE, ("Replace", rf"\A{SPACE}", SPACE * 2), ("Metaspace", "always")): True,  # 5's, from tokenizer.model
    (("Metaspace", "always"),): True,
    (("Metaspace", "first"),): True,
    (("Metaspace", "never"),): False,
    (_ESCAPE,): False,
    (_ESCAPE, _NO_SPLIT): False,  # Gemma's; no space is left to split at
}


def space_prefix(parsed: dict[str, Any], where: str) -> bool:
    """Return whether text gets a space in front. Raises CheckpointError, naming `where`, for unknown steps."""
    steps = (*_steps(parsed.get("normalizer")), *_steps(parsed.get("pre_tokenizer")))
    if steps not in PREFIXES or parsed["model"].get("ignore_merges"):
        shown = " then ".join(" ".join(map(repr, step)) for step in steps) or "by nothing"
        raise CheckpointError(
            f"{where}: its SentencePiece tokenizer prepares text in a way that GGUF export does not know "
            f"({shown:.200}); known are those of Llama 2, Mistral and Gemma."
        )
    return PREFIXES[steps]


def piece_scores(parsed: dict[str, Any], where: str) -> dict[str, float]:
    """Return by piece minus the rank of the merges that make it. Pieces that no merge makes need none.

    Raises CheckpointError, naming `where`, if llama.cpp would merge in another order, or more, or a byte has no piece.
    """
    vocabulary = parsed["model"]["vocab"]
    # Added tokens are cut out of the text before anything is merged; not those that spell a space, which text does not.
    cut_out = {token["content"] for token in parsed["added_tokens"] if SPACE not in token["content"]}
    products = [left + right for left, right in parsed["model"]["merges"] if left + right not in cut_out]
    ranked = [product for product, _ in groupby(products)]
    num_runs, num_merges = Counter(ranked), Counter(products)

    def is_part(text: str) -> bool:
        return len(text) == 1 or text in vocabulary

    def num_splits(piece: str) -> int:
        return sum(is_part(piece[:cut]) and is_part(piece[cut:]) for cut in range(1, len(piece)))

    for piece in vocabulary:
        if piece not in cut_out and (num_runs[piece] > 1 or num_splits(piece) != num_merges[piece]):
            raise CheckpointError(
                f"{where}: llama.cpp's scores cannot say how its tokenizer merges (first difference: {piece!r}); "
                "the tokenizer cannot be exported."
            )
    # A byte below 128 is a character, which may be a piece of its own instead.
    missing = [
        byte
        for byte in range(256)
        if byte_piece(byte) not in vocabulary and not (byte < 128 and chr(byte) in vocabulary)
    ]
    if missing:
        raise CheckpointError(
            f"{where}: its tokenizer has no piece {byte_piece(missing[0])}, without which llama.cpp cannot spell "
            "unknown characters; the tokenizer cannot be exported."
        )
    return {piece: -float(rank) for rank, piece in enumerate(ranked)}


def byte_piece(byte: int) -> str:
    """Return how SentencePiece names a byte."""
    return f"<0x{byte:02X}>"


def _steps(part: dict[str, Any] | None) -> tuple[tuple[str, ...], ...]:
    """Return (kind, what decides) of every step of a normalizer or pre-tokenizer."""
    if part is None:
        return ()
    kind = part["type"]
    if kind == "Sequence":
        return tuple(
            step for each in part.get("normalizers") or part.get("pretokenizers") or () for step in _steps(each)
        )
    pattern = next(iter(part.get("pattern", {}).values()), "")
    if kind == "Prepend":
        return ((kind, part["prepend"]),)
    if kind == "Replace":
        return ((kind, pattern, part["content"]),)
    if kind == "Split" and not part["invert"]:
        return ((kind, pattern, part["behavior"]),)
    if kind == "Metaspace" and part["replacement"] == SPACE and not part["split"]:
        return ((kind, part["prepend_scheme"]),)
    return ((kind, "unusual"),)
