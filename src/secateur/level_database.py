"""The level database: every group's refitted reader at every level, on disk.

In: the columns kept and their refitted weights, one safetensors file per group and level. Out: a model's reader at full
width with those weights and zeros elsewhere, so that a plan is tried out without cutting anything. All levels together
take about half as many bytes as there are levels, times the readers'.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.budget import GroupKey


class LevelDatabase:
    """Files in `directory`, which must exist. `levels`: the numbers of units stored, from all of them down."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.levels: dict[GroupKey, list[int]] = {}

    def add(
        self,
        key: GroupKey,
        num_keep: int,
        columns_R: Int64[Tensor, " R"],
        weight_HR: Float[Tensor, "H R"],
        bias_H: Float[Tensor, " H"] | None,
    ) -> None:
        """Store one level; call from all units down. The first, all of them, is how the reader is put back.

        At level 0 the bias goes with the units.
        """
        tensors = {"columns": columns_R, "weight": weight_HR}
        if bias_H is not None:
            tensors["bias"] = bias_H if num_keep else torch.zeros_like(bias_H)
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, self._path(key, num_keep))
        self.levels.setdefault(key, []).append(num_keep)

    @torch.no_grad()
    def load_into(self, reader: nn.Linear, key: GroupKey, num_keep: int) -> None:
        """Give the reader the weights of one level, bit for bit, and zeros for the units that go."""
        stored = load_file(self._path(key, num_keep))  # memory-mapped
        reader.weight.zero_()
        reader.weight[:, stored["columns"].to(reader.weight.device)] = stored["weight"].to(reader.weight)
        if "bias" in stored:
            reader.bias.copy_(stored["bias"])

    def _path(self, key: GroupKey, num_keep: int) -> Path:
        return self.directory / f"layer{key[0]}-{key[1]}-{num_keep}.safetensors"
