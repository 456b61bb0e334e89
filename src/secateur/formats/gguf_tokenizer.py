"""A tokenizer as llama.cpp wants it: byte-level BPE with its splitting rule, or SentencePiece with scores."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

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
_BYTES, _GPT2 = ("ByteLevel", False), ("ByteLevel", True)  # with its own regular expression or without

# (steps of the pre-tokenizer, words of the vocabulary beat merges) -> llama.cpp's name
PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((("Digits", True), _GPT2), False): "smollm",
    ((("Split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("Split", _QWEN2), _BYTES), False): "qwen2",
    ((("Split", _TEKKEN), _BYTES), True): "tekken",
}
# Gemma 3's text models have the tokenizer of their larger siblings, whose token for images has no row in them.
_WITHOUT_ROW = {"<image_soft_token>"}


@dataclass(frozen=True, slots=True)
class Rules:
    """How text becomes tokens, in llama.cpp's words. A tokenizer has either merges or scores, of pieces."""

    model: str
    pre: str
    merges: list[str] | None
    scores: dict[str, float] | None
    space_prefix: bool


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Raise CheckpointError, naming `where`, if the tokenizer cannot go into a GGUF file of `vocab_size` rows."""
    _rules(tokenizer, where)
    largest = max(index for token, index in tokenizer.get_vocab().items() if token not in _WITHOUT_ROW)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{where}: its tokenizer has id {largest}, its model only {vocab_size} rows; "
            "use the tokenizer and the weights of one and the same model."
        )


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Write vocabulary, kinds of tokens, merges or scores, special ids and chat template to a `gguf.GGUFWriter`.

    Rows of the embedding beyond the tokenizer's ids get names of their own, marked unused. Raises as `check_tokenizer`.
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
    """Return every row's token and its kind."""
    import gguf

    kind, byte_pieces = gguf.TokenType, {byte_piece(byte) for byte in range(256)}
    tokens, kinds = [f"[PAD{index}]" for index in range(vocab_size)], [int(kind.UNUSED)] * vocab_size
    # Sorted, for two spellings may share an id: then the byte's name, which is the later one, stands.
    for token, index in sorted(tokenizer.get_vocab().items()):
        if token not in _WITHOUT_ROW:
            tokens[index], kinds[index] = token, int(kind.BYTE if token in byte_pieces else kind.NORMAL)
    for index, added in tokenizer.added_tokens_decoder.items():
        # One that spells a space is made by merges: llama.cpp would look for its spelling, which text does not have.
        if index < vocab_size and (added.special or SPACE not in added.content):
            kinds[index] = int(kind.CONTROL if added.special else kind.USER_DEFINED)
    return tokens, kinds


def _add_special(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    ids: Any = tokenizer
    for add, index in (
        (writer.add_bos_token_id, ids.bos_token_id),
        (writer.add_eos_token_id, ids.eos_token_id),
        (writer.add_unk_token_id, ids.unk_token_id),
        (writer.add_pad_token_id, ids.pad_token_id),
    ):
        if index is not None:
            add(index)
    # Stated both ways, for what llama.cpp assumes differs by splitting rule.
    encoded = list(ids.encode("a"))
    writer.add_add_bos_token(ids.bos_token_id is not None and encoded[0] == ids.bos_token_id)
    writer.add_add_eos_token(ids.eos_token_id is not None and encoded[-1] == ids.eos_token_id)


def _rules(tokenizer: PreTrainedTokenizerBase, where: str) -> Rules:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    parsed = {"model": {"type": type(tokenizer).__name__}} if backend is None else json.loads(backend.to_str())
    model, normalizer = parsed["model"], parsed.get("normalizer")
    if model["type"] != "BPE":
        raise CheckpointError(f"{where}: GGUF export knows BPE tokenizers, this one is {model['type']}.")
    if not model["merges"]:
        raise CheckpointError(f"{where}: its tokenizer has no merges, without which llama.cpp cannot use it.")
    if model.get("byte_fallback"):
        return Rules("llama", "default", None, piece_scores(parsed, where), space_prefix(parsed, where))
    steps = _normaliser_steps(parsed.get("pre_tokenizer"))
    rule = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    # llama.cpp never normalises; NFC, which Qwen's has, changes only text that is not in that form already.
    if rule is None or (normalizer and normalizer["type"] != "NFC"):
        raise CheckpointError(
            f"{where}: its tokenizer splits text by a rule that GGUF export does not know ({_shown(steps)}); "
            f"known are those of {', '.join(PRE_TOKENIZERS.values())}."
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Rules("gpt2", rule, merges, None, space_prefix=False)


def _normaliser_steps(pre_tokenizer: dict[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """Return (kind, what decides) of every step; what changes nothing (offsets) is left out."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _normaliser_steps(part))
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return ((kind, pre_tokenizer["use_regex"]),)
    if kind == "Digits":
        return ((kind, pre_tokenizer["individual_digits"]),)
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        return ((kind, pre_tokenizer["pattern"].get("Regex")),)
    return ((kind, "unusual"),)


def _shown(steps: tuple[tuple[str, Any], ...]) -> str:
    return " then ".join(f"{kind} {detail}" for kind, detail in steps) or "no splitting"
