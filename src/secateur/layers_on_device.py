"""Decoder layers that come to a device one at a time, for a model that does not fit there whole.

In: a model whose layers lie in ordinary memory or are mapped from files, and a device. Out: the same model, with all
but its layers on the device; a layer comes when it is run and goes when another one is, while the next is on its way.
What was changed of a layer on the device goes home with it; what was not is still there, so nothing is copied back.

Letters: none; weights only.
"""

from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from secateur.device import CPU, bring, parameter_on

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


class LayersOnDevice:
    """Brings `layers` to `device`, one at a time, from the moment that it is made until `end`."""

    def __init__(self, layers: list[nn.Module], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.there: int | None = None
        self.trips: dict[_Place, _Trip] = {}
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
            if index != self.there:
                self.go()
                self.there, self.trips = index, self._arrived(index)
                if index + 1 < len(self.layers):
                    self.coming = index + 1, self.carrier.submit(self._trips, index + 1)
            else:  # what was put into it meanwhile
                self.trips |= self._trips(index)
            for (module, name), trip in self.trips.items():
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

    def go(self) -> None:
        """Send home the layer that is on the device, if any: what was changed of it, and what it was else."""
        if self.there is None:
            return
        for place in _places(self.layers[self.there]):
            module, name = place
            now, trip = module._parameters[name], self.trips.get(place)
            assert now is not None
            if trip is not None and now is trip.away and now._version == trip.away_version:
                module._parameters[name] = trip.home
            else:
                module._parameters[name] = parameter_on(CPU, now)
        self.there, self.trips = None, {}

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
            for place in _places(self.layers[index]):
                parameter = place[0]._parameters[place[1]]
                if parameter is not None and place not in but and parameter.device.type == "cpu":
                    found[place] = self._trip(parameter)
            if self.stream is not None:
                self.stream.synchronize()  # pinned sources may go
        return found

    def _trip(self, parameter: nn.Parameter) -> _Trip:
        version, place = parameter._version, parameter.data_ptr()
        # Only from pinned memory does a copy run beside the computation.
        source = parameter.detach() if self.stream is None else parameter.detach().pin_memory()
        away = nn.Parameter(source.to(self.device, non_blocking=True), requires_grad=parameter.requires_grad)
        return _Trip(parameter, version, place, away, away._version)


def fetch(layer: nn.Module) -> None:
    """Have the layer on the device before it is run, if it is one of those that come and go."""
    if layer in _TRAVELLERS:
        _TRAVELLERS[layer].fetch(layer)


def send_home(layer: nn.Module) -> None:
    """Bring the layer back to ordinary memory, if it is one of those that come and go."""
    if layer in _TRAVELLERS:
        _TRAVELLERS[layer].go()


@contextmanager
def placed(root: nn.Module, layers: list[nn.Module], device: torch.device, one_at_a_time: bool) -> Iterator[None]:
    """Within the context the model is on the device, its layers all or one at a time; afterwards in ordinary memory.

    On the CPU nothing happens.
    """
    if device.type == "cpu":
        yield
        return
    bring(root, device, but=layers if one_at_a_time else ())
    travelling = LayersOnDevice(layers, device) if one_at_a_time else None
    try:
        yield
    finally:
        if travelling is not None:
            travelling.end()
        bring(root, CPU)


def _places(layer: nn.Module) -> list[_Place]:
    return [(module, name) for module in layer.modules() for name, p in module._parameters.items() if p is not None]
