"""One group's step: measure, select, compensate, cut.

In: the walk standing before the group's layer, how many units to keep. Out: the layer with smaller linears, the kept
indices, and the line of the run log that says what was lost and given back.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.arch import Group, linear
from secateur.cut import cut, rows_of, unit_columns
from secateur.measure import Measurement, measure
from secateur.memory import release_freed
from secateur.obs import greedy_obs
from secateur.original_readers import OriginalReaders
from secateur.recipe import Recipe
from secateur.repair import Repair, repair
from secateur.score import NEED_GRAM, SCORES, ScoreInputs, damped_gram, keep_highest
from secateur.walk import Walk


@dataclass(frozen=True, slots=True)
class Selection:
    """`keep`: sorted indices among the units the group has now. `scores`: of all of them; none if all were to stay."""

    keep: Tensor
    scores: Tensor


@torch.no_grad()
def prune_group(
    walk: Walk,
    group: Group,
    num_keep: int,
    recipe: Recipe,
    shares: dict[str, float],
    seed: int,
    originals: OriginalReaders | None,
) -> tuple[Int64[Tensor, " K"], dict[str, Any]]:
    """Measure, select, compensate and cut one group; return the kept indices and the log line."""
    layer = walk.layers[group.layer]
    reader = linear(layer, group.reader.module)
    num_units = reader.in_features // group.width
    is_mlp = not group.reader.module.startswith(f"{walk.arch.attention}.")
    measured = measure(
        walk,
        group,
        recipe.domain_weighting,
        shares,
        gram=recipe.score in NEED_GRAM or recipe.compensate == "least_squares",
        drift=is_mlp and bool(walk.dense_BTD),
        to_middle=is_mlp,
    )
    release_freed()
    selection = _select(layer, group, measured, num_keep, recipe, seed)
    release_freed()
    columns = rows_of(selection.keep, group.reader.segments, num_units)
    repaired = repair(reader, measured, columns, recipe)
    release_freed()
    if originals is not None:
        originals.narrow(layer, group, columns)
    cut(layer, group, selection.keep, num_units, repaired.weight_HS, repaired.bias_H)
    return selection.keep, _log_line(group, num_units, measured, selection, repaired)


def _select(
    layer: nn.Module, group: Group, measured: Measurement, num_keep: int, recipe: Recipe, seed: int
) -> Selection:
    weight_HF = linear(layer, group.reader.module).weight
    num_units = weight_HF.shape[1] // group.width
    if num_keep == num_units:
        return Selection(torch.arange(num_keep, device=weight_HF.device), weight_HF.new_zeros(0))
    columns_UW = unit_columns(group.reader.segments, num_units, weight_HF.device)
    if recipe.score == "obs":
        assert measured.pooled.gram is not None
        hessian = damped_gram(measured.pooled.gram, recipe.damping)
        found = greedy_obs(weight_HF, hessian, columns_UW, num_keep, max(1, recipe.obs_batch // group.width))
        return Selection(found.keep, found.scores_U)
    squares_U = _writer_squares(layer, group, num_units)
    inputs = ScoreInputs(weight_HF.float(), squares_U, measured.pooled, columns_UW, recipe.damping, seed)
    scores = SCORES[recipe.score](inputs)
    return Selection(keep_highest(scores, num_keep), scores)


def _writer_squares(layer: nn.Module, group: Group, num_units: int) -> Float[Tensor, " U"]:
    total = 0
    for axis in group.writers:
        weight = linear(layer, axis.module).weight.float()
        total = total + weight.square().sum(dim=1)[unit_columns(axis.segments, num_units, weight.device)].sum(dim=1)
    assert isinstance(total, Tensor)
    return total


def _log_line(
    group: Group, num_units: int, measured: Measurement, selection: Selection, repaired: Repair
) -> dict[str, Any]:
    line: dict[str, Any] = {
        "layer": group.layer,
        "group": group.name,
        "kept": len(selection.keep),
        "total": num_units,
        "output_energy": measured.energy,
        "score_quantiles": _quantiles(selection.scores),
    }
    if repaired.guard is not None:
        line |= dataclasses.asdict(repaired.guard) | {"damping": repaired.damping, "condition": repaired.condition}
    return line


def _quantiles(values: Tensor) -> list[float]:
    if not len(values):
        return []
    ordered = values.float().sort().values
    return [float(ordered[round(q * (len(ordered) - 1))]) for q in (0.0, 0.25, 0.5, 0.75, 1.0)]
