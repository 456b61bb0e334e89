"""Reading a checkpoint's tokenizer. Never remote code; what cannot be read is one sentence."""

from pathlib import Path
from types import TracebackType

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from secateur.checkpoint import Checkpoint
from secateur.checkpoint_config import BAD_GGUF, one_line
from secateur.checkpoint_locate import TOKENIZER_FILES
from secateur.checkpoint_quiet import quiet_transformers
from secateur.checkpoint_tensors import read_json
from secateur.errors import CheckpointError


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Return the tokenizer, its chat template included.

    Raises CheckpointError if there is none, or it cannot be read without remote code or packages not installed.
    """
    directory = checkpoint.directory
    with _tokenizer_errors(directory), quiet_transformers():
        if checkpoint.gguf_file:
            # AutoTokenizer would parse the whole file once more to find out that it wants this class.
            return PreTrainedTokenizerFast.from_pretrained(directory, gguf_file=checkpoint.gguf_file)
        _check_tokenizer_files(directory)
        return AutoTokenizer.from_pretrained(directory, config=checkpoint.config, trust_remote_code=False)


def check_same_tokens(
    pruned: Checkpoint,
    dense: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    option: str,
    instead: str = "give the model that was pruned",
) -> None:
    """Raise CheckpointError unless both models read text as the same tokens and give as many logits.

    `tokenizer`: that of the pruned model. `option`: by which the dense model was given. `instead`: what to do where
    the tokenizers differ.
    """
    other = load_tokenizer(dense)
    if tokenizer.get_vocab() != other.get_vocab():
        raise CheckpointError(
            f"{option} {dense.reference}: its tokenizer ({len(other):,} tokens) is not that of {pruned.reference} "
            f"({len(tokenizer):,} tokens), so both would read different text; {instead}."
        )
    num_logits, num_other = (each.config.get_text_config().vocab_size for each in (pruned, dense))
    if num_logits != num_other:
        raise CheckpointError(
            f"{option} {dense.reference}: it gives {num_other:,} logits and {pruned.reference} {num_logits:,}, so "
            "their predictions cannot be compared; give the model that was pruned."
        )


class _tokenizer_errors:
    """Turn what transformers and tokenizers raise for a tokenizer they cannot use into a CheckpointError.

    tokenizers raises a bare Exception, which no except clause can name without catching everything.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, CheckpointError):
            return
        if kind is Exception or isinstance(error, (*BAD_GGUF, ImportError)):
            raise CheckpointError(f"{self.directory}: its tokenizer cannot be loaded ({one_line(error)}).") from None


def _check_tokenizer_files(directory: Path) -> None:
    if not any(any(directory.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise CheckpointError(
            f"{directory}: has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); copy the model's own there."
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            read_json(directory / name)
