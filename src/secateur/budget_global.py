"""The global budget: one threshold over all groups' scores, each group's scores standardised first.

In: one score per unit. Out: the plan. Source: An et al., FLAP, arXiv 2312.11983 (adaptive structure search); they too
count what lies below the threshold in parameters, and do not divide the scores by a unit's price.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from secateur.arch import Group
from secateur.budget import GroupKey, Plan, align_of, num_params_gone, round_down
from secateur.errors import RecipeError


def global_plan(
    groups: tuple[Group, ...],
    scores: Mapping[GroupKey, Tensor],
    num_params: int,
    remove: float,
    align: int,
    *,
    protected: Collection[int] = (),
) -> Plan:
    """Remove the units of least (score - mean) / std over their group, whatever group they are in.

    `scores` has one number per unit of the model's full width. Each group keeps the multiple of its step nearest to its
    count of units above the threshold, at least one step; the threshold is the lowest with which `remove` of all
    `num_params` parameters goes. Layers in `protected` stay whole.

    Raises RecipeError if so much cannot go, saying the largest possible `remove`.
    """
    free = [group for group in groups if group.layer not in protected]
    standardised = {(group.layer, group.name): _standardised(scores[group.layer, group.name]) for group in free}
    whole = {(group.layer, group.name): group.num_units for group in groups}
    target = math.ceil(remove * num_params)

    def widths(threshold: float) -> dict[GroupKey, int]:
        kept = {key: int((values >= threshold).sum()) for key, values in standardised.items()}
        return whole | {(g.layer, g.name): _aligned(g, kept[g.layer, g.name], align_of(g, align)) for g in free}

    largest = num_params_gone(groups, widths(math.inf))
    if target > largest:
        raise RecipeError(
            f"remove: {remove:g} of all {num_params:,} parameters is out of reach; the recipe's groups allow at most "
            f"{round_down(largest / num_params)} with protected layers whole and one step (align {align}) left in "
            f"each other group; ask for less, lower align or protect fewer layers."
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


def _aligned(group: Group, num_above: int, step: int) -> int:
    nearest = step * math.floor(num_above / step + 0.5)
    return min(max(nearest, step), group.num_units)
