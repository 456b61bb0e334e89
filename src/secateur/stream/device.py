"""The device that a run computes on: memory, the weights' way there and back, and threads.

Weights come whole (`Placement`), a layer at a time (`LayersOnDevice`), or from files
(`LayersOnDisk`). Products are shared out over threads, so that another number of them may change
the last bits of a result; with the same number they are the same.
"""

import ctypes
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.model.group import Group, attribute_of, put
from secateur.model.stock import CausalLM


def peak_bytes() -> int:
    """Return the highest resident set size so far in bytes, file-backed pages included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_freed() -> None:
    """Return freed memory to the system, if the C library would hold it (glibc).

    Matrices of a few megabytes leave holes in the heap, a tenth of the memory of a small prune.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def keeping_freed() -> Iterator[None]:
    """Keep freed memory for the next tensors until `release_freed` (glibc).

    Else large tensors get pages that the system clears anew each time: a tenth of the CPU seconds
    of a prune, a fifth of a training's.
    """
    _set_thresholds(2**31 - 1, 2**31 - 1)
    try:
        yield
    finally:
        _set_thresholds(2**25, 2**26)  # what glibc's own, which follow the sizes seen, come to
        release_freed()


def _set_thresholds(mapped: int, trimmed: int) -> None:
    """Set the bytes from which a block is mapped by itself, and those free at the heap's end that
    go back.
    """
    set_option = _of_glibc("mallopt")
    if set_option is not None:
        set_option(-3, mapped)  # M_MMAP_THRESHOLD
        set_option(-1, trimmed)  # M_TRIM_THRESHOLD


@cache
def _of_glibc(name: str) -> "ctypes._NamedFuncPointer | None":
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


Model = TypeVar("Model", bound=nn.Module)

CPU = torch.device("cpu")
# Usable share of a device's free memory; the rest is for activations and libraries.
USABLE_SHARE = 0.85
LOW = (torch.bfloat16, torch.float16)


def free_bytes(device: torch.device) -> int | None:
    """Return the device memory that a run may use; None for the CPU and if torch cannot tell."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return int(USABLE_SHARE * module.mem_get_info(device)[0])
    if hasattr(module, "recommended_max_memory"):  # MPS
        return int(USABLE_SHARE * module.recommended_max_memory())
    return None


def peak_bytes_on(device: torch.device) -> int | None:
    """Return the peak allocation on the device; None for the CPU and if torch does not count."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    return (
        int(module.max_memory_allocated(device))
        if hasattr(module, "max_memory_allocated")
        else None
    )


