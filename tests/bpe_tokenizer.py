"""BPE tokenizers trained on a few sentences: byte-level and SentencePiece's, under each rule that GGUF export knows."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"llama-bpe": LLAMA3, "qwen2": QWEN2, "tekken": TEKKEN}
SPACE = "\u2581"
TEMPLATE = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"
FERRY = "the ferry leaves at 06:15, they said; it's 3.5 hours, isn't it?"
CORPUS = [FERRY, "def fare(distance):\n    return 12345\n"] * 9

# Sentences in scripts that the text which is pruned on does not have.
SAMPLES = {
    "Chinese": "今天早上下雨,所以我们坐公共汽车去学校。老师请大家打开书,读第一页。",
    "Russian": "Утром шёл дождь, поэтому мы поехали в школу на автобусе. Учитель попросил открыть книгу.",
    "Arabic": "نزل المطر هذا الصباح، لذلك ذهبنا إلى المدرسة بالحافلة.",
    "Hindi": "आज सुबह बारिश हो रही थी, इसलिए हम बस से स्कूल गए। शिक्षक ने सबसे किताब खोलकर पहला पन्ना पढ़ने को कहा।",
    "German": "Heute Morgen regnete es, deshalb fuhren wir mit dem Bus zur Schule. Die Lehrerin bat alle, das Buch "
    "aufzuschlagen und die erste Seite zu lesen.",
}


def bpe_tokenizer(rule: str = "gpt-2", vocab_size: int = 310, corpus: list[str] = CORPUS) -> PreTrainedTokenizerFast:
    """Return a tokenizer with two special tokens and one added word that is not special."""
    backend = Tokenizer(models.BPE(ignore_merges=rule in ("llama-bpe", "tekken")))
    backend.pre_tokenizer = _rule(rule)
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    first = {"special_tokens": ["<|start|>", "<|end|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, show_progress=False, **first)
    backend.train_from_iterator(corpus, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    special = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)


def sentencepiece_tokenizer(rule: str = "mistral", vocab_size: int = 380) -> PreTrainedTokenizerFast:
    """Return what transformers makes of a SentencePiece model: 3 special tokens, bytes, pieces, every split a merge.

    `rule`: mistral puts a space before every piece of text, llama before the first, gemma nowhere. Gemma's has "\\n\\n"
    and two spaces as added tokens that are not special.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocab_size - 3 - 256, show_progress=False))
    special, learned = ["<s>", "</s>", "<unk>"], sorted(learner.get_vocab(), key=learner.token_to_id)
    added = ["\n\n", SPACE * 2] if rule == "gemma" else []
    pieces = [*added, *(piece for piece in learned if len(piece) > 1), "na", "ana"]  # an+a and a+na make ana
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *(p for p in learned if len(p) == 1)]
    vocabulary = {name: index for index, name in enumerate(names)}
    splits = [(piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece))]
    merges = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    escape = normalizers.Replace(" ", SPACE)
    if rule == "mistral":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape])  # type: ignore[assignment]
    elif rule == "llama":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # type: ignore[assignment]
    else:
        backend.normalizer = escape  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # type: ignore[assignment]
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    start = [("<s>", vocabulary["<s>"])]
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, start)  # type: ignore[assignment]
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **named)


def _rule(name: str) -> pre_tokenizers.PreTokenizer:
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = pre_tokenizers.Split(Regex(PATTERNS[name]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
