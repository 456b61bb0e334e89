"""The command `recipe`. The comments that it prints are the docstrings of keys in `secateur.recipe`."""

import re
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import secateur.cli.common as common
from secateur.recipe import SCORE_NAMES, Domain, RecoverySettings, parse_recipe, preset_texts

WIDTH = 100


@common.app.command(epilog="Example: secateur recipe best > recipe.yaml")
def recipe(
    preset: Annotated[str, typer.Argument(help=f"Whose values: {', '.join(preset_texts())}.")] = "default",
) -> None:
    """Print a recipe with every key, its value and what it means, to change and give to prune."""
    found = parse_recipe({"preset": preset}, "recipe")
    head = [line for line in preset_texts()[preset].splitlines() if line.startswith("#")]
    print("\n".join([f"# Preset {preset}.", *head, *_commented(found)]))


def _commented(values: BaseModel, indent: str = "") -> Iterator[str]:
    """Yield YAML with every key under its meaning; a `recover` that is off is a comment."""
    for name, field in type(values).model_fields.items():
        value = getattr(values, name)
        if not indent:
            yield ""
        if isinstance(value, BaseModel) and not indent:
            yield from [*_comment(about(type(value)), indent), f"{name}:", *_commented(value, "  ")]
        elif name == "recover" and value is None:
            yield from _comment(about(RecoverySettings), indent)
            yield from (f"# {line}" for line in (f"{name}:", *_commented(RecoverySettings(), "  ")))
        elif name == "domains":
            yield from _comment(about(Domain), indent)
            for key, of_domain in Domain.model_fields.items():
                yield from _comment(f"{key}: {meaning(of_domain)}", indent)
            yield f"{indent}{name}:"
            domains: dict[str, Domain] = dict(value)
            yield from (f"{indent}  {each}: {plain_value(domain)}" for each, domain in domains.items())
        else:
            names = SCORE_NAMES if name == "score" else _choices(field.annotation)
            allowed = f"One of {', '.join(names)}." if len(names) > 1 else ""
            yield from _comment(f"{meaning(field)} {allowed}", indent)
            yield f"{indent}{name}: {plain_value(value)}"


def about(model: type[BaseModel]) -> str:
    """Return what a group of keys is for."""
    return " ".join((model.__doc__ or "").split())


def meaning(field: FieldInfo) -> str:
    """Return what a key means, on one line, in words of YAML."""
    return re.sub(r"\bNone\b", "null", " ".join((field.description or "").split()))


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for each in get_args(annotation) if (found := _choices(each))), ())


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)


def plain_value(value: Any) -> str:
    """Return a recipe's value as YAML on one line."""
    own = isinstance(value, Domain)
    plain = value.model_dump(mode="json", exclude_unset=own) if isinstance(value, BaseModel) else value
    plain = list(plain) if isinstance(plain, tuple) else plain
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
