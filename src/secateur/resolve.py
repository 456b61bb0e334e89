"""Turn a recipe and an architecture into concrete numbers. Every error that needs no weights surfaces here.

In: a recipe, a bound architecture, the model's config. Out: the recipe with every `None` filled, and the plans.
"""

from dataclasses import dataclass
from typing import Any

from secateur.arch import Arch, Group
from secateur.budget import (
    MAX_LEVELS,
    Plan,
    default_align,
    largest_remove,
    least_keep,
    levels_of,
    round_down,
    round_plans,
    round_shares,
    uniform_plan,
)
from secateur.errors import RecipeError
from secateur.recipe import Recipe

# Least squares wants this many pooled tokens per reader input; with a fraction 1/n of them the damping is at least n
# times its default. At least, not times: resolving a saved recipe must change nothing.
TOKENS_PER_INPUT = 10
DEFAULT_TOKENS_PER_INPUT = 16
MIN_DEFAULT_TOKENS = 51200
DEFAULT_SEQUENCE_LENGTH = 512
DEFAULT_TARGET_MIX = 0.5
# A search stores every level of every group; this many keep that within twelve copies of the readers.
MAX_SEARCH_LEVELS = 24


@dataclass(frozen=True, slots=True)
class Resolved:
    """A run in concrete numbers. `removals`: the share of all parameters that is gone after each round.

    `plans`: one per round, the last is the target; a budget other than `uniform` departs from them layer by layer.
    `groups`: those that lose units; layers that are protected have none.
    """

    recipe: Recipe
    groups: tuple[Group, ...]
    plans: list[Plan]
    removals: list[float]
    warnings: tuple[str, ...]

    @property
    def max_levels(self) -> int:
        """How many widths of a group are looked at when planning."""
        return _max_levels(self.recipe)


def resolve(recipe: Recipe, arch: Arch, config: Any, num_params: int) -> Resolved:
    """Fill what depends on the model and make the plans.

    Raises ArchError or RecipeError, each naming the recipe key, for whatever cannot be done with this model.
    """
    groups = _unprotected(recipe, arch)
    if recipe.compensate == "bias" and any(group.bias_switch is None for group in groups):
        raise RecipeError(
            f"compensate: family {arch.family} cannot store a bias in its readers (it would be dropped on reload); "
            f"use least_squares or none."
        )
    longest = getattr(config, "max_position_embeddings", None)
    length = recipe.calibration.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, longest or DEFAULT_SEQUENCE_LENGTH)
    if longest is not None and length > longest:
        raise RecipeError(
            f"calibration.sequence_length: {length} is longer than the model's {longest} positions; set it to at most "
            f"{longest}."
        )
    align = recipe.align or default_align(groups)
    widest = max(group.num_units * group.width for group in groups)
    num_tokens = recipe.calibration.num_tokens or max(MIN_DEFAULT_TOKENS, DEFAULT_TOKENS_PER_INPUT * widest)
    mix = _target_mix(recipe, arch)
    damping, warnings = _damping(recipe, num_tokens, widest)
    calibration = recipe.calibration.model_copy(update={"num_tokens": num_tokens, "sequence_length": length})
    resolved = recipe.model_copy(
        update={
            "align": align,
            "calibration": calibration,
            "damping": damping,
            "target_mix": mix,
            "widths": _widths(recipe),
        }
    )
    _check_within_reach(resolved, groups, num_params)
    # Other budgets need the plan only to count with, and spread it over layers in steps of their own.
    plan = uniform_plan(groups, num_params, recipe.remove, align if recipe.budget == "uniform" else 1)
    _check_least(resolved, groups, plan)
    shares = round_shares(recipe.rounds, recipe.schedule)
    plans = round_plans(groups, plan, shares, align if recipe.budget == "uniform" else 1)
    return Resolved(resolved, groups, plans, [recipe.remove * share for share in shares], warnings)


