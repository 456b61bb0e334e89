"""The commands that make a model, in the order of the work: from `inspect` and `recipe` to
`recover`.

The comments that `recipe` prints are the docstrings of keys in `secateur.recipe`.
"""

import re
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import secateur
import secateur.cli.common as common
from secateur.errors import RecipeError
from secateur.recipe import (
    SCORE_NAMES,
    Domain,
    Keys,
    Recipe,
    RecoverySettings,
    load_recipe,
    merged,
    over_preset,
    parse_recipe,
    preset_texts,
)


@common.app.command(epilog="Example: secateur inspect Qwen/Qwen2.5-7B --remove 0.3")
def inspect(
    model: common.Model,
    remove: common.Remove = None,
    to: common.To = None,
    recipe: common.RecipeFile = None,
    preset: common.Preset = None,
    sets: common.Sets = None,
    as_json: common.Json = False,
) -> None:
    """Say what MODEL consists of, and what a run would leave, without its weights."""
    parsed = _recipe_of(recipe, preset, {"remove": {"share": remove, "to": to}}, None, sets)
    with common.progress_bar() as progress:
        inspection = secateur.inspect(model, parsed, progress=progress)
    common.show(inspection, as_json=as_json)


WIDTH = 100


@common.app.command(epilog="Example: secateur recipe best > recipe.yaml")
def recipe(
    preset: Annotated[
        str, typer.Argument(help=f"Whose values: {', '.join(preset_texts())}.")
    ] = "default",
) -> None:
    """Print a recipe with every key, its value and what it means, to change and give to prune."""
    values = parse_recipe({"preset": preset}, "recipe")
    head = [line for line in preset_texts()[preset].splitlines() if line.startswith("#")]
    print("\n".join([f"# Preset {preset}.", *head, *_commented(values)]))


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
            yield from (
                f"{indent}  {name}: {plain_value(domain)}" for name, domain in domains.items()
            )
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
    return next((names for part in get_args(annotation) if (names := _choices(part))), ())


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False
    )


def plain_value(value: Any) -> str:
    """Return a recipe's value as YAML on one line."""
    if isinstance(value, Domain):
        value = value.model_dump(mode="json", exclude_unset=True)
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


@common.app.command(
    epilog="Example: secateur measure Qwen/Qwen2.5-0.5B sizes --set calibration.num_tokens=16384"
)
def measure(
    model: common.Model,
    out: common.Out,
    recipe: common.RecipeFile = None,
    preset: common.Preset = None,
    domain: common.Domains = None,
    answers: common.Answers = None,
    device: common.Device = None,
    sets: common.Sets = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take; MODEL needs no weights.")
    ] = False,
    overwrite: common.Overwrite = False,
) -> None:
    """Foretell what each size of MODEL would cost before a cut; write curves and a page to OUT."""
    options = {"machine": {"device": device}}
    parsed = _recipe_of(recipe, preset, options, domain, sets, answers)
    if dry_run:
        print(secateur.foretell_measure(model, parsed))
        return
    with common.progress_bar() as progress:
        measurement = secateur.measure(
            model,
            parsed,
            out=out,
            overwrite=overwrite,
            command=common.command_line(out),
            progress=progress,
            tell=common.tell,
        )
    common.show(measurement, f"{out}: result.json, report.html")


@common.app.command(
    epilog=(
        "Example: secateur prune Qwen/Qwen2.5-0.5B smaller --remove 0.2 --domain code --domain "
        "chat=chat.jsonl"
    )
)
def prune(
    model: common.Model,
    out: common.Out,
    remove: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE[,...]",
            help="Share of all parameters that goes; several are cut in one walk.",
        ),
    ] = None,
    to: common.To = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="NATS", help="As much goes as loses no more per token of held-out text."
        ),
    ] = None,
    recipe: common.RecipeFile = None,
    preset: common.Preset = None,
    domain: common.Domains = None,
    answers: common.Answers = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(metavar="N", help="Tokens go too: so many stay, or auto, as many as pay."),
    ] = None,
    polish: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="TOKENS", help="Tokens to train on at the end; 0 for no training."
        ),
    ] = None,
    device: common.Device = None,
    sets: common.Sets = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="RESULT", help="Remove what went there, with its recipe; refit on MODEL."
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="What measure has written: its recipe, and its curves plan widths.",
        ),
    ] = None,
    overwrite: common.Overwrite = False,
    force: common.Force = False,
) -> None:
    """Prune MODEL and write the smaller checkpoint to OUT; of several sizes each to OUT/SIZE."""
    sizes = [*common.shares(remove), *(() if to is None else to.split(","))]
    is_alone = len(sizes) < 2 or (remove is not None and to is not None)
    goes = {"share": None if remove is None else sizes[0], "to": to} if is_alone else {}
    options = {
        "remove": {**goes, "vocabulary": vocabulary},
        "polish": {"num_tokens": polish},
        "machine": {"device": device},
    }
    parsed = _recipe_of(recipe, preset, options, domain, sets, answers)
    if is_alone:
        return prune_and_tell(
            out,
            partial(
                secateur.prune,
                model,
                parsed,
                like=like,
                from_=from_,
                max_loss=max_loss,
                overwrite=overwrite,
                force=force,
            ),
        )
    in_sets = {"share", "to"} & common.parse_sets(sets).get("remove", {}).keys()
    for option, given in (
        ("--like", like),
        ("--max-loss", max_loss),
        ("--set", " and ".join(f"remove.{name}" for name in sorted(in_sets)) or None),
    ):
        if given is not None:
            raise RecipeError(
                f"{option} {given}: gives one size; leave it out, or --remove and --to."
            )
    with common.progress_bar() as progress:
        results = secateur.prune_sizes(
            model,
            parsed,
            sizes,
            out=out,
            from_=from_,
            overwrite=overwrite,
            command=common.command_line(out),
            progress=progress,
            tell=common.tell,
        )
    for made in results:
        common.show(made.summary, str(made.out))


