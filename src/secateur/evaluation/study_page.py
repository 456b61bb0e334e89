"""What a study found: tables, a page, and a verdict that says no more than its draws carry."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import yaml

from secateur.evaluation.study import DENSE, Comparison, Foreseen, FoundCell, Study
from secateur.files import staged_file
from secateur.log import human_bytes
from secateur.report.measured import Change, mean_change, spread_of
from secateur.report.page import Page, Section, Table, render
from secateur.report.plots import Series, Text, dot_plot
from secateur.report.rows import Tables, escaped, markdown, terminal

_perplexity: Callable[[FoundCell], float] = attrgetter("perplexity")
_other_perplexity: Callable[[FoundCell], float] = attrgetter("other_perplexity")

OfModel = TypeVar("OfModel", FoundCell, Foreseen)

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
    """Write the study, results.json, the tables in Markdown, and the page to `out`."""
    dumped = yaml.safe_dump(study.model_dump(mode="json", exclude_none=True), sort_keys=False)
    texts = {"study.yaml": dumped, "results.json": comparison.to_json(), **_pages(study, list(comparison.cells))}
    for name, text in texts.items():
        with staged_file(out / name, overwrite=True) as staged:
            staged.write_text(text, encoding="utf-8")


def comparison_table(comparison: Comparison) -> Tables:
    """Return what the terminal shows of a study: its tables and verdict."""
    cells = list(comparison.cells)
    return terminal(overview("", cells), [(verdict(cells),)])


def _pages(study: Study, found: list[FoundCell]) -> dict[str, str]:
    models, about = by_model(found), _about(study, found)
    tables, sections = list[Table](), list[Section]()
    if len(models) > 1:
        tables, (plots, hidden) = _tables_over_models(found), _plots(found)
        sections.append(Section("models", f"{len(models)} models together", hidden, plots, tables, stacked=True))
    for number, (model, cells) in enumerate(models.items(), 1):
        quality = _quality_table(cells)
        more = [_over_dense_table(cells), *([_others_table(cells)] if cells[0].others else [])]
        more += [_task_table(cells)] if any(cell.tasks for cell in cells) else []
        (first, *last), where, text, named = _narrow(quality), ("quality", "Quality"), list[str](), [quality, *more]
        if len(models) > 1:
            where, text = (f"model-{number}", model), [verdict(cells)]
            named = [replace(table, caption=f"{model}: {table.caption}") for table in named]
        plots, hidden = _plots(cells)
        shown = (first, *more, *last)
        sections.append(Section(*where, [*text, *hidden], plots, shown, stacked=len(models) > 1))
        tables = [*tables, *named]
    text = [f"# {escaped(study.question)}", "", *(f"- {escaped(line)}" for line in about), ""]
    for table in tables:
        text += [f"## {escaped(table.caption)}", "", *markdown(table), ""]
    sections.append(Section("how", "How it was measured", text=about))
    page = Page(study.question, verdict(found), (), (), sections)
    return {"table.md": "\n".join(text), "report.html": render(page)}


def by_model(found: Iterable[OfModel]) -> dict[str, list[OfModel]]:
    """Group cells by the model that they are of, in the order they came."""
    grouped: dict[str, list[OfModel]] = {}
    for cell in found:
        grouped.setdefault(cell.model, []).append(cell)
    return grouped


def _changes(found: Iterable[FoundCell]) -> dict[tuple[str, float], list[Change]]:
    """Return nats per token over dense by method and share: the mean over models, then each model's own.

    Models are judged on much the same documents, so the mean's error is taken as the mean of errors,
    which is the most it can be.
    """
    grouped: dict[tuple[str, float], list[Change]] = {}
    for cells in by_model(found).values():
        for row in (row for row in rows_of(cells) if row.method != DENSE):
            grouped.setdefault((row.method, row.ratio), []).append(_over_dense(row, _dense(cells))[0])
    with_mean = dict[tuple[str, float], list[Change]]()
    for key, each in grouped.items():
        nats = statistics.mean(change.nats_per_token for change in each)
        errors = [change.standard_error for change in each if change.standard_error is not None]
        error = statistics.mean(errors) if len(errors) == len(each) else None
        with_mean[key] = [Change(nats, error), *each]
    return with_mean


def _quality(found: list[FoundCell]) -> Callable[[Row], float]:
    """Return what ranks methods: perplexity; of several models, how many times that of dense, geometric mean."""
    if len(by_model(found)) == 1:
        return lambda row: _mean(row, _perplexity)
    changes = _changes(found)
    return lambda row: math.exp(changes[row.method, row.ratio][0].nats_per_token)


def _tables_over_models(found: list[FoundCell]) -> list[Table]:
    """Return perplexity over that of each model's dense, and the same in nats with errors."""
    changes = _changes(found).items()
    header = ("method", "asked", "mean of models", *by_model(found))
    times = [
        (name, f"{ratio:.0%}", *(f"{math.exp(x.nats_per_token):,.2f}" for x in each)) for (name, ratio), each in changes
    ]
    nats = [(name, f"{ratio:.0%}", *(x.text() for x in each)) for (name, ratio), each in changes]
    own = "Nats per token of each model's own tokenizer over its own dense"
    return [
        Table("Perplexity over that of each model's own dense, geometric mean", header, times),
        Table(f"{own}, ± standard error over draws; of one draw, over documents", header, nats),
    ]


