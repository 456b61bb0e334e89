"""What is wrong with a recipe, in one sentence. In: pydantic's error and the model that refused. Out: text."""

import math
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from secateur.errors import advice, one_of, shown
from secateur.plugins import SOURCE_GROUP, plugin_names


def sentence_of(error: ValidationError, model: type[BaseModel]) -> str:
    """Return what is wrong with a recipe, or a part of it, that was made by its name."""
    name = model.__name__
    return f"{name}: {sentence(error, model).removeprefix(f'{name.lower()}: ')}"


def sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """Return what is wrong with a recipe: the key, what it got, what is allowed, the nearest known name."""
    errors = error.errors()
    # A wrong list for a key that takes a name or a list is not a wrong name.
    first = next((e for e in errors if e["type"] != "literal_error" or isinstance(e["input"], str)), errors[0])
    location = [part for part in map(str, first["loc"]) if not part.startswith(("literal[", "tuple["))]
    key = ".".join(location) or model.__name__.lower()
    kind, got = first["type"], first.get("input")
    if kind == "extra_forbidden" and key == "preset":
        return f"preset: belongs to a mapping; where a recipe is asked for, give {{'preset': {got!r}, ...}}."
    if kind == "extra_forbidden":
        elsewhere = [name for name in grouped_keys(model) if name.partition(".")[2] == key]
        if elsewhere:
            return f"unknown key '{key}'; did you mean {' or '.join(elsewhere)}?"
        allowed = _allowed_keys(location[:-1], model)
        return f"unknown key '{key}'; {advice(location[-1], allowed, one_of(allowed))}"
    if kind == "literal_error":
        allowed = first.get("ctx", {}).get("expected", "")
        names = allowed.replace("'", "").replace(" or ", ", ").split(", ")
        return f"unknown {key} {shown(got)}; allowed: {', '.join(names)}; {advice(str(got), names)}"
    message = "must be a list" if kind == "tuple_type" else first["msg"].removeprefix("Value error, ")
    if key == "remove.share" or (model.__name__ == "Remove" and key == "share"):
        share = "NaN" if isinstance(got, float) and math.isnan(got) else got
        message = "the share of total parameters to remove must be a number above 0 and below 1"
        return f"remove: {message}, got {share}."
    if location[:2] == ["remove", "vocabulary"]:  # a number or a name, so pydantic says two things
        key, message = "remove.vocabulary", "must be auto, or how many tokens stay, a multiple of 64"
    return f"{key}: {message}, got {shown(got)}."


def grouped_keys(model: type[BaseModel]) -> list[str]:
    """Return the keys of a recipe's groups, as group.key."""
    return [f"{group}.{key}" for group, field in model.model_fields.items() for key in _keys_of(field.annotation)]


def _keys_of(annotation: Any) -> tuple[str, ...]:
    models = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
    return tuple(key for each in models if issubclass(each, BaseModel) for key in each.model_fields)


def _allowed_keys(location: list[str], model: type[BaseModel]) -> list[str]:
    """Return the keys that may stand at a place of the recipe, or of its part."""
    for name in location:
        if name in model.model_fields:  # else it is the name of a domain
            annotation = model.model_fields[name].annotation
            types = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
            model = next(each for each in types if issubclass(each, BaseModel))
    top = ["preset"] if model.__name__ == "Recipe" else []
    return [*top, *model.model_fields, *(plugin_names(SOURCE_GROUP) if model.__name__ == "Domain" else ())]
