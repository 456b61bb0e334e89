"""One group's step: measure, select, compensate, cut.

In: the walk standing before the group's layer, how many units to keep. Out: the layer with smaller linears, the kept
indices, and the line of the run log that says what was lost and given back.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from secateur.arch import Group, linear
from secateur.cut import cut, rows_of, unit_columns
from secateur.domain_weights import reweighted
from secateur.expert_channels import cut_channels, prune_expert_channels
from secateur.experts import cut_experts, prune_experts
from secateur.layers_on_device import fetch
from secateur.measure import Measurement, measure
from secateur.memory import release_freed
from secateur.ranks import from_first, is_first
from secateur.recipe import Recipe
from secateur.repair import Repair, repair
from secateur.score import needs_gram
from secateur.selection import Selection, select
from secateur.walk import Walk


@torch.no_grad()
def redo_group(layer: nn.Module, group: Group, stored: dict[str, Tensor]) -> Tensor:
    """Do to the layer, bit for bit, what `prune_group` did to such a layer, and return the kept indices.

    `stored`: what `outcome_of` said then.
    """
    keep = stored["keep"].to(next(layer.parameters()).device)
    if group.experts is not None:
        module = layer.get_submodule(group.experts.module)
        if group.experts.are_channels:
            cut_channels(module, group.experts.stacks, keep)
        else:
            cut_experts(layer, group, keep)
    else:
        reader = linear(layer, group.reader.module)
        cut(layer, group, keep, reader.in_features // group.width)
    for name, parameter in _refitted(layer, group).items():
        parameter.copy_(stored[name])
    return keep


def outcome_of(layer: nn.Module, group: Group, keep: Tensor) -> dict[str, Tensor]:
    """Return what a layer as it was before the group's step does not tell: which units stay, what was refitted."""
    return {"keep": keep, **_refitted(layer, group)}


def _refitted(layer: nn.Module, group: Group) -> dict[str, Tensor]:
    if group.experts is not None:
        name = f"{group.experts.module}.{group.experts.stacks.down}"
        return {name: layer.get_parameter(name)}
    return dict(linear(layer, group.reader.module).named_parameters())


@torch.no_grad()
def prune_group(
    walk: Walk,
    group: Group,
    num_keep: int,
    recipe: Recipe,
    shares: dict[str, float],
    seed: int,
    scores_U: Tensor | None = None,
) -> tuple[Int64[Tensor, "*E K"], dict[str, Any]]:
    """Measure, select, compensate and cut one group; return the kept indices and the log line.

    `scores_U`: the units' scores, where they were measured on the whole model before.
    """
    fetch(walk.layers[group.layer])
    if group.experts is not None and group.experts.are_channels:
        return prune_expert_channels(walk, group, num_keep, recipe, shares, seed)
    if group.experts is not None:
        return prune_experts(walk, group, num_keep, recipe, shares, seed)
    layer = walk.layers[group.layer]
    is_mlp = not walk.arch.is_in_attention(group)
    reader = linear(layer, group.reader.module)
    num_units = reader.in_features // group.width
    measured = measure(
        walk,
        group,
        recipe.domain_weighting,
        shares,
        gram=needs_gram(recipe.score) or recipe.compensate == "least_squares",
        drift=is_mlp and bool(walk.dense_BTD),
        to_middle=is_mlp,
    )
    release_freed()
    measured, weights = _weighted(measured, group, reader, num_keep, recipe, shares)
    selection = from_first(lambda: select(layer, group, measured, num_keep, recipe, seed, scores_U))
    release_freed()
    columns = rows_of(selection.keep, group.reader.segments, num_units)
    repaired = repair(reader, measured, columns, recipe)
    release_freed()
    cut(layer, group, selection.keep, num_units, repaired.weight_HS, repaired.bias_H)
    line = _log_line(group, num_units, measured, selection, repaired)
    return selection.keep, line | ({"domain_weights": weights} if weights else {})


def _weighted(
    measured: Measurement, group: Group, reader: nn.Linear, num_keep: int, recipe: Recipe, shares: dict[str, float]
) -> tuple[Measurement, dict[str, float]]:
    """Pool the domains' statistics anew where their weights depend on what a cut does to them; return the weights.

    Only on the first rank, which alone selects and solves.
    """
    num_units = reader.in_features // group.width
    if not measured.by_domain or num_keep == num_units or not is_first():
        return measured, {}
    columns_UW = unit_columns(group.reader.segments, num_units, reader.weight.device)
    weight_HF = reader.weight.float()
    pooled, weights = reweighted(measured.by_domain, shares, weight_HF, columns_UW, num_keep, recipe.damping)
    return dataclasses.replace(measured, pooled=pooled, by_domain={}), weights


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
