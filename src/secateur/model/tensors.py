"""The safetensors files of a checkpoint directory: their names, headers and tensors.

The headers alone reveal a missing shard, a truncated file and every tensor's shape; safetensors checks
them. Tensors are read into ordinary memory, or mapped from their files, where they occupy page cache only. Not
handled: pickle files (refused). What quantised tensors mean is in `quantised`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import str_to_torch_dtype

from secateur.errors import CheckpointError

_DTYPES = {**str_to_torch_dtype, "F8_E8M0": torch.float8_e8m0fnu}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What one tensor of a file is."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint by name, from the headers alone.

    Raises CheckpointError if there are no safetensors weights, or a shard is missing or damaged.
    """
    return {name: tensor for file in _weight_files(directory) for name, tensor in _read_header(file).items()}


def read_tensor(stored: StoredTensor, *, mapped: bool = False) -> torch.Tensor:
    """Return the tensor in its own memory, or `mapped`: a view of its file; writing to it copies its pages.

    Raises CheckpointError if the file has changed.
    """
    try:
        with safe_open(stored.file, framework="pt") as opened:
            tensor = opened.get_tensor(stored.name)
            return tensor if mapped else tensor.clone()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{stored.file}: cannot be read again ({error}); is something writing to it?") from None


class _Index(BaseModel):
    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def _weight_files(directory: Path) -> list[Path]:
    # In transformers' order of preference, so that both read the same weights.
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in directory.glob(f"*.{suffix}"))
        there = f"only pickle files ({', '.join(pickles[:3])}), which can run code when opened" if pickles else "none"
        raise CheckpointError(
            f"{directory}: needs safetensors weights (model.safetensors or its index), found {there}; convert pickle "
            'weights where you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('DIR', dtype='auto').save_pretrained('NEW')\" and copy the tokenizer files."
        )
    try:
        shard_of = _Index.model_validate_json(index.read_bytes()).weight_map
    except (OSError, ValueError):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to shard files; copy it again.") from None
    names = sorted(set(shard_of.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard '{name}' must be a plain file name inside {directory}.")
        if not os.path.isfile(directory / name):  # unlike Path.is_file, False for a name that no disk takes
            raise CheckpointError(f"{directory}: shard {name} named in {index.name} is missing; copy it there.")
    return [directory / name for name in names]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # no mapping
                piece = opened.get_slice(name)
                dtype, shape = piece.get_dtype(), tuple(piece.get_shape())
                if dtype not in _DTYPES:
                    allowed = ", ".join(_DTYPES)
                    raise CheckpointError(f"{file}: stores weights as {dtype}, not prunable; allowed: {allowed}.")
                tensors[name] = StoredTensor(file, name, _DTYPES[dtype], shape)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: is truncated, damaged or not safetensors ({error}); copy it again.") from None
    return tensors
