"""A family's YAML bound to a model's real modules: groups, experts, head and layers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor, nn

from secateur.errors import ArchError, advice
from secateur.model.group import Axis, BiasSwitch, Experts, Group, Linears, Segments, Stacks, submodule
from secateur.model.modules import Logits, ScaledHead, linears_for_conv
from secateur.model.spec import ArchSpec, ChannelsSpec, ExpertsSpec, GroupSpec, LogitsSpec, SegmentSpecs, find_spec


def text_config(model: nn.Module) -> Any:
    """Return the config of the language model, which may be part of a larger model."""
    config: Any = model.config
    return config.get_text_config()


def count_of(expression: str, config: Any, where: str, family: str) -> int:
    """Return the number that "KEY", "KEY / KEY" or "KEY or 4 x KEY" stands for.

    Raises ArchError if the config has no such number.
    """
    key, _, instead = expression.partition(" or ")
    factor = "1"
    if instead and getattr(config, key, None) is None:
        factor, _, key = instead.partition(" x ")
    numbers: list[Any] = []
    for name in key.split(" / "):
        numbers.append(getattr(config, name, None))
        if not isinstance(numbers[-1], int):
            raise ArchError(f"{where}: config has no number '{name}', which family {family} needs.")
    return int(factor) * numbers[0] // math.prod(numbers[1:])


def head_width(config: Any) -> int:
    """Return head_dim; it follows from hidden_size if the config does not state it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def segments_of(specs: SegmentSpecs, config: Any) -> Segments:
    """Return rows per unit, segment by segment. Raises ArchError for an unknown segment."""
    segments: list[int] = []
    for spec in specs:
        if isinstance(spec, int):
            segments.append(spec)
            continue
        width, _, repeat = spec.partition(" x ")
        if width not in ("kv", "q") or (repeat and not hasattr(config, repeat)):
            allowed = "a number, 'kv', 'q', or one of the latter with ' x ' and a config key"
            raise ArchError(f"spec: segment '{spec}' is no number; it must be {allowed}.")
        queries = config.num_attention_heads // config.num_key_value_heads if width == "q" else 1
        segments += [head_width(config) * queries] * (getattr(config, repeat) if repeat else 1)
    return tuple(segments)


def bind_logits(spec: LogitsSpec, config: Any, family: str) -> Logits:
    """Return the config's numbers. Raises ArchError if one is missing; only a cap may be None."""
    for key in (spec.multiply, spec.divide, spec.cap):
        if key is not None and not hasattr(config, key):
            raise ArchError(f"logits: config has no '{key}', which family {family} needs.")
    multiply, divide = (1.0 if key is None else float(getattr(config, key)) for key in (spec.multiply, spec.divide))
    return Logits(multiply, divide, cap=None if spec.cap is None else getattr(config, spec.cap))


EXPERTS, EXPERT_CHANNELS = "experts", "expert_ffn"
# Channels that fill 16 bytes in half precision, the alignment of transformers' grouped matmul.
CHANNEL_STEP = 8


