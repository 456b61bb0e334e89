"""LLM-Pruner (Ma et al., NeurIPS 2023): Taylor, `param_first`, block-wise, without its LoRA.

One pass and one gradient. The score of a unit is the sum of |w times gradient| over all its
weights: rows of q, k and v and columns of o for a head, rows of gate and up and columns of down for
a channel. Every layer but the first and the last ones loses the same share of both.
"""

import torch
from gradients import accumulate, clear, salience
from pruned import Pruned, count_parameters
from torch import Tensor, nn
from transformers import PreTrainedModel
from uniform import uniform
from units import Heads, cut_channels, cut_heads, heads_of, layers_of, rows_of

LENGTH = 64
FIRST_SHARE, LAST_SHARE = 4 / 32, 2 / 32  # The scripts prune layers 4 to 29 of 32.


def pruned_layers(num_layers: int) -> range:
    """The layers that may lose something."""
    return range(round(num_layers * FIRST_SHARE), num_layers - round(num_layers * LAST_SHARE))


def group_scores(attention: nn.Module, heads: Heads) -> Tensor:
    """The score of each key/value head with the query heads that read it.

    With grouped heads the code adds the rows of `q_proj` and the columns of `o_proj` to the
    key/value heads in turn (query head i to i modulo the groups), though neighbours share one.
    """
    parts = [salience(linear.weight).sum(1) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    parts.append(salience(attention.o_proj.weight).sum(0))
    return torch.stack([part.view(-1, heads.groups, heads.dim).sum((0, 2)) for part in parts]).sum(0)


def channel_scores(mlp: nn.Module) -> Tensor:
    """The score of each FFN channel."""
    rows = salience(mlp.gate_proj.weight).sum(1) + salience(mlp.up_proj.weight).sum(1)
    return rows + salience(mlp.down_proj.weight).sum(0)


def without_lowest(scores: Tensor, num: int) -> Tensor:
    """True but for the `num` lowest scores."""
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[scores.argsort(stable=True)[:num]] = False
    return keep


def prune(model: PreTrainedModel, blocks_NT: Tensor, share: float, seed: int) -> Pruned:
    """Removes `share` of all parameters of `model`, in place; deterministic, `seed` is not used.

    With grouped heads the unit is a key/value head with its readers, as in the authors' script
    for Llama 3.
    """
    heads, rows_NT = heads_of(model), rows_of(blocks_NT, LENGTH)
    repeat, pruned = heads.num // heads.groups, pruned_layers(len(layers_of(model)))
    cut = uniform(model, len(pruned), heads.groups, (2 * repeat + 2) * heads.dim, share)
    accumulate(model, rows_NT)
    keeps = []
    for index in pruned:
        layer = layers_of(model)[index]
        keep_G = without_lowest(group_scores(layer.self_attn, heads), cut.num_heads)
        keeps.append((keep_G.repeat_interleave(repeat), without_lowest(channel_scores(layer.mlp), cut.num_channels)))
    clear(model)
    for index, (keep_H, keep_C) in zip(pruned, keeps, strict=True):
        cut_heads(layers_of(model)[index], keep_H, heads)
        cut_channels(layers_of(model)[index].mlp, keep_C)
    notes = f"{rows_NT.shape[0]} rows of {rows_NT.shape[1]} tokens (published: 10 rows of 64 of BookCorpus); {cut}"
    return Pruned(model, count_parameters(model), "LoRA (not run)", notes)
