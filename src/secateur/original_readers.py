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
            save_file(_tensors(linear(layer, group.reader.module)), self._path(group))

    def forget(self, group: Group) -> None:
        """Forget the group, which is gone whole, so that there is no reader to put anything back into."""
        self._path(group).unlink(missing_ok=True)

    @contextmanager
    def in_place(
        self, layers: list[nn.Module], groups: tuple[Group, ...], keeps: Mapping[GroupKey, Tensor]
    ) -> Iterator[None]:
        """Within the context readers have their original weights in the columns that stayed; then their own again.

        Of the groups those are meant whose readers were kept; one without an entry in `keeps` has lost no unit.
        """
        kept = [group for group in groups if self._path(group).exists()]
        readers = {group: linear(layers[group.layer], group.reader.module) for group in kept}
        for group, reader in readers.items():
            save_file(_tensors(reader), self._path(group, "own"))
        try:
            for group, reader in readers.items():
                stayed = keeps.get((group.layer, group.name), torch.arange(group.num_units))
                columns = rows_of(stayed, group.reader.segments, group.num_units)
                stored = load_file(self._path(group))
                _fill(reader, stored | {"weight": stored["weight"][:, columns]})
            yield
        finally:
            for group, reader in readers.items():
                _fill(reader, load_file(self._path(group, "own")))

    def _path(self, group: Group, which: str = "original") -> Path:
        return self.directory / f"{which}-{group.layer}-{group.name}.safetensors"


@torch.no_grad()
def _fill(reader: nn.Linear, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        reader.get_parameter(name).copy_(tensor)


def _tensors(reader: nn.Linear) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in reader.named_parameters()}
