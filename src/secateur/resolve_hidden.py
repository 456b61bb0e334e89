"""The model that a recipe with `hidden_size` plans on: as wide as it will be, on the meta device. No weight is read.

In: a recipe, the dense model (the meta device will do). Out: a model of the narrower shape; the recipe resolved on it,
with prices as parts of the dense model's.
"""

import copy
import dataclasses
from typing import Any

import torch

from secateur.arch import bind
from secateur.budget import Prices
from secateur.checkpoint import meta_model
from secateur.errors import RecipeError
from secateur.hidden_cut import check_hidden_size, cut_hidden
from secateur.prices import prices_of
from secateur.recipe import Recipe
from secateur.resolve import Resolved, check_without_prices, resolve

HIDDEN_TARGETS = ("parameters", "flops")


def planned_shape(recipe: Recipe, model: Any) -> Any:
    """Return a model on the meta device that is `hidden_size` wide, or `model` itself where the recipe names none.

    Raises RecipeError or ArchError if the family or its config cannot be that wide, or the target cannot count it.
    """
    if recipe.hidden_size is None:
        return model
    if recipe.target not in HIDDEN_TARGETS:
        raise RecipeError(
            f"hidden_size: what it saves is counted in {' or '.join(HIDDEN_TARGETS)}, not in target {recipe.target}; "
            f"use one of them, or leave hidden_size out."
        )
    check_hidden_size(bind(model), recipe.hidden_size)
    narrow = meta_model(copy.deepcopy(model.config))
    cut_hidden(narrow, bind(narrow), torch.arange(recipe.hidden_size, device="meta"))
    return narrow


def check_for(recipe: Recipe, model: Any) -> Any:
    """Return the shape that the recipe plans on. Raises ArchError or RecipeError for what this model cannot do."""
    planned = planned_shape(recipe, model)
    check_without_prices(recipe, bind(planned), planned.config)
    return planned


def resolve_for(recipe: Recipe, model: Any) -> Resolved:
    """Return the recipe in concrete numbers for the dense model, whichever shape it plans on. Raises as `resolve`."""
    planned = check_for(recipe, model)
    return resolve(recipe, bind(planned), planned.config, _prices(recipe, model, planned))


def _prices(recipe: Recipe, model: Any, planned: Any) -> Prices:
    """Return the prices in the planned shape, out of the dense model's total."""
    prices = prices_of(recipe, bind(planned), planned)
    if planned is model:
        return prices
    total = prices_of(recipe, bind(model), model).total
    return dataclasses.replace(prices, total=total, gone_before=total - prices.total)
