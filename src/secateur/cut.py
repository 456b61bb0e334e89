"""The only place where shapes change: remove units from a group's writers and reader.

In: a decoder layer, a group, the sorted indices of the units to keep. Out: the same layer with smaller linears.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.arch import Group, Segments, linear


def rows_of(keep: Int64[Tensor, " K"], segments: Segments, num_units: int) -> Int64[Tensor, " R"]:
    """Return the rows that the kept units own, segment by segment.

    Segment k begins where the ones before it end and gives unit i the `segments[k]` rows from `i * segments[k]` on.
    """
    parts, start = [], 0
    for width in segments:
        first = start + keep * width
        parts.append((first[:, None] + torch.arange(width, device=keep.device)).flatten())
        start += width * num_units
    return torch.cat(parts)


def unit_columns(segments: Segments, num_units: int, device: torch.device) -> Int64[Tensor, "U w"]:
    """Return the rows (of a reader: columns) that each unit owns, a row of the result per unit."""
    parts, start = [], 0
    for width in segments:
        parts.append(start + torch.arange(num_units * width, device=device).view(num_units, width))
        start += width * num_units
    return torch.cat(parts, dim=1)


def original_units(before: Int64[Tensor, "... B"], keep: Int64[Tensor, "*E K"]) -> Int64[Tensor, "*E K"]:
    """Return which of the units that there were at first stay, if `before` had stayed and of these `keep` do.

    Of experts' channels both have a row per expert, `before` perhaps one for all.
    """
    return before.expand(*keep.shape[:-1], before.shape[-1]).gather(-1, keep)


@torch.no_grad()
def cut(
    layer: nn.Module,
    group: Group,
    keep: Int64[Tensor, " K"],
    num_units: int,
    reader_weight: Float[Tensor, "H R"] | None = None,
    reader_bias: Float[Tensor, " H"] | None = None,
) -> None:
    """Keep only the units `keep` (sorted, of the `num_units` that the layer has now).

    `reader_weight` replaces the reader's remaining columns (compensation); without it they stay as they were, bit for
    bit. `reader_bias` is added to the reader's bias; the caller has made sure that the family can store one.
    """
    for axis in group.writers:
        _cut_rows(linear(layer, axis.module), rows_of(keep, axis.segments, num_units))
    reader = linear(layer, group.reader.module)
    columns = rows_of(keep, group.reader.segments, num_units)
    kept = reader.weight[:, columns] if reader_weight is None else reader_weight.to(reader.weight)
    reader.weight = _parameter(kept, reader.weight)
    reader.in_features = len(columns)
    if group.count is not None:
        module, _, attribute = group.count.rpartition(".")
        setattr(layer.get_submodule(module), attribute, len(keep))
    if group.local_config is not None:
        _set_local_config(layer.get_submodule(group.local_config), group, reader)
    if reader_bias is not None:
        assert reader.bias is not None
        reader.bias.add_(reader_bias.to(reader.bias))


@torch.no_grad()
def zero_units(layer: nn.Module, group: Group, removed: Int64[Tensor, " R"]) -> None:
    """Mask instead of cutting: set the removed units' reader columns to zero. The exactness tests compare with this."""
    reader = linear(layer, group.reader.module)
    reader.weight[:, rows_of(removed, group.reader.segments, group.num_units)] = 0


def add_zero_biases(layer: nn.Module, group: Group) -> None:
    """Give every linear of the group's bias switch a bias of zeros, where it has none; outputs do not change."""
    assert group.bias_switch is not None
    for name in group.bias_switch.modules:
        module = linear(layer, name)
        if module.bias is None:
            zeros = module.weight.new_zeros(module.out_features)
            module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)


def _set_local_config(module: Any, group: Group, reader: nn.Linear) -> None:
    """Give the module a config of its own with the numbers of heads that it has now."""
    assert group.head_dim is not None
    module.config = copy.copy(module.config)
    setattr(module.config, group.config_key, reader.in_features // group.width)
    module.config.num_attention_heads = reader.in_features // group.head_dim


def _cut_rows(module: nn.Linear, rows: Int64[Tensor, " R"]) -> None:
    module.weight = _parameter(module.weight[rows], module.weight)
    if module.bias is not None:
        module.bias = _parameter(module.bias[rows], module.bias)
    module.out_features = len(rows)


def _parameter(value: Tensor, old: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
