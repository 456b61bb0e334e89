"""Recipes from YAML, mappings and options: presets, merging, one sentence per mistake.

In: YAML text or a mapping. Out: a frozen `Recipe`, or a RecipeError: the key, what it got, what is
allowed.
"""

import math
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from secateur.errors import RecipeError, advice, one_of
from secateur.files import yaml_of
from secateur.plugins import SOURCE_GROUP, plugin_names
from secateur.recipe import Domain, Recipe, Remove

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
        raise RecipeError(f"{where}: {_sentence(error)}") from None


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
        reason = " ".join(str(error).split())
        raise RecipeError(f"recipe {path}: cannot be read ({reason}); give a YAML file in UTF-8.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path}: a recipe is a mapping of keys to values, got {type(data).__name__}.")
    return data


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML that `parse_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False)


def sentence_of(error: ValidationError, model: type[BaseModel]) -> str:
    """Return what is wrong with a recipe, or a part of it, that was made by its name."""
    name = model.__name__
    return f"{name}: {_sentence(error, model).removeprefix(f'{name.lower()}: ')}"


def _sentence(error: ValidationError, model: type[BaseModel] = Recipe) -> str:
    errors = error.errors()
    # A wrong list for a key that takes a name or a list is not a wrong name.
    first = next((e for e in errors if e["type"] != "literal_error" or isinstance(e["input"], str)), errors[0])
    location = [part for part in map(str, first["loc"]) if not part.startswith(("literal[", "tuple["))]
    key = ".".join(location) or model.__name__.lower()
    kind, got = first["type"], first.get("input")
    if kind == "extra_forbidden" and key == "preset":
        return f"preset: belongs to a mapping; where a recipe is asked for, give {{'preset': {got!r}, ...}}."
    if kind == "extra_forbidden":
        allowed = _allowed_keys(location[:-1], model)
        return f"unknown key '{key}'; {advice(location[-1], allowed, one_of(allowed))}"
    if kind == "literal_error":
        allowed = first.get("ctx", {}).get("expected", "")
        names = allowed.replace("'", "").replace(" or ", ", ").split(", ")
        return f"unknown {key} '{got}'; allowed: {', '.join(names)}; {advice(str(got), names)}"
    message = "must be a list" if kind == "tuple_type" else first["msg"].removeprefix("Value error, ")
    if key == "remove.share" or (model is Remove and key == "share"):
        shown = "NaN" if isinstance(got, float) and math.isnan(got) else got
        message = "the share of total parameters to remove must be a number above 0 and below 1"
        return f"remove: {message}, got {shown}."
    if location[:2] == ["remove", "vocabulary"]:  # a number or a name, so pydantic says two things
        key, message = "remove.vocabulary", "must be auto, or how many tokens stay, a multiple of 64"
    return f"{key}: {message}, got {got!r}."


def _allowed_keys(location: list[str], model: type[BaseModel]) -> list[str]:
    """Return the keys that may stand at a place of the recipe, or of its part."""
    for name in location:
        if name in model.model_fields:  # else it is the name of a domain
            annotation = model.model_fields[name].annotation
            types = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
            model = next(each for each in types if issubclass(each, BaseModel))
    top = ["preset"] if model is Recipe else []
    return [*top, *model.model_fields, *(plugin_names(SOURCE_GROUP) if model is Domain else ())]
