"""Byte-level BPE tokenizers trained on a few sentences, under each splitting rule that GGUF export knows."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEMPLATE = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"
CORPUS = [
    "the ferry leaves at 06:15, they said; it's 3.5 hours, isn't it?",
    "def fare(distance):\n    return 12345\n",
] * 9


def bpe_tokenizer(rule: str = "gpt-2", vocab_size: int = 310) -> PreTrainedTokenizerFast:
    """Return a tokenizer with two special tokens and one added word that is not special."""
    backend = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    backend.pre_tokenizer = _rule(rule)
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        show_progress=False,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


def _rule(name: str) -> pre_tokenizers.PreTokenizer:
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = pre_tokenizers.Split(Regex(QWEN2 if name == "qwen2" else LLAMA3), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
