"""What a study found: tables, and a verdict that says no more than its draws carry."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from secateur.evaluation.study import DENSE, Comparison, FoundCell, Study
from secateur.files import staged_file
from secateur.report.measured import Change, mean_change
from secateur.report.page import Table
from secateur.report.rows import Tables, escaped, markdown, terminal

Value = Callable[[FoundCell], float]

TASK_METRICS = ("acc_norm,none", "acc,none")


@dataclass(frozen=True, slots=True)
class Row:
    """A method at a share, over seeds."""

    method: str
    ratio: float
    cells: list[FoundCell]

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
        spread = f" ± {statistics.stdev(map(value, self.cells)):,.{digits}f}" if len(self.cells) > 1 else ""
        return mean + spread


def save_comparison(study: Study, comparison: Comparison, out: Path) -> None:
    """Write the study, results.json, and the tables in Markdown to `out`."""
    dumped = yaml.safe_dump(study.model_dump(mode="json", exclude_none=True), sort_keys=False)
    tables = _markdown(study, list(comparison.cells))
    for name, text in {"study.yaml": dumped, "results.json": comparison.to_json(), "table.md": tables}.items():
        with staged_file(out / name, overwrite=True) as staged:
            staged.write_text(text, encoding="utf-8")


def comparison_table(comparison: Comparison) -> Tables:
    """Return what the terminal shows of a study: a row per method and share, and the verdict."""
    cells = list(comparison.cells)
    return terminal([quality_table("", cells, domains=())], [(verdict(cells),)])


def _markdown(study: Study, cells: list[FoundCell]) -> str:
    lines = [f"# {escaped(study.question)}", "", escaped(verdict(cells)), ""]
    lines += [*(f"- {escaped(line)}" for line in _about(study, cells)), ""]
    tables = [quality_table(BY_DOMAIN, cells, cells[0].nats_per_token), over_dense_table(cells)]
    tables += [others_table(cells)] if cells[0].others else []
    tables += [task_table(cells)] if cells[0].tasks else []
    for table in tables:
        lines += [f"## {escaped(table.caption)}", "", *markdown(table), ""]
    return "\n".join(lines)


def rows_of(cells: Iterable[FoundCell]) -> list[Row]:
    """Group cells by share and method, in the order they came."""
    grouped: dict[tuple[float, str], list[FoundCell]] = {}
    for cell in cells:
        grouped.setdefault((cell.ratio, cell.method), []).append(cell)
    ordered = sorted(grouped.items(), key=lambda item: item[0][0])
    return [Row(method, ratio, of_row) for (ratio, method), of_row in ordered]


def _table(caption: str, cells: list[FoundCell], columns: Mapping[str, Value]) -> Table:
    rows = [
        (row.method, f"{row.ratio:.0%}", *(row.text(value) for value in columns.values())) for row in rows_of(cells)
    ]
    return Table(caption, ("method", "asked", *columns), rows)


BY_DOMAIN = "Perplexity by domain, mean ± spread over seeds"


def quality_table(caption: str, cells: list[FoundCell], domains: Iterable[str]) -> Table:
    """Return what was removed, and perplexity over all domains and on each of `domains`."""
    columns: dict[str, Value] = {
        "removed, %": lambda cell: 100 * cell.remove_reached,
        "perplexity (geometric mean)": lambda cell: cell.perplexity,
    }
    for name in domains:
        columns[name] = lambda cell, name=name: math.exp(cell.nats_per_token[name])
    return _table(caption, cells, columns | {"seconds": lambda cell: cell.seconds})


def others_table(cells: list[FoundCell]) -> Table:
    """Return perplexity on the other kinds of text."""
    columns: dict[str, Value] = {"perplexity (geometric mean)": lambda cell: cell.other_perplexity}
    for name in cells[0].others:
        columns[name] = lambda cell, name=name: math.exp(cell.others[name])
    return _table("Perplexity on kinds of text that no run saw", cells, columns)


OVER_DENSE = (
    "Nats per token over the dense model on the same text, ± standard error over draws; of one draw, over documents"
)


def over_dense_table(cells: list[FoundCell]) -> Table:
    """Return the difference to the dense model on the same draw: mean of domains, and each."""
    domains, rows = list(cells[0].nats_per_token), []
    for row in (row for row in rows_of(cells) if row.method != DENSE):
        mean, changes = _over_dense(row, cells)
        by_domain = (each.text() for each in (mean, *(changes[name] for name in domains)))
        rows.append((row.method, f"{row.ratio:.0%}", *by_domain))
    return Table(OVER_DENSE, ("method", "asked", "mean of domains", *domains), rows)


def _over_dense(row: Row, cells: list[FoundCell]) -> tuple[Change, dict[str, Change]]:
    """Return the row's nats per token over the dense model's, draw by draw: mean of domains, and each.

    Errors are over draws, each of which has its own calibration and judging text; of one draw, over
    documents.
    """
    dense = {cell.seed: cell for cell in cells if (cell.method, cell.ratio) == (DENSE, 0.0)}
    draws = [cell.over(dense[cell.seed]) for cell in row.cells]
    if len(draws) == 1:
        return mean_change(draws[0].values()), draws[0]

    def over_draws(values: list[float]) -> Change:
        return Change(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))

    by_domain = {name: over_draws([draw[name].nats_per_token for draw in draws]) for name in draws[0]}
    return over_draws([mean_change(draw.values()).nats_per_token for draw in draws]), by_domain


def verdict(cells: list[FoundCell]) -> str:
    """Name the method with the lowest perplexity at each share, and those that may be as good.

    A method is told apart from another if it is better on every draw and, over at least two draws, by
    more than two standard errors of the paired differences of log perplexity.
    """
    rows, parts = [row for row in rows_of(cells) if row.ratio], []
    for ratio in dict.fromkeys(row.ratio for row in rows):
        best, *others = sorted((row for row in rows if row.ratio == ratio), key=lambda row: row.perplexity)
        named = {row.method: f"{row.method} ({row.perplexity:.2f})" for row in others}
        alike = [named[row.method] for row in others if not _is_better(best, row)]
        part = f"at {ratio:.0%} removed {best.method} has the lowest ({best.perplexity:.2f})"
        if others and not alike:
            part += f", then {named[others[0].method]}"
        elif alike:
            draws = "one draw does" if len(best.cells) == 1 else f"{len(best.cells)} draws do"
            part += f"; {draws} not tell it from {', '.join(alike)}"
        parts.append(part)
    return f"By geometric-mean perplexity over domains, {'; '.join(parts)}."


def _is_better(best: Row, other: Row) -> bool:
    ours, theirs = ({cell.seed: math.log(cell.perplexity) for cell in row.cells} for row in (best, other))
    gains = [theirs[draw] - nats for draw, nats in ours.items() if draw in theirs]
    if len(gains) < 2 or min(gains) <= 0:
        return False
    return statistics.mean(gains) > 2 * statistics.stdev(gains) / math.sqrt(len(gains))


def _about(study: Study, cells: list[FoundCell]) -> list[str]:
    tokens = sorted({sum(cell.num_tokens.values()) for cell in cells if cell.num_tokens})
    length = study.recipe.get("calibration", {}).get("sequence_length", "the model's default")
    tasks, limit = ", ".join(study.evaluation.tasks) or "none", study.evaluation.limit
    return [
        f"model {study.model}; ratios are shares of total parameters, tied weights counted once",
        f"seeds {', '.join(map(str, study.seeds))}: each draws calibration and evaluation text anew",
        f"calibration tokens per run: {', '.join(f'{count:,}' for count in tokens)}, in blocks of {length}",
        f"judged on {study.evaluation.num_blocks} held-out blocks of each of {len(cells[0].nats_per_token)} domains, "
        "from documents that no run calibrates on",
        f"tasks: {tasks}" + (f", the first {limit} questions of each" if limit else ""),
    ]


ACCURACY = "Accuracy by task (acc_norm where the task has it), ± spread over seeds; of one, its error over questions"


def task_table(cells: list[FoundCell]) -> Table:
    """Return accuracies by task, and their mean."""
    tasks, rows = list(cells[0].tasks), []
    for row in rows_of(cells):
        accuracies = (_accuracy(row, [name]) for name in tasks)
        rows.append((row.method, f"{row.ratio:.0%}", _accuracy(row, tasks), *accuracies))
    return Table(ACCURACY, ("method", "asked", "mean", *tasks), rows)


def _accuracy(row: Row, tasks: list[str]) -> str:
    """Return the mean over tasks, with its spread over draws, or of one draw the standard error over questions."""
    if len(row.cells) > 1:
        return row.text(lambda cell: statistics.mean(_score(cell, name)[0] for name in tasks), digits=3)
    scores, errors = zip(*(_score(row.cells[0], name) for name in tasks), strict=True)
    return f"{statistics.mean(scores):.3f} ± {math.hypot(*errors) / len(errors):.3f}"


def _score(cell: FoundCell, task: str) -> tuple[float, float]:
    """Return the task's accuracy and its standard error, not a number where the harness has none."""
    numbers = cell.tasks[task]
    metric = next((metric for metric in TASK_METRICS if metric in numbers), "")
    return numbers.get(metric, math.nan), numbers.get(metric.replace(",", "_stderr,"), math.nan)
