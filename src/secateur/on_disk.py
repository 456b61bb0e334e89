"""Weights that a round does not need in memory, kept on disk meanwhile.

In: a model, a scratch directory. Out: its embedding and head as memory-mapped files while a round runs, back in memory
afterwards, bit for bit; and its layers as they were before a cut, for the dense stream or to go back to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from secateur.arch import Group

EMBEDDINGS_FILE = "embeddings.safetensors"


@contextmanager
def embeddings_on_disk(
    model: PreTrainedModel, directory: Path, *, are_there: bool = False
) -> Iterator[Callable[[], None]]:
    """Within the context embedding and head are mapped from a file, so that no memory is spent on them until they run.

    Yields a function that gives back the memory which they took when they ran. Only in ordinary memory; on other
    devices nothing happens, nor where they `are_there` already.
    """
    if are_there:
        yield lambda: None
        return
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    parameters = {id(p): p for module in modules if module is not None for p in module.parameters()}
    held = {str(number): p for number, p in enumerate(parameters.values()) if p.device.type == "cpu"}
    path = directory / EMBEDDINGS_FILE
    save_file({name: p.detach().contiguous() for name, p in held.items()}, path)

    def map_anew() -> None:
        for name, tensor in load_file(path).items():
            held[name].data = tensor

    map_anew()
    try:
        yield map_anew
    finally:
        for p in held.values():
            p.data = p.data.clone()
        path.unlink()


class LayersOnDisk:
    """One safetensors file per layer, called `name`, and the numbers of units and the configs that its modules held."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name
        self.counts: dict[int, dict[str, Any]] = {}

    @property
    def indices(self) -> list[int]:
        """Layers that are kept."""
        return list(self.counts)

    def keep(self, index: int, layer: nn.Module, groups: list[Group]) -> None:
        """Write the layer as it is now."""
        # Unlinked first: a file that is still mapped keeps what it held.
        self._path(index).unlink(missing_ok=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in layer.named_parameters()}, self._path(index))
        self.counts[index] = {name: _count(layer, name) for group in groups for name in group.attributes}

    def put_back(self, index: int, layer: nn.Module) -> None:
        """Make the layer what it was when it was kept."""
        device = next(layer.parameters()).device
        for name, tensor in load_file(self._path(index)).items():
            _put(layer, name, nn.Parameter(tensor.to(device), requires_grad=False))
        for name, count in self.counts[index].items():
            _put(layer, name, count)
        _state_sizes(layer)

    @contextmanager
    def in_place(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Within the context the layer is as it was kept; afterwards as it was before."""
        own = dict(layer.named_parameters())
        own_counts = {name: _count(layer, name) for name in self.counts[index]}
        try:
            self.put_back(index, layer)
            yield
        finally:
            for name, value in (own | own_counts).items():
                _put(layer, name, value)
            _state_sizes(layer)

    def _path(self, index: int) -> Path:
        return self.directory / f"{self.name}-{index}.safetensors"


def forget_weights(module: nn.Module) -> None:
    """Free the memory of the module's weights; the module itself stays."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def _state_sizes(layer: nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape


def _count(layer: nn.Module, name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(layer.get_submodule(module), attribute)


def _put(layer: nn.Module, name: str, value: Any) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(layer.get_submodule(module), attribute, value)
