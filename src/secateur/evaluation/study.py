"""A study: a grid of methods, shares and seeds from a YAML file, its cells and tables.

The verdict on a grid says no more than its draws carry.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from secateur.errors import RecipeError, advice, one_of
from secateur.facts import Loss, Record, geometric_mean_perplexity
from secateur.files import write_text
from secateur.recipe import (
    Count,
    Domain,
    Keys,
    Recipe,
    Strict,
    load_recipe,
    merged,
    parse_recipe,
    sentence,
    shipped_yaml,
)
from secateur.report.page import Table, Tables, escaped, markdown, terminal
from secateur.report.records import Change, change, mean_change

SHIPPED = "evaluation/studies"
SMALL_KEY = "small"
DENSE, TRAINED_DENSE = "dense", "dense, trained"

Ratio = Annotated[float, Field(gt=0, lt=1)]


class StudyMethod(Strict):
    """A row of the grid. `domains`: None for all. `recipe`: keys over the study's recipe."""

    domains: tuple[str, ...] | None = None
    recipe: Keys = Field(default={})


class StudyEvaluation(Strict):
    """What judges every cell: held-out blocks per domain, and lm-evaluation-harness tasks.

    `others`: text of kinds that no run calibrates on, as many blocks of each. `limit`: questions
    per task. `tasks_data`: as the option of evaluate. `batch_size`: requests at a time; padding may
    change last digits. `run_code`: tasks may run code that the models write.
    """

    num_blocks: Count = 8
    others: dict[str, Domain] = Field(default={})
    tasks: tuple[str, ...] = ()
    tasks_data: Path | None = None
    limit: Count | None = None
    batch_size: Count = 1
    run_code: bool = False