def _dense(found: Iterable[FoundCell]) -> dict[int, FoundCell]:
    """Return the dense model's cell by seed."""
    return {cell.seed: cell for cell in found if (cell.method, cell.ratio) == (DENSE, 0.0)}


def _narrow(quality: Table) -> list[Table]:
    """Return the columns of all domains, and those of each: together they are wider than a page."""
    about, seconds = 5, len(quality.header) - 1
    parts = {
        "Perplexity, mean ± spread over seeds": (*range(about), seconds),
        quality.caption: (0, 1, *range(about, seconds)),
    }

    def columns(cells: Sequence[str], kept: tuple[int, ...]) -> list[str]:
        return [cells[place] for place in kept]

    return [
        Table(caption, columns(quality.header, kept), [columns(row, kept) for row in quality.rows])
        for caption, kept in parts.items()
    ]


def rows_of(found: Iterable[FoundCell]) -> list[Row]:
    """Group cells by share and method, in the order they came."""
    grouped: dict[tuple[float, str], list[FoundCell]] = {}
    for cell in found:
        grouped.setdefault((cell.ratio, cell.method), []).append(cell)
    ordered = sorted(grouped.items(), key=lambda item: item[0][0])
    return [Row(method, ratio, cells) for (ratio, method), cells in ordered]


def overview(question: str, found: list[FoundCell]) -> list[Table]:
    """Return what the terminal shows: a row per method and share, for each model and over all."""
    tables = []
    for caption, cells in by_question(question, found):
        rows = []
        for row in rows_of(cells):
            reached = f"{_mean(row, lambda cell: cell.remove_reached):.1%}"
            facts = (reached, f"{_mean(row, _perplexity):.2f}", str(len(row.cells)))
            rows.append((row.method, f"{row.ratio:.0%}", *facts))
        header = ("method", "asked", "removed", "perplexity, mean of seeds", "seeds")
        tables.append(Table(caption, header, rows))
    return tables if len(tables) == 1 else [*tables, _tables_over_models(found)[0]]


def by_question(question: str, found: Iterable[OfModel]) -> list[tuple[str, list[OfModel]]]:
    """Return each model's cells under the question, which begins with the model's name if there are several."""
    models = by_model(found)
    return [(question if len(models) == 1 else f"{model}: {question}", cells) for model, cells in models.items()]


