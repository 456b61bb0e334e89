"""Which units of a group stay, given how many: by score, or greedily by OBS."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.facts import PerDomain
from secateur.methods.compensate import Method
from secateur.methods.scores import ScoreInputs, scored
from secateur.model.group import Group, linear, unit_columns
from secateur.stream.statistics import (
    Hand,
    Statistics,
    damped_gram,
    inverse_of,
    keep_highest,
    removal_errors,
)
from secateur.stream.walk import Walk

# Every batch rewrites F^2 numbers, so wide readers need a bounded number of batches.
MIN_BATCH_COLUMNS, MAX_BATCHES = 32, 48


class ObsSelection(NamedTuple):
    """`keep`: sorted units that stay; `removed`: the others, in order.

    `error_curve[k]`: squared output error after k+1 batches, the other columns refitted.
    """

    keep: Tensor
    removed: Tensor
    error_curve: Tensor


def units_at_once(num_columns: int, width: int) -> int:
    """Return how many units of `width` columns go between two updates of a reader with
    `num_columns`.
    """
    return max(1, max(MIN_BATCH_COLUMNS, num_columns // MAX_BATCHES) // width)


def greedy_obs(
    reader_HF: Float[Tensor, "H F"],
    hessian_FF: Float[Tensor, "F F"],
    columns_UW: Int64[Tensor, "U w"],
    num_keep: int,
    batch: int,
) -> ObsSelection:
    """Remove the units of least `removal_errors`, `batch` at a time, until `num_keep` stay.

    After a batch with columns M, A = ([H^-1]_MM)^-1:  error += tr(W_M A W_M'), W -= W_M A [H^-1]_M,
    H^-1 -= [H^-1]_M' A [H^-1]_M. Batch 1: each removal is the exact best single. `hessian_FF` is
    overwritten; the work runs on its device and in its dtype. The result is on the reader's.
    Source: Hassibi and Stork 1993; block update: OBC, arXiv 2208.11580, eq. 7.
    """
    inverse = inverse_of(hessian_FF)
    # Float32 is enough for the weights, which only rank; the inverse would lose small pivots.
    weight = reader_HF.to(hessian_FF.device, torch.float32, copy=True)
    columns_UW = columns_UW.to(weight.device)
    active = torch.ones(len(columns_UW), dtype=torch.bool, device=weight.device)
    num_left, error, curve, order = len(columns_UW), inverse.new_zeros(()), [], []
    while num_left > num_keep:
        scores = removal_errors(weight, inverse, columns_UW)
        scores[~active] = torch.inf
        size = min(batch, num_left - num_keep)
        units = torch.sort(scores, stable=True).indices[:size].sort().values
        columns = columns_UW[units].flatten()
        rows = inverse[columns]
        gain = torch.linalg.solve(rows[:, columns], rows)  # A [H^-1]_M
        of_columns = weight[:, columns].to(rows.dtype)
        error = error + (of_columns * torch.linalg.solve(rows[:, columns], of_columns.T).T).sum()
        weight.addmm_(weight[:, columns], gain.float(), alpha=-1)
        inverse.addmm_(rows.T, gain, alpha=-1)
        # Removed columns are masked: 1.0 on their diagonal only avoids a division by zero.
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse.diagonal()[columns] = 1.0
        active[units] = False
        num_left -= size
        curve.append(error)
        order.append(units)
    removed = torch.cat(order) if order else columns_UW.new_zeros(0)
    errors, device = torch.stack(curve) if curve else inverse.new_zeros(0), reader_HF.device
    keep = active.nonzero().flatten().to(device)
    return ObsSelection(keep, removed.to(device), errors)


@dataclass(frozen=True, slots=True)
class Task:
    """One group to prune; `walk` stands before its layer.

    `keep`: the units that stay, if another run has chosen them; with one row per expert for
    channels of experts. `hand`: see `measure`.
    """

    walk: Walk
    group: Group
    num_keep: int
    method: Method
    shares: PerDomain
    seed: int
    keep: Tensor | None = None
    hand: Hand | None = None

    @property
    def layer(self) -> nn.Module:
        """The group's layer."""
        return self.walk.layers[self.group.layer]


StepResult = tuple[Int64[Tensor, "*E K"], dict[str, Any]]
"""The units that stay, a row per expert for channels of experts, and the line for the run log."""


def log_line(group: Group, kept: int, total: int, output_energy: PerDomain) -> dict[str, Any]:
    """Return the run log's line of a group's step."""
    return {
        "layer": group.layer,
        "group": group.name,
        "kept": kept,
        "total": total,
        "output_energy": output_energy,
    }


def select(task: Task, pooled: Statistics) -> Int64[Tensor, " K"]:
    """Return the sorted units that stay: those of `task.keep`, greedily for `obs`, or by the
    score.
    """
    layer, group, method, num_keep = task.layer, task.group, task.method, task.num_keep
    reader = linear(layer, group.reader.module)
    num_units = reader.in_features // group.width
    if num_keep == num_units:
        return torch.arange(num_keep, device=reader.weight.device)
    if task.keep is not None:
        return task.keep.to(reader.weight.device)
    if method.score == "obs":
        hessian = damped_gram(pooled.gram, method.damping)
        columns_UW = unit_columns(group.reader.segments, num_units, reader.weight.device)
        batch = units_at_once(reader.in_features, group.width)
        return greedy_obs(reader.weight, hessian, columns_UW, num_keep, batch).keep
    scores_U = unit_scores(layer, group, pooled, method.score, method.damping, task.seed)
    return keep_highest(scores_U, num_keep)


def unit_scores(
    layer: nn.Module, group: Group, pooled: Statistics, score: str, damping: float, seed: int
) -> Float[Tensor, " U"]:
    """Return every unit's score before any goes."""
    weight_HF = linear(layer, group.reader.module).weight
    num_units = weight_HF.shape[1] // group.width
    columns_UW = unit_columns(group.reader.segments, num_units, weight_HF.device)
    squares_U = weight_HF.new_zeros(num_units, dtype=torch.float32)
    for axis in group.writers:
        squares_R = linear(layer, axis.module).weight.float().square().sum(dim=1)
        squares_U = squares_U + squares_R[
            unit_columns(axis.segments, num_units, squares_R.device)
        ].sum(dim=1)
    return scored(
        score, ScoreInputs(weight_HF.float(), squares_U, pooled, columns_UW, damping, seed)
    )
