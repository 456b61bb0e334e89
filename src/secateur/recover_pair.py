"""The two models of a recovery, opened and compared before anything runs.

In: a pruned checkpoint and the dense one. Out: both checkpoints, or one sentence on why they do not belong together.
Only configs, tokenizers and headers are read here.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.arch import Arch, bind
from secateur.checkpoint import Checkpoint, check_weights, meta_model, open_checkpoint
from secateur.checkpoint_tokenizer import check_same_tokens, load_tokenizer
from secateur.errors import CheckpointError

KEEP_FILE = "keep.json"


@dataclass(frozen=True, slots=True)
class Candidates:
    """Both checkpoints and their shapes."""

    pruned: Checkpoint
    teacher: Checkpoint
    pruned_shape: PreTrainedModel
    teacher_shape: PreTrainedModel
    teacher_arch: Arch
    tokenizer: PreTrainedTokenizerBase


def open_pair(pruned: str | Path, teacher: str | Path) -> Candidates:
    """Open both and check that one can teach the other, token by token and layer by layer.

    Raises CheckpointError if either cannot be opened, or vocabulary, tokenizer, family, hidden size or layers differ.
    """
    student, dense = open_checkpoint(pruned), open_checkpoint(teacher)
    shapes = meta_model(student.config), meta_model(dense.config)
    archs = bind(shapes[0]), bind(shapes[1])
    tokenizer = load_tokenizer(student)
    check_same_tokens(student, dense, tokenizer, "--teacher")
    if archs[0].family != archs[1].family:
        raise CheckpointError(
            f"--teacher {teacher}: is a {archs[1].family} model and {pruned} a {archs[0].family} one; give the model "
            "that was pruned."
        )
    hidden, other = (shape.config.get_text_config().hidden_size for shape in shapes)
    if hidden != other:
        raise CheckpointError(
            f"--teacher {teacher}: its hidden size is {other} and that of {pruned} {hidden}; give the model that was "
            "pruned."
        )
    _check_layers(student, archs[0].num_layers, archs[1].num_layers, str(teacher))
    for checkpoint, shape in zip((student, dense), shapes, strict=True):
        check_weights(checkpoint, shape)
    return Candidates(student, dense, *shapes, archs[1], tokenizer)


def _check_layers(student: Checkpoint, num_layers: int, num_dense: int, teacher: str) -> None:
    """Check that the pruned model has the dense layers that stayed, by keep.json where any went."""
    path = student.directory / KEEP_FILE
    found: list[list[int]] = []
    if path.is_file():
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            found = [entry["keep"] for entry in entries if entry["group"] == "layers"]
        except (OSError, ValueError, TypeError, KeyError):
            raise CheckpointError(f"{path}: cannot be read; use the file that secateur prune wrote.") from None
    layers = tuple(found[0]) if found else tuple(range(num_dense))
    if len(layers) != num_layers or layers[-1] >= num_dense:
        says = f"{path} names {len(layers)} that stayed" if found else f"no {KEEP_FILE} says that any went"
        raise CheckpointError(
            f"--teacher {teacher}: has {num_dense} layers and {student.reference} {num_layers}, and {says}; give the "
            "model that was pruned."
        )
