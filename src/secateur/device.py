"""The device that a run computes on: found by its name, and modules brought there.

In: a name as torch has them (cpu, cuda, cuda:1, mps, xpu, ...; ROCm's GPUs are called cuda), or none. Out: the device,
what it has free, and modules whose weights and buffers are on it. Nothing here knows one kind of device from another.
"""

import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.ranks import size
from secateur.ranks_group import rank_device

Model = TypeVar("Model", bound=nn.Module)

CPU = torch.device("cpu")
# Of what a device has free: the rest is for activations of a batch and for what its libraries hold.
USABLE_SHARE = 0.85
LOW = (torch.bfloat16, torch.float16)


def device_called(name: str | None) -> torch.device:
    """Return the device of this process. None: a CUDA or ROCm GPU if torch finds one, else the CPU.

    Of several ranks each has the GPU of its local rank. Raises RecipeError if torch knows or finds no such device.
    """
    if name is None:
        return rank_device()
    try:
        device = torch.empty(1, device=torch.device(name)).device  # with its number, as tensors there say it
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise RecipeError(
            f"device: torch finds no '{name}' here ({reason}); give cpu, cuda, cuda:1, mps, or leave it out."
        ) from None
    if device.type == "meta":
        raise RecipeError("device: 'meta' holds no numbers; give cpu, cuda, cuda:1, mps, or leave it out.")
    if size() > 1 and device.type == "cuda":
        if device.index is not None:
            raise RecipeError(f"device: '{name}' cannot be that of {size()} ranks; give cuda, and each takes its own.")
        return rank_device()
    return device


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that a run may use of the device's memory; None for the CPU and where torch cannot tell."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return int(USABLE_SHARE * module.mem_get_info(device)[0])
    if hasattr(module, "recommended_max_memory"):  # MPS
        return int(USABLE_SHARE * module.recommended_max_memory())
    return None


def peak_bytes_on(device: torch.device) -> int | None:
    """Return the most that was allocated on the device so far; None for the CPU and where torch does not count."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    return int(module.max_memory_allocated(device)) if hasattr(module, "max_memory_allocated") else None


def multiplies_in_software(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether matrices of this dtype take many times as long there as those of float32.

    So it is on processors without AVX-512 or an equal of it, where torch multiplies bfloat16 number by number.
    """
    if device.type != "cpu" or dtype not in LOW:
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)())


@cache
def float64_device(device: torch.device) -> torch.device:
    """Return where float64 is computed for this device: there, or on the CPU if it has none, as Apple's GPUs."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1).cpu()
    except (TypeError, RuntimeError):
        return CPU
    return device


def bring(
    root: nn.Module, device: torch.device, *, but: Iterable[nn.Module] = (), dtype: Callable[..., Any] | None = None
) -> None:
    """Move all weights and buffers to the device, but not those of the modules `but`. Tied weights stay tied.

    `dtype`: called with (module, name, parameter), says which one the parameter is to have there; None: its own.
    """
    left = {id(module) for each in but for module in each.modules()}
    moved: dict[int, nn.Parameter] = {}
    for module in root.modules():
        if id(module) in left:
            continue
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            wanted = parameter.dtype if dtype is None else dtype(module, name, parameter)
            if (parameter.device, parameter.dtype) != (device, wanted):
                if id(parameter) not in moved:
                    moved[id(parameter)] = parameter_on(device, parameter, wanted)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def on_device(model: Model, device: torch.device) -> Model:
    """Return the model, all of it on the device, in float32 where that multiplies its dtype in software."""
    low = [p.dtype for p in model.parameters() if p.dtype in LOW]
    in_software = bool(low) and multiplies_in_software(device, low[0])
    bring(model, device, dtype=(lambda _, __, parameter: raised(parameter.dtype)) if in_software else None)
    return model


def raised(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for what is shorter, any other dtype as it is."""
    return torch.float32 if dtype in LOW else dtype


def parameter_on(device: torch.device, parameter: nn.Parameter, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Return the parameter as a new one on the device, in this dtype if one is given."""
    # Made within inference mode it could not be changed outside of it.
    with torch.inference_mode(False), torch.no_grad():
        tensor: Tensor = parameter.detach().to(device, dtype or parameter.dtype)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def now(device: torch.device) -> float:
    """Return the clock's seconds once the device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()