def _unprotected(recipe: Recipe, arch: Arch) -> tuple[Group, ...]:
    last = arch.num_layers - 1
    for index in recipe.protected_layers:
        if not -arch.num_layers <= index <= last:
            raise RecipeError(
                f"protected_layers: there is no layer {index}; use 0 to {last}, or {-arch.num_layers} to -1 from the "
                f"end."
            )
    protected = {index % arch.num_layers for index in recipe.protected_layers}
    groups = tuple(group for group in arch.select(recipe.groups) if group.layer not in protected)
    if not groups:
        raise RecipeError("protected_layers: no layer is left to remove anything from; protect fewer.")
    return groups


def _widths(recipe: Recipe) -> str:
    """Return what the recipe's widths must be. Raises RecipeError if it says that they must not."""
    reasons = [f"budget {recipe.budget}"] * (recipe.budget != "uniform") + ["protected_layers"] * bool(
        recipe.protected_layers
    )
    if not reasons:
        return recipe.widths or "uniform"
    if recipe.widths == "uniform":
        raise RecipeError(
            f"widths: uniform cannot be met with {reasons[0]}, which gives layers widths of their own; leave it out, "
            f"or use budget uniform without protected_layers."
        )
    return "per_layer"


def _max_levels(recipe: Recipe) -> int:
    return MAX_SEARCH_LEVELS if recipe.budget == "search" else MAX_LEVELS


def _check_within_reach(recipe: Recipe, groups: tuple[Group, ...], num_params: int) -> None:
    """Raise RecipeError if a budget that plans layer by layer could not reach the target whatever it measures."""
    if recipe.budget == "uniform":
        return
    assert recipe.align is not None
    least = least_keep(groups, recipe.align, recipe.min_keep)
    if recipe.budget != "global":
        for group in groups:
            levels = levels_of(group, group.num_units, recipe.align, _max_levels(recipe))
            key = (group.layer, group.name)
            least[key] = min(level for level in levels if level >= least[key])
    largest = largest_remove(groups, num_params, least)
    if recipe.remove > largest:
        raise RecipeError(
            f"remove: {recipe.remove:g} of all {num_params:,} parameters is out of reach; the recipe's groups allow at "
            f"most {round_down(largest)} with each at its smallest width; ask for less, or lower min_keep or align."
        )


def _check_least(recipe: Recipe, groups: tuple[Group, ...], plan: Plan) -> None:
    if recipe.budget != "uniform":
        return
    for group in groups:
        left = plan.num_keep[group.layer, group.name] / group.num_units
        if left < recipe.min_keep:
            raise RecipeError(
                f"min_keep: {recipe.min_keep:g} of each group is to stay, but removing {recipe.remove:g} of all "
                f"parameters leaves {left:.3f} of {group.name}; lower min_keep or remove less."
            )


def _target_mix(recipe: Recipe, arch: Arch) -> float:
    possible = arch.mlp_adds_directly and recipe.compensate == "least_squares"
    if recipe.target_mix is None:
        return DEFAULT_TARGET_MIX if possible else 0.0
    if recipe.target_mix > 0 and not arch.mlp_adds_directly:
        raise RecipeError(
            f"target_mix: family {arch.family} normalises what an MLP gives before adding it, so no drift can be made "
            f"up for; got {recipe.target_mix:g}, set it to 0 or leave it out."
        )
    return recipe.target_mix if recipe.compensate == "least_squares" else 0.0


def _damping(recipe: Recipe, num_tokens: int, widest: int) -> tuple[float, tuple[str, ...]]:
    needed = TOKENS_PER_INPUT * widest
    raised = Recipe().damping * needed / num_tokens
    if recipe.compensate != "least_squares" or num_tokens >= needed or recipe.damping >= raised:
        return recipe.damping, ()
    warning = (
        f"calibration.num_tokens: {num_tokens:,} tokens are few for least squares over {widest:,} channels "
        f"(want {needed:,}), so damping rises from {recipe.damping:g} to {raised:g}."
    )
    return raised, (warning,)
