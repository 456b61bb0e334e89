"""What a report says of a recovery: the loss curve, quality by domain before and after, what it cost.

In: a `ResultFiles` whose directory holds a recovery. Out: a section. Pure; the rows are those of the terminal's table.
"""

import math
from collections.abc import Sequence

from secateur.page import KeyFigure, Section, Table
from secateur.plots import Series, Text, dot_plot, line_plot
from secateur.recover_record import mean_kl, won_back
from secateur.recover_table import cost_rows, recovery_headline, recovery_task_table, verdict_table
from secateur.report_evaluation import task_plots
from secateur.result_files import ResultFiles, TrainingStep

CURVE_POINTS = 60


def recovery(files: ResultFiles) -> Section:
    """What training after the cut won back."""
    record = files.recovery
    assert record is not None
    text = (
        f"{recovery_headline(record)}. Teacher: {record.teacher}. Both models are judged on "
        f"{record.num_held_out_tokens:,} held-out tokens that nothing was trained on; a training after which the mean "
        "KL to the dense model is not lower is undone. Figures elsewhere on this page are of the model before "
        "recovery, unless measured later.",
    )
    table = verdict_table(record, "Held-out nats per token, KL to the dense model")
    costs = Table("Cost", (), list(cost_rows(record)), numbers=False)
    described = Text("recovery-plot", "Held-out KL by domain", "KL to the dense model, as in the table.")
    series = [
        Series("before", "before", [verdict.kl for verdict in record.before.values()]),
        Series("after", "pruned", [verdict.kl for verdict in record.after.values()]),
    ]
    plots = [dot_plot(described, list(record.before), series, "KL to the dense model, nats per token")]
    if files.training:
        plots.append(_curve(files.training, mean_kl(record.before)))
    tables, found = [table], record.tasks
    if found is not None:
        models = {
            "dense": ("dense", found.dense),
            "pruned": ("before", found.pruned),
            "recovered": ("pruned", found.recovered),
        }
        plots += task_plots("recovery-tasks-plot", models)
        tables.append(recovery_task_table(record))
    return Section("recovery", "Recovery", text, tuple(plots), (*tables, costs, _steps(files.training)))


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
    series = [Series("loss", "pruned", [mean.loss for mean in means])]
    return line_plot(described, [mean.tokens for mean in means], series, "trained tokens", "loss, nats")


def _steps(steps: Sequence[TrainingStep]) -> Table:
    rows = [(f"{mean.tokens:,} tokens", f"{mean.loss:.4f}") for mean in _thinned(steps)]
    return Table("Training loss, means of neighbouring steps", ("", "loss"), rows, folded=True)


def _thinned(steps: Sequence[TrainingStep]) -> list[TrainingStep]:
    """Return at most CURVE_POINTS means of neighbours, each at the tokens of its last step."""
    size = -(-len(steps) // CURVE_POINTS)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)] if steps else []
    return [TrainingStep(part[-1].step, part[-1].tokens, sum(s.loss for s in part) / len(part)) for part in parts]
