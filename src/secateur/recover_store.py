"""Finished layers and stages of an interrupted recovery, kept in a directory until the whole job is done.

In: a layer and what the log says of it. Out: one safetensors file per layer, its log line in the file's header, each
appearing complete or not at all. Nothing is checked here but that the tensors fit.
"""

from pathlib import Path
from typing import Any

from torch import nn

from secateur.whole_file import load_tensors, save_tensors


class LayerStore:
    """`directory` None: nothing is kept."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def load(self, index: int, layer: nn.Module) -> dict[str, Any] | None:
        """Give the layer its finished weights and return its log line; None, and nothing changed, if it is not done."""
        path = self._path(index)
        if path is None or not path.is_file():
            return None
        tensors, line = load_tensors(path)
        for name, parameter in layer.named_parameters():
            parameter.data = tensors[name].to(parameter.device)
        return line

    def save(self, index: int, layer: nn.Module, line: dict[str, Any]) -> None:
        """Write the layer as it is now."""
        path = self._path(index)
        if path is None:
            return
        save_tensors(path, dict(layer.named_parameters()), line)

    def _path(self, index: int) -> Path | None:
        return None if self.directory is None else self.directory / f"layer-{index}.safetensors"
