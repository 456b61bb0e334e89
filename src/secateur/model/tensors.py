"""The safetensors files of a checkpoint directory: their names, headers and tensors.

The headers alone reveal a missing shard, a truncated file and every tensor's shape. Tensors are
read into ordinary memory, or mapped from their files, where they occupy page cache only. Not
handled: pickle files (refused). What quantised tensors mean is in `quantised`.
"""

import math
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from secateur.errors import CheckpointError
from secateur.files import json_of

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `num_bytes` bytes at `offset` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint by name, from the headers alone.

    Raises CheckpointError if there are no safetensors weights, or a shard is missing or damaged.
    """
    headers = (_read_header(file) for file in _weight_files(directory))
    return {name: stored for header in headers for name, stored in header.items()}


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Return the tensor in its own memory. Raises CheckpointError if the file has shrunk."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    buffer: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        num_read = file.readinto(buffer)
    if num_read != stored.num_bytes:
        raise CheckpointError(f"{stored.file}: ended while it was being read; is something writing to it?")
    return tensor


def mapped_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor by name as a view of its mapped file; writing to one copies its pages."""
    stored = stored_tensors(directory)
    files: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in {each.file for each in stored.values()}}
    return {name: files[each.file].get_tensor(name) for name, each in stored.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises CheckpointError if it does not hold one."""
    try:
        data = json_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download or copy it again.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {type(data).__name__}.")
    return data


def _weight_files(directory: Path) -> list[Path]:
    # In transformers' order of preference, so that both read the same weights.
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in directory.glob(f"*.{suffix}"))
        found = f"only pickle files ({', '.join(pickles[:3])}), which can run code when opened" if pickles else "none"
        raise CheckpointError(
            f"{directory}: needs safetensors weights (model.safetensors or its index), found {found}; convert pickle "
            'weights where you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('DIR', dtype='auto').save_pretrained('NEW')\" and copy the tokenizer files."
        )
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{index}: has no weight_map from tensor names to shard files; copy it again.")
    names = sorted({str(name) for name in shard_of.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard '{name}' must be a plain file name inside {directory}.")
        if not os.path.isfile(directory / name):  # unlike Path.is_file, False for a name that no disk takes
            raise CheckpointError(f"{directory}: shard {name} named in {index.name} is missing; copy it there.")
    return [directory / name for name in names]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    num_file_bytes = file.stat().st_size
    with file.open("rb") as opened:
        data_start = 8 + int.from_bytes(opened.read(8), "little")
        if data_start > num_file_bytes:
            raise CheckpointError(f"{file}: is truncated or not safetensors ({num_file_bytes} bytes); copy it again.")
        raw = opened.read(data_start - 8)
    try:
        header = json_of(raw)
        header.pop("__metadata__", None)
        tensors = {name: _stored(file, data_start, entry) for name, entry in header.items()}
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise CheckpointError(f"{file}: its safetensors header is malformed; copy the file again.") from None
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=data_start)
    if end != num_file_bytes:
        sizes = f"its header describes {end} bytes, the file has {num_file_bytes}"
        raise CheckpointError(f"{file}: is truncated or damaged: {sizes}; copy it again.")
    _check_layout(file, data_start, tensors)
    return tensors


def _check_layout(file: Path, data_start: int, tensors: dict[str, StoredTensor]) -> None:
    """Raise CheckpointError unless every byte belongs to one tensor, as the format demands."""
    end, before = data_start, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset < end:
            raise CheckpointError(f"{file}: tensors {before} and {name} share bytes; get the file from its source.")
        if tensor.offset > end:
            gap = f"the {tensor.offset - end} bytes before tensor {name} belong to no tensor"
            raise CheckpointError(f"{file}: {gap}; get the file from its source.")
        end, before = tensor.offset + tensor.num_bytes, name


def _stored(file: Path, data_start: int, entry: Any) -> StoredTensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        allowed = ", ".join(_DTYPES)
        raise CheckpointError(f"{file}: stores weights as {entry['dtype']}, not prunable; allowed: {allowed}.")
    begin, end = map(operator.index, entry["data_offsets"])
    shape = tuple(map(operator.index, entry["shape"]))
    if end - begin != math.prod(shape) * dtype.itemsize or min(begin, *shape, 0) < 0:
        raise ValueError("offsets and shape disagree")
    return StoredTensor(file, dtype, shape, data_start + begin, end - begin)
