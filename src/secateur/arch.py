"""Architectures as data: one YAML file per family in `archs/`, bound to a model's real modules.

In: a model (real, or on the meta device). Out: an `Arch`, whose groups say which rows and columns go when a unit goes.
A tensor axis is a row of segments; in each segment unit i owns `w` consecutive rows. Nothing is guessed by attribute
name: a module that the spec names and the model lacks, or a size that disagrees, is an ArchError.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from secateur.errors import ArchError, nearest

Segments = tuple[int, ...]


class GroupSpec(BaseModel):
    """One group as its YAML states it. Modules are named relative to a decoder layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: str
    num_units: str  # the config key that holds the number of units
    writers: dict[str, Segments] = Field(min_length=1)
    reader: dict[str, Segments] = Field(min_length=1, max_length=1)
    bias_switch: dict[str, tuple[str, ...]] = Field(default={}, max_length=1)


class ArchSpec(BaseModel):
    """One family as its YAML states it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_types: tuple[str, ...] = Field(min_length=1)
    backbone: str
    layers: str
    head: str
    groups: dict[str, GroupSpec]


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
    """One layer's group, bound to real modules. `params_per_unit` counts weights and biases of writers and reader."""

    layer: int
    name: str
    unit: str
    num_units: int
    params_per_unit: int
    writers: tuple[Axis, ...]
    reader: Axis
    config_key: str
    bias_switch: BiasSwitch | None


@dataclass(frozen=True, slots=True)
class Arch:
    """A family bound to one model. `groups` lists every layer's groups, layer by layer."""

    family: str
    backbone: str
    layers: str
    head: str
    groups: tuple[Group, ...]
    num_layers: int

    def select(self, names: tuple[str, ...]) -> tuple[Group, ...]:
        """Return the groups of these names. Raises ArchError if the family has no such group."""
        known = {group.name for group in self.groups}
        for name in names:
            if name not in known:
                raise ArchError(
                    f"groups: family {self.family} has no group '{name}'; it has {', '.join(sorted(known))}; "
                    f"did you mean '{nearest(name, known)}'?"
                )
        return tuple(group for group in self.groups if group.name in names)


@cache
def load_specs() -> dict[str, ArchSpec]:
    """Read every spec in `archs/`, keyed by family (the file's name)."""
    files = sorted(resources.files("secateur.archs").iterdir(), key=lambda file: file.name)
    texts = {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in files
        if file.name.endswith(".yaml")
    }
    return {family: ArchSpec.model_validate(yaml.safe_load(text)) for family, text in texts.items()}


def find_spec(model_type: str) -> tuple[str, ArchSpec]:
    """Return (family, spec) for a config's `model_type`. Raises ArchError naming the nearest supported family."""
    families = {model_type: family for family, spec in load_specs().items() for model_type in spec.model_types}
    if model_type not in families:
        raise ArchError(
            f"model family '{model_type}' is not supported; supported: {', '.join(sorted(families))}; "
            f"the nearest is '{nearest(model_type, families)}'."
        )
    return families[model_type], load_specs()[families[model_type]]


def bind(model: nn.Module) -> Arch:
    """Check the family's spec against the model's modules and return it with real sizes.

    Raises ArchError if the family is unknown, a named module is missing (naming the closest one) or a size disagrees
    with the config. Works on the meta device: no weight is read.
    """
    config: Any = model.config
    family, spec = find_spec(config.model_type)
    layers = _submodule(model, spec.layers, family)
    for name in (spec.backbone, spec.head):
        _submodule(model, name, family)
    groups = [
        _bind_group(layer, index, name, group, config, family)
        for index, layer in enumerate(layers.children())
        for name, group in spec.groups.items()
    ]
    return Arch(family, spec.backbone, spec.layers, spec.head, tuple(groups), len(list(layers.children())))


def linear(layer: nn.Module, name: str) -> nn.Linear:
    """Return the layer's linear of that name."""
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def decoder_layers(model: nn.Module, arch: Arch) -> list[nn.Module]:
    """Return the model's decoder layers in order."""
    return list(model.get_submodule(arch.layers).children())


def _bind_group(layer: nn.Module, index: int, name: str, spec: GroupSpec, config: object, family: str) -> Group:
    where = f"layer {index}, group {name}"
    num_units = getattr(config, spec.num_units, None)
    if not isinstance(num_units, int):
        raise ArchError(f"{where}: config has no number '{spec.num_units}', which family {family} needs.")
    params_per_unit = 0
    for module, segments, is_writer in _axes(spec):
        found = _submodule(layer, module, family)
        if not isinstance(found, nn.Linear):
            raise ArchError(f"{where}: {module} is a {type(found).__name__}, but family {family} cuts nn.Linear.")
        size = found.out_features if is_writer else found.in_features
        rows_per_unit = sum(segments)
        if size != rows_per_unit * num_units:
            raise ArchError(
                f"{where}: {module} has {size} rows for its units, but config {spec.num_units}={num_units} "
                f"asks for {rows_per_unit * num_units}; the checkpoint and its config disagree."
            )
        across = found.in_features + (found.bias is not None) if is_writer else found.out_features
        params_per_unit += rows_per_unit * across
    for module in (module for modules in spec.bias_switch.values() for module in modules):
        _submodule(layer, module, family)
    (reader,) = (Axis(*item) for item in spec.reader.items())
    writers = tuple(Axis(*item) for item in spec.writers.items())
    switch = next((BiasSwitch(*item) for item in spec.bias_switch.items()), None)
    return Group(index, name, spec.unit, num_units, params_per_unit, writers, reader, spec.num_units, switch)


def _axes(spec: GroupSpec) -> Iterator[tuple[str, Segments, bool]]:
    yield from ((module, segments, True) for module, segments in spec.writers.items())
    yield from ((module, segments, False) for module, segments in spec.reader.items())


def _submodule(parent: nn.Module, name: str, family: str) -> nn.Module:
    names = {child: module for child, module in parent.named_modules() if child}
    if name not in names:
        raise ArchError(
            f"family {family}: the spec names module '{name}', which this {type(parent).__name__} does not have; "
            f"did you mean '{nearest(name, names)}'?"
        )
    return names[name]
