"""A tokenizer for llama.cpp: byte-level BPE with a splitting rule, or SentencePiece with scores."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.errors import CheckpointError
from secateur.vocabulary.tokenizer import SPACE, byte_piece

_ESCAPE, _NO_SPLIT = ("Replace", " ", SPACE), ("Split", " ", "MergedWithPrevious")

# SentencePiece: steps of normalizer and pre-tokenizer -> whether text gets a space in front.
PREFIXES = {
    (("Prepend", SPACE), _ESCAPE): True,  # transformers 4's files for Llama and Mistral
    (
        _ESCAPE,
        ("Replace", rf"\A{SPACE}", SPACE * 2),
        ("Metaspace", "always"),
    ): True,  # 5's, from tokenizer.model
    (("Metaspace", "always"),): True,
    (("Metaspace", "first"),): True,
    (("Metaspace", "never"),): False,
    (_ESCAPE,): False,
    (_ESCAPE, _NO_SPLIT): False,  # Gemma's; no space is left to split at
}


def space_prefix(parsed: dict[str, Any], where: str) -> bool:
    """Return whether text gets a space in front. Raises CheckpointError for unknown steps."""
    steps = (*_steps(parsed.get("normalizer")), *_steps(parsed.get("pre_tokenizer")))
    if steps not in PREFIXES or parsed["model"].get("ignore_merges"):
        raise CheckpointError(
            f"{where}: its SentencePiece tokenizer prepares text in a way that GGUF export does "
            f"not know ({_shown(steps)}); known are those of Llama 2, Mistral and Gemma."
        )
    return PREFIXES[steps]


def piece_scores(parsed: dict[str, Any], where: str) -> dict[str, float]:
    """Return each piece's score: minus the rank of its merge. Pieces without a merge need none.

    Raises CheckpointError if llama.cpp would merge in another order or more, or lacks a byte.
    """
    vocabulary = parsed["model"]["vocab"]
    # Added tokens are cut out before merging, except those spelt with SPACE, which text never has.
    cut_out = {
        token["content"] for token in parsed["added_tokens"] if SPACE not in token["content"]
    }
    products = [
        left + right for left, right in parsed["model"]["merges"] if left + right not in cut_out
    ]
    ranked = [product for product, _ in groupby(products)]
    num_runs, num_merges = Counter(ranked), Counter(products)

    def num_splits(piece: str) -> int:
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        return sum(all(len(part) == 1 or part in vocabulary for part in parts) for parts in cuts)

    for piece in vocabulary:
        if piece not in cut_out and (num_runs[piece] > 1 or num_splits(piece) != num_merges[piece]):
            raise CheckpointError(
                f"{where}: llama.cpp's scores cannot say how its tokenizer merges (first "
                f"difference: {piece!r}); the tokenizer cannot be exported."
            )
    for byte in range(256):  # a byte below 128 may be a piece as a character instead
        if byte_piece(byte) not in vocabulary and not (byte < 128 and chr(byte) in vocabulary):
            raise CheckpointError(
                f"{where}: its tokenizer has no piece {byte_piece(byte)}, without which llama.cpp "
                "cannot spell unknown characters; the tokenizer cannot be exported."
            )
    return {piece: -float(rank) for rank, piece in enumerate(ranked)}


def _steps(part: dict[str, Any] | None) -> tuple[tuple[Any, ...], ...]:
    """Return (kind, settings that decide) of every step of a normalizer or pre-tokenizer."""
    if part is None:
        return ()
    kind = part["type"]
    if kind == "Sequence":
        parts = part.get("normalizers") or part.get("pretokenizers") or ()
        return tuple(step for inner in parts for step in _steps(inner))
    pattern = next(iter(part.get("pattern", {}).values()), "")
    if kind == "Prepend":
        return ((kind, part["prepend"]),)
    if kind == "Replace":
        return ((kind, pattern, part["content"]),)
    if kind == "Split" and not part["invert"]:
        return ((kind, pattern, part["behavior"]),)
    if kind == "Metaspace" and part["replacement"] == SPACE and not part["split"]:
        return ((kind, part["prepend_scheme"]),)
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return ((kind, part["use_regex"]),)
    if kind == "Digits":
        return ((kind, part["individual_digits"]),)
    return ((kind, "unusual"),)


def _shown(steps: tuple[tuple[Any, ...], ...]) -> str:
    return f"{' then '.join(' '.join(map(repr, step)) for step in steps) or 'by nothing':.200}"


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES, _GPT2 = (
    ("ByteLevel", False),
    ("ByteLevel", True),
)  # with its own regular expression or without

# Byte-level BPE: (steps of the pre-tokenizer, ignore_merges) -> llama.cpp's name
PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((("Digits", True), _GPT2), False): "smollm",
    ((("Split", _LLAMA3, "Isolated"), _BYTES), True): "llama-bpe",
    ((("Split", _QWEN2, "Isolated"), _BYTES), False): "qwen2",
    ((("Split", _TEKKEN, "Isolated"), _BYTES), True): "tekken",
}
# Gemma 3's text models share a tokenizer whose token for images has no row in them.
_WITHOUT_ROW = {"<image_soft_token>"}


@dataclass(frozen=True, slots=True)
class Rules:
    """How text becomes tokens, in llama.cpp's words: by merges or by scores of pieces."""

    model: str
    pre: str
    merges: list[str] | None
    scores: dict[str, float] | None
    space_prefix: bool


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Raise CheckpointError if a GGUF file of `vocab_size` rows cannot hold the tokenizer."""
    _rules(tokenizer, where)
    largest = max(
        index for token, index in tokenizer.get_vocab().items() if token not in _WITHOUT_ROW
    )
    if largest >= vocab_size:
        raise CheckpointError(
            f"{where}: its tokenizer has id {largest}, its model only {vocab_size} rows; "
            "use the tokenizer and the weights of one and the same model."
        )


def add_tokenizer(
    writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str
) -> None:
    """Write vocabulary, token kinds, merges or scores, special ids and chat template.

    Embedding rows beyond the tokenizer's ids become unused tokens. Raises as `check_tokenizer`.
    """
    rules = _rules(tokenizer, where)
    tokens, kinds = _tokens(tokenizer, vocab_size)
    writer.add_tokenizer_model(rules.model)
    writer.add_tokenizer_pre(rules.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if rules.merges is not None:
        writer.add_token_merges(rules.merges)
    if rules.scores is not None:
        writer.add_token_scores([rules.scores.get(token, -float(len(tokens))) for token in tokens])
        writer.add_add_space_prefix(rules.space_prefix)
    _add_special(writer, tokenizer)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the token of every row, and its kind."""
    import gguf

    kind, byte_pieces = gguf.TokenType, {byte_piece(byte) for byte in range(256)}
    tokens, kinds = (
        [f"[PAD{index}]" for index in range(vocab_size)],
        [int(kind.UNUSED)] * vocab_size,
    )
    # Sorted: if two spellings share an id, the byte's name comes later and wins.
    for token, index in sorted(tokenizer.get_vocab().items()):
        if token not in _WITHOUT_ROW:
            tokens[index], kinds[index] = (
                token,
                int(kind.BYTE if token in byte_pieces else kind.NORMAL),
            )
    for index, added in tokenizer.added_tokens_decoder.items():
        # Those spelt with SPACE come from merges: llama.cpp would search text for that spelling.
        if index < vocab_size and (added.special or SPACE not in added.content):
            kinds[index] = int(kind.CONTROL if added.special else kind.USER_DEFINED)
    return tokens, kinds