def multiplies_in_software(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether matmuls of this dtype are many times slower than those of float32.

    True on CPUs without instructions for it: below AVX-512 torch has no such products, and AVX-512
    alone takes them apart, which oneDNN calls supported.
    """
    if device.type != "cpu" or dtype not in LOW:
        return False
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_supported():
        return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)())


@cache
def float64_device(device: torch.device) -> torch.device:
    """Return the device for float64: the same, or the CPU if it has none, as Apple's GPUs."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1).cpu()
    except (TypeError, RuntimeError):
        return CPU
    return device


def bring(
    root: nn.Module,
    device: torch.device,
    *,
    but: Iterable[nn.Module] = (),
    in_float32: bool = False,
    dtypes: Mapping[tuple[nn.Module, str], torch.dtype] | None = None,
) -> None:
    """Move all weights and buffers to the device, except those of the modules `but`; ties stay.

    `in_float32`: half precision becomes float32 there. `dtypes`: else the parameters' dtypes there,
    by module and name.
    """
    left = {id(module) for root in but for module in root.modules()}
    moved: dict[int, nn.Parameter] = {}
    for key, parameter in _parameters(root):
        module, name = key
        if id(module) in left:
            continue
        dtype = parameter.dtype
        wanted = raised(dtype) if in_float32 else (dtypes or {}).get(key, dtype)
        if (parameter.device, dtype) != (device, wanted):
            if id(parameter) not in moved:
                moved[id(parameter)] = parameter_on(device, parameter, wanted)
            module._parameters[name] = moved[id(parameter)]
    _move_buffers((module for module in root.modules() if id(module) not in left), device)


def _move_buffers(modules: Iterable[nn.Module], device: torch.device) -> None:
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def on_device(model: Model, device: torch.device) -> Model:
    """Return the model on the device, in float32 if its dtype would multiply in software."""
    low = [p.dtype for p in model.parameters() if p.dtype in LOW]
    bring(model, device, in_float32=bool(low) and multiplies_in_software(device, low[0]))
    return model


def raised(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision, any other dtype unchanged."""
    return torch.float32 if dtype in LOW else dtype


def parameter_on(
    device: torch.device, parameter: nn.Parameter, dtype: torch.dtype | None
) -> nn.Parameter:
    """Return the parameter as a new one on the device, in this dtype if given."""
    # Parameters made in inference mode could not be changed outside of it.
    with torch.inference_mode(False), torch.no_grad():
        tensor = parameter.detach().to(device, dtype)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


# Which object onloads a layer: fetch, settle and offload get the layer alone.
_OWNERS: "WeakKeyDictionary[nn.Module, LayersOnDevice]" = WeakKeyDictionary()

_Key = tuple[nn.Module, str]  # a module and the name of its parameter


@dataclass(frozen=True, slots=True)
class _Copy:
    """A host parameter and its copy on the device, each with its version when it was copied.

    `host_pointer`: the host's data, which may be replaced under the same parameter.
    """

    host: nn.Parameter
    host_version: int
    host_pointer: int
    device: nn.Parameter
    device_version: int

    def is_of(self, parameter: nn.Parameter | None) -> bool:
        """Say whether this is still a copy of the host parameter."""
        now = self.host._version, self.host.data_ptr()
        return parameter is self.host and now == (self.host_version, self.host_pointer)

    def is_unchanged(self, parameter: nn.Parameter) -> bool:
        """Say whether the parameter is the device copy, unchanged."""
        return parameter is self.device and parameter._version == self.device_version


class LayersOnDevice:
    """Onloads `layers` to `device`, one at a time, from its construction until `end`.

    `in_float32`: they compute in float32 there, whatever dtype they are stored in. `keeps`: a layer
    that came stays, since text that is generated reads each of them at every token.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        device: torch.device,
        *,
        in_float32: bool = False,
        keeps: bool = False,
    ) -> None:
        self.layers, self.in_float32, self.keeps = layers, in_float32, keeps
        self.device = torch.empty(1, device=device).device  # with its index, as tensors report it
        self.dtypes = {key: p.dtype for layer in layers for key, p in _parameters(layer)}
        self.onloaded: dict[int, dict[_Key, _Copy]] = {}
        self.prefetched: tuple[int, Future[dict[_Key, _Copy]]] | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="secateur-layer")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.handles = [
            layer.register_forward_pre_hook(
                lambda *_, index=index: self.onload(index), prepend=True
            )
            for index, layer in enumerate(layers)
        ]
        for layer in layers:
            _OWNERS[layer] = self

    def onload(self, index: int) -> None:
        """Have layer `index` on the device, and no other one; prefetch the next."""
        # A layer whose forward is replaced does not run, so its weights are not needed.
        if "forward" in self.layers[index].__dict__:
            return
        with torch.inference_mode(False), torch.no_grad():
            if index not in self.onloaded:
                if not self.keeps:
                    self.offload()
                self.onloaded[index] = self._copies(index, self._prefetched(index))
                if index + 1 < len(self.layers) and not self.keeps:
                    self.prefetched = index + 1, self.thread.submit(self._copies, index + 1, {})
            else:  # parameters that were set meanwhile
                self.onloaded[index] |= self._copies(index, {})
            for (module, name), copy in self.onloaded[index].items():
                if copy.is_of(module._parameters[name]):
                    module._parameters[name] = copy.device
                if self.stream is not None:  # the allocator must not reuse its memory while in use
                    copy.device.record_stream(torch.cuda.current_stream(self.device))
            _move_buffers(self.layers[index].modules(), self.device)

    def settle(self, layer: nn.Module) -> None:
        """Round the layer's changed parameters to the dtypes in which they are stored; drop what
        they were before.
        """
        copies = self.onloaded.get(self.layers.index(layer), {})
        with torch.no_grad():
            for key, parameter in _parameters(layer):
                if key in copies and copies[key].is_unchanged(parameter):
                    continue
                copies.pop(key, None)
                stored = self.dtypes.get(key, parameter.dtype)
                if parameter.dtype != stored:
                    parameter.copy_(parameter.to(stored))

    def offload(self) -> None:
        """Copy changed parameters of the onloaded layer to the host, and drop unchanged copies."""
        for index, copies in self.onloaded.items():
            for key, now in _parameters(self.layers[index]):
                copy, (module, name) = copies.get(key), key
                if copy is not None and copy.is_unchanged(now):
                    module._parameters[name] = copy.host
                else:
                    module._parameters[name] = parameter_on(CPU, now, self.dtypes.get(key))
        self.onloaded = {}

    def end(self) -> None:
        """Leave all layers on the host."""
        self.offload()
        self.thread.shutdown()
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            _OWNERS.pop(layer, None)

    def _prefetched(self, index: int) -> dict[_Key, _Copy]:
        """Return the copies that were prefetched, if they are of this layer."""
        prefetched, self.prefetched = self.prefetched, None
        return prefetched[1].result() if prefetched is not None and prefetched[0] == index else {}

    def _copies(self, index: int, known: dict[_Key, _Copy]) -> dict[_Key, _Copy]:
        """Copy the layer's parameters that are elsewhere, unless `known` has it; also runs in the
        prefetch thread.
        """
        context = nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        copies: dict[_Key, _Copy] = {}
        with context, torch.no_grad():
            for key, parameter in _parameters(self.layers[index]):
                dtype = raised(parameter.dtype) if self.in_float32 else parameter.dtype
                if key in known and known[key].is_of(parameter):
                    copies[key] = known[key]
                elif (parameter.device, parameter.dtype) != (self.device, dtype):
                    copies[key] = self._copy(parameter, dtype)
            if self.stream is not None:
                self.stream.synchronize()  # the pinned sources may be freed after it
        return copies

    def _copy(self, parameter: nn.Parameter, dtype: torch.dtype) -> _Copy:
        version, pointer = parameter._version, parameter.data_ptr()
        # Copies overlap with computation only from pinned memory.
        source = parameter.detach() if self.stream is None else parameter.detach().pin_memory()
        moved = source.to(self.device, dtype, non_blocking=True)
        copy = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        return _Copy(parameter, version, pointer, copy, copy._version)