def prune_and_tell(out: Path, prune: "Callable[..., secateur.Result]") -> None:
    """Print the result of `prune` in `out`. It is `secateur.prune` but for what the terminal
    gives.
    """
    with common.progress_bar() as progress:
        made = prune(out=out, command=common.command_line(out), progress=progress, tell=common.tell)
    summary = made.summary
    loader = (
        "secateur.load"
        if summary.has_layers_of_different_widths
        else f"{summary.loaded_by}.from_pretrained"
    )
    common.show(summary, f"{out}. Load it with {loader}('{out}')")


def _recipe_of(
    file: str | None,
    preset: str | None,
    options: Keys,
    domains: list[str] | None,
    sets: list[str] | None,
    answers: str | None = None,
) -> Recipe:
    """Return the recipe of the file over the preset, under `options`, `domains`, `answers` and
    `sets`.
    """
    data = {} if file is None else load_recipe(file)
    parse_recipe(data, f"recipe {file}")  # or errors in options would name the file
    if preset is not None:
        data = over_preset({**data, "preset": preset}, "--preset")
    data = merged(data, _without_none(options))
    if domains:
        data = over_preset(data, f"recipe {file}") if "preset" in data else data
        data["calibration"] = {
            **data.get("calibration", {}),
            "domains": common.parse_domains(domains),
        }
    data = common.with_answers(data, answers)
    whole = merged(data, common.parse_sets(sets))
    parse_recipe(data, "command line")  # or errors in options would name --set
    return parse_recipe(whole, "--set")


def _without_none(options: Keys) -> Keys:
    """Return what was given on the command line, mapping by mapping."""
    given = {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in options.items()
    }
    return {key: value for key, value in given.items() if value is not None and value != {}}


@common.app.command(
    epilog=(
        "Example: secateur trim Qwen/Qwen2.5-0.5B smaller --vocabulary 65536 --domain "
        "chat=chat.jsonl --set remove.keep_scripts=[latin,cyrillic]"
    )
)
def trim(
    model: common.Model,
    out: common.Out,
    vocabulary: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many tokens stay, a multiple of 64.")
    ],
    domain: common.Domains = None,
    sets: common.Sets = None,
    overwrite: common.Overwrite = False,
    force: common.Force = False,
) -> None:
    """Keep the N tokens of MODEL that its domains need most, and write the result to OUT.

    Every text still reads back as it was, in more tokens. Held-out text judges what that costs,
    domain by domain.
    """
    recipe = _recipe_of(
        None, None, {"remove": {"groups": [], "vocabulary": vocabulary}}, domain, sets
    )
    prune_and_tell(out, partial(secateur.prune, model, recipe, overwrite=overwrite, force=force))


@common.app.command(
    epilog=(
        "Example: secateur recover smaller --teacher Qwen/Qwen2.5-0.5B --tokens 1000000 --out "
        "recovered"
    )
)
def recover(
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="A result of prune.")],
    teacher: Annotated[
        str, typer.Option(metavar="DENSE", help="The dense model that PRUNED came from.")
    ],
    out: Annotated[
        Path, typer.Option(help="The directory to write; it appears complete or not at all.")
    ],
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to train on, all domains together.")
    ] = None,
    recipe: common.RecipeFile = None,
    domain: common.Domains = None,
    answers: common.Answers = None,
    sets: common.Sets = None,
    other_dense: common.OtherDense = False,
    overwrite: common.Overwrite = False,
) -> None:
    """Train PRUNED on its recipe's domains, to win back quality; resumes by itself."""
    changes = _recipe_of(recipe, None, {"recover": {"num_tokens": tokens}}, domain, sets, answers)
    with common.progress_bar() as progress:
        record = secateur.recover(
            pruned,
            teacher,
            changes,
            out=out,
            overwrite=overwrite,
            other_dense=other_dense,
            command=common.command_line(out),
            progress=progress,
            tell=common.tell,
        )
    common.show(record, str(out))
