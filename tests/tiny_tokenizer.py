"""A byte-level tokenizer for tests: one token per UTF-8 byte, `<eos>`, and a one-line-per-message chat template."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS = "<eos>"
CHAT_TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"


def tiny_tokenizer(*, begins: bool = False) -> PreTrainedTokenizerFast:
    """Return the tokenizer: 256 byte tokens with ids 0 to 255 and `<eos>` with id 256.

    `begins`: it puts `<eos>` before each text, as Llama's puts a token.
    """
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, chat_template=CHAT_TEMPLATE)
    if begins:
        added = [(EOS, tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{EOS} $A", None, added)
    return tokenizer
