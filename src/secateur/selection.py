"""Selection: which units of a group stay, given how many.

In: a layer, what was measured of the group, a method. Out: the kept indices and every unit's score. Nothing changes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.arch import Group, linear
from secateur.cut import unit_columns
from secateur.obs import greedy_obs, units_at_once
from secateur.score import ScoreInputs, damped_gram, keep_highest, scored
from secateur.stats import Decide, Statistics, here
from secateur.walk import Walk


@dataclass(frozen=True, slots=True)
class Method:
    """How units are chosen and readers repaired: plain numbers, and names as recipes have them."""

    score: str
    obs_batch: int | None
    compensate: str
    damping: float
    damping_factors: tuple[float, ...]
    target_mix: float
    weighting: str


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
