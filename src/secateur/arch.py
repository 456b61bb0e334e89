"""Architectures as data: one YAML file per family in `archs/`, bound to a model's real modules.

In: a model (real, or on the meta device). Out: an `Arch`, whose groups say which rows and columns go when a unit goes.
A tensor axis is a row of segments; in each segment unit i owns `w` consecutive rows. Nothing is guessed by attribute
name: a module that the spec names and the model lacks, or a size that disagrees, is an ArchError.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor, nn

from secateur.arch_conv import linears_for_conv
from secateur.arch_experts import bind_expert_channels, bind_experts
from secateur.arch_group import Axis as Axis
from secateur.arch_group import BiasSwitch, Group, Linears, submodule
from secateur.arch_group import linear as linear
from secateur.arch_logits import Logits, bind_logits, head_with
from secateur.arch_numbers import Segments as Segments
from secateur.arch_numbers import count_of, head_width, layer_configs, segments_of, text_config
from secateur.arch_spec import GroupSpec, SegmentSpecs, find_spec
from secateur.errors import ArchError, nearest


@dataclass(frozen=True, slots=True)
class Arch:
    """A family bound to one model. `groups` lists every layer's groups, layer by layer.

    `params_per_layer`: all parameters of each layer, those of no group included. `omits`: what cannot be cut, and why.
    """

    family: str
    backbone: str
    layers: str
    head: str
    attention: str | None
    middle: str | None
    mlp_adds_directly: bool
    groups: tuple[Group, ...]
    num_layers: int
    params_per_layer: tuple[int, ...]
    logits: Logits | None
    omits: dict[str, str]
    layers_give_tuples: bool

    def layer_output(self, hidden: Tensor) -> Any:
        """Return hidden states as the backbone expects them of a layer."""
        return (hidden, None) if self.layers_give_tuples else hidden

    def is_in_attention(self, group: Group) -> bool:
        """Say whether the group's units are the attention's."""
        return self.attention is not None and group.parts.module.startswith(f"{self.attention}.")

    def select(self, names: tuple[str, ...]) -> tuple[Group, ...]:
        """Return the groups of these names. Raises ArchError if the family has no such group."""
        known = {group.name for group in self.groups}
        for name in names:
            if name in self.omits and name not in known:
                raise ArchError(f"groups: family {self.family} cannot lose {name}: {self.omits[name]}.")
            if name not in known:
                raise ArchError(
                    f"groups: family {self.family} has no group '{name}'; it has {', '.join(sorted(known))}; "
                    f"did you mean '{nearest(name, known)}'?"
                )
        chosen = tuple(group for group in self.groups if group.name in names)
        for name, other in combinations(names, 2):
            first, second = (next(group for group in chosen if group.name == n) for n in (name, other))
            if first.parts.module == second.parts.module:
                raise ArchError(f"groups: {name} and {other} cut the same {first.parts.module}; choose one of them.")
        return chosen


def bind(model: nn.Module) -> Arch:
    """Check the family's spec against the model's modules and return it with real sizes.

    Raises ArchError if the family is unknown, a named module is missing (naming the closest one) or a size disagrees
    with the config. Works on the meta device: no weight is read. GPT-2's transposed linears become `arch_conv`'s, which
    compute and save the same.
    """
    config: Any = text_config(model)
    family, spec = find_spec(_config(model).model_type)
    linears_for_conv(submodule(model, spec.layers, family))
    layers = list(submodule(model, spec.layers, family).children())
    configs = layer_configs(config)
    for name in (spec.backbone, spec.head):
        submodule(model, name, family)
    for layer in layers:
        for name in (spec.attention, spec.middle):
            if name is not None:
                submodule(layer, name, family)
    forbidden = {
        name: why for name, group in spec.groups.items() for key, why in group.unless.items() if _is_on(config, key)
    }
    groups: list[Group] = []
    for index, (layer, layer_config) in enumerate(zip(layers, configs, strict=True)):
        for name, group in spec.groups.items():
            if name not in forbidden and not (group.in_some_layers and _is_absent(layer, next(iter(group.reader)))):
                divide = spec.heads_divide_hidden_size
                groups.append(_bind_group(layer, index, name, group, layer_config, family, divide))
        if spec.experts is not None and not _is_absent(layer, spec.experts.experts):
            groups.append(bind_experts(layer, index, spec.experts, layer_config, family))
            if spec.experts.channels.num_units is not None:
                groups.append(bind_expert_channels(layer, index, spec.experts, layer_config, family))
    adds = spec.mlp_adds_directly
    return Arch(
        family=family,
        backbone=spec.backbone,
        layers=spec.layers,
        head=spec.head,
        attention=spec.attention,
        middle=spec.middle,
        mlp_adds_directly=_is_on(config, adds) if isinstance(adds, str) else adds,
        groups=tuple(groups),
        num_layers=len(layers),
        params_per_layer=tuple(sum(p.numel() for p in layer.parameters()) for layer in layers),
        logits=spec.logits and bind_logits(spec.logits, config, family),
        omits=spec.omits | forbidden,
        layers_give_tuples=spec.layers_give_tuples,
    )


def head_of(model: nn.Module, arch: Arch) -> nn.Module:
    """Return what makes logits of the last hidden state: the head, and what the family does to its output."""
    return head_with(model.get_submodule(arch.head), arch.logits)


def decoder_layers(model: nn.Module, arch: Arch) -> list[nn.Module]:
    """Return the model's decoder layers in order."""
    return list(model.get_submodule(arch.layers).children())


