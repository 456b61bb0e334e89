"""The device that a run computes on: its memory and that of this process, and threads.

Products are shared out over threads, so that another number of them may change the last bits of a
result; with the same number they are the same.
"""

import ctypes
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn


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
    for module in root.modules():
        if id(module) in left:
            continue
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            wanted = (
                raised(parameter.dtype)
                if in_float32
                else (dtypes or {}).get((module, name), parameter.dtype)
            )
            if (parameter.device, parameter.dtype) != (device, wanted):
                if id(parameter) not in moved:
                    moved[id(parameter)] = parameter_on(device, parameter, wanted)
                module._parameters[name] = moved[id(parameter)]
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
        tensor: Tensor = parameter.detach().to(device, dtype or parameter.dtype)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


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
