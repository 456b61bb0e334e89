"""Recipes in short for tests: the keys of all groups in one mapping, which `grouped` puts where they belong."""

from typing import Any

from secateur.recipe import Recipe

SHORT = {"removed_layers": ("remove", "layers"), "remove": ("remove", "share")} | {
    key: (group, key)
    for group in ("remove", "choose", "repair", "machine", "output")
    for key in Recipe.model_fields[group].annotation.model_fields
    if key not in ("share", "layers")
}


def grouped(short: Any) -> Any:
    """Return the recipe with its keys in their groups and no polish, unless it names one.

    What is no mapping, or a key of no group, stays as it is.
    """
    if not isinstance(short, dict):
        return short
    found: dict[str, Any] = {}
    for key, value in short.items():
        group, name = SHORT.get(key, (None, key))
        if group is None or (key in Recipe.model_fields and isinstance(value, dict)):
            found[key] = (found.get(key, {}) | value) if isinstance(value, dict) else value
        else:
            found.setdefault(group, {})[name] = value
    found.setdefault("polish", False)  # trained only where a test is about that
    return found
