"""Budgets: how many units each group keeps. Pure arithmetic on the architecture, before any weight is read.

In: the groups, the model's total parameters (tied weights once), the share to remove. Out: plans, one per round.
"""

import math
from dataclasses import dataclass

from secateur.arch import Group
from secateur.errors import RecipeError

GroupKey = tuple[int, str]  # (layer, group name)

# Widths that keep tensor cores and quantisation blocks busy: the second from this many units on.
ALIGN_SMALL, ALIGN_LARGE, LARGE_WIDTH = 64, 128, 4096


@dataclass(frozen=True, slots=True)
class Plan:
    """How many units each group keeps, and what that leaves of the model."""

    num_keep: dict[GroupKey, int]
    num_params_before: int
    num_params_after: int

    @property
    def removed_fraction(self) -> float:
        """Share of total parameters that goes."""
        return 1 - self.num_params_after / self.num_params_before


def default_align(groups: tuple[Group, ...]) -> int:
    """Return the alignment of widths where the recipe names none."""
    return ALIGN_LARGE if min(group.num_units for group in groups) >= LARGE_WIDTH else ALIGN_SMALL


def uniform_plan(groups: tuple[Group, ...], num_params: int, remove: float, align: int) -> Plan:
    """Keep the same share of every group so that `remove` of all `num_params` parameters goes.

    The share taken from each group is remove * num_params / sum(units * params_per_unit); the width is the multiple of
    `align` nearest to what that leaves, so the target is met within half an aligned unit per group.

    Raises RecipeError if the groups do not hold enough parameters, saying the largest possible `remove`; or if not even
    one aligned unit would go, saying the smallest.
    """
    prunable = sum(group.num_units * group.params_per_unit for group in groups)
    keep_fraction = 1 - remove * num_params / prunable
    num_keep = {
        (group.layer, group.name): min(align * round(group.num_units * keep_fraction / align), group.num_units)
        for group in groups
    }
    largest = _removed(groups, {key: align for key in num_keep}) / num_params
    if min(num_keep.values()) < align:
        raise RecipeError(
            f"remove: {remove:g} of all {num_params:,} parameters is out of reach; the recipe's groups allow at "
            f"most {_round_down(largest)} with {align} units (align) left in each; ask for less or lower align."
        )
    plan = Plan(num_keep, num_params, num_params - _removed(groups, num_keep))
    if plan.num_params_after == num_params:
        smallest = math.ceil(1e4 * sum(align * group.params_per_unit for group in groups) / num_params / 2) / 1e4
        raise RecipeError(
            f"remove: {remove:g} of all {num_params:,} parameters is less than half an aligned unit per layer, so "
            f"nothing would go; ask for at least {smallest:.4f} or set align below {align}."
        )
    return plan


def round_plans(groups: tuple[Group, ...], plan: Plan, rounds: int, align: int) -> list[Plan]:
    """Return the plans of all rounds, in equal steps of units from the whole model to `plan`, each width aligned."""
    plans = []
    for done in range(1, rounds):
        num_keep = {}
        for group in groups:
            target = plan.num_keep[group.layer, group.name]
            width = group.num_units - (group.num_units - target) * done / rounds
            num_keep[group.layer, group.name] = max(min(align * round(width / align), group.num_units), target)
        plans.append(Plan(num_keep, plan.num_params_before, plan.num_params_before - _removed(groups, num_keep)))
    return [*plans, plan]


def _removed(groups: tuple[Group, ...], num_keep: dict[GroupKey, int]) -> int:
    return sum((g.num_units - min(num_keep[g.layer, g.name], g.num_units)) * g.params_per_unit for g in groups)


def _round_down(fraction: float) -> str:
    return f"{int(max(fraction, 0) * 1000) / 1000:.3f}"
