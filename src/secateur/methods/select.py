"""Which units of a group stay, given how many: by score, or greedily by OBS."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.facts import Method
from secateur.methods.scores import ScoreInputs, scored
from secateur.model.group import Group, linear, unit_columns
from secateur.stream.statistics import Decide, Statistics, damped_gram, here, inverse_of, keep_highest, removal_errors
from secateur.stream.walk import Walk

# Every batch rewrites F^2 numbers, so their number, not their size, must be bounded for wide readers.
MIN_BATCH_COLUMNS, MAX_BATCHES = 32, 48


@dataclass(frozen=True, slots=True)
class ObsSelection:
    """`keep`: sorted units that stay. `scores_U`: all units' scores before any removal.

    `removed`: the units that go, in order of removal. `error_curve[k]`: squared output error after k+1 batches, the
    other columns refitted.
    """

    keep: Tensor
    scores_U: Tensor
    removed: Tensor
    error_curve: Tensor


def units_at_once(asked_columns: int | None, num_columns: int, width: int) -> int:
    """Return how many units of `width` columns go between two updates.

    `asked_columns`: the recipe's `obs_batch`; None: a 48th of the reader's `num_columns`, and at least 32.
    """
    return max(1, (asked_columns or max(MIN_BATCH_COLUMNS, num_columns // MAX_BATCHES)) // width)


def greedy_obs(
    reader_HF: Float[Tensor, "H F"],
    hessian_FF: Float[Tensor, "F F"],
    columns_UW: Int64[Tensor, "U w"],
    num_keep: int,
    batch: int,
) -> ObsSelection:
    """Remove the units of least `removal_errors`, `batch` at a time, until `num_keep` stay.

    After a batch with columns M, A = ([H^-1]_MM)^-1:  error += tr(W_M A W_M');  W -= W_M A [H^-1]_M;
    H^-1 -= [H^-1]_M' A [H^-1]_M. With batch 1 every step is the exact best single removal. `hessian_FF` is overwritten;
    all runs on its device and solves in its dtype, and what is returned is on the reader's.
    Source: Hassibi and Stork 1993; block update as in Frantar and Alistarh, OBC, arXiv 2208.11580, eq. 7.
    """
    inverse = inverse_of(hessian_FF)
    # Float32 is enough for the weights, which only rank; the inverse would lose its small pivots in it.
    weight = reader_HF.to(hessian_FF.device, torch.float32, copy=True)
    columns_UW = columns_UW.to(weight.device)
    active = torch.ones(len(columns_UW), dtype=torch.bool, device=weight.device)
    num_left, error, curve, order = len(columns_UW), inverse.new_zeros(()), [], []
    first_scores = removal_errors(weight, inverse, columns_UW)
    while num_left > num_keep:
        scores = removal_errors(weight, inverse, columns_UW)
        scores[~active] = torch.inf
        size = min(batch, num_left - num_keep)
        units = torch.sort(scores, stable=True).indices[:size].sort().values
        columns = columns_UW[units].flatten()
        rows = inverse[columns]
        gain = torch.linalg.solve(rows[:, columns], rows)  # A [H^-1]_M
        gone = weight[:, columns].to(rows.dtype)
        error = error + (gone * torch.linalg.solve(rows[:, columns], gone.T).T).sum()
        weight.addmm_(weight[:, columns], gain.float(), alpha=-1)
        inverse.addmm_(rows.T, gain, alpha=-1)
        # Exact zeros would divide by zero above; the removed columns are masked, so any positive value serves.
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse.diagonal()[columns] = 1.0
        active[units] = False
        num_left -= size
        curve.append(error)
        order.append(units)
    removed = torch.cat(order) if order else columns_UW.new_zeros(0)
    errors, home = torch.stack(curve) if curve else inverse.new_zeros(0), reader_HF.device
    return ObsSelection(active.nonzero().flatten().to(home), first_scores.float().to(home), removed.to(home), errors)


@dataclass(frozen=True, slots=True)
class Task:
    """One group's step: what a kind of unit needs to prune it. `walk` stands before the group's layer.

    `scores_U`: the units' scores, where they were measured on the whole model before.
    """

    walk: Walk
    group: Group
    num_keep: int
    method: Method
    shares: dict[str, float]
    seed: int
    scores_U: Tensor | None = None
    decide: Decide = here

    @property
    def layer(self) -> nn.Module:
        """The group's layer."""
        return self.walk.layers[self.group.layer]


@dataclass(frozen=True, slots=True)
class Selection:
    """`keep`: sorted indices among the units the group has now. `scores`: of all of them; none if all were to stay."""

    keep: Tensor
    scores: Tensor


def select(
    layer: nn.Module,
    group: Group,
    pooled: Statistics,
    num_keep: int,
    method: Method,
    seed: int,
    scores_U: Tensor | None = None,
) -> Selection:
    """Choose `num_keep` units: greedily for `obs`, else those of highest score.

    `scores_U`: scores that were measured before, of all units; without them the method's score is taken.
    """
    reader = linear(layer, group.reader.module)
    num_units = reader.in_features // group.width
    if num_keep == num_units:
        return Selection(torch.arange(num_keep, device=reader.weight.device), reader.weight.new_zeros(0))
    if method.score == "obs" and scores_U is None:
        assert pooled.gram is not None
        hessian = damped_gram(pooled.gram, method.damping)
        columns_UW = unit_columns(group.reader.segments, num_units, reader.weight.device)
        batch = units_at_once(method.obs_batch, reader.in_features, group.width)
        found = greedy_obs(reader.weight, hessian, columns_UW, num_keep, batch)
        return Selection(found.keep, found.scores_U)
    if scores_U is None:
        scores_U = unit_scores(layer, group, pooled, method.score, method.damping, seed)
    return Selection(keep_highest(scores_U, num_keep), scores_U)


def unit_scores(
    layer: nn.Module, group: Group, pooled: Statistics, score: str, damping: float, seed: int
) -> Float[Tensor, " U"]:
    """Return every unit's score as it is before any goes."""
    weight_HF = linear(layer, group.reader.module).weight
    num_units = weight_HF.shape[1] // group.width
    columns_UW = unit_columns(group.reader.segments, num_units, weight_HF.device)
    squares_U = _writer_squares(layer, group, num_units)
    inputs = ScoreInputs(weight_HF.float(), squares_U, pooled, columns_UW, damping, seed)
    return scored(score, inputs)


def _writer_squares(layer: nn.Module, group: Group, num_units: int) -> Float[Tensor, " U"]:
    total = 0
    for axis in group.writers:
        weight = linear(layer, axis.module).weight.float()
        total = total + weight.square().sum(dim=1)[unit_columns(axis.segments, num_units, weight.device)].sum(dim=1)
    assert isinstance(total, Tensor)
    return total
