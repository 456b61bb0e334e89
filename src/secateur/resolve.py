"""Turn a recipe and an architecture into concrete numbers. Every error that needs no weights surfaces here.

In: a recipe, a bound architecture, the model's config. Out: the recipe with every `None` filled, and the plans.
"""

from dataclasses import dataclass
from typing import Any

from secateur.arch import Arch, Group
from secateur.budget import Plan, default_align, round_plans, uniform_plan
from secateur.errors import RecipeError
from secateur.recipe import Recipe

# Least squares wants this many pooled tokens per reader input; with a fraction 1/n of them the damping is at least n
# times its default. At least, not times: resolving a saved recipe must change nothing.
TOKENS_PER_INPUT = 10
DEFAULT_TOKENS_PER_INPUT = 16
MIN_DEFAULT_TOKENS = 51200
DEFAULT_SEQUENCE_LENGTH = 512
DEFAULT_TARGET_MIX = 0.5


@dataclass(frozen=True, slots=True)
class Resolved:
    """A run in concrete numbers. `plans` has one entry per round; the last is the target."""

    recipe: Recipe
    groups: tuple[Group, ...]
    plans: list[Plan]
    warnings: tuple[str, ...]


def resolve(recipe: Recipe, arch: Arch, config: Any, num_params: int) -> Resolved:
    """Fill what depends on the model and make the plans.

    Raises ArchError or RecipeError, each naming the recipe key, for whatever cannot be done with this model.
    """
    groups = arch.select(recipe.groups)
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
        update={"align": align, "calibration": calibration, "damping": damping, "target_mix": mix}
    )
    plan = uniform_plan(groups, num_params, recipe.remove, align)
    return Resolved(resolved, groups, round_plans(groups, plan, recipe.rounds, align), warnings)


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
