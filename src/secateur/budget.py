"""Budgets: how many units each group keeps. Pure arithmetic on the architecture, before any weight is read.

In: the groups, the model's total parameters (tied weights once), the share to remove. Out: plans, one per round.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from secateur.arch import Group
from secateur.errors import RecipeError

GroupKey = tuple[int, str]  # (layer, group name)

# Widths that keep tensor cores and quantisation blocks busy: the second from this many units on.
ALIGN_SMALL, ALIGN_LARGE, LARGE_WIDTH = 64, 128, 4096
# An error curve needs no more points than this; wide groups step by several of their aligned units.
MAX_LEVELS = 64


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
    narrow = [group.num_units for group in groups if group.width == 1]
    return ALIGN_LARGE if min(narrow, default=0) >= LARGE_WIDTH else ALIGN_SMALL


def align_of(group: Group, align: int) -> int:
    """Return the step of a group's counts: `align` for units of one reader column, 1 for heads."""
    return align if group.width == 1 else 1


def uniform_plan(groups: tuple[Group, ...], num_params: int, remove: float, align: int) -> Plan:
    """Keep the same share of every group so that `remove` of all `num_params` parameters goes.

    The share taken is remove * num_params / sum(units * params_per_unit); counts are the nearest multiples
    of their step. Kinds of group with large steps (heads) come first and those with small ones make up for their
    rounding, so the target is met within half a step of the last kind per group.

    Raises RecipeError if the groups do not hold enough parameters, saying the largest possible `remove`; or if not even
    one step would go, saying the smallest.
    """
    steps = {group.name: align_of(group, align) * group.params_per_unit for group in groups}
    names = sorted(steps, key=lambda name: (-steps[name], name))
    num_keep: dict[GroupKey, int] = {}
    missing = remove * num_params
    for position, name in enumerate(names):
        left = [group for group in groups if group.name in names[position:]]
        keep_share = 1 - missing / sum(group.num_units * group.params_per_unit for group in left)
        members = tuple(group for group in left if group.name == name)
        is_last = position == len(names) - 1
        num_keep |= {
            (g.layer, name): _nearest(g, keep_share, align_of(g, align), at_least=not is_last) for g in members
        }
        missing -= num_params_gone(members, num_keep)
    largest = largest_remove(groups, num_params, least_keep(groups, align, 0.0))
    if any(num_keep[group.layer, group.name] < align_of(group, align) for group in groups):
        left_in = " and ".join(f"{align_of(g, align)} {g.unit}s" for g in {g.name: g for g in groups}.values())
        raise RecipeError(
            f"remove: {remove:g} of all {num_params:,} parameters is out of reach; the recipe's groups allow at "
            f"most {round_down(largest)} with {left_in} (align) left in each; ask for less or lower align."
        )
    plan = Plan(num_keep, num_params, num_params - num_params_gone(groups, num_keep))
    if plan.num_params_after == num_params:
        step = sum(steps[names[-1]] for group in groups if group.name == names[-1])
        smallest = math.ceil(1e4 * step / num_params / 2) / 1e4
        raise RecipeError(
            f"remove: {remove:g} of all {num_params:,} parameters is less than half an aligned unit per layer, so "
            f"nothing would go; ask for at least {smallest:.4f} or set align below {align}."
        )
    return plan


def largest_remove(groups: tuple[Group, ...], num_params: int, least: Mapping[GroupKey, int]) -> float:
    """Return the share of all parameters that goes when every group keeps its least."""
    return num_params_gone(groups, least) / num_params


def least_keep(groups: tuple[Group, ...], align: int, min_keep: float) -> dict[GroupKey, int]:
    """Return the fewest units that each group may keep: the multiple of its step that is at least `min_keep` of all."""
    least: dict[GroupKey, int] = {}
    for group in groups:
        step = align_of(group, align)
        first = max(math.ceil(min_keep * group.num_units / step), 1) * step
        counts = (count for count in range(first, group.num_units, step) if group.allows(count))
        least[group.layer, group.name] = next(counts, group.num_units)
    return least


def levels_of(group: Group, num_units: int, align: int, max_levels: int = MAX_LEVELS) -> tuple[int, ...]:
    """Return the counts that a group of `num_units` may keep, from all of them down; those the config can state."""
    grid = level_grid(num_units, align_of(group, align), max_levels)
    return (num_units, *(count for count in grid[1:] if group.allows(count)))


def level_grid(num_units: int, step: int, max_levels: int = MAX_LEVELS) -> tuple[int, ...]:
    """Return all units and the multiples of `step` below, down to one; of more than `max_levels` evenly spaced ones."""
    stride = step * math.ceil(num_units / (step * max_levels))
    highest = stride * ((num_units - 1) // stride)
    return (num_units, *range(highest, 0, -stride))


def round_shares(rounds: int, schedule: str) -> list[float]:
    """Return the share of all that goes which is gone after each round: r/n, or 1 - (1 - r/n)^3 for `cubic`.

    Source of the cubic schedule: Zhu and Gupta, arXiv 1710.01878, eq. 1.
    """
    power = 3 if schedule == "cubic" else 1
    return [1 - (1 - done / rounds) ** power for done in range(1, rounds)] + [1.0]


def round_plans(groups: tuple[Group, ...], plan: Plan, shares: list[float], align: int) -> list[Plan]:
    """Return the plans of all rounds, by shares of the way from the whole model to `plan`, each width aligned."""
    plans = []
    for share in shares[:-1]:
        num_keep = {}
        for group in groups:
            target, step = plan.num_keep[group.layer, group.name], align_of(group, align)
            width = group.num_units - (group.num_units - target) * share
            num_keep[group.layer, group.name] = max(nearest_count(group, width, step), target)
        plans.append(Plan(num_keep, plan.num_params_before, plan.num_params_before - num_params_gone(groups, num_keep)))
    return [*plans, plan]


def _nearest(group: Group, keep_share: float, step: int, *, at_least: bool) -> int:
    if not at_least and group.num_units * keep_share < step / 2:
        return 0
    return nearest_count(group, group.num_units * keep_share, step)


def nearest_count(group: Group, width: float | int, step: int) -> int:
    """Return the multiple of `step` that is nearest to `width` and that the config can state, or the full width."""
    nearest = min(step * round(width / step), group.num_units)
    if nearest >= step and group.allows(nearest):
        return nearest
    counts = [count for count in range(step, group.num_units, step) if group.allows(count)]
    return min((*counts, group.num_units), key=lambda count: abs(count - width))


def num_params_gone(groups: tuple[Group, ...], num_keep: Mapping[GroupKey, int]) -> int:
    """Return the parameters that go when each group keeps that many units, counted from its full width."""
    return sum((g.num_units - min(num_keep[g.layer, g.name], g.num_units)) * g.params_per_unit for g in groups)


def round_down(fraction: float) -> str:
    """Return a share to three decimals, never more than it is: what an error may promise."""
    return f"{int(max(fraction, 0) * 1000) / 1000:.3f}"
