"""What a model's files are known by, without reading them whole. In: a checkpoint. Out: a digest per weight file."""

import hashlib
from pathlib import Path

from secateur.checkpoint import Checkpoint
from secateur.checkpoint_tensors import stored_tensors

SAMPLED_BYTES = 1 << 20


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