def fetch(layer: nn.Module) -> None:
    """Onload the layer before it runs, if layers are onloaded one at a time."""
    if owner := _OWNERS.get(layer):
        owner.onload(owner.layers.index(layer))


def settle(layer: nn.Module) -> None:
    """Round the layer's changes to its stored dtypes, if layers are onloaded one at a time."""
    if owner := _OWNERS.get(layer):
        owner.settle(layer)


def offload(layer: nn.Module) -> None:
    """Return the layer to host memory, if layers are onloaded one at a time."""
    if owner := _OWNERS.get(layer):
        owner.offload()


class Placement:
    """Moves a model to a device and back: whole, or with its layers onloaded one at a time.

    `in_float32`: it computes in float32, one layer at a time, of which those that came stay if it
    `keeps` them. Otherwise a CPU run moves nothing.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: list[nn.Module],
        device: torch.device,
        *,
        one_at_a_time: bool,
        in_float32: bool,
        keeps: bool = False,
    ) -> None:
        self.root, self.device, self.in_float32, self.keeps = root, device, in_float32, keeps
        self.stays = device.type == "cpu" and not in_float32
        self.one_at_a_time = one_at_a_time
        # A model that stays is not referenced, so that removed layers are freed.
        self.layers = [] if self.stays else layers
        self.dtypes = (
            {} if self.stays else {key: parameter.dtype for key, parameter in _parameters(root)}
        )
        self.layers_on_device: LayersOnDevice | None = None

    def onload(self) -> None:
        """Move the model to the device."""
        if self.stays:
            return
        by_layer = self.one_at_a_time or self.in_float32
        bring(
            self.root, self.device, but=self.layers if by_layer else (), in_float32=self.in_float32
        )
        if by_layer:
            self.layers_on_device = LayersOnDevice(
                self.layers, self.device, in_float32=self.in_float32, keeps=self.keeps
            )

    def offload(self) -> None:
        """Move the model back to host memory, in its stored dtypes."""
        if self.stays:
            return
        if self.layers_on_device is not None:
            self.layers_on_device.end()
            self.layers_on_device = None
        bring(self.root, CPU, dtypes=self.dtypes)

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Have the model in host memory inside the context, to save it."""
        self.offload()
        yield
        self.onload()


