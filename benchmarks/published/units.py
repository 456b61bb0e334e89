"""Heads and FFN channels of a Llama or Qwen2 model: counted, cut out, zeroed.

A query head goes with its rows of `q_proj` and its columns of `o_proj`; a key/value head goes with
the last query head that reads it. A key/value head that keeps only some of its readers cannot be
sliced out of a stock attention: there the removed heads are zeros, and count as removed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Heads(NamedTuple):
    """`num`: query heads. `groups`: key/value heads. `dim`: channels of a head."""

    num: int
    groups: int
    dim: int


class Kept(NamedTuple):
    """What each layer keeps: `heads` bool [L, H], `channels` bool [L, C]."""

    heads: Tensor
    channels: Tensor


class NoAttention(nn.Module):
    """An attention without heads: `bias`, or nothing, for every token."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        zero = torch.zeros_like(hidden_states)
        return (zero if self.bias is None else zero + self.bias), None


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers."""
    return model.model.layers


def heads_of(model: PreTrainedModel) -> Heads:
    """The heads of every layer of an unpruned model."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads, config.num_key_value_heads, dim)


def everything(model: PreTrainedModel) -> Kept:
    """Nothing removed yet."""
    num_layers, config = len(layers_of(model)), model.config
    return Kept(
        torch.ones(num_layers, config.num_attention_heads, dtype=torch.bool),
        torch.ones(num_layers, config.intermediate_size, dtype=torch.bool),
    )


def live_groups(keep_H: Tensor, heads: Heads) -> Tensor:
    """The key/value heads that a kept query head reads: bool [..., groups]."""
    return keep_H.unflatten(-1, (heads.groups, -1)).any(-1)


def num_removed(model: PreTrainedModel, kept: Kept) -> int:
    """Parameters that go with what `kept` leaves out of the unpruned `model`."""
    heads, layer = heads_of(model), layers_of(model)[0]
    attention, width = layer.self_attn, model.config.hidden_size
    row = width + (attention.q_proj.bias is not None)
    query, group = heads.dim * (row + width), 2 * heads.dim * row
    groups = live_groups(kept.heads, heads)
    return int((~kept.heads).sum()) * query + int((~groups).sum()) * group + int((~kept.channels).sum()) * 3 * width


def cut(model: PreTrainedModel, kept: Kept, all_groups: bool = False) -> int:
    """Cuts every layer of `model` to `kept`; the number of parameters that are zeros instead.

    `all_groups`: keep the key/value heads that nothing reads.
    """
    heads, num_zeros = heads_of(model), 0
    for layer, keep_H, keep_C in zip(layers_of(model), kept.heads, kept.channels, strict=True):
        cut_channels(layer.mlp, keep_C)
        num_zeros += cut_heads(layer, keep_H, heads, all_groups)
    return num_zeros


def cut_heads(layer: nn.Module, keep_H: Tensor, heads: Heads, all_groups: bool = False) -> int:
    """Cuts the attention of `layer` to the heads `keep_H`; the number of zeros left in it."""
    attention = layer.self_attn
    groups = torch.ones(heads.groups, dtype=torch.bool) if all_groups else live_groups(keep_H, heads)
    if not groups.any():
        layer.self_attn = NoAttention(None if attention.o_proj.bias is None else attention.o_proj.bias.data)
        return 0
    zero_heads(attention, keep_H, heads.dim)
    readers = groups.repeat_interleave(heads.num // heads.groups)
    take_rows(attention.q_proj, readers.repeat_interleave(heads.dim))
    take_columns(attention.o_proj, readers.repeat_interleave(heads.dim))
    for linear in (attention.k_proj, attention.v_proj):
        take_rows(linear, groups.repeat_interleave(heads.dim))
    row = attention.q_proj.in_features + (attention.q_proj.bias is not None)
    return int((readers & ~keep_H).sum()) * heads.dim * (row + attention.o_proj.out_features)


@torch.no_grad()
def zero_heads(attention: nn.Module, keep_H: Tensor, dim: int) -> None:
    """Zeroes the rows of `q_proj` and the columns of `o_proj` of the heads outside `keep_H`."""
    gone = (~keep_H).repeat_interleave(dim)
    attention.q_proj.weight[gone] = 0.0
    if attention.q_proj.bias is not None:
        attention.q_proj.bias[gone] = 0.0
    attention.o_proj.weight[:, gone] = 0.0


def cut_channels(mlp: nn.Module, keep_C: Tensor) -> None:
    """Cuts an FFN to the channels `keep_C`."""
    take_rows(mlp.gate_proj, keep_C)
    take_rows(mlp.up_proj, keep_C)
    take_columns(mlp.down_proj, keep_C)


def take_rows(linear: nn.Linear, keep: Tensor) -> None:
    """Keeps the outputs `keep` of `linear`."""
    linear.weight = nn.Parameter(linear.weight.data[keep].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[keep].clone())
    linear.out_features = int(keep.sum())


def take_columns(linear: nn.Linear, keep: Tensor) -> None:
    """Keeps the inputs `keep` of `linear`."""
    linear.weight = nn.Parameter(linear.weight.data[:, keep].clone())
    linear.in_features = int(keep.sum())


def rows_of(blocks_NT: Tensor, length: int) -> Tensor:
    """The tokens of `blocks_NT` as rows of `length`; the rest of each block is left out."""
    length = min(length, blocks_NT.shape[1])
    num = blocks_NT.shape[1] // length
    return blocks_NT[:, : num * length].reshape(-1, length)


def keep_count(scores_LH: Tensor, scores_LC: Tensor, num: int) -> Kept:
    """All units but the `num` with the lowest scores."""
    flat = torch.cat([scores_LH.flatten(), scores_LC.flatten()])
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    keep[torch.argsort(flat, stable=True)[:num]] = False
    return Kept(
        keep[: scores_LH.numel()].view_as(scores_LH),
        keep[scores_LH.numel() :].view_as(scores_LC),
    )


def keep_share(model: PreTrainedModel, scores_LH: Tensor, scores_LC: Tensor, target: float) -> Kept:
    """The lowest units removed, one order over all layers, so many that about `target` parameters go."""
    low, high = 0, int(torch.isfinite(scores_LH).sum() + torch.isfinite(scores_LC).sum())
    while low < high:
        middle = (low + high) // 2
        if num_removed(model, keep_count(scores_LH, scores_LC, middle)) < target:
            low = middle + 1
        else:
            high = middle
    nearest = [keep_count(scores_LH, scores_LC, num) for num in (max(low - 1, 0), low)]
    return min(nearest, key=lambda kept: abs(num_removed(model, kept) - target))
