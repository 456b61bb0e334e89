"""A device that computes on the processor and is none: what is found by its name alone, is found on any device.

Tensors on it are wrappers around ordinary ones. As on a GPU, an operation on tensors of two devices is an error, but
for tensors of no dimensions. It stands where torch keeps a place for devices from outside: one per process.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
DEVICE = "pretend:0"  # autograd wants its number

FACTORIES = "empty empty_strided arange full zeros ones scalar_tensor rand randn randint eye linspace".split()

LIBRARY = torch.library.Library("aten", "IMPL")  # what is registered lasts as long as this

# Dtypes that the device does not have.
LACKING: set[torch.dtype] = set()

# What may meet tensors of another device.
CROSSING = {"aten::copy_", "aten::_copy_from"}


class Pretended(Tensor):
    """A tensor of the device; `inner` is the ordinary one that holds the numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretended":
        if inner.dtype in LACKING:
            raise TypeError(f"{NAME} has no {inner.dtype}")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        # One made within inference mode could not be sliced in another.
        with torch.inference_mode(False):
            self = Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **layout)
        self.inner = inner
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, name = tree_leaves((args, kwargs)), func._schema.name
        if name == "aten::_has_compatible_shallow_copy_type":
            return False  # so that modules move by new parameters
        strangers = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Pretended) and x.dim()]
        if strangers and name not in CROSSING:
            raise RuntimeError(f"{name}: expected all tensors to be on the device {NAME}, found one on cpu")
        goes = [x for x in leaves if isinstance(x, torch.device)] + [torch.device(NAME)]
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs or {}))
        given = [(argument.alias_info, value) for argument, value in _given(func, args, kwargs or {})]
        written = [value for alias, value in given if alias is not None and alias.is_write]
        if written and func._schema.returns:
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
        return tree_map(_wrapped, found) if goes[0].type == NAME else found


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if isinstance(value, Pretended) else value


def _wrapped(value: Any) -> Any:
    return Pretended(value) if isinstance(value, Tensor) else value


def _given(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        if value is not None:
            yield argument, value


@cache
def device() -> torch.device:
    """Make torch know the device, and return it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    for operation in _factories():
        name = operation.name().removeprefix("aten::").removesuffix(".default")
        LIBRARY.impl(name, _made(operation), "PrivateUse1")
    LIBRARY.impl("_copy_from", _copied, "PrivateUse1")
    return torch.device(NAME)


def _factories() -> Iterator[Any]:
    """Yield what makes a tensor out of nothing, but for what torch makes of others of these."""
    for name in FACTORIES:
        packet = getattr(torch.ops.aten, name)
        for operation in (getattr(packet, overload) for overload in packet.overloads()):
            has_device = any(argument.name == "device" for argument in operation._schema.arguments)
            key = operation.name(), "CompositeImplicitAutograd"
            if has_device and not torch._C._dispatch_has_kernel_for_dispatch_key(*key):
                yield operation


def _made(operation: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        return Pretended(operation(*args, **{**kwargs, "device": "cpu"}))

    return make


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _inner(target).copy_(_inner(source))
    return target
