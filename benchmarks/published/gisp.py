"""GISP (Wang et al., ACL 2026, arXiv 2510.18030): global, iterative, first-order.

Step by step, all heads and channels of the model are ranked by the mean |w times gradient| of
their block: the sum over the unit's weights by the block's size, as in the authors' code. The
lowest go, and the gradient is taken anew. The first tenth of the layers and the last one stay
whole. The kept sets are nested, so one run serves every share up to its last.
"""

from collections.abc import Iterator, Sequence

import torch
from gradients import accumulate, clear, salience
from pruned import Pruned, count_parameters
from torch import Tensor, nn
from transformers import PreTrainedModel
from units import Kept, cut, everything, heads_of, keep_count, keep_share, layers_of, num_removed, rows_of, zero_heads

LENGTH, STEP = 256, 0.7 / 111  # The published schedule: 0 to 0.7 of all units in 112 steps.
OUR_STEP, ROWS_PER_STEP = 4 * STEP, 8  # What two cores can afford: about 16 gradients for 30%.


def head_scores(attention: nn.Module, dim: int) -> Tensor:
    """Sum over a head's weights, by 4 x head width x hidden width.

    With grouped heads the sum leaves out the keys and values, which other heads read too.
    """
    linears = [attention.q_proj]
    if attention.k_proj.out_features == attention.q_proj.out_features:
        linears += [attention.k_proj, attention.v_proj]
    rows = torch.stack([salience(linear.weight).sum(1) for linear in linears]).sum(0)
    rows = rows + salience(attention.o_proj.weight).sum(0)
    return rows.unflatten(0, (-1, dim)).sum(1) / (4 * dim * attention.o_proj.out_features)


def channel_scores(mlp: nn.Module) -> Tensor:
    """Sum over a channel's weights, by 3 x FFN width."""
    rows = salience(mlp.gate_proj.weight).sum(1) + salience(mlp.up_proj.weight).sum(1)
    return (rows + salience(mlp.down_proj.weight).sum(0)) / (3 * mlp.down_proj.in_features)


def scores(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Scores of heads [L, H] and channels [L, C]; infinite in the layers that stay whole."""
    layers, dim = layers_of(model), heads_of(model).dim
    scores_LH = torch.stack([head_scores(layer.self_attn, dim) for layer in layers])
    scores_LC = torch.stack([channel_scores(layer.mlp) for layer in layers])
    for scores_LU in (scores_LH, scores_LC):
        scores_LU[: int(len(layers) * 0.1)] = torch.inf
        scores_LU[-1] = torch.inf
    return scores_LH, scores_LC


def num_at(step: int, num_units: int, size: float) -> int:
    """How many units are gone after step `step`, as the code's threshold has it: one at step 0."""
    return num_units - int(num_units * (1 - step * size)) + 1


@torch.no_grad()
def zero(model: PreTrainedModel, kept: Kept) -> None:
    """Zeroes what `kept` leaves out, so that it scores 0 and stays out."""
    dim = heads_of(model).dim
    for layer, keep_H, keep_C in zip(layers_of(model), kept.heads, kept.channels, strict=True):
        zero_heads(layer.self_attn, keep_H, dim)
        layer.mlp.gate_proj.weight[~keep_C] = 0.0
        layer.mlp.up_proj.weight[~keep_C] = 0.0
        layer.mlp.down_proj.weight[:, ~keep_C] = 0.0


def trajectory(
    model: PreTrainedModel, rows_NT: Tensor, shares: Sequence[float], seed: int, step_size: float, rows_per_step: int
) -> Iterator[Kept]:
    """What is kept at each of the rising `shares`; zeroes the rest in `model` as it goes.

    `rows_per_step`: rows drawn anew for each gradient, at most all of them.
    """
    total, kept, step = count_parameters(model), everything(model), 0
    num_units = kept.heads.numel() + kept.channels.numel()
    draw = torch.Generator().manual_seed(seed)
    for share in shares:
        reached = num_removed(model, kept) >= share * total
        while not reached:
            rows = torch.randperm(rows_NT.shape[0], generator=draw)[:rows_per_step]
            accumulate(model, rows_NT[rows])
            ranked = scores(model)
            kept = keep_count(*ranked, num_at(step, num_units, step_size))
            reached = num_removed(model, kept) >= share * total
            if reached:
                kept = keep_share(model, *ranked, share * total)
            else:
                step += 1
            zero(model, kept)
        yield kept
    clear(model)


def prune(model: PreTrainedModel, blocks_NT: Tensor, share: float, seed: int) -> Pruned:
    """Removes `share` of all parameters of `model`, in place; `seed` draws the rows of each step."""
    rows_NT = rows_of(blocks_NT, LENGTH)
    (kept,) = trajectory(model, rows_NT, [share], seed, OUR_STEP, ROWS_PER_STEP)
    num_zeros = cut(model, kept)
    notes = (
        f"steps of {OUR_STEP:.2%} of all units, {min(ROWS_PER_STEP, len(rows_NT))} of {len(rows_NT)} rows of "
        f"{rows_NT.shape[1]} tokens each (published: {STEP:.2%}, 2,000 rows of 256 of C4)"
    )
    return Pruned(model, count_parameters(model) - num_zeros, "none", notes)
