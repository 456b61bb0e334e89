"""A study: a grid of methods, shares and seeds from a YAML file, and the page of its results."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from secateur.errors import RecipeError, advice, one_of
from secateur.files import staged_file
from secateur.recipe import Domain, Recipe, Strict
from secateur.recipe_file import load_recipe, merged, parse_recipe
from secateur.report.measured import Comparison, FoundCell
from secateur.report.page import Page, Section, Table, render
from secateur.report.plots import Series, Text, dot_plot
from secateur.report.rows import escaped, markdown

SHIPPED = "studies"
SMALL = "small"
_perplexity: Callable[[FoundCell], float] = attrgetter("perplexity")
_other_perplexity: Callable[[FoundCell], float] = attrgetter("other_perplexity")

Ratio = Annotated[float, Field(gt=0, lt=1)]


class Method(Strict):
    """A row of the grid. `domains`: None for all. `recipe`: keys over the study's recipe."""

    domains: tuple[str, ...] | None = None
    recipe: dict[str, Any] = Field(default={})


class Evaluation(Strict):
    """What judges every cell: held-out blocks per domain, and lm-evaluation-harness tasks.

    `others`: text of kinds that no run calibrates on, as many blocks of each. `limit`: questions
    per task. `batch_size`: requests at a time; padding may change last digits.
    """

    num_blocks: Annotated[int, Field(ge=1)] = 8
    others: dict[str, Domain] = Field(default={})
    tasks: tuple[str, ...] = ()
    limit: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 1


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
    """One run of the grid."""

    method: str
    ratio: float
    seed: int
    recipe: Recipe