def bind_experts(layer: nn.Module, index: int, spec: ExpertsSpec, config: Any, family: str) -> Group:
    """Return the layer's group of experts.

    At least as many remain as the router chooses. If it chooses within the best `topk_group` of
    `n_group` groups, those must hold enough, and each group needs the two experts that rank it.
    Raises ArchError if a tensor or module is missing, or its size contradicts the config.
    """
    where = f"layer {index}, group {EXPERTS}"
    num_units, top_k = (count_of(key, config, where, family) for key in (spec.num_units, spec.top_k))
    module, router = submodule(layer, spec.experts, family), submodule(layer, spec.router, family)
    stacks = list(module.named_parameters())
    rows = [(name, _tensor(router, name, where, family)) for name in spec.router_rows]
    for name, tensor in [*stacks, *rows]:
        if tensor.shape[0] != num_units:
            got = f"{name} has {tensor.shape[0]} entries, but config {spec.num_units}={num_units}"
            raise ArchError(f"{where}: {got}; the checkpoint and its config disagree.")
    for name in spec.counts:
        parent, _, attribute = name.rpartition(".")
        if not hasattr(submodule(layer, parent, family), attribute):
            raise ArchError(f"{where}: {parent} has no '{attribute}', which family {family} needs.")
    num_groups = getattr(config, spec.num_groups, None) or 1 if spec.num_groups else 1
    chosen_groups = getattr(config, spec.top_k_groups, None) or 1 if spec.top_k_groups else 1
    at_least = top_k if num_groups == 1 else num_groups * max(2, -(-top_k // chosen_groups))
    held = [tensor for _, tensor in [*stacks, *rows] if isinstance(tensor, nn.Parameter)]
    return Group(
        layer=index,
        name=EXPERTS,
        kind="experts",
        unit="expert",
        num_units=num_units,
        params_per_unit=sum(tensor.numel() for tensor in held) // num_units,
        config_key=spec.num_units,
        at_least=at_least,
        multiple_of=num_groups,
        parts=Experts(
            module=spec.experts,
            router=spec.router,
            router_rows=tuple(f"{spec.router}.{name}" for name in spec.router_rows),
            counts=spec.counts,
            num_groups=num_groups,
            buffers=tuple(f"{spec.router}.{name}" for name, row in rows if not isinstance(row, nn.Parameter)),
            stacks=_stacks(module, spec.channels, where, family),
            weighted_inputs=spec.weighted_inputs,
        ),
    )


def bind_expert_channels(layer: nn.Module, index: int, spec: ExpertsSpec, config: Any, family: str) -> Group:
    """Return the group of channels inside experts: a unit is one channel of every expert.

    Each expert loses its own channels. Raises ArchError if a stack contradicts the config.
    """
    where, channels = f"layer {index}, group {EXPERT_CHANNELS}", spec.channels
    assert channels.num_units is not None
    num_units = count_of(channels.num_units, config, where, family)
    module = submodule(layer, spec.experts, family)
    writer, down = (_tensor(module, name, where, family) for name in (channels.writer, channels.down))
    axis, other = (1, 2) if channels.transposed else (2, 1)
    if down.shape[axis] != num_units or writer.shape[3 - axis] != 2 * num_units:
        raise ArchError(
            f"{where}: {channels.writer} and {channels.down} are {list(writer.shape)} and {list(down.shape)}, but "
            f"config {channels.num_units}={num_units}; the checkpoint and its config disagree."
        )
    per_channel = 3 * down.shape[other] + 2 * (channels.writer_bias is not None)
    stacks = _stacks(module, channels, where, family)
    return Group(
        layer=index,
        name=EXPERT_CHANNELS,
        kind="expert_channels",
        unit="channel of each expert",
        num_units=num_units,
        params_per_unit=len(down) * per_channel,
        config_key=channels.num_units,
        at_least=1,
        multiple_of=CHANNEL_STEP,
        parts=Experts(spec.experts, spec.router, (), (), 1, (), stacks, unit_axis=axis),
    )


def _stacks(module: nn.Module, spec: ChannelsSpec, where: str, family: str) -> Stacks:
    for name in (spec.writer, spec.down, *filter(None, [spec.writer_bias])):
        _tensor(module, name, where, family)
    return Stacks(spec.writer, spec.writer_bias, spec.down, spec.alternating, spec.transposed)


def _tensor(module: nn.Module, name: str, where: str, family: str) -> Tensor:
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    if name not in tensors:
        raise ArchError(f"{where}: no tensor '{name}', which family {family} needs; there are {', '.join(tensors)}.")
    return tensors[name]


@dataclass(frozen=True, slots=True)
class Arch:
    """A family bound to one model. `groups` lists every layer's groups, layer by layer.

    `params_per_layer`: all parameters of each layer. `omits`: what cannot be cut, and why.
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
        """Return hidden states in the form in which the backbone expects a layer's output."""
        return (hidden, None) if self.layers_give_tuples else hidden

    def is_in_attention(self, group: Group) -> bool:
        """Say whether the group's units belong to the attention."""
        return self.attention is not None and group.parts.module.startswith(f"{self.attention}.")

    def select(self, names: tuple[str, ...]) -> tuple[Group, ...]:
        """Return the groups of these names. Raises ArchError if the family has no such group."""
        known = {group.name for group in self.groups}
        for name in names:
            if name in self.omits and name not in known:
                raise ArchError(f"remove.groups: family {self.family} cannot lose {name}: {self.omits[name]}.")
            if name not in known:
                raise ArchError(
                    f"remove.groups: family {self.family} has no group '{name}'; it has {', '.join(sorted(known))}; "
                    f"{advice(name, known)}"
                )
        chosen = tuple(group for group in self.groups if group.name in names)
        for name, other in combinations(names, 2):
            first, second = (next(group for group in chosen if group.name == n) for n in (name, other))
            if first.parts.module == second.parts.module:
                raise ArchError(f"remove.groups: {name} and {other} cut the same {first.parts.module}; choose one.")
        return chosen


def bind(model: nn.Module) -> Arch:
    """Check the family's spec against the model's modules and return it with real sizes.

    Raises ArchError if the family is unknown, a module is missing, or a size contradicts the
    config. Works on the meta device. GPT-2's linears become `TransposedLinear`, which saves the
    same.
    """
    own_config: Any = model.config
    config = text_config(model)
    family, spec = find_spec(own_config.model_type)
    linears_for_conv(submodule(model, spec.layers, family))
    layers = list(submodule(model, spec.layers, family).children())
    for name in (spec.backbone, spec.head):
        submodule(model, name, family)
    forbidden = {
        name: why for name, group in spec.groups.items() for key, why in group.unless.items() if _is_on(config, key)
    }
    groups: list[Group] = []
    configs = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    for index, (layer, layer_config) in enumerate(zip(layers, configs, strict=True)):
        groups += _layer_groups(layer, index, spec, layer_config, family, forbidden)
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


def _layer_groups(
    layer: nn.Module, index: int, spec: ArchSpec, config: Any, family: str, forbidden: dict[str, str]
) -> Iterator[Group]:
    for name in (spec.attention, spec.middle):
        if name is not None:
            submodule(layer, name, family)
    present = dict(layer.named_modules())
    for name, group in spec.groups.items():
        if name not in forbidden and not (group.in_some_layers and next(iter(group.reader)) not in present):
            yield _bind_group(layer, index, name, group, config, family, spec.heads_divide_hidden_size)
    if spec.experts is not None and spec.experts.experts in present:
        yield bind_experts(layer, index, spec.experts, config, family)
        if spec.experts.channels.num_units is not None:
            yield bind_expert_channels(layer, index, spec.experts, config, family)


def head_of(model: nn.Module, arch: Arch) -> nn.Module:
    """Return what maps the last hidden state to logits: the head and the family's scaling."""
    head = model.get_submodule(arch.head)
    return head if arch.logits is None else ScaledHead(head, arch.logits)


def decoder_layers(model: nn.Module, arch: Arch) -> list[nn.Module]:
    """Return the model's decoder layers in order."""
    return list(model.get_submodule(arch.layers).children())


def _is_on(config: Any, key: str) -> bool:
    name, _, inside = key.partition(".")
    if not hasattr(config, name):
        raise ArchError(f"spec: config has no switch '{key}', which the family's spec names.")
    value = getattr(config, name)
    return bool((value or {}).get(inside) if inside else value)


def _bind_group(
    layer: nn.Module, index: int, name: str, spec: GroupSpec, config: Any, family: str, heads_divide: bool
) -> Group:
    where = f"layer {index}, group {name}"
    num_units = count_of(spec.num_units, config, where, family)
    params_per_unit, axes = 0, []
    for module, segment_specs in (spec.writers | spec.reader).items():
        is_writer = module in spec.writers
        found = submodule(layer, module, family)
        if not isinstance(found, nn.Linear):
            raise ArchError(f"{where}: {module} is a {type(found).__name__}, but family {family} cuts nn.Linear.")
        segments = segments_of(segment_specs, config)
        rows_per_unit = sum(segments)
        size = found.out_features if is_writer else found.in_features
        if size != rows_per_unit * num_units:
            needs = f"config {spec.num_units}={num_units} asks for {rows_per_unit * num_units}"
            raise ArchError(f"{where}: {module} has {size} rows, but {needs}; the checkpoint and its config disagree.")
        across = found.in_features + (found.bias is not None) if is_writer else found.out_features
        params_per_unit += rows_per_unit * across
        axes.append(Axis(module, segments))
    switch = next((BiasSwitch(*item) for item in spec.bias_switch.items()), None)
    for module in switch.modules if switch else ():
        submodule(layer, module, family)
    is_head = sum(axes[-1].segments) > 1  # only heads have several reader columns
    divides = (config.num_attention_heads // num_units, config.hidden_size) if heads_divide and is_head else None
    return Group(
        layer=index,
        name=name,
        kind="heads" if is_head else "channels",
        unit=spec.unit,
        num_units=num_units,
        params_per_unit=params_per_unit,
        parts=Linears(tuple(axes[:-1]), axes[-1]),
        count=spec.count,
        bias_switch=switch,
        divides=divides,
        config_key=spec.num_units.split(" ")[0],
        head_dim=head_width(config) if is_head else None,
        local_config=spec.local_config,
    )