def _parameters(root: nn.Module) -> Iterator[tuple[_Key, nn.Parameter]]:
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (module, name), parameter


@contextmanager
def embeddings_on_disk(
    model: CausalLM, directory: Path, *, are_there: bool
) -> Iterator[Callable[[], None]]:
    """Map embedding and head from a file inside the context, so that only their use costs memory.

    Yields a function that frees the memory after use. Does nothing on devices other than the CPU,
    or if they `are_there` already.
    """
    if are_there:
        yield lambda: None
        return
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    parameters = {id(p): p for module in modules if module is not None for p in module.parameters()}
    held = {
        str(number): p for number, p in enumerate(parameters.values()) if p.device.type == "cpu"
    }
    path = directory / "embeddings.safetensors"
    save_file({name: p.detach().contiguous() for name, p in held.items()}, path)

    def map_again() -> None:
        for name, tensor in load_file(path).items():
            held[name].data = tensor

    map_again()
    try:
        yield map_again
    finally:
        for p in held.values():
            p.data = p.data.clone()
        path.unlink()


class LayersOnDisk:
    """One safetensors file per layer, called `name`, and its modules' unit counts and configs."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name
        self.counts: dict[int, dict[str, Any]] = {}

    @property
    def indices(self) -> list[int]:
        """Layers that are saved."""
        return list(self.counts)

    def save(self, index: int, layer: nn.Module, groups: list[Group]) -> None:
        """Save the layer as it is now."""
        # Unlinked first: a file that is still mapped keeps its content.
        self._path(index).unlink(missing_ok=True)
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in layer.named_parameters()},
            self._path(index),
        )
        names = (name for group in groups for name in (*group.counts, *group.tensors(layer)))
        held = {name: attribute_of(layer, name) for name in names}
        self.counts[index] = {
            name: each for name, each in held.items() if not isinstance(each, nn.Parameter)
        }

    def restore(self, index: int, layer: nn.Module) -> None:
        """Make the layer what it was when it was saved."""
        device, saved = next(layer.parameters()).device, load_file(self._path(index)).items()
        parameters = {
            name: nn.Parameter(tensor.to(device), requires_grad=False) for name, tensor in saved
        }
        for name, value in (parameters | self.counts[index]).items():
            put(layer, name, value)

    @contextmanager
    def restored(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Have the layer as it was saved inside the context; afterwards as it was before."""
        own = dict(layer.named_parameters()) | {
            name: attribute_of(layer, name) for name in self.counts[index]
        }
        try:
            self.restore(index, layer)
            yield
        finally:
            for name, value in own.items():
                put(layer, name, value)

    def _path(self, index: int) -> Path:
        return self.directory / f"{self.name}-{index}.safetensors"


def forget_weights(module: nn.Module) -> None:
    """Free the memory of the module's weights; the module itself stays."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def now(device: torch.device) -> float:
    """Return the clock's seconds after the device has finished its work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


# Timed runs of each number of threads, by turns with the others.
REPEATS = 5
# Half of the threads may take so much longer before fewer are not tried.
SLOWER = 1.2


def fastest_threads(compute: Callable[[], object]) -> int:
    """Return with how many threads `compute` takes least: all that torch has, a half, a quarter,
    ... or one.

    On cores that others use, threads that wait for each other are slower than fewer ones.
    """
    most = torch.get_num_threads()
    chosen, count = most, most // 2
    with threads_kept():
        while count >= 1:
            timed: dict[int, list[float]] = {chosen: [], count: []}
            for number in [*timed] * REPEATS:
                torch.set_num_threads(number)
                compute()  # so that its threads exist
                start = time.perf_counter()
                compute()
                timed[number].append(time.perf_counter() - start)
            # A core that something takes for a moment is no busy core.
            seconds, fewer_seconds = median(timed[chosen]), median(timed[count])
            if fewer_seconds > SLOWER * seconds:
                break
            if fewer_seconds < seconds:
                chosen = count
            count //= 2
    return chosen


@contextmanager
def threads_kept() -> Iterator[None]:
    """Give torch the number of threads behind the block that it has before it."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
