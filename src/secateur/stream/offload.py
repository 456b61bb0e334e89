"""Where weights lie: layers that come to a device one at a time, and layers kept on disk during a round."""

from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.model.checkpoint import CausalLM
from secateur.model.group import Group
from secateur.stream.device import CPU, bring, parameter_on, raised

# The layers that are not at home by themselves: send_home is told a layer alone.
_TRAVELLERS: "WeakKeyDictionary[nn.Module, LayersOnDevice]" = WeakKeyDictionary()

_Place = tuple[nn.Module, str]


@dataclass(frozen=True, slots=True)
class _Trip:
    """A parameter at home and its copy on the device, each with the number of changes it had seen.

    `place`: of the numbers at home, for which others may be put under the same parameter.
    """

    home: nn.Parameter
    home_version: int
    place: int
    away: nn.Parameter
    away_version: int

    def is_of(self, parameter: nn.Parameter | None) -> bool:
        """Whether the copy is still one of the parameter at home."""
        same = parameter is self.home and self.home._version == self.home_version
        return same and self.home.data_ptr() == self.place

    def is_unchanged(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter is the copy on the device, as it came."""
        return parameter is self.away and parameter._version == self.away_version


class LayersOnDevice:
    """Brings `layers` to `device`, one at a time, from the moment that it is made until `end`.

    `in_float32`: they compute in it there, whatever they are stored in.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device, *, in_float32: bool = False) -> None:
        self.layers, self.in_float32 = layers, in_float32
        self.device = torch.empty(1, device=device).device  # with its number, as tensors there say it
        self.dtypes = {place: p.dtype for layer in layers for place, p in _parameters(layer)}
        self.there: dict[int, dict[_Place, _Trip]] = {}
        self.coming: tuple[int, Future[dict[_Place, _Trip]]] | None = None
        self.carrier = ThreadPoolExecutor(1, thread_name_prefix="secateur-layer")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.handles = [
            layer.register_forward_pre_hook(lambda *_, index=index: self.come(index), prepend=True)
            for index, layer in enumerate(layers)
        ]
        for layer in layers:
            _TRAVELLERS[layer] = self

    def come(self, index: int) -> None:
        """Have layer `index` on the device, and no other one."""
        # A layer whose forward is replaced does not run, so its weights need not come.
        if "forward" in self.layers[index].__dict__:
            return
        with torch.inference_mode(False), torch.no_grad():
            if index not in self.there:
                self.go()
                self.there[index] = self._arrived(index)
                if index + 1 < len(self.layers):
                    self.coming = index + 1, self.carrier.submit(self._trips, index + 1)
            else:  # what was put into it meanwhile
                self.there[index] |= self._trips(index)
            for (module, name), trip in self.there[index].items():
                if trip.is_of(module._parameters[name]):
                    module._parameters[name] = trip.away
                if self.stream is not None:  # its memory is not to be given to the next copy while it is in use
                    trip.away.record_stream(torch.cuda.current_stream(self.device))
            for module in self.layers[index].modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.to(self.device)

    def fetch(self, layer: nn.Module) -> None:
        """Have this layer there."""
        self.come(next(index for index, mine in enumerate(self.layers) if mine is layer))

    def settle(self, layer: nn.Module) -> None:
        """Round what was changed of the layer to the dtypes that it is stored in."""
        trips = next((self.there.get(index, {}) for index, mine in enumerate(self.layers) if mine is layer), {})
        with torch.no_grad():
            for place, parameter in _parameters(layer):
                if place in trips and trips[place].is_unchanged(parameter):
                    continue
                stored = self.dtypes.get(place, parameter.dtype)
                if parameter.dtype != stored:
                    parameter.copy_(parameter.to(stored))

    def go(self) -> None:
        """Send home what is on the device: what was changed of it, and what it was else."""
        for index, trips in self.there.items():
            for place, now in _parameters(self.layers[index]):
                trip = trips.get(place)
                if trip is not None and trip.is_unchanged(now):
                    place[0]._parameters[place[1]] = trip.home
                else:
                    place[0]._parameters[place[1]] = parameter_on(CPU, now, self.dtypes.get(place))
        self.there = {}

    def end(self) -> None:
        """Leave all layers at home."""
        self.go()
        self.carrier.shutdown()
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            _TRAVELLERS.pop(layer, None)

    def _arrived(self, index: int) -> dict[_Place, _Trip]:
        """Return a trip of every parameter of the layer as it is now; those on their way where they are of these."""
        coming, self.coming = self.coming, None
        known = coming[1].result() if coming is not None and coming[0] == index else {}
        still = {place: trip for place, trip in known.items() if trip.is_of(place[0]._parameters.get(place[1]))}
        return still | self._trips(index, but=still)

    def _trips(self, index: int, but: Container[_Place] = ()) -> dict[_Place, _Trip]:
        """Copy the layer's parameters that are not on the device; called also by the thread that runs ahead."""
        context = nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        found: dict[_Place, _Trip] = {}
        with context, torch.no_grad():
            for place, parameter in _parameters(self.layers[index]):
                if place not in but and (parameter.device, parameter.dtype) != self._wanted(parameter):
                    found[place] = self._trip(parameter)
            if self.stream is not None:
                self.stream.synchronize()  # pinned sources may go
        return found

    def _wanted(self, parameter: nn.Parameter) -> tuple[torch.device, torch.dtype]:
        return self.device, raised(parameter.dtype) if self.in_float32 else parameter.dtype

    def _trip(self, parameter: nn.Parameter) -> _Trip:
        version, place = parameter._version, parameter.data_ptr()
        # Only from pinned memory does a copy run beside the computation.
        source = parameter.detach() if self.stream is None else parameter.detach().pin_memory()
        moved = source.to(*self._wanted(parameter), non_blocking=True)
        away = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        return _Trip(parameter, version, place, away, away._version)


