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
from secateur.compensate import Guard, guard, held_out_error, least_squares, mean_shift
from secateur.cut import cut, rows_of, unit_columns
from secateur.measure import Measurement, measure
from secateur.memory import release_freed
from secateur.obs import greedy_obs
from secateur.original_readers import OriginalReaders
from secateur.recipe import Recipe
from secateur.score import NEED_GRAM, SCORES, ScoreInputs, damped_gram, keep_highest
from secateur.walk import Walk


@dataclass(frozen=True, slots=True)
class Selection:
    """`keep`: sorted indices among the units the group has now. `scores`: of all of them; none if all were to stay."""

    keep: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True)
class Repair:
    """What compensation does to a reader: new weights for its remaining columns, a bias, and how it was reached."""

    weight_HS: Tensor | None = None
    bias_H: Tensor | None = None
    guard: Guard | None = None
    damping: float | None = None
    condition: float | None = None


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
    gram = recipe.score in NEED_GRAM or recipe.compensate == "least_squares"
    measured = measure(walk, group, recipe.domain_weighting, shares, gram=gram)
    release_freed()
    selection = _select(layer, group, measured, num_keep, recipe, seed)
    release_freed()
    columns = rows_of(selection.keep, group.reader.segments, num_units)
    repair = _repair(reader, measured, columns, recipe)
    release_freed()
    if originals is not None:
        originals.narrow(layer, group, columns)
    cut(layer, group, selection.keep, num_units, repair.weight_HS, repair.bias_H)
    return selection.keep, _log_line(group, num_units, measured, selection, repair)


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


def _repair(reader: nn.Linear, measured: Measurement, columns: Int64[Tensor, " S"], recipe: Recipe) -> Repair:
    if len(columns) == reader.in_features:
        return Repair()
    weight_HF, dtype = reader.weight.float(), reader.weight.dtype
    if recipe.compensate in ("bias", "none"):
        old_HS = weight_HF[:, columns]
        if recipe.compensate == "none":
            return Repair(guard=_judge(weight_HF, columns, measured.held_out_TF, old_HS, old_HS, None))
        shift_H = mean_shift(weight_HF, measured.pooled.mean_F, columns).to(dtype).float()
        judged = _judge(weight_HF, columns, measured.held_out_TF, old_HS, old_HS, shift_H)
        return Repair(bias_H=judged.step * shift_H, guard=judged)
    assert measured.pooled.gram is not None
    fit = least_squares(weight_HF, measured.pooled.gram, columns, recipe.damping)
    release_freed()
    # The guard judges what will be stored, rounding included.
    old_HS, new_HS = weight_HF[:, columns], fit.weight_HS.copy_(fit.weight_HS.to(dtype))
    judged = _judge(weight_HF, columns, measured.held_out_TF, old_HS, new_HS, None)
    if judged.step == 0:
        return Repair(guard=judged, damping=fit.damping, condition=fit.condition)
    stored_HS = new_HS if judged.step == 1 else old_HS + judged.step * (new_HS - old_HS)
    return Repair(stored_HS, None, judged, fit.damping, fit.condition)


def _judge(
    weight_HF: Float[Tensor, "H F"],
    columns: Int64[Tensor, " S"],
    held_out_TF: dict[str, Tensor],
    old_HS: Float[Tensor, "H S"],
    new_HS: Float[Tensor, "H S"],
    shift_H: Float[Tensor, " H"] | None,
) -> Guard:
    is_gone = torch.ones(weight_HF.shape[1], dtype=torch.bool, device=weight_HF.device)
    is_gone[columns] = False
    gone = is_gone.nonzero().flatten()
    gone_HC = weight_HF[:, gone]
    change_SH, errors = (new_HS - old_HS).T, {}
    for name, x_TF in held_out_TF.items():
        x_TF = x_TF.float()
        given_TH = x_TF[:, columns] @ change_SH
        energy = float(torch.linalg.vector_norm(x_TF @ weight_HF.T).square())
        errors[name] = held_out_error(
            x_TF[:, gone] @ gone_HC.T, given_TH if shift_H is None else given_TH + shift_H, energy
        )
    return guard(errors)


def _writer_squares(layer: nn.Module, group: Group, num_units: int) -> Float[Tensor, " U"]:
    total = 0
    for axis in group.writers:
        weight = linear(layer, axis.module).weight.float()
        total = total + weight.square().sum(dim=1)[unit_columns(axis.segments, num_units, weight.device)].sum(dim=1)
    assert isinstance(total, Tensor)
    return total


def _log_line(
    group: Group, num_units: int, measured: Measurement, selection: Selection, repair: Repair
) -> dict[str, Any]:
    line: dict[str, Any] = {
        "layer": group.layer,
        "group": group.name,
        "kept": len(selection.keep),
        "total": num_units,
        "output_energy": measured.energy,
        "score_quantiles": _quantiles(selection.scores),
    }
    if repair.guard is not None:
        line |= dataclasses.asdict(repair.guard) | {"damping": repair.damping, "condition": repair.condition}
    return line


def _quantiles(values: Tensor) -> list[float]:
    if not len(values):
        return []
    ordered = values.float().sort().values
    return [float(ordered[round(q * (len(ordered) - 1))]) for q in (0.0, 0.25, 0.5, 0.75, 1.0)]
