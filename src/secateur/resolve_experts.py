"""What a recipe may ask of experts and their channels. In: recipe, the groups it names. Out: an error in a sentence."""

from collections.abc import Sequence

from secateur.arch_group import OF_EXPERTS, Group
from secateur.errors import RecipeError
from secateur.recipe import Recipe
from secateur.score import find_score
from secateur.stats import BY_DOMAIN


def check_experts(recipe: Recipe, groups: Sequence[Group]) -> None:
    """Raise RecipeError for what experts do not have (budgets, targets, weightings, scores), or only they have."""
    have_experts = any(group.kind in OF_EXPERTS for group in groups)
    if have_experts and (recipe.budget != "uniform" or recipe.target != "parameters"):
        raise RecipeError(
            f"groups: experts and their channels can only go with budget: uniform and target: parameters, "
            f"got {recipe.budget} and {recipe.target}; change these or leave experts out."
        )
    units = find_score(recipe.score).units
    if have_experts and units == "channels and heads":
        raise RecipeError(
            f"score: {recipe.score} is of channels and heads, not of experts; use obs, or leave experts out of groups."
        )
    if have_experts and recipe.domain_weighting in BY_DOMAIN:
        raise RecipeError(
            f"domain_weighting: {recipe.domain_weighting} looks at one reader's cut, which experts and their channels "
            f"do not have; use energy or tokens, or leave experts out of groups."
        )
    other = next((group.name for group in groups if group.kind != "experts"), None)
    if other and units == "experts":
        raise RecipeError(
            f"score: {recipe.score} is of whole experts, groups has {other} too; use obs, or groups: [experts]."
        )
