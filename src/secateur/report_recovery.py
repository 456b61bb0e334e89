"""What a report says of a recovery: the loss curve, quality by domain before and after, what it cost.

In: a `ResultFiles` whose directory holds a recovery. Out: a section. Pure; the rows are those of the terminal's table.
"""

import math
from collections.abc import Sequence

from secateur.evaluate_differences import PLOTTED_METRICS
from secateur.page import KeyFigure, Section, Table
from secateur.plots import Series, Text, curve_plot, dot_plot
from secateur.recover_judge import mean_kl, won_back
from secateur.recover_record import Score, TaskScores
from secateur.recover_table import TASK_COLUMNS, cost_rows, headline, models, task_rows, verdict_rows
from secateur.result_files import ResultFiles, TrainingStep

CURVE_POINTS = 60


def recovery(files: ResultFiles) -> Section:
    """What training after the cut won back."""
    record = files.recovery
    assert record is not None
    columns = models(record)
    text = (
        f"{headline(record)}. Teacher: {record.teacher}. Both models are judged on {record.num_held_out_tokens:,} "
        "held-out tokens that nothing was trained on; a training after which the mean KL to the dense model is not "
        "lower is undone. Figures elsewhere on this page are of the model before recovery, unless measured later.",
    )
    table = Table(
        "Held-out nats per token, KL to the dense model",
        ("", *columns),
        [(label, *cells) for label, cells in verdict_rows(record)],
    )
    costs = Table("Cost", (), list(cost_rows(record)), numbers=False)
    described = Text("recovery-plot", "Held-out KL by domain", "KL to the dense model, as in the table.")
    series = [
        Series("before", "before", [verdict.kl for verdict in record.before.values()]),
        Series("after", "pruned", [verdict.kl for verdict in record.after.values()]),
    ]
    plots = [dot_plot(described, list(record.before), series, "KL to the dense model, nats per token")]
    if files.training:
        plots.append(_curve(files.training, mean_kl(record.before)))
    tables = [table]
    if record.tasks is not None:
        plots += _task_plot(record.tasks)
        rows = [(label, *cells) for label, cells in task_rows(record)]
        tables.append(Table("Score ± standard error; gain: recovered minus pruned", TASK_COLUMNS, rows))
    return Section("recovery", "Recovery", text, tuple(plots), (*tables, costs, _steps(files.training)))


def _task_plot(found: TaskScores) -> list[str]:
    plotted = _plotted_metrics(found.recovered)
    if not plotted:
        return []
    series = []
    for label, look, scores in (
        ("dense", "dense", found.dense),
        ("pruned", "before", found.pruned),
        ("recovered", "pruned", found.recovered),
    ):
        shown = [scores[task][metric] for task, metric in plotted.items()]
        errors = [(score.error or 0.0, score.error or 0.0) for score in shown]
        series.append(Series(label, look, [score.value for score in shown], errors))
    described = Text("recovery-tasks-plot", "Scores by task", "Bars are one standard error. The table has the numbers.")
    return [dot_plot(described, list(plotted), series, "share right")]


def _plotted_metrics(scores: dict[str, dict[str, Score]]) -> dict[str, str]:
    """Return, of each task that has one, the metric that it is plotted by."""
    return {
        task: f"{metric},none"
        for task, metrics in scores.items()
        for metric in PLOTTED_METRICS
        if f"{metric},none" in metrics
    }


def recovery_figures(files: ResultFiles) -> list[KeyFigure]:
    """Return how much of what was lost came back, nothing where nothing was lost or no recovery ran."""
    record = files.recovery
    share = math.nan if record is None else won_back(record.dense, record.before, record.after)
    if record is None or math.isnan(share):
        return []
    return [
        KeyFigure(
            "lost log-perplexity won back", f"by {record.training.num_tokens:,} tokens of training", f"{share:.1%}"
        )
    ]


def _curve(steps: Sequence[TrainingStep], before: float) -> str:
    means = _thinned(steps)
    described = Text(
        "loss-plot",
        "Training loss",
        f"Means of neighbouring steps over trained tokens. The held-out KL before was {before:.4f}.",
    )
    return curve_plot(
        described, [float(m.tokens) for m in means], [m.loss for m in means], "trained tokens", "loss, nats"
    )


def _steps(steps: Sequence[TrainingStep]) -> Table:
    rows = [(f"{mean.tokens:,} tokens", f"{mean.loss:.4f}") for mean in _thinned(steps)]
    return Table("Training loss, means of neighbouring steps", ("", "loss"), rows, folded=True)


def _thinned(steps: Sequence[TrainingStep]) -> list[TrainingStep]:
    """Return at most CURVE_POINTS means of neighbours, each at the tokens of its last step."""
    size = -(-len(steps) // CURVE_POINTS)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)] if steps else []
    return [TrainingStep(part[-1].step, part[-1].tokens, sum(s.loss for s in part) / len(part)) for part in parts]
