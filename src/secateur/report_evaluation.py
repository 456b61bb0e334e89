"""What a report says of `evaluation.json`: bits per byte, distance to the dense model, benchmark tasks.

In: a `ResultFiles`. Out: sections, which name the command that adds them where the file is not there. Pure.
"""

import shlex
from dataclasses import dataclass
from typing import Any

from secateur.evaluate_differences import PLOTTED_METRICS
from secateur.page import Section, Table
from secateur.plots import Series, Text, dot_plot
from secateur.result_files import Evaluation, Measured, ResultFiles
from secateur.tables import plus_minus


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task. `error`: its standard error, None where the harness gives none."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.error is None else f"{self.value:.3f} ± {self.error:.3f}"


Scores = dict[str, dict[str, Score]]  # task -> metric -> score


def distance(files: ResultFiles) -> Section:
    """Bits per byte, WikiText-2, and KL to the dense model."""
    title, found = "Distance to the dense model", files.evaluation
    command = f"secateur evaluate DIR --against {shlex.quote(files.summary.model)}"
    if found is None:
        text = f"{command} adds bits per byte and the divergence from the dense model's predictions."
        return Section("distance", title, (text,))
    text = [
        "KL of the pruned model's next-token distributions from the dense model's, over the whole vocabulary. Same "
        "first: how often both models put the same token first."
    ]
    if not found.kl:
        text = [f"Measured without the dense model; {command} adds the divergence from it."]
    text += found.notes
    tables = [_quality_table(found)]
    if found.kl:
        rows = [
            (domain, f"{kl.mean:.3f}{plus_minus(kl.standard_error)}", f"{kl.p95:.2f}", f"{kl.top1_agreement:.1%}")
            for domain, kl in found.kl.items()
        ]
        tables.append(Table("KL in nats per token", ("domain", "mean", "95% of tokens below", "same first"), rows))
    return Section("distance", title, text, tables=tables)


def tasks(files: ResultFiles) -> Section:
    """Scores of benchmark tasks, with standard errors."""
    title, models = "Quality by task", _models(files.evaluation)
    scores = {name: _scores(measured) for name, measured in models.items()}
    if not any(scores.values()):
        return Section("tasks", title, ("secateur evaluate DIR --tasks NAMES adds benchmark tasks of lm-eval.",))
    rows = [
        (f"{task}, {metric}", *(str(by_task[task][metric]) for by_task in scores.values()))
        for task, metrics in scores["pruned"].items()
        for metric in metrics
    ]
    table = Table("Score ± standard error", ("task", *models), rows)
    plotted = {
        task: metric for task in scores["pruned"] for metric in PLOTTED_METRICS if metric in scores["pruned"][task]
    }
    text = (
        "Measured by lm-evaluation-harness; higher is better, but for perplexity. Bars and ± are one standard error.",
    )
    if not plotted:
        return Section("tasks", title, text, tables=(table,))
    series = []
    for name, by_task in scores.items():
        shown = [by_task[task][metric] for task, metric in plotted.items()]
        series.append(Series(name, name, [s.value for s in shown], [(s.error or 0.0, s.error or 0.0) for s in shown]))
    described = Text("tasks-plot", "Scores by task", f"{text[0]} The table has the numbers.")
    return Section("tasks", title, text, (dot_plot(described, list(plotted), series, "share right"),), (table,))


def _models(found: Evaluation | None) -> dict[str, Measured]:
    if found is None:
        return {}
    return {"dense": found.dense, "pruned": found.pruned} if found.dense else {"pruned": found.pruned}


def _quality_table(found: Evaluation) -> Table:
    models = _models(found)
    texts: dict[str, list[str]] = {}
    for measured in models.values():
        named = {**measured.domains, **({"WikiText-2": measured.wikitext2} if measured.wikitext2 else {})}
        for text, quality in named.items():
            texts.setdefault(text, []).append(f"{quality.bits_per_byte:.3f} ({quality.perplexity:.2f})")
    rows = [(text, *cells) for text, cells in texts.items()]
    return Table("Bits per byte (perplexity per token)", ("", *models), rows)


def _scores(measured: Measured) -> Scores:
    """Read the harness's results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    results = measured.tasks.results if measured.tasks else {}
    return {task: _metrics(result) for task, result in results.items()}


def _metrics(result: dict[str, Any]) -> dict[str, Score]:
    metrics = {}
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = result.get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else f"{metric} ({kind})"
        metrics[label] = Score(value, error if isinstance(error, int | float) else None)
    return metrics
