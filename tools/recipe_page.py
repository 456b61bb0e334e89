"""Write the tables of docs/recipe.md: every key with its type, its default and what it means.

    python tools/recipe_page.py

Types and defaults are those of the schema in src/secateur/recipe.py, the meanings its docstrings.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from secateur.cli.prune import about, meaning, plain_value
from secateur.recipe import SCORE_NAMES, Domain, Recipe, RecoverySettings

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
START, END = "<!-- tables: python tools/recipe_page.py -->\n", "<!-- end of tables -->\n"
# Mappings within a group, behind the table of their group.
WITHIN = {
    "calibration.domains.NAME": Domain,
    "recover": RecoverySettings,
}
# Options of their own on the command line.
OPTIONS = {
    "remove.share": "--remove",
    "remove.to": "--to",
    "remove.vocabulary": "--vocabulary",
    "calibration.domains": "--domain",
    "calibration.answers": "--answers",
    "machine.device": "--device",
    "recover.num_tokens": "--tokens",
    "polish.num_tokens": "--polish",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
NAMES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "`true` or `false`",
    "null": "`null`",
}


def page() -> str:
    """Return the page with today's tables."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return f"{before}{START}\n{tables()}\n{END}{rest.partition(END)[2]}"


def tables() -> str:
    """Return a section for each group of keys, each followed by the mappings within it."""
    groups = {name: type(field.default) for name, field in Recipe.model_fields.items() if _has_keys(field.default)}
    sections = [*_section("Top level", Recipe)]
    for group in [*groups, "recover"]:
        for place, model in {**groups, **WITHIN}.items():
            if place == group or place.startswith(f"{group}."):
                sections += ["", *_section(place, model)]
    return "\n".join(sections) + "\n"


def _has_keys(value: Any) -> bool:
    return isinstance(value, BaseModel)


def _section(place: str, model: type[BaseModel]) -> Iterator[str]:
    meanings = {key: meaning(field) for key, field in model.model_fields.items()}
    title, prefix = (place, "") if model is Recipe else (f"`{place}`", f"{place}.")
    yield from (f"{'###' if '.' in place else '##'} {title}", "", about(model), "")
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    schema = model.model_json_schema()["properties"]
    for key, field in model.model_fields.items():
        has_section = _has_keys(field.default)
        if model is Recipe and has_section and not meanings[key]:
            continue
        below = next((other for other in WITHIN if other.removesuffix(".NAME") == prefix + key), None)
        below = prefix + key if has_section else below
        if key == "domains":
            default, meanings[key] = (
                "see [your data](data.md#domains)",
                "a name for each, and its source; or the mixture `general`.",
            )
        elif has_section or field.is_required():
            default = "see there" if has_section else "none"
        else:
            default = f"`{plain_value(field.default)}`"
        kind = _type({"enum": SCORE_NAMES}) if key == "score" else "" if below else _type(schema[key])
        kind = f"mapping, see [below](#{below.lower().replace('.', '')})" if below else kind
        yield f"| `{key}` | {kind} | {default} | {meanings[key]}{_option(prefix + key)} |"


def _option(key: str) -> str:
    short = OPTIONS.get(key, OPTIONS.get(f"{key}.num_tokens"))
    return f" Also `{short}`." if short else ""


def _type(schema: dict[str, Any]) -> str:
    """Say in words what a JSON schema allows."""
    *others, last = _choices(schema)
    return f"{', '.join(others)} or {last}" if others else last


def _choices(schema: dict[str, Any]) -> list[str]:
    if "anyOf" in schema:
        return [choice for each in schema["anyOf"] for choice in _choices(each)]
    if "enum" in schema or "const" in schema:
        return [f"`{name}`" for name in schema.get("enum", [schema.get("const")])]
    if schema["type"] == "array":
        return [f"list of {_type(schema['items']).replace('number', 'numbers')}"]
    if schema["type"] == "object":
        return [f"mapping of names to {_type(schema['additionalProperties']).replace('number', 'numbers')}"]
    bounds = ", ".join(f"{sign} {schema[name]}" for name, sign in BOUNDS.items() if name in schema)
    return [f"{NAMES[schema['type']]} ({bounds})"] if bounds else [NAMES[schema["type"]]]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
