"""Recipes from YAML, mappings and options: presets, merging, one sentence per mistake.

In: YAML text or a mapping. Out: a frozen `Recipe`, or a RecipeError: the key, what it got, what is
allowed.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from secateur.errors import RecipeError, advice, web_address
from secateur.files import without_places, yaml_of
from secateur.recipe import Recipe
from secateur.recipe_errors import sentence

RECIPE_FILE = "recipe.yaml"


def parse_recipe(data: Any, where: str = "recipe") -> Recipe:
    """Return the validated recipe. `where`: its source, for messages. `preset`: one of `presets/`.

    Raises RecipeError: the key, what it got, what is allowed, the nearest known name.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, got {type(data).__name__}.")
    if "preset" in data:
        data = over_preset(data, where)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {sentence(error, Recipe)}") from None


def as_recipe(recipe: Recipe | dict[str, Any] | Path | str | None) -> Recipe:
    """Return a recipe from a Recipe, a mapping, a YAML file or None. Raises RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path | str):
        return parse_recipe(load_recipe(Path(recipe)), f"recipe {recipe}")
    return parse_recipe(recipe or {})


def over_preset(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `data` merged over the preset that it names. Raises RecipeError if unknown."""
    texts, own = preset_texts(), dict(data)
    name = own.pop("preset")
    if not isinstance(name, str) or name not in texts:
        hint = advice(str(name), texts)
        raise RecipeError(f"{where}: unknown preset '{name}'; allowed: {', '.join(texts)}; {hint}")
    return merged(yaml.safe_load(texts[name]), own)


def preset_texts() -> dict[str, str]:
    """Return the presets' YAML by name."""
    files = sorted((resources.files("secateur") / "presets").iterdir(), key=lambda file: file.name)
    found = [file for file in files if file.name.endswith(".yaml")]
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in found}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` merged in; `remove: 0.2` is `remove: {share: 0.2}`."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if key == "remove" and (isinstance(old, dict) or isinstance(value, dict)):
            old, value = (each if isinstance(each, dict) or each is None else {"share": each} for each in (old, value))
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file as a plain mapping, so that options can override keys before validation.

    Raises RecipeError if the file is missing, not UTF-8 or not YAML.
    """
    try:
        data = yaml_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "it is a web address" if web_address(str(path)) else " ".join(str(error).split())
        raise RecipeError(f"recipe {path}: cannot be read ({reason}); give a YAML file in UTF-8.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path}: a recipe is a mapping of keys to values, got {type(data).__name__}.")
    return data


def dump_recipe(recipe: Recipe, *, places: bool = True) -> str:
    """Return the recipe as YAML that `parse_recipe` reads back to an equal recipe.

    Without `places` paths of this machine are their last parts, as others may see them.
    """
    values = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(values if places else without_places(values), sort_keys=False)