class Study(Strict):
    """A grid. `question`: what it answers, in one sentence. `small`: keys for a short run.

    `train_dense`: a row of the dense model after the recipe's polish, by cross-entropy alone.
    """

    question: str
    model: str
    ratios: Annotated[tuple[Ratio, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    methods: Annotated[dict[str, StudyMethod], Field(min_length=1)]
    recipe: Keys = Field(default={})
    evaluation: StudyEvaluation = StudyEvaluation()
    train_dense: bool = False
    small: Keys = Field(default={})


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid; with ratio 0 the dense model's, whose recipe has the domains that
    judge.
    """

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
        raise RecipeError(
            f"study {reference}: has no question, so it is no study; give a recipe to secateur "
            "prune."
        )
    if small:
        if not data.get(SMALL_KEY):
            raise RecipeError(
                f"study {reference}: has no keys under '{SMALL_KEY}' for --small; leave the option "
                "out."
            )
        data = merged(data, data[SMALL_KEY])
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

    The dense model's come first and last: as it is, and trained by cross-entropy, since it has
    nothing to be distilled from: what the text alone teaches.
    """
    for seed in study.seeds:
        dense = parse_recipe({**study.recipe, "seed": seed}, "study recipe")
        yield Cell(DENSE, 0.0, seed, dense)
        for ratio in study.ratios:
            for name, method in study.methods.items():
                yield Cell(name, ratio, seed, _recipe(study, name, method, ratio, seed))
        if study.train_dense:
            yield Cell(
                TRAINED_DENSE,
                0.0,
                seed,
                dense.filled(polish={"kl_share": 0.0}, remove={"vocabulary": None}),
            )


def _path(reference: str) -> Path:
    if Path(reference).is_file():
        return Path(reference)
    name, shipped = reference.removesuffix(".yaml"), shipped_yaml(SHIPPED)
    if name not in shipped:
        raise RecipeError(
            f"study {reference}: is no file and not among the shipped ones ({', '.join(shipped)}); "
            f"{advice(name, shipped)}"
        )
    return shipped[name]


def _recipe(study: Study, name: str, method: StudyMethod, ratio: float, seed: int) -> Recipe:
    where = f"study, method '{name}'"
    data = merged(merged(study.recipe, method.recipe), {"remove": {"share": ratio}, "seed": seed})
    recipe = parse_recipe(data, where)
    if recipe.recover is not None:
        raise RecipeError(
            f"{where}: compare runs no recover; leave it out, and give polish the tokens to train "
            "on."
        )
    if method.domains is None:
        return recipe
    known = recipe.calibration.domains
    for domain in method.domains:
        if domain not in known:
            raise RecipeError(
                f"{where}: unknown domain '{domain}'; {advice(domain, known, one_of(known))}"
            )
    chosen = {domain: known[domain] for domain in method.domains}
    return recipe.filled(calibration={"domains": chosen})


@dataclass(frozen=True, slots=True)
class FoundCell:
    """A finished cell of a study. `tasks`: the harness's numbers. `seconds`: of pruning alone.

    `losses`: by domain, in nats per token of the dense tokenizer. `others`: on text of kinds that
    no run saw.
    """

    method: str
    ratio: float
    seed: int
    remove_reached: float
    seconds: float
    losses: dict[str, Loss]
    tasks: dict[str, dict[str, float]]
    num_tokens: dict[str, int] = field(default_factory=dict)
    others: dict[str, Loss] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Geometric mean over domains."""
        return geometric_mean_perplexity(self.losses)


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Record):
    """`results.json`: all cells of a study's grid, in each seed the dense model first."""

    cells: tuple[FoundCell, ...]
    versions: dict[str, str]


Value = Callable[[FoundCell], float]

TASK_METRICS = ("acc_norm,none", "acc,none")


@dataclass(frozen=True, slots=True)
class StudyRow:
    """A method at a share, over seeds."""

    method: str
    ratio: float
    cells: Sequence[FoundCell]

    def mean(self, value: Value) -> float:
        """Return the mean over seeds."""
        return statistics.mean(map(value, self.cells))

    @property
    def perplexity(self) -> float:
        """The mean over seeds of the geometric mean over domains."""
        return self.mean(lambda cell: cell.perplexity)

    def text(self, value: Value, digits: int = 2) -> str:
        """Return the mean, of several seeds with its spread."""
        mean = f"{self.mean(value):,.{digits}f}"
        spread = (
            f" ± {statistics.stdev(map(value, self.cells)):,.{digits}f}"
            if len(self.cells) > 1
            else ""
        )
        return mean + spread


def save_comparison(study: Study, comparison: Comparison, out: Path) -> None:
    """Write the study, results.json, and the tables in Markdown to `out`."""
    dumped = yaml.safe_dump(study.model_dump(mode="json", exclude_none=True), sort_keys=False)
    tables = _markdown(study, comparison.cells)
    for name, text in {
        "study.yaml": dumped,
        "results.json": comparison.to_json(),
        "table.md": tables,
    }.items():
        write_text(out / name, text)


def comparison_table(comparison: Comparison) -> Tables:
    """Return what the terminal shows of a study: a row per method and share, and the verdict."""
    return terminal(
        [quality_table("", comparison.cells, domains=())], [(study_verdict(comparison.cells),)]
    )


def _markdown(study: Study, cells: Sequence[FoundCell]) -> str:
    lines = [f"# {escaped(study.question)}", "", escaped(study_verdict(cells)), ""]
    lines += [*(f"- {escaped(line)}" for line in _about(study, cells)), ""]
    tables = [quality_table(PERPLEXITY_BY_DOMAIN, cells, cells[0].losses), over_dense_table(cells)]
    tables += [others_table(cells)] if cells[0].others else []
    tables += [accuracy_table(cells)] if cells[0].tasks else []
    for table in tables:
        lines += [f"## {escaped(table.caption)}", "", *markdown(table), ""]
    return "\n".join(lines)


def study_rows(cells: Sequence[FoundCell]) -> list[StudyRow]:
    """Group cells by share and method, in the order they came."""
    grouped: dict[tuple[float, str], list[FoundCell]] = {}
    for cell in cells:
        grouped.setdefault((cell.ratio, cell.method), []).append(cell)
    ordered = sorted(grouped.items(), key=lambda item: item[0][0])
    return [StudyRow(method, ratio, of_row) for (ratio, method), of_row in ordered]


def _table(caption: str, cells: Sequence[FoundCell], columns: Mapping[str, Value]) -> Table:
    rows = [
        (row.method, f"{row.ratio:.0%}", *(row.text(value) for value in columns.values()))
        for row in study_rows(cells)
    ]
    return Table(caption, ("method", "asked", *columns), rows)


PERPLEXITY_BY_DOMAIN = "Perplexity by domain, mean ± spread over seeds"


def quality_table(caption: str, cells: Sequence[FoundCell], domains: Iterable[str]) -> Table:
    """Return what was removed, and perplexity over all domains and on each of `domains`."""
    removed: dict[str, Value] = {"removed, %": lambda cell: 100 * cell.remove_reached}
    perplexities = _perplexities(lambda cell: cell.losses, domains)
    return _table(caption, cells, removed | perplexities | {"seconds": lambda cell: cell.seconds})


def others_table(cells: Sequence[FoundCell]) -> Table:
    """Return perplexity on the other kinds of text."""
    columns = _perplexities(lambda cell: cell.others, cells[0].others)
    return _table("Perplexity on kinds of text that no run saw", cells, columns)


def _perplexities(
    losses_of: Callable[[FoundCell], dict[str, Loss]], names: Iterable[str]
) -> dict[str, Value]:
    """Return columns of perplexity: the geometric mean over all texts, and each of `names`."""
    columns: dict[str, Value] = {
        "perplexity (geometric mean)": lambda cell: geometric_mean_perplexity(losses_of(cell)),
    }
    for name in names:
        columns[name] = lambda cell, name=name: losses_of(cell)[name].perplexity
    return columns


OVER_DENSE = (
    "Nats per token over the dense model on the same text, ± standard error over draws; of one "
    "draw, over documents"
)


def over_dense_table(cells: Sequence[FoundCell]) -> Table:
    """Return the difference to the dense model on the same draw: mean of domains, and each."""
    domains, rows = list(cells[0].losses), []
    for row in (row for row in study_rows(cells) if row.method != DENSE):
        mean, changes = _over_dense(row, cells)
        by_domain = (change.text() for change in (mean, *(changes[name] for name in domains)))
        rows.append((row.method, f"{row.ratio:.0%}", *by_domain))
    return Table(OVER_DENSE, ("method", "asked", "mean of domains", *domains), rows)


def _over_dense(row: StudyRow, cells: Sequence[FoundCell]) -> tuple[Change, dict[str, Change]]:
    """Return the row's nats per token over the dense model's, draw by draw: mean of domains, and
    each.

    Errors are over draws, each of which has its own calibration and judging text; of one draw, over
    documents.
    """
    dense = {cell.seed: cell.losses for cell in cells if (cell.method, cell.ratio) == (DENSE, 0.0)}
    draws = [
        {name: change(dense[cell.seed][name], loss) for name, loss in cell.losses.items()}
        for cell in row.cells
    ]
    if len(draws) == 1:
        return mean_change(draws[0].values()), draws[0]

    def over_draws(values: list[float]) -> Change:
        return Change(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))

    by_domain = {
        name: over_draws([draw[name].nats_per_token for draw in draws]) for name in draws[0]
    }
    return over_draws([mean_change(draw.values()).nats_per_token for draw in draws]), by_domain


def study_verdict(cells: Sequence[FoundCell]) -> str:
    """Name the method with the lowest perplexity at each share, and those that may be as good.

    A method is told apart from another if it is better on every draw and, over at least two draws,
    by more than two standard errors of the paired differences of log perplexity.
    """
    rows, parts = [row for row in study_rows(cells) if row.ratio], []
    for ratio in dict.fromkeys(row.ratio for row in rows):
        best, *others = sorted(
            (row for row in rows if row.ratio == ratio), key=lambda row: row.perplexity
        )
        alike = [
            f"{row.method} ({row.perplexity:.2f})" for row in others if not _is_better(best, row)
        ]
        part = f"at {ratio:.0%} removed {best.method} has the lowest ({best.perplexity:.2f})"
        if alike:
            draws = "one draw does" if len(best.cells) == 1 else f"{len(best.cells)} draws do"
            part += f"; {draws} not tell it from {', '.join(alike)}"
        parts.append(part)
    return f"By geometric-mean perplexity over domains, {'; '.join(parts)}."


def _is_better(best: StudyRow, other: StudyRow) -> bool:
    ours, theirs = (
        {cell.seed: math.log(cell.perplexity) for cell in row.cells} for row in (best, other)
    )
    gains = [theirs[draw] - nats for draw, nats in ours.items() if draw in theirs]
    if len(gains) < 2 or min(gains) <= 0:
        return False
    return statistics.mean(gains) > 2 * statistics.stdev(gains) / math.sqrt(len(gains))


def _about(study: Study, cells: Sequence[FoundCell]) -> list[str]:
    tokens = sorted({sum(cell.num_tokens.values()) for cell in cells if cell.num_tokens})
    length = study.recipe.get("calibration", {}).get("sequence_length", "the model's default")
    tasks, limit = ", ".join(study.evaluation.tasks) or "none", study.evaluation.limit
    return [
        f"model {study.model}; ratios are shares of total parameters, tied weights counted once",
        f"seeds {', '.join(map(str, study.seeds))}: each draws calibration and evaluation text "
        "anew",
        f"calibration tokens per run: {', '.join(f'{count:,}' for count in tokens)}, in blocks of "
        f"{length}",
        f"judged on {study.evaluation.num_blocks} held-out blocks of each of "
        f"{len(cells[0].losses)} domains, from documents that no run calibrates on",
        f"tasks: {tasks}" + (f", the first {limit} questions of each" if limit else ""),
    ]


ACCURACY = (
    "Accuracy by task (acc_norm where the task has it), ± spread over seeds; of one, its error "
    "over questions"
)


def accuracy_table(cells: Sequence[FoundCell]) -> Table:
    """Return accuracies by task, and their mean."""
    tasks, rows = list(cells[0].tasks), []
    for row in study_rows(cells):
        accuracies = (_accuracy(row, [name]) for name in tasks)
        rows.append((row.method, f"{row.ratio:.0%}", _accuracy(row, tasks), *accuracies))
    return Table(ACCURACY, ("method", "asked", "mean", *tasks), rows)


def _accuracy(row: StudyRow, tasks: list[str]) -> str:
    """Return the mean over tasks, with its spread over draws, or of one draw the standard error
    over questions.
    """
    if len(row.cells) > 1:
        return row.text(
            lambda cell: statistics.mean(_score(cell, name)[0] for name in tasks), digits=3
        )
    scores, errors = zip(*(_score(row.cells[0], name) for name in tasks), strict=True)
    return f"{statistics.mean(scores):.3f} ± {math.hypot(*errors) / len(errors):.3f}"


def _score(cell: FoundCell, task: str) -> tuple[float, float]:
    """Return the task's accuracy and its standard error, not a number where the harness has
    none.
    """
    numbers = cell.tasks[task]
    metric = next((metric for metric in TASK_METRICS if metric in numbers), "")
    return numbers.get(metric, math.nan), numbers.get(metric.replace(",", "_stderr,"), math.nan)