def fetch(layer: nn.Module) -> None:
    """Have the layer on the device before it is run, if it is one of those that come and go."""
    if layer in _TRAVELLERS:
        _TRAVELLERS[layer].fetch(layer)


def settle(layer: nn.Module) -> None:
    """Round what was changed of the layer to what it is stored in, if it computes in more than that."""
    if layer in _TRAVELLERS:
        _TRAVELLERS[layer].settle(layer)


def send_home(layer: nn.Module) -> None:
    """Bring the layer back to ordinary memory, if it is one of those that come and go."""
    if layer in _TRAVELLERS:
        _TRAVELLERS[layer].go()


class Placement:
    """A model's way to a device and back: all of it, or all but its layers, which come one at a time.

    `in_float32`: there it computes in float32, and its layers come one at a time. On the CPU nothing happens otherwise.
    """

    def __init__(
        self, root: nn.Module, layers: list[nn.Module], device: torch.device, *, one_at_a_time: bool, in_float32: bool
    ) -> None:
        self.root, self.device, self.in_float32 = root, device, in_float32
        self.stays = device.type == "cpu" and not in_float32
        self.one_at_a_time = one_at_a_time or in_float32
        # Nothing is held of a model that stays, so that layers that are removed from it are gone.
        self.layers = [] if self.stays else layers
        self.dtypes = {} if self.stays else {place: parameter.dtype for place, parameter in _parameters(root)}
        self.travelling: LayersOnDevice | None = None

    def go(self) -> None:
        """Bring the model to the device."""
        if self.stays:
            return
        to_float32 = (lambda _, __, parameter: raised(parameter.dtype)) if self.in_float32 else None
        bring(self.root, self.device, but=self.layers if self.one_at_a_time else (), dtype=to_float32)
        if self.one_at_a_time:
            self.travelling = LayersOnDevice(self.layers, self.device, in_float32=self.in_float32)

    def come_home(self) -> None:
        """Bring it back to ordinary memory, in the dtypes that it is stored in."""
        if self.stays:
            return
        if self.travelling is not None:
            self.travelling.end()
            self.travelling = None
        bring(self.root, CPU, dtype=lambda module, name, parameter: self.dtypes.get((module, name), parameter.dtype))

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Within the context the model is in ordinary memory, to be saved."""
        self.come_home()
        yield
        self.go()


def _parameters(root: nn.Module) -> Iterator[tuple[_Place, nn.Parameter]]:
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (module, name), parameter


EMBEDDINGS_FILE = "embeddings.safetensors"


@contextmanager
def embeddings_on_disk(model: CausalLM, directory: Path, *, are_there: bool = False) -> Iterator[Callable[[], None]]:
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
