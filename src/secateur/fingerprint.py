"""What the files of a model are known by. In: a checkpoint. Out: a digest per weight file, or one of all files."""

import hashlib
from pathlib import Path

from secateur.checkpoint import Checkpoint
from secateur.checkpoint_locate import TOKENIZER_FILES
from secateur.checkpoint_tensors import stored_tensors

SAMPLED_BYTES = 1 << 20
_READ_BY_LOADING = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
    "tokenizer_config.json",
)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 over the names and bytes of the files that loading the model and its tokenizer reads."""
    patterns = (checkpoint.gguf_file,) if checkpoint.gguf_file else _READ_BY_LOADING
    paths = {path for pattern in patterns for path in checkpoint.directory.glob(pattern) if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as stream:
            digest.update(f"{path.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def weight_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Return a hash of every weight file by its name: of its size and its first, middle and last megabyte."""
    if checkpoint.gguf_file:
        files = {checkpoint.directory / checkpoint.gguf_file}
    else:
        files = {stored.file for stored in stored_tensors(checkpoint.directory).values()}
    return {file.name: _sampled(file) for file in sorted(files)}


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for place in (0, size // 2, max(0, size - SAMPLED_BYTES)):
            opened.seek(place)
            digest.update(opened.read(SAMPLED_BYTES))
    return digest.hexdigest()
