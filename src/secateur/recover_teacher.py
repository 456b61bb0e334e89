"""What the teacher says of the training text: computed when a batch needs it, or written to disk once.

In: the dense model and blocks of tokens. Out: `Targets` for every position that predicts a token of a block. On disk
there are only the likeliest words: safetensors files of some blocks each, log probabilities in float16 and words in
int32, 6 bytes per word and position.

B: blocks of a batch, T: tokens of a block, P: T - 1 positions, K: words kept.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from safetensors import safe_open
from torch import Tensor, nn

from secateur.progress import Progress, silent
from secateur.recover_loss import Targets, targets_of
from secateur.whole_file import save_tensors

BYTES_PER_WORD = 2 + 4
SHARD_BLOCKS = 64


@torch.no_grad()
def live_targets(
    teacher: nn.Module, ids_BT: Int64[Tensor, "B T"], temperature: float, top_words: int | None
) -> Targets:
    """Return the teacher's targets for B x (T - 1) positions, block after block."""
    logits_BTV = teacher(input_ids=ids_BT, use_cache=False).logits
    return targets_of(logits_BTV[:, :-1].flatten(0, 1), temperature=temperature, num_words=top_words)


def cache_bytes(num_blocks: int, sequence_length: int, top_words: int) -> int:
    """Return the bytes on disk of a cache, but for headers of a few hundred bytes per file."""
    return num_blocks * (sequence_length - 1) * top_words * BYTES_PER_WORD


class TeacherCache:
    """The teacher's likeliest words for a list of blocks, in `directory`; complete shards are not computed again."""

    def __init__(self, directory: Path, num_blocks: int) -> None:
        self.directory, self.num_blocks = directory, num_blocks
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def is_complete(self) -> bool:
        """Say whether every shard is there, so that no teacher is needed."""
        return all(self._path(first).is_file() for first in range(0, self.num_blocks, SHARD_BLOCKS))

    def fill(
        self,
        teacher: nn.Module,
        blocks: Sequence[Int64[Tensor, " T"]],
        temperature: float,
        top_words: int,
        progress: Progress = silent,
    ) -> None:
        """Write the shards that are missing."""
        device = next(teacher.parameters()).device
        progress("teacher's words", 0, len(blocks))
        for first in range(0, len(blocks), SHARD_BLOCKS):
            path = self._path(first)
            if not path.is_file():
                found = [
                    live_targets(teacher, ids_T[None].to(device), temperature, top_words)
                    for ids_T in blocks[first : first + SHARD_BLOCKS]
                ]
                words = torch.stack([each.words_PK for each in found if each.words_PK is not None])
                tensors = {"log_p": torch.stack([each.log_p for each in found]).half(), "words": words.int()}
                save_tensors(path, tensors, {})
            progress("teacher's words", min(first + SHARD_BLOCKS, len(blocks)), len(blocks))

    def targets(self, number: int) -> Targets:
        """Return the targets of block `number`."""
        first, inside = number // SHARD_BLOCKS * SHARD_BLOCKS, number % SHARD_BLOCKS
        with safe_open(self._path(first), framework="pt") as opened:
            return Targets(opened.get_slice("log_p")[inside].float(), opened.get_slice("words")[inside])

    def _path(self, first: int) -> Path:
        return self.directory / f"blocks-{first}.safetensors"
