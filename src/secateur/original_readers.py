"""Keeps the readers as they would be without compensation, on disk, to measure "the same cut, uncompensated".

In: each reader just before it is cut. Out: the model with those readers exchanged for the compensated ones, and back.
"""

from pathlib import Path

import torch
from jaxtyping import Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.arch import Group, linear


class OriginalReaders:
    """One safetensors file per group in `directory`, holding the original columns of the units kept so far."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def narrow(self, layer: nn.Module, group: Group, columns: Int64[Tensor, " R"]) -> None:
        """Note that `columns` of the reader's present inputs stay. Call before the reader is cut."""
        path = self._path(group)
        tensors = load_file(path) if path.exists() else _tensors(linear(layer, group.reader.module))
        tensors["weight"] = tensors["weight"][:, columns.cpu()].contiguous()
        save_file(tensors, path)

    @torch.no_grad()
    def exchange(self, layers: list[nn.Module], groups: tuple[Group, ...]) -> None:
        """Swap the readers in the model with those on disk; a second call swaps them back, bit for bit."""
        for group in groups:
            reader, path = linear(layers[group.layer], group.reader.module), self._path(group)
            stored, present = load_file(path), _tensors(reader)
            save_file(present, path)
            for name, tensor in stored.items():
                reader.get_parameter(name).copy_(tensor)

    def _path(self, group: Group) -> Path:
        return self.directory / f"layer{group.layer}-{group.name}.safetensors"


def _tensors(reader: nn.Linear) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in reader.named_parameters()}
