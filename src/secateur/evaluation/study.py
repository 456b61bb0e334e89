"""A study: a grid of methods, shares and seeds from a YAML file, and its cells. Its tables: `study_tables`."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from secateur.errors import RecipeError, advice, one_of
from secateur.facts import Loss, Record
from secateur.recipe import Domain, Recipe, Strict
from secateur.recipe_errors import sentence
from secateur.recipe_file import load_recipe, merged, parse_recipe
from secateur.report.measured import Change, change

SHIPPED = "studies"
SMALL = "small"
DENSE, TRAINED_DENSE = "dense", "dense, trained"

Ratio = Annotated[float, Field(gt=0, lt=1)]


class Method(Strict):
    """A row of the grid. `domains`: None for all. `recipe`: keys over the study's recipe."""

    domains: tuple[str, ...] | None = None
    recipe: dict[str, Any] = Field(default={})


class Evaluation(Strict):
    """What judges every cell: held-out blocks per domain, and lm-evaluation-harness tasks.

    `others`: text of kinds that no run calibrates on, as many blocks of each. `limit`: questions
    per task. `batch_size`: requests at a time; padding may change last digits. `run_code`: tasks may
    run code that the models write.
    """

    num_blocks: Annotated[int, Field(ge=1)] = 8
    others: dict[str, Domain] = Field(default={})
    tasks: tuple[str, ...] = ()
    limit: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 1
    run_code: bool = False


class Study(Strict):
    """A grid. `question`: what it answers, in one sentence. `small`: keys for a short run.

    `train_dense`: a row of the dense model after the recipe's polish, by cross-entropy alone.
    """

    question: str
    model: str
    ratios: Annotated[tuple[Ratio, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    recipe: dict[str, Any] = Field(default={})
    evaluation: Evaluation = Evaluation()
    train_dense: bool = False
    small: dict[str, Any] = Field(default={})


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid; with ratio 0 the dense model's, whose recipe has the domains that judge."""

    method: str
    ratio: float
    seed: int
    recipe: Recipe

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model as it is."""
        return (self.method, self.ratio) == (DENSE, 0.0)


def load_study(reference: str, *, small: bool, model: str | None = None) -> Study:
    """Return a shipped study or the one in a file; `model` replaces the study's own.

    Raises RecipeError for an unknown study (naming the shipped ones) and for a wrong key.
    """
    data = load_recipe(_path(reference))
    if "question" not in data:
        raise RecipeError(f"study {reference}: has no question, so it is no study; give a recipe to secateur prune.")
    if small:
        if not data.get(SMALL):
            raise RecipeError(f"study {reference}: has no keys under '{SMALL}' for --small; leave the option out.")
        data = merged(data, data[SMALL])
    if model is not None:
        data["model"] = model
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"study {reference}: {sentence(error, Study)}") from None
    list(cells(study))  # every recipe is valid before the first run
    return study


def cells(study: Study) -> Iterator[Cell]:
    """Yield the cells seed by seed, so that an interrupted study has whole repetitions.

    The dense model's come first and last: as it is, and trained by cross-entropy, since it has nothing
    to be distilled from: what the text alone teaches.
    """
    for seed in study.seeds:
        dense = parse_recipe({**study.recipe, "seed": seed}, "study recipe")
        yield Cell(DENSE, 0.0, seed, dense)
        for ratio in study.ratios:
            for name, method in study.methods.items():
                yield Cell(name, ratio, seed, _recipe(study, name, method, ratio, seed))
        if study.train_dense:
            yield Cell(TRAINED_DENSE, 0.0, seed, dense.filled(polish={"kl_share": 0.0}, remove={"vocabulary": None}))


def shipped_studies() -> list[str]:
    """Return the names of the studies in the package."""
    names = (file.name for file in (resources.files("secateur.evaluation") / SHIPPED).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _path(reference: str) -> Path:
    if Path(reference).is_file():
        return Path(reference)
    name = reference.removesuffix(".yaml")
    if name not in shipped_studies():
        raise RecipeError(
            f"study {reference}: is no file and not among the shipped ones ({', '.join(shipped_studies())}); "
            f"{advice(name, shipped_studies())}"
        )
    return Path(str(resources.files("secateur.evaluation") / SHIPPED / f"{name}.yaml"))


def _recipe(study: Study, name: str, method: Method, ratio: float, seed: int) -> Recipe:
    where = f"study, method '{name}'"
    data = merged(merged(study.recipe, method.recipe), {"remove": {"share": ratio}, "seed": seed})
    recipe = parse_recipe(data, where)
    if recipe.recover is not None:
        raise RecipeError(f"{where}: compare runs no recover; leave it out, and give polish the tokens to train on.")
    if method.domains is None:
        return recipe
    known = recipe.calibration.domains
    for domain in method.domains:
        if domain not in known:
            raise RecipeError(f"{where}: unknown domain '{domain}'; {advice(domain, known, one_of(known))}")
    chosen = {domain: known[domain] for domain in method.domains}
    return recipe.filled(calibration={"domains": chosen})


@dataclass(frozen=True, slots=True)
class FoundCell:
    """A finished cell of a study. `tasks`: the harness's numbers. `seconds`: of pruning alone.

    All nats are per token of the dense tokenizer. `others`: on text of kinds that no run saw.
    `document_nats`, `document_tokens`: sums over each document, by domain.
    """

    method: str
    ratio: float
    seed: int
    remove_reached: float
    seconds: float
    nats_per_token: dict[str, float]
    tasks: dict[str, dict[str, float]]
    num_tokens: dict[str, int] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    document_nats: dict[str, list[float]] = field(default_factory=dict)
    document_tokens: dict[str, list[int]] = field(default_factory=dict)

    def over(self, dense: "FoundCell") -> dict[str, Change]:
        """Return nats per token over those of the dense model on the same draw, by domain."""
        changes: dict[str, Change] = {}
        for name in self.nats_per_token:
            sums = [(each.document_nats.get(name, ()), each.document_tokens.get(name, ())) for each in (dense, self)]
            nats = dense.nats_per_token[name], self.nats_per_token[name]
            before, after = (Loss(mean, None, 0, *of) for mean, of in zip(nats, sums, strict=True))
            changes[name] = change(before, after)
        return changes

    @property
    def perplexity(self) -> float:
        """Geometric mean over domains."""
        return math.exp(statistics.mean(self.nats_per_token.values()))

    @property
    def other_perplexity(self) -> float:
        """Geometric mean over the other kinds of text."""
        return math.exp(statistics.mean(self.others.values()))


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Record):
    """`results.json`: all cells of a study's grid, in each seed the dense model first."""

    cells: tuple[FoundCell, ...]
    versions: dict[str, str]