def _config(model: nn.Module) -> Any:
    return model.config


def _is_on(config: Any, key: str) -> bool:
    name, _, inside = key.partition(".")
    if not hasattr(config, name):
        raise ArchError(f"spec: config has no switch '{key}', which the family's spec names.")
    value = getattr(config, name)
    return bool((value or {}).get(inside) if inside else value)


def _is_absent(layer: nn.Module, name: str) -> bool:
    return name not in dict(layer.named_modules())


def _bind_group(
    layer: nn.Module, index: int, name: str, spec: GroupSpec, config: Any, family: str, heads_divide: bool
) -> Group:
    where = f"layer {index}, group {name}"
    num_units = count_of(spec.num_units, config, where, family)
    params_per_unit, axes = 0, []
    for module, segment_specs, is_writer in _axes(spec):
        found = submodule(layer, module, family)
        if not isinstance(found, nn.Linear):
            raise ArchError(f"{where}: {module} is a {type(found).__name__}, but family {family} cuts nn.Linear.")
        segments = segments_of(segment_specs, config)
        size = found.out_features if is_writer else found.in_features
        rows_per_unit = sum(segments)
        if size != rows_per_unit * num_units:
            raise ArchError(
                f"{where}: {module} has {size} rows for its units, but config {spec.num_units}={num_units} "
                f"asks for {rows_per_unit * num_units}; the checkpoint and its config disagree."
            )
        across = found.in_features + (found.bias is not None) if is_writer else found.out_features
        params_per_unit += rows_per_unit * across
        axes.append(Axis(module, segments))
    for module in (module for modules in spec.bias_switch.values() for module in modules):
        submodule(layer, module, family)
    switch = next((BiasSwitch(*item) for item in spec.bias_switch.items()), None)
    writers, reader = tuple(axes[:-1]), axes[-1]
    # Units of several reader columns are heads.
    is_head = sum(reader.segments) > 1
    divides = (config.num_attention_heads // num_units, config.hidden_size) if heads_divide and is_head else None
    return Group(
        layer=index,
        name=name,
        kind="heads" if is_head else "channels",
        unit=spec.unit,
        num_units=num_units,
        params_per_unit=params_per_unit,
        parts=Linears(writers, reader),
        count=spec.count,
        bias_switch=switch,
        divides=divides,
        config_key=spec.num_units.split(" ")[0],
        head_dim=head_width(config) if is_head else None,
        local_config=spec.local_config,
    )


def _axes(spec: GroupSpec) -> Iterator[tuple[str, SegmentSpecs, bool]]:
    yield from ((module, segments, True) for module, segments in spec.writers.items())
    yield from ((module, segments, False) for module, segments in spec.reader.items())