def foreseen_table(question: str, foreseen: Sequence[Foreseen]) -> Table:
    """Return what the terminal shows of a model's grid that has not run yet."""
    rows = []
    for each in foreseen:
        rows.append((each.method, f"{each.ratio:.0%}", str(each.num_draws), human_bytes(each.disk_bytes)))
    most = human_bytes(max(each.disk_bytes for each in foreseen))
    rows.append(("all", "", str(sum(each.num_draws for each in foreseen)), most))
    return Table(question, ("method", "asked", "draws", "disk meanwhile"), rows)


def verdict(found: list[FoundCell]) -> str:
    """Name the method with the lowest perplexity at each share, and those that may be as good.

    A method is told apart from another if it is better on every draw (of every model) and, over at
    least two draws, by more than two standard errors of the paired differences of log perplexity.
    """
    value, rows, num_models = _quality(found), [row for row in rows_of(found) if row.ratio], len(by_model(found))
    parts = []
    for ratio in dict.fromkeys(row.ratio for row in rows):
        best, *others = sorted((row for row in rows if row.ratio == ratio), key=value)
        alike = [f"{row.method} ({value(row):.2f})" for row in others if not _is_better(best, row)]
        part = f"at {ratio:.0%} removed {best.method} has the lowest ({value(best):.2f})"
        if others and not alike:
            part += f", then {others[0].method} ({value(others[0]):.2f})"
        elif alike:
            draws = "one draw does" if len(best.cells) == 1 else f"{len(best.cells)} draws do"
            part += f"; {draws} not tell it from {', '.join(alike)}"
        parts.append(part)
    by = "By geometric-mean perplexity over domains"
    if num_models > 1:
        by = f"By perplexity over that of each model's own dense (geometric mean over domains and {num_models} models)"
    return f"{by}, {'; '.join(parts)}."


def _is_better(best: Row, other: Row) -> bool:
    theirs = {(cell.model, cell.seed): math.log(_perplexity(cell)) for cell in other.cells}
    ours = {(cell.model, cell.seed): math.log(_perplexity(cell)) for cell in best.cells}
    gains = [theirs[draw] - nats for draw, nats in ours.items() if draw in theirs]
    if len(gains) < 2 or min(gains) <= 0:
        return False
    return statistics.mean(gains) > 2 * statistics.stdev(gains) / math.sqrt(len(gains))


def _about(study: Study, found: list[FoundCell]) -> list[str]:
    tokens = sorted({sum(cell.num_tokens.values()) for cell in found if cell.num_tokens})
    length = study.recipe.get("calibration", {}).get("sequence_length", "the model's default")
    tasks, limit, several = ", ".join(study.evaluation.tasks) or "none", study.evaluation.limit, len(study.models) > 1
    own = (
        "perplexity and nats are per token of each model's own dense tokenizer, and all read as many tokens: where "
        "tokenizers differ, compare what is over the own dense, not perplexities"
    )
    return [
        f"model{'s' * several} {', '.join(study.models)}; ratios are shares of total parameters, tied weights counted "
        "once",
        f"seeds {', '.join(map(str, study.seeds))}: each draws calibration and evaluation text anew",
        f"calibration tokens per run: {', '.join(f'{count:,}' for count in tokens)}, in blocks of {length}",
        f"judged on {study.evaluation.num_blocks} held-out blocks of each of {len(found[0].nats_per_token)} domains, "
        "from documents that no run calibrates on",
        f"tasks: {tasks}" + (f", the first {limit} questions of each" if limit else ""),
        *([own] if several else []),
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


def _over_dense_table(found: list[FoundCell]) -> Table:
    domains, rows = list(found[0].nats_per_token), []
    for row in (row for row in rows_of(found) if row.method != DENSE):
        mean, changes = _over_dense(row, _dense(found))
        cells = (each.text() for each in (mean, *(changes[name] for name in domains)))
        rows.append((row.method, f"{row.ratio:.0%}", *cells))
    caption = (
        "Nats per token over the dense model on the same text, ± standard error over draws; of one draw, over documents"
    )
    return Table(caption, ("method", "asked", "mean of domains", *domains), rows)


def _over_dense(row: Row, dense: dict[int, FoundCell]) -> tuple[Change, dict[str, Change]]:
    """Return the row's nats per token over the dense model's, draw by draw: mean of domains, and each.

    Errors are over draws, each of which has its own calibration and judging text; of one draw, over
    blocks.
    """
    draws = [cell.over(dense[cell.seed]) for cell in row.cells]
    if len(draws) == 1:
        return mean_change(draws[0].values()), draws[0]

    def over_draws(values: list[float]) -> Change:
        return Change(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))

    by_domain = {name: over_draws([draw[name].nats_per_token for draw in draws]) for name in draws[0]}
    return over_draws([mean_change(draw.values()).nats_per_token for draw in draws]), by_domain


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
        rows.append(
            (row.method, f"{row.ratio:.0%}", _accuracy(row, tasks), *(_accuracy(row, [name]) for name in tasks))
        )
    caption = "Accuracy by task (acc_norm where the task has it), ± spread over seeds; of one, its error over questions"
    return Table(caption, ("method", "asked", "mean", *tasks), rows)


