"""Architectures as data: one YAML file per family in `archs/`, bound to a model's real modules.

In: a model (real, or on the meta device). Out: an `Arch`, whose groups say which rows and columns go when a unit goes.
A tensor axis is a row of segments; in each segment unit i owns `w` consecutive rows. Nothing is guessed by attribute
name: a module that the spec names and the model lacks, or a size that disagrees, is an ArchError.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import nn

from secateur.arch_hidden import Hidden, bind_hidden, submodule
from secateur.arch_spec import GroupSpec, SegmentSpecs, find_spec
from secateur.errors import ArchError, nearest

Segments = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """The units' axis of one linear: `segments[k]` consecutive rows per unit in segment k."""

    module: str
    segments: Segments


@dataclass(frozen=True, slots=True)
class BiasSwitch:
    """The config key that makes the reader's bias storable, and the linears that it gives a bias."""

    config_key: str
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """One layer's group, bound to real modules. `params_per_unit` counts weights and biases of writers and reader.

    `count`: the module attribute, dotted from the layer, that holds the number of units; None where none does.
    `divides`: (factor, whole) where the config class takes only counts whose `factor` fold divides `whole`.
    """

    layer: int
    name: str
    unit: str
    num_units: int
    params_per_unit: int
    writers: tuple[Axis, ...]
    reader: Axis
    count: str | None
    bias_switch: BiasSwitch | None
    divides: tuple[int, int] | None = None

    def allows(self, num_units: int) -> bool:
        """Say whether the family's config can state that many units."""
        return self.divides is None or self.divides[1] % (num_units * self.divides[0]) == 0

    @property
    def width(self) -> int:
        """Reader columns of one unit."""
        return sum(self.reader.segments)


@dataclass(frozen=True, slots=True)
class Arch:
    """A family bound to one model. `groups` lists every layer's groups, layer by layer.

    `params_per_layer`: all parameters of each layer, those of no group included.
    """

    family: str
    backbone: str
    layers: str
    head: str
    attention: str
    middle: str
    mlp_adds_directly: bool
    groups: tuple[Group, ...]
    num_layers: int
    params_per_layer: tuple[int, ...]
    hidden: Hidden | None

    def select(self, names: tuple[str, ...]) -> tuple[Group, ...]:
        """Return the groups of these names. Raises ArchError if the family has no such group."""
        known = {group.name for group in self.groups}
        for name in names:
            if name not in known:
                raise ArchError(
                    f"groups: family {self.family} has no group '{name}'; it has {', '.join(sorted(known))}; "
                    f"did you mean '{nearest(name, known)}'?"
                )
        chosen = tuple(group for group in self.groups if group.name in names)
        for name, other in combinations(names, 2):
            first, second = (next(group for group in chosen if group.name == n) for n in (name, other))
            if first.reader.module == second.reader.module:
                raise ArchError(f"groups: {name} and {other} cut the same {first.reader.module}; choose one of them.")
        return chosen


def bind(model: nn.Module) -> Arch:
    """Check the family's spec against the model's modules and return it with real sizes.

    Raises ArchError if the family is unknown, a named module is missing (naming the closest one) or a size disagrees
    with the config. Works on the meta device: no weight is read.
    """
    config: Any = model.config
    family, spec = find_spec(config.model_type)
    layers = submodule(model, spec.layers, family)
    for name in (spec.backbone, spec.head):
        submodule(model, name, family)
    groups = [
        _bind_group(layer, index, name, group, layer_config, family, spec.heads_divide_hidden_size)
        for index, (layer, layer_config) in enumerate(zip(layers.children(), _layer_configs(config), strict=True))
        for name, group in spec.groups.items()
        if not _has_no_parameters(layer, next(iter(group.reader)))
    ]
    for layer in layers.children():
        submodule(layer, spec.attention, family)
        submodule(layer, spec.middle, family)
    heads = [each.num_attention_heads for each in _layer_configs(config)] if spec.heads_divide_hidden_size else []
    hidden = spec.hidden and bind_hidden(model, list(layers.children()), spec.head, spec.hidden, family, heads)
    return Arch(
        family,
        spec.backbone,
        spec.layers,
        spec.head,
        spec.attention,
        spec.middle,
        spec.mlp_adds_directly,
        tuple(groups),
        len(list(layers.children())),
        tuple(sum(p.numel() for p in layer.parameters()) for layer in layers.children()),
        hidden,
    )


def linear(layer: nn.Module, name: str) -> nn.Linear:
    """Return the layer's linear of that name."""
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def num_units_left(layer: nn.Module, group: Group) -> int:
    """Return how many of the group's units the layer has now; 0 where its attention or MLP is gone."""
    if _has_no_parameters(layer, group.reader.module):
        return 0
    return linear(layer, group.reader.module).in_features // group.width


def decoder_layers(model: nn.Module, arch: Arch) -> list[nn.Module]:
    """Return the model's decoder layers in order."""
    return list(model.get_submodule(arch.layers).children())


def _layer_configs(config: Any) -> list[Any]:
    """Return each layer's own config: of a model with per-layer widths they differ."""
    per_layer = getattr(config, "per_layer_config", None)
    return [config] * config.num_hidden_layers if per_layer is None else list(per_layer)


def _has_no_parameters(layer: nn.Module, reader: str) -> bool:
    """Say whether the sublayer of the reader of that name is gone: what stands in its place has no parameters."""
    sublayer = getattr(layer, reader.partition(".")[0], None)
    return isinstance(sublayer, nn.Module) and next(sublayer.parameters(), None) is None


def _bind_group(
    layer: nn.Module, index: int, name: str, spec: GroupSpec, config: Any, family: str, heads_divide: bool
) -> Group:
    where = f"layer {index}, group {name}"
    num_units = _num_units(spec.num_units, config, where, family)
    params_per_unit, axes = 0, []
    for module, segment_specs, is_writer in _axes(spec):
        found = submodule(layer, module, family)
        if not isinstance(found, nn.Linear):
            raise ArchError(f"{where}: {module} is a {type(found).__name__}, but family {family} cuts nn.Linear.")
        segments = _segments(segment_specs, config)
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
    return Group(index, name, spec.unit, num_units, params_per_unit, writers, reader, spec.count, switch, divides)


def _num_units(key: str, config: object, where: str, family: str) -> int:
    numbers = []
    for name in key.split(" / "):
        number = getattr(config, name, None)
        if not isinstance(number, int):
            raise ArchError(f"{where}: config has no number '{name}', which family {family} needs.")
        numbers.append(number)
    return numbers[0] if len(numbers) == 1 else numbers[0] // numbers[1]


def _segments(specs: SegmentSpecs, config: Any) -> Segments:
    segments: list[int] = []
    for spec in specs:
        if isinstance(spec, int):
            segments.append(spec)
            continue
        width, _, repeat = spec.partition(" x ")
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rows = {"kv": head, "q": head * (config.num_attention_heads // config.num_key_value_heads)}
        if width not in rows or (repeat and not hasattr(config, repeat)):
            raise ArchError(
                f"spec: segment '{spec}' is no number, 'kv', 'q', or one of these with ' x ' and a config key."
            )
        segments += [rows[width]] * (getattr(config, repeat) if repeat else 1)
    return tuple(segments)


def _axes(spec: GroupSpec) -> Iterator[tuple[str, SegmentSpecs, bool]]:
    yield from ((module, segments, True) for module, segments in spec.writers.items())
    yield from ((module, segments, False) for module, segments in spec.reader.items())
