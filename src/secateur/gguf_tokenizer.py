"""A tokenizer as llama.cpp wants it: byte-level BPE, with the name of the rule that splits text before merging.

In: the tokenizer as transformers loads it; its files can say otherwise, for transformers gives some families a rule of
its own. Out: keys on a `gguf.GGUFWriter`. llama.cpp knows splitting rules by name; the name is found from the rule
itself (pattern and order of steps), so that any vocabulary under a known rule is exported, and never by guessing from
the model. Not handled: SentencePiece, WordPiece and Unigram tokenizers.
"""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.errors import CheckpointError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES, _GPT2 = ("ByteLevel", False), ("ByteLevel", True)  # with its own regular expression or without

# (steps of the pre-tokenizer, words of the vocabulary beat merges) -> llama.cpp's name
PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((("Digits", True), _GPT2), False): "smollm",
    ((("Split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("Split", _QWEN2), _BYTES), False): "qwen2",
}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Raise CheckpointError, naming `where`, if the tokenizer cannot go into a GGUF file of `vocab_size` rows."""
    _parts(tokenizer, where)
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise CheckpointError(
            f"{where}: its tokenizer has id {largest}, its model only {vocab_size} rows; "
            "use the tokenizer and the weights of one and the same model."
        )


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Write vocabulary, kinds of tokens, merges, special ids and chat template to a `gguf.GGUFWriter`.

    Rows of the embedding beyond the tokenizer's ids get names of their own, marked unused. Raises as `check_tokenizer`.
    """
    import gguf

    rule, merges = _parts(tokenizer, where)
    tokens, kinds = [f"[PAD{index}]" for index in range(vocab_size)], [int(gguf.TokenType.UNUSED)] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        tokens[index], kinds[index] = token, int(gguf.TokenType.NORMAL)
    for index, added in tokenizer.added_tokens_decoder.items():
        kinds[index] = int(gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    _add_special(writer, tokenizer)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


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


def _parts(tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, list[str]]:
    """Return (llama.cpp's name of the splitting rule, merges)."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    parsed = {"model": {"type": type(tokenizer).__name__}} if backend is None else json.loads(backend.to_str())
    model, normalizer = parsed["model"], parsed.get("normalizer")
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece-like BPE" if model.get("byte_fallback") else model["type"]
        raise CheckpointError(f"{where}: GGUF export knows byte-level BPE tokenizers, this one is {kind}.")
    if not model["merges"]:
        raise CheckpointError(f"{where}: its tokenizer has no merges, without which llama.cpp refuses byte-level BPE.")
    steps = _steps(parsed.get("pre_tokenizer"))
    rule = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    # llama.cpp never normalises; NFC, which Qwen's has, changes only text that is not in that form already.
    if rule is None or (normalizer and normalizer["type"] != "NFC"):
        raise CheckpointError(
            f"{where}: its tokenizer splits text by a rule that GGUF export does not know ({_shown(steps)}); "
            f"known are those of {', '.join(PRE_TOKENIZERS.values())}."
        )
    return rule, [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """Return (kind, what decides) of every step; what changes nothing (offsets) is left out."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return ((kind, pre_tokenizer["use_regex"]),)
    if kind == "Digits":
        return ((kind, pre_tokenizer["individual_digits"]),)
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        return ((kind, pre_tokenizer["pattern"].get("Regex")),)
    return ((kind, "unusual"),)


def _shown(steps: tuple[tuple[str, Any], ...]) -> str:
    return " then ".join(f"{kind} {detail}" for kind, detail in steps) or "no splitting"