def load_study(reference: str, *, small: bool, model: str | None = None) -> Study:
    """Return a shipped study or the one in a file; `model` replaces the study's own.

    Raises RecipeError for an unknown study (naming the shipped ones) and for a wrong key.
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
            hint = advice(str(first["loc"][-1]), Study.model_fields, one_of(Study.model_fields))
            raise RecipeError(f"study {reference}: unknown key '{key}'; {hint}") from None
        raise RecipeError(f"study {reference}: {key}: {first['msg'].lower()}, got {first.get('input')!r}.") from None
    list(cells(study))  # every recipe is valid before the first run
    return study


def cells(study: Study) -> Iterator[Cell]:
    """Yield the cells seed by seed, so that an interrupted study has whole repetitions."""
    for seed in study.seeds:
        for ratio in study.ratios:
            for name, method in study.methods.items():
                yield Cell(name, ratio, seed, _recipe(study, name, method, ratio, seed))


def study_recipe(study: Study, seed: int) -> Recipe:
    """Return what all cells of a seed share; its domains are those they are judged on."""
    return parse_recipe({**study.recipe, "seed": seed}, "study recipe")


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
    if method.domains is None:
        return recipe
    known = recipe.calibration.domains
    for domain in method.domains:
        if domain not in known:
            raise RecipeError(f"{where}: unknown domain '{domain}'; {advice(domain, known, one_of(known))}")
    chosen = {domain: known[domain] for domain in method.domains}
    return recipe.filled(calibration={"domains": chosen})


TASK_METRICS = ("acc_norm,none", "acc,none")
# A plot leaves out methods this many times worse than the best.
MOST_TIMES_BEST = 4


@dataclass(frozen=True, slots=True)
class Row:
    """A method at a share, over seeds."""

    method: str
    ratio: float
    cells: list[FoundCell]


def save_comparison(study: Study, comparison: Comparison, out: Path) -> None:
    """Write `study.yaml`, `results.json`, `table.md` and `report.html` into `out`."""
    dumped = yaml.safe_dump(study.model_dump(mode="json", exclude_none=True), sort_keys=False)
    texts = {"study.yaml": dumped, "results.json": comparison.to_json()}
    for name, text in (texts | _pages(study, list(comparison.cells))).items():
        with staged_file(out / name, overwrite=True) as staged:
            staged.write_text(text, encoding="utf-8")


def _pages(study: Study, found: list[FoundCell]) -> dict[str, str]:
    quality = _quality_table(found)
    others = [_others_table(found)] if found[0].others else []
    tables = [quality, *others, *([_task_table(found)] if any(cell.tasks for cell in found) else [])]
    about = _about(study, found)
    text = [f"# {escaped(study.question)}", "", *(f"- {escaped(line)}" for line in about), ""]
    for table in tables:
        text += [f"## {escaped(table.caption)}", "", *markdown(table), ""]
    rows = [row for row in rows_of(found) if row.ratio]
    by_ratio = {row.ratio: [each for each in rows if each.ratio == row.ratio] for row in rows}
    sections = [
        Section("quality", "Quality", plots=[_plot(*each) for each in by_ratio.items()], tables=tables),
        Section("how", "How it was measured", text=about),
    ]
    page = Page(study.question, verdict(found), (), (), sections)
    return {"table.md": "\n".join(text), "report.html": render(page)}


def rows_of(found: Iterable[FoundCell]) -> list[Row]:
    """Group cells by share and method, in the order they came."""
    grouped: dict[tuple[float, str], list[FoundCell]] = {}
    for cell in found:
        grouped.setdefault((cell.ratio, cell.method), []).append(cell)
    ordered = sorted(grouped.items(), key=lambda item: item[0][0])
    return [Row(method, ratio, cells) for (ratio, method), cells in ordered]


def overview(question: str, found: list[FoundCell]) -> Table:
    """Return what the terminal shows: a row per method and share."""
    rows = []
    for row in rows_of(found):
        reached = f"{_mean(row, lambda cell: cell.remove_reached):.1%}"
        rows.append((row.method, f"{row.ratio:.0%}", reached, f"{_mean(row, _perplexity):.2f}", str(len(row.cells))))
    return Table(question, ("method", "asked", "removed", "perplexity, mean of seeds", "seeds"), rows)


def verdict(found: list[FoundCell]) -> str:
    """Name the method with the lowest perplexity at each share, and the next best."""
    parts, rows = [], [row for row in rows_of(found) if row.ratio]
    for ratio in dict.fromkeys(row.ratio for row in rows):
        ranked = sorted((row for row in rows if row.ratio == ratio), key=lambda row: _mean(row, _perplexity))
        best = f"at {ratio:.0%} removed {ranked[0].method} is best ({_mean(ranked[0], _perplexity):.2f}"
        if len(ranked) > 1:
            best += f", then {ranked[1].method}, {_mean(ranked[1], _perplexity):.2f}"
        parts.append(best + ")")
    return f"By geometric-mean perplexity over domains, {'; '.join(parts)}."


def _about(study: Study, found: list[FoundCell]) -> list[str]:
    tokens = sorted({sum(cell.num_tokens.values()) for cell in found if cell.num_tokens})
    length = study.recipe.get("calibration", {}).get("sequence_length", "the model's default")
    tasks, limit = ", ".join(study.evaluation.tasks) or "none", study.evaluation.limit
    return [
        f"model {study.model}; ratios are shares of total parameters, tied weights counted once",
        f"seeds {', '.join(map(str, study.seeds))}: each draws calibration and evaluation text anew",
        f"calibration tokens per run: {', '.join(f'{count:,}' for count in tokens)}, in blocks of {length}",
        f"judged on {study.evaluation.num_blocks} held-out blocks of each of {len(found[0].nats_per_token)} domains, "
        "from documents that no run calibrates on",
        f"tasks: {tasks}" + (f", the first {limit} questions of each" if limit else ""),
    ]


def _quality_table(found: list[FoundCell]) -> Table:
    domains, all_rows = list(found[0].nats_per_token), rows_of(found)
    first = {row.ratio: row for row in reversed(all_rows) if row.ratio}
    paired = f"over {next(iter(first.values())).method}, draw by draw" if first else "draw by draw"
    header = ("method", "asked", "removed", "perplexity (geometric mean)", paired, *domains, "seconds")
    rows = []
    for row in all_rows:
        by_domain = [_show(row, lambda cell, name=name: math.exp(cell.nats_per_token[name])) for name in domains]
        reached = f"{_mean(row, lambda cell: cell.remove_reached):.1%}"
        seconds = f"{_mean(row, lambda cell: cell.seconds):.0f}"
        over = _paired(row, first[row.ratio]) if row.ratio else ""
        rows.append((row.method, f"{row.ratio:.0%}", reached, _show(row, _perplexity), over, *by_domain, seconds))
    return Table("Perplexity by domain, mean ± spread over seeds", header, rows)


def _others_table(found: list[FoundCell]) -> Table:
    kinds, all_rows = list(found[0].others), rows_of(found)
    first = {row.ratio: row for row in reversed(all_rows) if row.ratio}
    rows = []
    for row in all_rows:
        by_kind = [_show(row, lambda cell, name=name: math.exp(cell.others[name])) for name in kinds]
        over = _paired(row, first[row.ratio], _other_perplexity) if row.ratio else ""
        rows.append((row.method, f"{row.ratio:.0%}", _show(row, _other_perplexity), over, *by_kind))
    caption = "Perplexity on kinds of text that no run saw"
    return Table(caption, ("method", "asked", "perplexity (geometric mean)", "draw by draw", *kinds), rows)


def _paired(row: Row, other: Row, value: Callable[[FoundCell], float] = _perplexity) -> str:
    """Return the row's value over another's on the same draw: mean, lowest and highest.

    Draws of text differ more than methods do; on the same draw that difference cancels.
    """
    theirs = {cell.seed: value(cell) for cell in other.cells}
    ratios = [value(cell) / theirs[cell.seed] for cell in row.cells if cell.seed in theirs]
    if row is other or not ratios:
        return ""
    mean = f"{statistics.mean(ratios):.3f}"
    return f"{mean} ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else mean


def _task_table(found: list[FoundCell]) -> Table:
    tasks = list(found[0].tasks)
    rows = []
    for row in rows_of(found):
        scores = [_show(row, lambda cell, name=name: _score(cell, name), digits=3) for name in tasks]
        mean = _show(row, lambda cell: statistics.mean(_score(cell, name) for name in tasks), digits=3)
        rows.append((row.method, f"{row.ratio:.0%}", mean, *scores))
    return Table("Accuracy by task (acc_norm where the task has it)", ("method", "asked", "mean", *tasks), rows)


def _score(cell: FoundCell, task: str) -> float:
    numbers = cell.tasks[task]
    return next((numbers[metric] for metric in TASK_METRICS if metric in numbers), math.nan)


def _plot(ratio: float, rows: list[Row]) -> str:
    best = min(_mean(row, _perplexity) for row in rows)
    shown = [row for row in rows if _mean(row, _perplexity) < MOST_TIMES_BEST * best]
    hidden = [row.method for row in rows if row not in shown]
    description = f"{len(shown)} methods; the table has the numbers."
    if hidden:
        description += f" Left out, {MOST_TIMES_BEST} times the best or more: {', '.join(hidden)}."
    spreads = [_spread(row, _perplexity) for row in shown]
    means = [_mean(row, _perplexity) for row in shown]
    series = Series("mean and spread over seeds", "pruned", means, [(spread, spread) for spread in spreads])
    text = Text(f"removed-{round(100 * ratio)}", f"Perplexity with {ratio:.0%} removed", description)
    return dot_plot(text, [row.method for row in shown], [series], f"perplexity, {ratio:.0%} of parameters removed")


def _mean(row: Row, value: Callable[[FoundCell], float]) -> float:
    return statistics.mean(map(value, row.cells))


def _spread(row: Row, value: Callable[[FoundCell], float]) -> float:
    return statistics.stdev(map(value, row.cells)) if len(row.cells) > 1 else 0.0


def _show(row: Row, value: Callable[[FoundCell], float], digits: int = 2) -> str:
    mean = f"{_mean(row, value):,.{digits}f}"
    return f"{mean} ± {_spread(row, value):,.{digits}f}" if len(row.cells) > 1 else mean
