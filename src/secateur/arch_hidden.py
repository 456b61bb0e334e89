"""The residual stream as data: which tensors are as wide as the model, bound to a model's real modules.

In: a family's `hidden` section and a model (real, or on the meta device). Out: a `Hidden`, whose units are channels
that go from every layer at once. A module that the spec names and the model lacks, or one of another width than the
config's hidden_size, is an ArchError.
"""

from dataclasses import dataclass
from math import lcm
from typing import Any, cast

from torch import Tensor, nn

from secateur.arch_spec import HiddenSpec
from secateur.errors import ArchError, nearest


@dataclass(frozen=True, slots=True)
class Hidden:
    """Modules over the residual stream. `readers`, `writers` and `writer_norms` are named relative to a decoder layer.

    `params_per_channel` counts embedding and head (once if tied), norms, and readers and writers of all layers.
    `step`: the family's config takes only widths that are multiples of this number; 1 where it takes any.
    """

    num_channels: int
    params_per_channel: int
    step: int
    embedding: str
    norm: str
    readers: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...]
    writer_norms: tuple[str, ...]
    norm_adds_one: bool
    embedding_scales: tuple[str, ...]


def bind_hidden(
    model: nn.Module, layers: list[nn.Module], head: str, spec: HiddenSpec, family: str, heads: list[int]
) -> Hidden:
    """Check the family's `hidden` section against the model's modules and return it with real sizes.

    `heads`: numbers that must divide the width. Raises ArchError, see above.
    """
    config: Any = cast(Any, model.config).get_text_config()
    width, total = config.hidden_size, 0
    parameters = {id(p): p for name in (spec.embedding, head) for p in submodule(model, name, family).parameters()}
    total += sum(_per_channel(p, -1, width, f"{spec.embedding} and {head}") for p in parameters.values())
    total += sum(_per_channel(p, 0, width, spec.norm) for p in submodule(model, spec.norm, family).parameters())
    for name in spec.embedding_scales:
        if not hasattr(submodule(model, spec.embedding, family), name):
            raise ArchError(f"hidden: {spec.embedding} has no '{name}', which family {family} needs.")
    inputs = [name for names in spec.readers.values() for name in names]
    for index, layer in enumerate(layers):
        for name in (*spec.readers, *spec.writer_norms):
            weights = submodule(layer, name, family).parameters()
            total += sum(_per_channel(p, 0, width, f"layer {index}, {name}") for p in weights)
        for name in (*inputs, *spec.writers):
            linear = submodule(layer, name, family)
            if not isinstance(linear, nn.Linear):
                raise ArchError(f"hidden: {name} is a {type(linear).__name__}, but family {family} cuts nn.Linear.")
            total += _per_channel(linear.weight, 0 if name in spec.writers else 1, width, f"layer {index}, {name}")
            total += name in spec.writers and linear.bias is not None
    return Hidden(
        num_channels=width,
        params_per_channel=total,
        step=lcm(*heads),
        embedding=spec.embedding,
        norm=spec.norm,
        readers=tuple(spec.readers.items()),
        writers=spec.writers,
        writer_norms=spec.writer_norms,
        norm_adds_one=spec.norm_adds_one,
        embedding_scales=spec.embedding_scales,
    )


def submodule(parent: nn.Module, name: str, family: str) -> nn.Module:
    """Return the module of that name. Raises ArchError naming the nearest one if there is none."""
    names = {child: module for child, module in parent.named_modules() if child}
    if name not in names:
        raise ArchError(
            f"family {family}: the spec names module '{name}', which this {type(parent).__name__} does not have; "
            f"did you mean '{nearest(name, names)}'?"
        )
    return names[name]


def _per_channel(parameter: Tensor, axis: int, width: int, where: str) -> int:
    """Return how many numbers of the tensor belong to one channel."""
    if parameter.shape[axis] != width:
        raise ArchError(
            f"hidden: {where} is {parameter.shape[axis]} wide, but config hidden_size={width}; the checkpoint and its "
            f"config disagree."
        )
    return parameter.numel() // width
