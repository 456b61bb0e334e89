"""Tensors of a checkpoint that transformers leaves aside on load, such as heads that predict several tokens.

In: the source's directory and a result's. Out: the result with those tensors, if all that they read kept its
shape; a sentence if they were left out. Not handled: quantised sources, and layers that were removed.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, tensor

from secateur.model.checkpoint import left_aside, open_checkpoint
from secateur.model.kept_tokens import KeptTokens
from secateur.model.tensors import StoredTensor, read_tensor, stored_tensors

FILE, INDEX = "model-aside.safetensors", "model.safetensors.index.json"
WHOLE, FIRST = "model.safetensors", "model-00001-of-00001.safetensors"

Shapes = dict[str, set[tuple[int, ...]]]
_IN_LAYER = re.compile(r"(?:.*\.)?layers?\.\d+\.(.+)")


def carry_aside(model: Any, source: Path, directory: Path, kept: KeptTokens | None) -> tuple[str, ...]:
    """Add the tensors to the result in `directory`, rows of tokens as in its embedding.

    Returns a sentence if they do not fit: a part of a layer that they have too, or a size that the
    config says, is another one than in the source.
    """
    if not model._keys_to_ignore_on_load_unexpected:
        return ()
    checkpoint = open_checkpoint(source, weights=False)
    if not (names := left_aside(checkpoint, model)):
        return ()
    before, after = stored_tensors(source), stored_tensors(directory)
    aside = {name: before.pop(name) for name in names}
    dense: Any = checkpoint.config.get_text_config()
    sizes, num_layers = {dense.vocab_size, dense.hidden_size, 2 * dense.hidden_size}, dense.num_hidden_layers
    changed = next(_changed(aside, _parts(before), _parts(after), sizes), "")
    if model.config.get_text_config().num_hidden_layers != num_layers and f".{num_layers}." in names[0]:
        changed = "they are numbered behind the layers, of which some are gone"
    if changed := "they are quantised" if checkpoint.quantised else changed:
        return (f"{len(aside)} tensors that transformers leaves aside ({names[0]}, ...) were left out: {changed}.",)

    # One file more, which the index names; a loader that finds a whole one reads no index.
    tensors = {name: _rows(read_tensor(each), kept) for name, each in aside.items()}
    save_file(tensors, directory / FILE, {"format": "pt"})
    (directory / FILE).chmod((directory / "config.json").stat().st_mode & 0o777)
    if (directory / WHOLE).is_file():
        (directory / WHOLE).rename(directory / FIRST)
    files = {name: FIRST if each.file.name == WHOLE else each.file.name for name, each in after.items()}
    size = sum(math.prod(each.shape) * each.dtype.itemsize for each in after.values()) + sum(
        each.nbytes for each in tensors.values()
    )
    places = sorted([*files.items(), *((name, FILE) for name in tensors)])
    index = {"metadata": {"total_size": size}, "weight_map": dict(places)}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return ()


def _rows(values: Tensor, kept: KeptTokens | None) -> Tensor:
    if kept and values.ndim == 2 and len(values) == kept.num_dense:
        return values.index_select(0, tensor(kept.dense_ids))
    return values


def _changed(aside: dict[str, StoredTensor], before: Shapes, after: Shapes, hidden: set[int]) -> Iterator[str]:
    """Yield parts of layers left aside that are of another shape in the result's layers, or that these lack."""
    for name, each in aside.items():
        part = match[1] if (match := _IN_LAYER.fullmatch(name)) else ""
        if before.get(part) != after.get(part) or (part and part not in before and not hidden.issuperset(each.shape)):
            yield f"{part} of the layers changed"


def _parts(stored: dict[str, StoredTensor]) -> Shapes:
    found: Shapes = {}
    for name, each in stored.items():
        if match := _IN_LAYER.fullmatch(name):
            found.setdefault(match[1], set()).add(each.shape)
    return found