def _accuracy(row: Row, tasks: list[str]) -> str:
    """Return the mean over tasks, with its spread over draws, or of one draw the standard error over questions."""
    if len(row.cells) > 1:
        return _show(row, lambda cell: statistics.mean(_score(cell, name)[0] for name in tasks), digits=3)
    scores, errors = zip(*(_score(row.cells[0], name) for name in tasks), strict=True)
    return f"{statistics.mean(scores):.3f} ± {math.hypot(*errors) / len(errors):.3f}"


def _score(cell: FoundCell, task: str) -> tuple[float, float]:
    """Return the task's accuracy and its standard error, not a number where the harness has none."""
    numbers = cell.tasks[task]
    metric = next((metric for metric in TASK_METRICS if metric in numbers), "")
    return numbers.get(metric, math.nan), numbers.get(metric.replace(",", "_stderr,"), math.nan)


def _plots(found: list[FoundCell]) -> tuple[list[str], list[str]]:
    """Return a plot per share and sentences about what it leaves out."""
    means = {key: changes[0] for key, changes in _changes(found).items() if key[1]}
    plots, hidden, what = [], [], "nats per token over dense" if len(by_model(found)) == 1 else "mean nats over dense"
    for ratio in dict.fromkeys(ratio for _, ratio in means):
        points = {method: change for (method, share), change in means.items() if share == ratio}
        most = min(each.nats_per_token for each in points.values()) + math.log(MOST_TIMES_BEST)
        shown = {method: change for method, change in points.items() if change.nats_per_token < most}
        left_out = f"Not in the plot, {MOST_TIMES_BEST} times the best perplexity or more"
        hidden += [f"{left_out}: {method} at {ratio:.0%}." for method in points if method not in shown]
        errors = [spread_of(each) for each in shown.values()]
        values = [each.nats_per_token for each in shown.values()]
        series = Series("± standard error, paired", "pruned", values, errors)
        title = f"Nats per token over the dense model with {ratio:.0%} removed"
        text = Text(title, f"{len(shown)} methods; the table has the numbers.")
        plots.append(dot_plot(text, list(shown), [series], f"{what}, {ratio:.0%} removed", reference=0.0))
    return plots, hidden


def _mean(row: Row, value: Callable[[FoundCell], float]) -> float:
    return statistics.mean(map(value, row.cells))


def _spread(row: Row, value: Callable[[FoundCell], float]) -> float:
    return statistics.stdev(map(value, row.cells)) if len(row.cells) > 1 else 0.0


def _show(row: Row, value: Callable[[FoundCell], float], digits: int = 2) -> str:
    mean = f"{_mean(row, value):,.{digits}f}"
    return f"{mean} ± {_spread(row, value):,.{digits}f}" if len(row.cells) > 1 else mean
