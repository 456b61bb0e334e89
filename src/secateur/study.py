"""A study: a grid of methods, ratios and seeds on one model, as a YAML file states it.

In: YAML. Out: a frozen `Study` and its cells. A method is a recipe's keys that differ from the study's own recipe, and,
where it calibrates on some of the study's domains alone, their names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from secateur.errors import RecipeError, nearest
from secateur.recipe import Recipe, Strict, load_recipe, merged, parse_recipe

SHIPPED = "studies"
SMALL = "small"

Ratio = Annotated[float, Field(gt=0, lt=1)]


class Method(Strict):
    """`domains`: None for all of the study's. `recipe`: keys over the study's recipe."""

    domains: tuple[str, ...] | None = None
    recipe: dict[str, Any] = Field(default={})


class Evaluation(Strict):
    """What every cell is judged by: held-out blocks per domain, and tasks of lm-evaluation-harness.

    `limit`: questions per task; `batch_size`: of the harness's requests. Padding may change a score's last digits.
    """

    num_blocks: Annotated[int, Field(ge=1)] = 8
    tasks: tuple[str, ...] = ()
    limit: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 1


class Study(Strict):
    """A whole grid. `question`: what it is to answer, in one sentence, for the page. `small`: keys for a short run."""

    question: str
    model: str
    ratios: Annotated[tuple[Ratio, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    recipe: dict[str, Any] = Field(default={})
    evaluation: Evaluation = Evaluation()
    small: dict[str, Any] = Field(default={})


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid."""

    method: str
    ratio: float
    seed: int
    recipe: Recipe


def load_study(reference: str, *, small: bool, model: str | None = None) -> Study:
    """Return the study of that name among the shipped ones, or of that file; `model` replaces the study's own.

    Raises RecipeError if there is none (naming the shipped ones), or a key is unknown or wrong.
    """
    data = load_recipe(_path(reference))
    if small:
        if not data.get(SMALL):
            raise RecipeError(f"study {reference}: has no keys under '{SMALL}' for --small; leave the option out.")
        data = merged(data, data[SMALL])
    if model is not None:
        data["model"] = model
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = nearest(str(first["loc"][-1]), Study.model_fields)
            raise RecipeError(f"study {reference}: unknown key '{key}'; did you mean '{hint}'?") from None
        raise RecipeError(f"study {reference}: {key}: {first['msg'].lower()}, got {first.get('input')!r}.") from None
    list(cells(study))  # every recipe is valid before the first run
    return study


def cells(study: Study) -> Iterator[Cell]:
    """Yield the grid's cells, seed by seed, so that an interrupted study has whole repetitions first."""
    for seed in study.seeds:
        for ratio in study.ratios:
            for name, method in study.methods.items():
                yield Cell(name, ratio, seed, _recipe(study, name, method, ratio, seed))


def study_recipe(study: Study, seed: int) -> Recipe:
    """Return the recipe that all of a seed's cells share: it names the domains that they are judged on."""
    return parse_recipe({**study.recipe, "seed": seed}, "study recipe")


def shipped_studies() -> list[str]:
    """Return the names of the studies that the package carries."""
    names = (file.name for file in (resources.files("secateur") / SHIPPED).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _path(reference: str) -> Path:
    if Path(reference).is_file():
        return Path(reference)
    name = reference.removesuffix(".yaml")
    if name not in shipped_studies():
        raise RecipeError(
            f"study {reference}: is no file and not among the shipped ones ({', '.join(shipped_studies())}); "
            f"did you mean '{nearest(name, shipped_studies())}'?"
        )
    return Path(str(resources.files("secateur") / SHIPPED / f"{name}.yaml"))


def _recipe(study: Study, name: str, method: Method, ratio: float, seed: int) -> Recipe:
    where = f"study, method '{name}'"
    data = merged(study.recipe, method.recipe) | {"remove": ratio, "seed": seed}
    recipe = parse_recipe(data, where)
    if method.domains is None:
        return recipe
    known = recipe.calibration.domains
    for domain in method.domains:
        if domain not in known:
            raise RecipeError(f"{where}: unknown domain '{domain}'; did you mean '{nearest(domain, known)}'?")
    chosen = {domain: known[domain] for domain in method.domains}
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"domains": chosen})})


def dump_study(study: Study) -> str:
    """Return the study as YAML."""
    return yaml.safe_dump(study.model_dump(mode="json", exclude_none=True), sort_keys=False)
