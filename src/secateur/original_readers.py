"""Keeps the readers as they were before any cut, on disk, to measure "the same cut, uncompensated".

In: each reader before it is first cut. Out: within a context, the model with the original columns of the units that
stayed, instead of the compensated ones.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.arch import Group, linear
from secateur.budget import GroupKey
from secateur.cut import rows_of


class OriginalReaders:
    """One safetensors file per group in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def keep(self, layer: nn.Module, group: Group) -> None:
        """Write the group's reader as it is, unless it has been written before."""
        if not self._path(group).exists():
            save_file(_tensors(_weights(layer, group)), self._path(group))

    @contextmanager
    def in_place(
        self, layers: list[nn.Module], groups: tuple[Group, ...], keeps: Mapping[GroupKey, Tensor]
    ) -> Iterator[None]:
        """Within the context readers have their original weights in the columns that stayed; then their own again.

        Of the groups those are meant whose readers were kept; one without an entry in `keeps` has lost no unit.
        """
        kept = [group for group in groups if self._path(group).exists()]
        for group in kept:
            save_file(_tensors(_weights(layers[group.layer], group)), self._path(group, "own"))
        try:
            for group in kept:
                stayed = keeps.get((group.layer, group.name), torch.arange(group.num_units))
                stored = load_file(self._path(group))
                stored["weight"] = _what_stayed(stored["weight"], group, stayed)
                _fill(_weights(layers[group.layer], group), stored)
            yield
        finally:
            for group in kept:  # whose parameters may be others by now, on a device or home from there
                _fill(_weights(layers[group.layer], group), load_file(self._path(group, "own")))

    def _path(self, group: Group, which: str = "original") -> Path:
        return self.directory / f"{which}-{group.layer}-{group.name}.safetensors"


def _weights(layer: nn.Module, group: Group) -> dict[str, nn.Parameter]:
    """Return the group's reader: a linear's parameters, or the stack of all experts' readers."""
    if group.experts is None:
        return dict(linear(layer, group.reader.module).named_parameters())
    return {"weight": layer.get_submodule(group.experts.module).get_parameter(group.experts.stacks.down)}


def _what_stayed(weight: Tensor, group: Group, stayed: Tensor) -> Tensor:
    if group.experts is None:
        return weight[:, rows_of(stayed, group.reader.segments, group.num_units)]
    if not group.experts.are_channels:
        return weight[stayed]
    if stayed.ndim == 1:  # nothing has gone
        return weight
    along, axis = (stayed[:, :, None], 1) if group.experts.stacks.transposed else (stayed[:, None, :], 2)
    return torch.take_along_dim(weight, along, dim=axis)


@torch.no_grad()
def _fill(reader: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        reader[name].copy_(tensor)


def _tensors(reader: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in reader.items()}
