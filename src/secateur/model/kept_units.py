"""keep.json: which layers and units of the dense model a result has.

Layers that went are named by the first entry, group `layers`: those that stayed, by their dense numbers.
The other entries number layers as the result does: n is the n-th of these.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files import json_of
from secateur.model.group import GroupKey

KEEP_FILE = "keep.json"
# The original indices of the units that stay, sorted, by layer and group.
Keeps = dict[GroupKey, Tensor]


def write_keeps(directory: Path, layers: Sequence[int], keeps: Mapping[GroupKey, Tensor]) -> None:
    """Write the file. `layers`: those that stayed; empty if all did."""
    entries = [{"group": "layers", "keep": layers}] if layers else []
    units = [{"layer": layer, "group": group, "keep": keep.tolist()} for (layer, group), keep in keeps.items()]
    (directory / KEEP_FILE).write_text(json.dumps([*entries, *units]) + "\n", encoding="utf-8")


def read_keeps(directory: Path, num_layers: int) -> tuple[tuple[int, ...], Keeps]:
    """Return the dense layers that stayed, and the units of each group. `num_layers`: of the dense model.

    Raises CheckpointError for a missing or damaged file.
    """
    layers, keeps = tuple(range(num_layers)), Keeps()
    try:
        for entry in json_of((directory / KEEP_FILE).read_text(encoding="utf-8")):
            keep = torch.tensor(entry["keep"])
            ascends = bool((keep >= 0).all() and (keep.diff() > 0).all())
            if keep.dtype != torch.long or not keep.numel() or not ascends:
                raise bad_keeps(directory)
            if entry["group"] == "layers":
                layers = tuple(keep.tolist())
            else:
                keeps[int(entry["layer"]), str(entry["group"])] = keep
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        raise bad_keeps(directory) from None
    return layers, keeps


def bad_keeps(directory: Path) -> CheckpointError:
    """Return the error for a file that names no units of the model."""
    return CheckpointError(
        f"{directory / KEEP_FILE}: does not name units that stay; use the file that secateur prune wrote."
    )
