"""Experts as stacks of matrices: how they are read, and cut.

E experts, T tokens, D hidden size, F channels of an expert, K that stay.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.model.group import Group, Stacks, attribute_of, set_counts


def num_channels(module: nn.Module, stacks: Stacks) -> int:
    """Return the number of channels of every expert."""
    return module.get_parameter(stacks.down).shape[1 if stacks.transposed else 2]


def reader_of(module: nn.Module, stacks: Stacks, expert: int) -> Float[Tensor, "D F"]:
    """Return one expert's reader in float32."""
    weight = module.get_parameter(stacks.down)[expert]
    return (weight.T if stacks.transposed else weight).float()


def channel_inputs(module: Any, stacks: Stacks, expert: int, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T F"]:
    """Return the inputs of the expert's reader: act(gate) * up, act(up), or the family's own gate."""
    writer = module.get_parameter(stacks.writer)[expert]
    both = hidden_TD @ (writer if stacks.transposed else writer.T)
    if stacks.writer_bias is not None:
        both = both + module.get_parameter(stacks.writer_bias)[expert]
    if not stacks.gated:
        return module.act_fn(both)
    if stacks.alternating or hasattr(module, "_apply_gate"):
        return module._apply_gate(both)
    gate, up = both.chunk(2, dim=-1)
    return module.act_fn(gate) * up


@torch.no_grad()
def cut_experts(layer: nn.Module, group: Group, keep: Int64[Tensor, " K"]) -> None:
    """Keep these experts: their entries of every stack, their router rows, and the counts.

    Rows behind those of the experts, of shared ones, stay.
    """
    experts, before = group.experts, group.parts.num_units_left(layer)
    names = [f"{experts.module}.{name}" for name, _ in layer.get_submodule(experts.module).named_parameters()]
    for name in (*names, *experts.router_rows):
        tensor, (parent, _, attribute) = attribute_of(layer, name), name.rpartition(".")
        axis = -1 if len(tensor) == 1 else 0
        rows = torch.cat([keep.to(tensor.device), torch.arange(before, tensor.shape[axis], device=tensor.device)])
        kept = tensor.index_select(axis, rows).contiguous()
        is_parameter = isinstance(tensor, nn.Parameter)
        kept = nn.Parameter(kept, requires_grad=tensor.requires_grad) if is_parameter else kept
        setattr(layer.get_submodule(parent), attribute, kept)
    set_counts(layer, experts.counts, len(keep))


@torch.no_grad()
def cut_expert_channels(layer: nn.Module, group: Group, keep_EK: Int64[Tensor, "E K"]) -> None:
    """Keep these channels of each expert: rows of the writers, columns of the readers."""
    stacks, module = group.experts.stacks, layer.get_submodule(group.experts.module)
    rows = keep_EK.unsqueeze(-1) * 2 + torch.arange(2, device=keep_EK.device)
    halves = torch.cat([keep_EK, keep_EK + num_channels(module, stacks)], dim=1) if stacks.gated else keep_EK
    rows_ER = rows.flatten(1) if stacks.alternating else halves
    _take(module, stacks.writer, rows_ER, 2 if stacks.transposed else 1)
    if stacks.writer_bias is not None:
        _take(module, stacks.writer_bias, rows_ER, 1)
    _take(module, stacks.down, keep_EK, 1 if stacks.transposed else 2)


def _take(module: nn.Module, name: str, index_EK: Tensor, axis: int) -> None:
    old = module.get_parameter(name)
    shape = [1] * old.ndim
    shape[0], shape[axis] = index_EK.shape
    kept = torch.take_along_dim(old.data, index_EK.to(old.device).view(shape), dim=axis)
    setattr(module, name, nn.Parameter(kept.contiguous(), requires_grad=old.requires_grad))
