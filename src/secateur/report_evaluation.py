"""What a report says of `evaluation.json`: bits per byte, distance to the dense model, benchmark tasks.

In: a `ResultFiles`. Out: sections, which name the command that adds them where the file is not there. Pure; the tables
are those of the terminal.
"""

import shlex

from secateur.evaluate_table import task_table, text_tables
from secateur.measured import PLOTTED_METRICS, Scores
from secateur.page import Section
from secateur.plots import Series, Text, dot_plot
from secateur.result_files import ResultFiles


def distance(files: ResultFiles) -> Section:
    """Nats per token, bits per byte, WikiText-2, and KL to the dense model."""
    title, found = "Distance to the dense model", files.evaluation
    command = f"secateur evaluate DIR --against {shlex.quote(files.summary.model)}"
    if found is None:
        text = f"{command} adds bits per byte and the divergence from the dense model's predictions."
        return Section("distance", title, (text,))
    text = "KL in nats per token, over the whole vocabulary; how often both models put the same token first."
    if not found.kl:
        text = f"Measured without the dense model; {command} adds the divergence from it."
    tables = [table for table in text_tables(found) if table.rows]
    return Section("distance", title, (text, *found.notes), tables=tables)


def tasks(files: ResultFiles) -> Section:
    """Scores of benchmark tasks, with standard errors."""
    title, found = "Quality by task", files.evaluation
    if found is None or not found.pruned.scores:
        return Section("tasks", title, ("secateur evaluate DIR --tasks NAMES adds benchmark tasks of lm-eval.",))
    text = "Measured by lm-evaluation-harness; higher is better, but for perplexity. Bars and ± are one standard error."
    models = {name: (name, measured.scores) for name, measured in found.models.items()}
    return Section("tasks", title, (text,), task_plots("tasks-plot", models), (task_table(found),))


def task_plots(name: str, models: dict[str, tuple[str, Scores]]) -> list[str]:
    """Return a plot of one metric of every task that has one to plot; no plot if none has.

    `models`: by label, the look of the model's marks and its scores.
    """
    *_, last = (scores for _, scores in models.values())
    plotted = {task: metric for task, of in last.items() for metric in PLOTTED_METRICS if metric in of}
    if not plotted:
        return []
    series = []
    for label, (look, scores) in models.items():
        shown = [scores[task][metric] for task, metric in plotted.items()]
        errors = [(score.error or 0.0, score.error or 0.0) for score in shown]
        series.append(Series(label, look, [score.value for score in shown], errors))
    described = Text(name, "Scores by task", "Bars are one standard error. The table has the numbers.")
    return [dot_plot(described, list(plotted), series, "share right")]