def _add_special(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    ids: Any = tokenizer
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        if (index := getattr(ids, name)) is not None:
            getattr(writer, f"add_{name}")(index)
    # Always stated: llama.cpp's defaults differ by splitting rule.
    encoded = list(ids.encode("a"))
    writer.add_add_bos_token(ids.bos_token_id is not None and encoded[0] == ids.bos_token_id)
    writer.add_add_eos_token(ids.eos_token_id is not None and encoded[-1] == ids.eos_token_id)


def _rules(tokenizer: PreTrainedTokenizerBase, where: str) -> Rules:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    parsed = (
        {"model": {"type": type(tokenizer).__name__}}
        if backend is None
        else json.loads(backend.to_str())
    )
    model, normalizer = parsed["model"], parsed.get("normalizer")
    if model["type"] != "BPE":
        raise CheckpointError(
            f"{where}: GGUF export knows BPE tokenizers, this one is {model['type']}."
        )
    if not model["merges"]:
        raise CheckpointError(
            f"{where}: its tokenizer has no merges, without which llama.cpp cannot use it."
        )
    if model.get("byte_fallback"):
        return Rules(
            "llama", "default", None, piece_scores(parsed, where), space_prefix(parsed, where)
        )
    steps = _steps(parsed.get("pre_tokenizer"))
    rule = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    # llama.cpp never normalises. Qwen's NFC is let through: most text is in that form already.
    if rule is None or (normalizer and normalizer["type"] != "NFC"):
        raise CheckpointError(
            f"{where}: its tokenizer splits text by a rule that GGUF export does not know "
            f"({_shown(steps)}); known are those of {', '.join(PRE_TOKENIZERS.values())}."
        )
    merges = [" ".join(merge) for merge in model["merges"]]
    return Rules("gpt2", rule, merges, None, space_prefix=False)
