"""A layer's experts, bound to real modules: every expert is a unit that goes with its row of the router.

In: a layer, a family's `experts` section, a config. Out: a `Group`. Checked: every parameter of the experts' module and
every router tensor that the spec names has one entry per expert on its first axis.
"""

from typing import Any

from torch import Tensor, nn

from secateur.arch_group import Experts, Group, Stacks, submodule
from secateur.arch_numbers import count_of
from secateur.arch_spec import ChannelsSpec, ExpertsSpec
from secateur.errors import ArchError

EXPERTS, EXPERT_CHANNELS = "experts", "expert_ffn"
# Channels of experts that fill 16 bytes in half precision: transformers multiplies experts in rows of so many.
CHANNEL_STEP = 8


def bind_experts(layer: nn.Module, index: int, spec: ExpertsSpec, config: Any, family: str) -> Group:
    """Return the layer's group of experts.

    At least as many stay as the router chooses. Where it chooses among the best `topk_group` of `n_group` groups, those
    must hold as many, and every group the two by which it is judged.
    Raises ArchError if a module or a tensor is missing or has another size than the config says.
    """
    where = f"layer {index}, group {EXPERTS}"
    num_units, top_k = (count_of(key, config, where, family) for key in (spec.num_units, spec.top_k))
    module, router = submodule(layer, spec.experts, family), submodule(layer, spec.router, family)
    stacks = list(module.named_parameters())
    rows = [(name, _tensor(router, name, where, family)) for name in spec.router_rows]
    for name, tensor in [*stacks, *rows]:
        if tensor.shape[0] != num_units:
            raise ArchError(
                f"{where}: {name} has {tensor.shape[0]} entries, but config {spec.num_units}={num_units}; the "
                f"checkpoint and its config disagree."
            )
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
    """Return the layer's group of channels inside experts: a unit is one channel of every expert, each its own.

    Raises ArchError if a stack is missing or has another width than the config says.
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


def _tensor(router: nn.Module, name: str, where: str, family: str) -> Tensor:
    tensors = dict(router.named_parameters()) | dict(router.named_buffers())
    if name not in tensors:
        raise ArchError(
            f"{where}: there is no tensor '{name}', which family {family} needs; there are {', '.join(tensors)}."
        )
    return tensors[name]
