"""The global budget: one threshold over all groups' scores, each group's scores standardised first.

In: one score per unit. Out: the plan. Source: An et al., FLAP, arXiv 2312.11983 (adaptive structure search); they too
count what lies below the threshold in parameters, and do not divide the scores by a unit's price.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.arch import Group
from secateur.budget import GroupKey, Plan, align_of, nearest_count, num_params_gone, round_down
from secateur.errors import RecipeError


def global_plan(
    groups: tuple[Group, ...],
    scores: Mapping[GroupKey, Tensor],
    num_params: int,
    remove: float,
    align: int,
    *,
    min_keep: Mapping[GroupKey, int],
) -> Plan:
    """Remove the units of least (score - mean) / std over their group, whatever group they are in.

    `scores` has one number per unit that a group has now. Each group keeps the multiple of its step nearest to its
    count of units above the threshold, at least `min_keep`; the threshold is the lowest with which `remove` of all
    `num_params` parameters goes, counted from the groups' full widths.

    Raises RecipeError if so much cannot go, saying the largest possible `remove`.
    """
    standardised = {(group.layer, group.name): _standardised(scores[group.layer, group.name]) for group in groups}
    target = math.ceil(remove * num_params)

    def widths(threshold: float) -> dict[GroupKey, int]:
        kept = {key: int((values >= threshold).sum()) for key, values in standardised.items()}
        aligned = {(g.layer, g.name): nearest_count(g, kept[g.layer, g.name], align_of(g, align)) for g in groups}
        return {key: min(max(width, min_keep[key]), len(standardised[key])) for key, width in aligned.items()}

    largest = num_params_gone(groups, widths(math.inf))
    if target > largest:
        raise RecipeError(
            f"remove: {remove:g} of all {num_params:,} parameters is out of reach; the recipe's groups allow at "
            f"most {round_down(largest / num_params)} with each at its smallest width; ask for less, or lower min_keep "
            f"or align."
        )
    thresholds = [*torch.cat([torch.zeros(0), *standardised.values()]).unique().tolist(), math.inf]
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if num_params_gone(groups, widths(thresholds[middle])) >= target else (middle + 1, high)
        )
    num_keep = widths(thresholds[low])
    return Plan(num_keep, num_params, num_params - num_params_gone(groups, num_keep))


def _standardised(scores_U: Tensor) -> Tensor:
    values = scores_U.detach().double().cpu()
    return ((values - values.mean()) / values.std(correction=0).clamp_min(1e-30)).float()
