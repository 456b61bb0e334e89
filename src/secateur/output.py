"""Writing a checkpoint: what a model directory holds.

In: a path, a model, a tokenizer. Out: safetensors weights, config, generation config, tokenizer and the side files of
the model it came from. Errors of the disk, whichever library meets them, become one sentence.
"""

import errno
import re
import shutil
from pathlib import Path
from types import TracebackType

from huggingface_hub.serialization._base import parse_size_to_int
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.checkpoint_quiet import quiet_transformers
from secateur.errors import CheckpointError, RecipeError

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another place",
    errno.EFBIG: "no file there may become that large; raise the limit (ulimit -f) or lower max_shard_size",
    errno.EACCES: "permission denied; choose another place or change its permissions",
    errno.EPERM: "permission denied; choose another place or change its permissions",
    errno.EROFS: "it is on a read-only file system; choose another place",
    errno.EIO: "the disk reports an input/output error; choose another disk",
}

# What a model directory may hold beside the files that saving writes anew.
_SIDE_FILES = (
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def check_free_space(directory: Path, num_bytes: int) -> None:
    """Raise CheckpointError if the disk of `directory` has fewer than `num_bytes` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(
            f"{directory.parent}: the run needs {num_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another place."
        )


def parse_size(key: str, text: str) -> int:
    """Return the bytes that a size such as "5GB" stands for. Raises RecipeError, naming `key`, if it is none."""
    try:
        num_bytes = parse_size_to_int(text)
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes <= 0:
        raise RecipeError(f"{key}: must be a number and KB, MB, GB or TB, such as 5GB, got '{text}'.")
    return num_bytes


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    max_shard_size: str,
    carry_from: Path | None,
) -> None:
    """Write the model, its configs and its tokenizer into `directory`; the same model gives the same bytes.

    Tied weights are written once. `carry_from`, the directory the model came from, gives its generation config as it
    is and the tokenizer and licence files that saving does not write; a directory without config.json gives nothing.

    Raises CheckpointError for disk errors, RecipeError for a bad `max_shard_size`.
    """
    num_shard_bytes = parse_size("max_shard_size", max_shard_size)
    with disk_errors(directory), quiet_transformers():
        tokenizer.save_pretrained(directory)
        _save_model(model, directory, num_shard_bytes)
        if carry_from is not None and (carry_from / "config.json").is_file():
            _carry(carry_from, directory)


class disk_errors:  # reads as a statement: with disk_errors(place):
    """Turn an error of the disk inside the block into a CheckpointError naming `place`; other errors pass.

    safetensors and tokenizers raise exceptions of their own (tokenizers: a bare Exception), whose text holds
    "(os error 28)"; hence a class with `__exit__` and not an except clause.
    """

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        rust = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(rust[1]) if rust else None
        if number not in _DISK_ERRORS:
            return
        # Of a copy the second is where it was written to.
        named = (error.filename2 or error.filename) if isinstance(error, OSError) else None
        place = re.sub(r"\.([^/]+)\.(partial-\d+|resume)", r"\1", str(named or self.place))  # hidden names say nothing
        raise CheckpointError(f"{place}: {_DISK_ERRORS[number]}.") from None


def _save_model(model: PreTrainedModel, directory: Path, num_shard_bytes: int) -> None:
    # save_pretrained refuses settings that loading accepts (temperature without sampling); to_json_file writes them.
    generation = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(directory, max_shard_size=num_shard_bytes)
    finally:
        model.generation_config = generation
    if generation is not None:
        generation.to_json_file(directory / "generation_config.json")
    readable = (directory / "config.json").stat().st_mode & 0o777
    for file in directory.glob("*.safetensors"):
        file.chmod(readable)  # safetensors lets only the owner read


def _carry(source: Path, directory: Path) -> None:
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", directory / "generation_config.json")
    for pattern in _SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            target = directory / file.relative_to(source)
            if file.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
