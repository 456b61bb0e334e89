"""The global budget: one threshold over all groups' scores, each group's scores standardised first.

In: one score per unit. Out: the plan. Source: An et al., FLAP, arXiv 2312.11983 (adaptive structure search); they too
count what lies below the threshold in parameters, and do not divide the scores by a unit's price.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.arch import Group
from secateur.budget import GroupKey, Plan, Prices, align_of, nearest_count, plan_of, round_down
from secateur.errors import RecipeError


def global_plan(
    groups: tuple[Group, ...],
    scores: Mapping[GroupKey, Tensor],
    prices: Prices,
    remove: float,
    align: int,
    *,
    min_keep: Mapping[GroupKey, int],
) -> Plan:
    """Remove the units of least (score - mean) / std over their group, whatever group they are in.

    `scores` has one number per unit that a group has now. Each group keeps the multiple of its step nearest to its
    count of units above the threshold, at least `min_keep`; the threshold is the lowest with which `remove` of what
    the whole model costs goes, counted from the groups' full widths.

    Raises RecipeError if so much cannot go, saying the largest possible `remove`.
    """
    standardised = {(group.layer, group.name): _standardised(scores[group.layer, group.name]) for group in groups}
    target = math.ceil(remove * prices.total)

    def widths(threshold: float) -> dict[GroupKey, int]:
        kept = {key: int((values >= threshold).sum()) for key, values in standardised.items()}
        aligned = {(g.layer, g.name): nearest_count(g, kept[g.layer, g.name], align_of(g, align)) for g in groups}
        return {key: min(max(width, min_keep[key]), len(standardised[key])) for key, width in aligned.items()}

    largest = prices.gone(groups, widths(math.inf))
    if target > largest:
        raise RecipeError(
            f"remove: {remove:g} of all {prices.total_text} is out of reach; the recipe's groups allow at most "
            f"{round_down(largest / prices.total)} with each at its smallest width; ask for less, or lower min_keep or "
            f"align."
        )
    thresholds = [*torch.cat([torch.zeros(0), *standardised.values()]).unique().tolist(), math.inf]
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if prices.gone(groups, widths(thresholds[middle])) >= target else (middle + 1, high)
    return plan_of(groups, prices, widths(thresholds[low]))


def _standardised(scores_U: Tensor) -> Tensor:
    values = scores_U.detach().cpu().double()
    return ((values - values.mean()) / values.std(correction=0).clamp_min(1e-30)).float()
