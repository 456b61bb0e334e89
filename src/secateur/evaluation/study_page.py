"""What a study found: tables, a page, and a verdict that says no more than its draws carry."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import yaml

from secateur.evaluation.study import DENSE, Comparison, Foreseen, FoundCell, Study
from secateur.files import staged_file
from secateur.report.measured import Change, mean_change
from secateur.report.page import Page, Section, Table, View, render, view
from secateur.report.plots import Curve, Series, Text, dot_plot, shared_picture
from secateur.report.records import PICTURE_FILE
from secateur.report.rows import escaped, human_seconds, markdown

_perplexity: Callable[[FoundCell], float] = attrgetter("perplexity")
_other_perplexity: Callable[[FoundCell], float] = attrgetter("other_perplexity")

TASK_METRICS = ("acc_norm,none", "acc,none")
_TEX = {each: rf"\{each}" for each in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
_TEX |= {"^": r"\textasciicircum{}", "±": r"$\pm$"}
# A plot leaves out methods this many times worse than the best.
MOST_TIMES_BEST = 4


@dataclass(frozen=True, slots=True)
class Row:
    """A method at a share, over seeds."""

    method: str
    ratio: float
    cells: list[FoundCell]


def save_comparison(study: Study, comparison: Comparison, out: Path) -> None:
    """Write the study, results.json, the tables in Markdown, CSV and LaTeX, page and picture to `out`."""
    dumped = yaml.safe_dump(study.model_dump(mode="json", exclude_none=True), sort_keys=False)
    texts, found = {"study.yaml": dumped, "results.json": comparison.to_json()}, list(comparison.cells)
    files = {name: text.encode() for name, text in (texts | _pages(study, found)).items()}
    for name, content in (files | {PICTURE_FILE: _picture(study, found)}).items():
        with staged_file(out / name, overwrite=True) as staged:
            staged.write_bytes(content)


def _pages(study: Study, found: list[FoundCell]) -> dict[str, str]:
    quality = _quality_table(found)
    more = [_over_dense_table(found), *([_others_table(found)] if found[0].others else [])]
    more += [_task_table(found)] if any(cell.tasks for cell in found) else []
    tables, (first, *last) = [quality, *more], _narrow(quality)
    about = _about(study, found)
    text = [f"# {escaped(study.question)}", "", *(f"- {escaped(line)}" for line in about), ""]
    for table in tables:
        text += [f"## {escaped(table.caption)}", "", *markdown(table), ""]
    rows = [row for row in rows_of(found) if row.ratio]
    by_ratio = {row.ratio: [each for each in rows if each.ratio == row.ratio] for row in rows}
    plots = [_plot(*each, _dense(found)) for each in by_ratio.items()]
    hidden = [
        f"Not in the plot, {MOST_TIMES_BEST} times the best perplexity or more: {row.method} at {row.ratio:.0%}."
        for each in by_ratio.values()
        for row in _split(each)[1]
    ]
    sections = [
        Section("quality", "Quality", hidden, plots, tables=(first, *more, *last)),
        Section("how", "How it was measured", text=about),
    ]
    page = Page(study.question, verdict(found), (), (), sections, PICTURE_FILE)
    wide = {"table.csv": csv_text(tables), "table.tex": latex(tables)}
    return {"table.md": "\n".join(text), **wide, "report.html": render(page)}


def _picture(study: Study, found: list[FoundCell]) -> bytes:
    """Return the picture of perplexity over the share of parameters that stays, a curve per method, as PNG."""
    dense = statistics.mean(cell.perplexity for cell in _dense(found).values())
    by_method: dict[str, list[Row]] = {}
    for row in (row for row in rows_of(found) if row.ratio):
        by_method.setdefault(row.method, []).append(row)
    curves = []
    for method, rows in sorted(by_method.items(), key=lambda item: _mean(item[1][-1], _perplexity)):
        points = [(100 * (1 - _mean(row, lambda cell: cell.remove_reached)), _mean(row, _perplexity)) for row in rows]
        curves.append(Curve(f"{method}: {points[-1][1]:,.2f}", [(100.0, dense), *points]))
    return shared_picture(study.question, verdict(found), curves, "% of all parameters that stay", dense)


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


def overview(question: str, found: list[FoundCell]) -> Table:
    """Return what the terminal shows: a row per method and share."""
    rows = []
    for row in rows_of(found):
        reached = f"{_mean(row, lambda cell: cell.remove_reached):.1%}"
        rows.append((row.method, f"{row.ratio:.0%}", reached, f"{_mean(row, _perplexity):.2f}", str(len(row.cells))))
    return Table(question, ("method", "asked", "removed", "perplexity, mean of seeds", "seeds"), rows)


def foreseen_table(question: str, foreseen: Iterable[Foreseen]) -> Table:
    """Return what the terminal shows of a study that has not run yet."""
    rows, total = [], 0.0
    for each in foreseen:
        total += each.seconds * each.num_draws
        rows.append((each.method, f"{each.ratio:.0%}", str(each.num_draws), human_seconds(each.seconds)))
    rows.append(("all, without reading text, judging and tasks", "", "", human_seconds(total)))
    return Table(question, ("method", "asked", "draws", "time of a draw"), rows)


@view.register
def _(comparison: Comparison) -> View:
    found = list(comparison.cells)
    rows = [
        {"method": cell.method, "ratio": cell.ratio, "seed": cell.seed, "remove_reached": cell.remove_reached}
        | {"seconds": cell.seconds, "perplexity": cell.perplexity}
        | {f"nats_per_token {name}": nats for name, nats in (cell.nats_per_token | cell.others).items()}
        | {f"{task} {metric}": score for task, of in cell.tasks.items() for metric, score in of.items()}
        for cell in found
    ]
    by_ratio = [row for row in rows_of(found) if row.ratio]
    first = [row for row in by_ratio if row.ratio == by_ratio[0].ratio]

    def picture(name: str) -> str:
        return _plot(first[0].ratio, first, _dense(found), name)

    return View(verdict(found), [overview("", found)], rows, picture if first else None)


def verdict(found: list[FoundCell]) -> str:
    """Name the method with the lowest perplexity at each share, and those that may be as good.

    A method is told apart from another if it is better on every draw and, over at least two draws,
    by more than two standard errors of the paired differences of log perplexity.
    """
    parts, rows = [], [row for row in rows_of(found) if row.ratio]
    for ratio in dict.fromkeys(row.ratio for row in rows):
        best, *others = sorted((row for row in rows if row.ratio == ratio), key=lambda row: _mean(row, _perplexity))
        alike = [f"{row.method} ({_mean(row, _perplexity):.2f})" for row in others if not _is_better(best, row)]
        part = f"at {ratio:.0%} removed {best.method} has the lowest ({_mean(best, _perplexity):.2f})"
        if others and not alike:
            part += f", then {others[0].method} ({_mean(others[0], _perplexity):.2f})"
        elif alike:
            draws = "one draw does" if len(best.cells) == 1 else f"{len(best.cells)} draws do"
            part += f"; {draws} not tell it from {', '.join(alike)}"
        parts.append(part)
    return f"By geometric-mean perplexity over domains, {'; '.join(parts)}."


def _is_better(best: Row, other: Row) -> bool:
    theirs = {cell.seed: math.log(_perplexity(cell)) for cell in other.cells}
    gains = [theirs[cell.seed] - math.log(_perplexity(cell)) for cell in best.cells if cell.seed in theirs]
    if len(gains) < 2 or min(gains) <= 0:
        return False
    return statistics.mean(gains) > 2 * statistics.stdev(gains) / math.sqrt(len(gains))


def csv_text(tables: Iterable[Table]) -> str:
    """Return the tables as CSV, each under a line with its caption, with an empty line between."""
    lines = io.StringIO()
    write = csv.writer(lines, lineterminator="\n").writerow
    for number, table in enumerate(tables):
        for row in ([[]] if number else []) + [[table.caption], table.header, *table.rows]:
            write(row)
    return lines.getvalue()


def latex(tables: Iterable[Table]) -> str:
    """Return the tables as LaTeX, for the package booktabs."""
    lines: list[str] = []
    for table in tables:
        lines += [r"\begin{table}", rf"\caption{{{_tex(table.caption)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}", r"\toprule"]
        header, *rows = (" & ".join(map(_tex, cells)) + r" \\" for cells in (table.header, *table.rows))
        lines += [header, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


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


def _over_dense_table(found: list[FoundCell]) -> Table:
    domains, rows = list(found[0].nats_per_token), []
    for row in (row for row in rows_of(found) if row.method != DENSE):
        mean, changes = _over_dense(row, _dense(found))
        cells = (each.text() for each in (mean, *(changes[name] for name in domains)))
        rows.append((row.method, f"{row.ratio:.0%}", *cells))
    caption = (
        "Nats per token over the dense model on the same text, ± standard error over draws; of one draw, over blocks"
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
        scores = [_show(row, lambda cell, name=name: _score(cell, name), digits=3) for name in tasks]
        mean = _show(row, lambda cell: statistics.mean(_score(cell, name) for name in tasks), digits=3)
        rows.append((row.method, f"{row.ratio:.0%}", mean, *scores))
    return Table("Accuracy by task (acc_norm where the task has it)", ("method", "asked", "mean", *tasks), rows)


def _score(cell: FoundCell, task: str) -> float:
    numbers = cell.tasks[task]
    return next((numbers[metric] for metric in TASK_METRICS if metric in numbers), math.nan)


def _split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows that a plot shows, and those too far from the best."""
    most = MOST_TIMES_BEST * min(_mean(row, _perplexity) for row in rows)
    shown = [row for row in rows if _mean(row, _perplexity) < most]
    return shown, [row for row in rows if row not in shown]


def _plot(ratio: float, rows: list[Row], dense: dict[int, FoundCell], name: str = "") -> str:
    shown, _ = _split(rows)
    changes = [_over_dense(row, dense)[0] for row in shown]
    errors = [(each.standard_error, each.standard_error) for each in changes]
    series = Series("± standard error, paired", "pruned", [each.nats_per_token for each in changes], errors)
    title = f"Nats per token over the dense model with {ratio:.0%} removed"
    text = Text(name or f"removed-{round(100 * ratio)}", title, f"{len(shown)} methods; the table has the numbers.")
    label = f"nats per token over dense, {ratio:.0%} removed"
    return dot_plot(text, [row.method for row in shown], [series], label, reference=0.0)


def _mean(row: Row, value: Callable[[FoundCell], float]) -> float:
    return statistics.mean(map(value, row.cells))


def _spread(row: Row, value: Callable[[FoundCell], float]) -> float:
    return statistics.stdev(map(value, row.cells)) if len(row.cells) > 1 else 0.0


def _show(row: Row, value: Callable[[FoundCell], float], digits: int = 2) -> str:
    mean = f"{_mean(row, value):,.{digits}f}"
    return f"{mean} ± {_spread(row, value):,.{digits}f}" if len(row.cells) > 1 else mean
