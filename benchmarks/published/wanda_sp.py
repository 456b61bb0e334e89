"""Wanda-sp (An et al., AAAI 2024, the baseline in FLAP's code): Wanda's score on whole units.

Layer by layer on the pruned stream. A weight's score is |w| times the norm of its input; a
channel's is the mean over its column, a head's the sum of its channels. Every layer loses the same
share of its heads, rounded down, and of its channels. No repair.
"""

from typing import Any

import torch
from pruned import Pruned, count_parameters
from torch import Tensor, nn
from transformers import PreTrainedModel
from uniform import Uniform, uniform
from units import cut_channels, cut_heads, heads_of, layers_of, rows_of

LENGTH, BATCH = 128, 16


class _FirstLayerReached(Exception):
    pass


@torch.no_grad()
def first_inputs(model: PreTrainedModel, rows_NT: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """What enters the first layer: hidden states and arguments, a batch an entry."""
    batches: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append((args[0], kwargs))
        raise _FirstLayerReached

    handle = layers_of(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch_NT in rows_NT.split(BATCH):
        try:
            model.model(input_ids=batch_NT, use_cache=False)
        except _FirstLayerReached:
            pass
    handle.remove()
    return batches


def norms(layer: nn.Module, batches: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, Tensor]:
    """Squared norms of the inputs of `o_proj` and `down_proj`, per channel, per sample."""
    linears = (layer.self_attn.o_proj, layer.mlp.down_proj)
    sums = [torch.zeros(linear.in_features) for linear in linears]

    def add(index: int, x_NTC: Tensor) -> None:
        sums[index] += x_NTC.float().square().sum((0, 1))

    handles = [
        linear.register_forward_pre_hook(lambda _, args, index=index: add(index, args[0]))
        for index, linear in enumerate(linears)
    ]
    for hidden_NTD, kwargs in batches:
        layer(hidden_NTD, **kwargs)
    for handle in handles:
        handle.remove()
    num = sum(hidden_NTD.shape[0] for hidden_NTD, _ in batches)
    return sums[0] / num, sums[1] / num


def column_scores(linear: nn.Linear, norm_C: Tensor) -> Tensor:
    """Mean of |w| times the norm of its input, over each column."""
    return (linear.weight.data.abs() * norm_C.sqrt()).mean(0)


def without_lowest(scores: Tensor, num: int) -> Tensor:
    """True but for the `num` lowest scores; ties with the threshold stay."""
    return scores >= scores.sort().values[num]


@torch.no_grad()
def prune_layers(model: PreTrainedModel, rows_NT: Tensor, cut: Uniform) -> int:
    """Cuts every layer in turn, each on what the cut ones before it put out."""
    heads, batches, num_zeros = heads_of(model), first_inputs(model, rows_NT), 0
    for layer in layers_of(model):
        o_proj, down_proj = layer.self_attn.o_proj, layer.mlp.down_proj
        o_norm_C, down_norm_C = norms(layer, batches)
        scores_H = column_scores(o_proj, o_norm_C).unflatten(0, (-1, heads.dim)).sum(1)
        scores_C = column_scores(down_proj, down_norm_C)
        keep_H = without_lowest(scores_H, cut.num_heads)
        num_zeros += cut_heads(layer, keep_H, heads, all_groups=heads.groups < heads.num)
        cut_channels(layer.mlp, without_lowest(scores_C, cut.num_channels))
        batches = [(layer(hidden_NTD, **kwargs), kwargs) for hidden_NTD, kwargs in batches]
    return num_zeros


def prune(model: PreTrainedModel, blocks_NT: Tensor, share: float, seed: int) -> Pruned:
    """Removes `share` of all parameters of `model`, in place; deterministic, `seed` is not used.

    With grouped heads, query heads go and key/value heads stay, as in the code of GISP.
    """
    heads, rows_NT = heads_of(model), rows_of(blocks_NT, LENGTH)
    matrices = 4 if heads.groups == heads.num else 2
    cut = uniform(model, len(layers_of(model)), heads.num, matrices * heads.dim, share)
    num_zeros = prune_layers(model, rows_NT, cut)
    notes = f"{rows_NT.shape[0]} rows of {rows_NT.shape[1]} tokens (published: 128 rows of 128 of C4); {cut}"
    return Pruned(model, count_parameters(model) - num_zeros, "none", notes)
