"""A report's sections on the result: quality, polish, speed, evaluation, recovery; dense and pruned.

Also what notebooks show of records, see `page.Shown`.
"""

import dataclasses
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from secateur.facts import Trained, mean_kl, won_back
from secateur.report import rows_measured
from secateur.report.measured import (
    PLOTTED_METRICS,
    BenchResult,
    Change,
    Evaluation,
    Quality,
    Ratio,
    RecoveryRecord,
    Scores,
)
from secateur.report.page import KeyFigure, Section, Table, View, view
from secateur.report.plots import Series, Text, dot_plot, line_plot
from secateur.report.records import Inspection, ResultFiles, Summary, TrainingStep
from secateur.report.rows import (
    SIDES,
    caveats,
    faster,
    figure_rows,
    inspected_groups,
    loss_changes,
    loss_rows,
    quality_and_size,
    verdict,
)
from secateur.report.vocabulary import of_dense

SpeedFigures = tuple[str, float, float, Ratio]
CURVE_POINTS = 60
OVER_BLOCKS = "one standard error over the same blocks"
AS_IN_TABLE = f"As in the table; bars are {OVER_BLOCKS}."


def quality(files: ResultFiles) -> Section | None:
    """Loss by domain, before and after, and the difference with its standard error."""
    summary, changes = files.summary, loss_changes(files.summary)
    if not changes:
        return None
    worst = max(changes, key=lambda domain: changes[domain].nats_per_token)
    unit = f"nats per token{of_dense(summary)}"
    about = f"Bars and ± are {OVER_BLOCKS} of {summary.calibration.sequence_length} tokens."
    if not any(each.standard_error for each in changes.values()):
        about = "There is one block alone, or none on record, so differences have no error."
    text = (
        f"Held-out text of the calibration's own domains, in {unit}; lower is better. Worst change: "
        f"{changes[worst].text()} on {worst}. {about}",
    )
    plot = _changes_plot("quality-plot", f"{text[0]} The table has every number.", changes, unit)
    table = Table(f"{unit.capitalize()} (perplexity)", ("domain", *SIDES), list(loss_rows(summary)))
    return Section("quality", "Quality by domain", text, (plot,), (table,))


def _changes_plot(name: str, about: str, changes: Mapping[str, Change], unit: str) -> str:
    """Return pruned minus dense by domain with standard errors, beside the dense model's line."""
    errors = [(each.standard_error, each.standard_error) for each in changes.values()]
    series = [Series("pruned", "pruned", [each.nats_per_token for each in changes.values()], errors)]
    described = Text(name, "Held-out loss by domain, pruned minus dense", about)
    return dot_plot(described, list(changes), series, f"{unit}, minus dense", reference=0.0)


def _losses_plot(name: str, losses: Mapping[str, Quality]) -> str:
    """Return one model's nats per token by domain with standard errors."""
    errors = [(each.standard_error, each.standard_error) for each in losses.values()]
    series = [Series("model", "pruned", [each.nats_per_token for each in losses.values()], errors)]
    return dot_plot(Text(name, "Loss by domain", AS_IN_TABLE), list(losses), series, "nats per token")


def speed_figures(files: ResultFiles) -> list[SpeedFigures]:
    """Return (phase, dense and pruned tokens/s, speed-up), if measured by `secateur bench`."""
    bench = files.bench
    if bench is None or bench.dense is None:
        return []
    before, after = bench.dense.speed, bench.pruned.speed
    rates = {
        "prefill": (before.prefill_tokens_per_second, after.prefill_tokens_per_second),
        "decode": (before.decode_tokens_per_second, after.decode_tokens_per_second),
    }
    return [(phase, *rates[phase], up.measured) for phase, up in bench.speed_ups.items()]


def speed(files: ResultFiles) -> Section:
    """Size, and if `secateur bench` has measured them, speed and memory beside the ideal."""
    bench, sizes = files.bench, Table("Parameters, bytes, widths", ("", *SIDES), list(figure_rows(files.summary)))
    if bench is None or bench.dense is None:
        return Section("speed", "Size", tables=(sizes,))
    tables, text = (*rows_measured.bench_tables(bench), sizes), (_how_timed(bench), *bench.notes)
    return Section("speed", "Speed and memory", text, (_speed_up_plot(bench, "speed-plot"),), tables)


def _how_timed(bench: BenchResult) -> str:
    work = bench.workload
    return (
        f"secateur bench: {bench.settings.engine} on {bench.settings.device}, batch {work.batch}, {work.prompt_tokens} "
        f"prompt and {work.new_tokens} new tokens, {work.repeats} repeats in turns. Bars reach from the slowest to the "
        "fastest repeat. Ideal: operations per prompt token and bytes read per decoded token, dense over pruned."
    )


def _speed_up_plot(bench: BenchResult, name: str) -> str:
    ups = bench.speed_ups
    measured = [up.measured for up in ups.values()]
    reach = [(each.median - each.lowest, each.highest - each.median) for each in measured]
    series = [
        Series("measured", "pruned", [each.median for each in measured], reach),
        Series("ideal", "ideal", [up.ideal for up in ups.values()]),
    ]
    described = Text(name, "Speed-up, measured and ideal", "The table has the numbers.")
    return dot_plot(described, list(ups), series, "times the dense speed", reference=1.0)


def distance(files: ResultFiles) -> Section | None:
    """Nats per token, bits per byte, WikiText-2, and KL to the dense model."""
    found = files.evaluation
    if found is None or not (tables := [table for table in rows_measured.text_tables(found) if table.rows]):
        return None
    text, title = (f"Measured by secateur evaluate. ± of a difference: {OVER_BLOCKS}.",), "Distance to the dense model"
    if found.kl:
        same = "how often both models put the same token first"
        text = (*text, f"KL in nats per token, over all tokens that both models have; {same}.")
    else:
        text, title = ("Measured without the dense model.",), "Quality on evaluated text"
    return Section("distance", title, (*text, *found.notes), tables=tables)


def samples(files: ResultFiles) -> Section | None:
    """What both models write after the same start."""
    found = () if files.evaluation is None else files.evaluation.samples
    if not found:
        return None
    tables = [
        Table(
            each.domain, (), [(side, _printable(getattr(each, side))) for side in ("start", *SIDES[:2])], numbers=False
        )
        for each in found
    ]
    text = "After the same start of a text, both models write on, greedily: always the likeliest token."
    return Section("samples", "A sample of text", (text,), tables=tables)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text).strip("\n")


def missing(files: ResultFiles) -> Section | None:
    """The commands that add what was not measured."""
    found, dense, measure = files.evaluation, shlex.quote(files.summary.model), []
    if found is None or not found.kl:
        what = "bits per byte, the divergence from the dense model's predictions, and a sample of text"
        measure.append(f"secateur evaluate DIR --against {dense}  # {what}")
    if found is None or not found.pruned.scores:
        measure.append("secateur evaluate DIR --tasks NAMES  # benchmark tasks of lm-eval")
    if files.bench is None or files.bench.dense is None:
        measure.append(f"secateur bench DIR --against {dense}  # speed beside the ideal, peak memory, cache size")
    unmeasured = (
        () if files.summary.dense_losses else ("Held-out loss was not measured: the recipe says evaluate: false.",)
    )
    if not (measure or unmeasured):
        return None
    again = ["secateur report DIR  # then this page again"] if measure else []
    return Section("missing", "Not measured", unmeasured, code="\n".join([*measure, *again]))


def tasks(files: ResultFiles) -> Section | None:
    """Scores of benchmark tasks, with standard errors."""
    title, found = "Quality by task", files.evaluation
    if found is None or not found.pruned.scores:
        return None
    text = "Measured by lm-evaluation-harness; higher is better, but for perplexity. Bars and ± are one standard error."
    models = {name: (name, measured.scores) for name, measured in found.models.items()}
    return Section("tasks", title, (text,), task_plots("tasks-plot", models), (rows_measured.task_table(found),))


def task_plots(name: str, models: dict[str, tuple[str, Scores]]) -> list[str]:
    """Return a plot of one metric per task, or none if no task has one.

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


def recovery(files: ResultFiles) -> Section | None:
    """What training after pruning won back."""
    record = files.recovery
    if record is None:
        return None
    text = (
        f"{rows_measured.recovery_headline(record)}. Teacher: {record.teacher}. Both models are judged on "
        f"{record.num_held_out_tokens:,} held-out tokens that nothing was trained on; a training after which their "
        "loss is not lower is undone. Figures elsewhere on this page are of the model before recovery, unless measured "
        "later.",
    )
    costs = Table("Cost", (), list(rows_measured.cost_rows(record)), numbers=False)
    section = _training("recovery", "Recovery", text, record, files.recovery_steps)
    plots, tables, found = list(section.plots), list(section.tables), record.tasks
    if found is not None:
        models = {"dense": ("dense", found.dense), "pruned": ("before", found.pruned)}
        plots += task_plots("recovery-tasks-plot", models | {"recovered": ("pruned", found.recovered)})
        tables.append(rows_measured.recovery_task_table(record))
    return replace(section, plots=tuple(plots), tables=(*tables, costs))


def polish(files: ResultFiles) -> Section | None:
    """What the training at the end of the prune won back."""
    record = files.summary.polish
    if record is None:
        return None
    training = record.training
    text = (
        f"{record.headline}, in {training.seconds:,.0f} s and {training.flops:.2e} floating-point operations. The last "
        f"step of the prune trains what is left to predict as the dense model does. {record.num_held_out_tokens:,} "
        "held-out tokens judge it; where their loss, half KL and half cross-entropy by default, does not fall, the "
        "training is undone.",
    )
    return _training("polish", "Polish", text, record, files.polish_steps, "polished")


def _training(
    key: str,
    title: str,
    text: tuple[str, ...],
    record: Trained,
    steps: Sequence[TrainingStep],
    name: str = "recovered",
) -> Section:
    table = rows_measured.verdict_table(record, "Held-out nats per token, KL to the dense model", name)
    plots = [_kl_plot(record, f"{key}-plot")]
    if steps:
        plots.append(_curve(f"{key}-loss-plot", steps, mean_kl(record.before)))
    return Section(key, title, text, tuple(plots), (table, _steps(steps)))


def _kl_plot(record: Trained, name: str) -> str:
    described = Text(name, "Held-out KL by domain", "KL to the dense model, as in the table.")
    series = [
        Series(
            label,
            look,
            [each.kl for each in verdicts.values()],
            [(e.standard_error, e.standard_error) for e in verdicts.values()],
        )
        for label, look, verdicts in (("before", "before", record.before), ("after", "pruned", record.after))
    ]
    return dot_plot(described, list(record.before), series, "KL to the dense model, nats per token")


def recovery_figures(files: ResultFiles) -> list[KeyFigure]:
    """Return the share of the loss that was won back; nothing if nothing was lost."""
    record = files.recovery
    share = math.nan if record is None else won_back(record.dense, record.before, record.after)
    if record is None or math.isnan(share):
        return []
    tokens = f"by {record.training.num_tokens:,} tokens of training"
    return [KeyFigure("lost log-perplexity won back", tokens, f"{share:.1%}")]


def _curve(name: str, steps: Sequence[TrainingStep], before: float) -> str:
    means = _thinned(steps)
    about = f"Means of neighbouring steps over trained tokens. The held-out KL before was {before:.4f}."
    described = Text(name, "Training loss", about)
    series = [Series("loss", "pruned", [mean.loss for mean in means])]
    return line_plot(described, [mean.tokens for mean in means], series, "trained tokens", "loss, nats")


def _steps(steps: Sequence[TrainingStep]) -> Table:
    rows = [(f"{mean.tokens:,} tokens", f"{mean.loss:.4f}") for mean in _thinned(steps)]
    return Table("Training loss, means of neighbouring steps", ("", "loss"), rows, folded=True)


def _thinned(steps: Sequence[TrainingStep]) -> list[TrainingStep]:
    """Return at most CURVE_POINTS means of neighbours, each at its last step's tokens."""
    size = -(-len(steps) // CURVE_POINTS)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)] if steps else []
    return [TrainingStep(part[-1].step, part[-1].tokens, sum(s.loss for s in part) / len(part)) for part in parts]


@view.register
def _(summary: Summary) -> View:
    rows = [
        {
            "domain": domain,
            "dense_nats_per_token": dense.nats_per_token,
            "dense_standard_error": dense.standard_error,
            "pruned_nats_per_token": summary.pruned_losses[domain].nats_per_token,
            "pruned_standard_error": summary.pruned_losses[domain].standard_error,
            "num_tokens": dense.num_tokens,
        }
        for domain, dense in summary.dense_losses.items()
    ]
    changes, unit = loss_changes(summary), f"nats per token{of_dense(summary)}"
    picture = partial(_changes_plot, about=AS_IN_TABLE, changes=changes, unit=unit) if changes else None
    title = f"{summary.model}: {verdict(summary)}"
    return View(title, [quality_and_size(summary)], rows, picture, caveats(summary))


@view.register
def _(inspection: Inspection) -> View:
    def picture(name: str) -> str:
        before = [group.num_params / 1e6 for group in inspection.groups]
        after = [each * group.num_keep / group.num_units for each, group in zip(before, inspection.groups, strict=True)]
        described = Text(name, "Parameters of what can go", "Before and after the run, as in the table.")
        series = [Series("before", "dense", before), Series("after", "pruned", after)]
        return dot_plot(described, [group.name for group in inspection.groups], series, "million parameters")

    table = inspected_groups(inspection)
    rows = [dataclasses.asdict(group) for group in inspection.groups]
    share = f"a run would remove {inspection.remove_reached:.1%} of all parameters"
    return View(f"{table.caption}; {share}", [table], rows, picture if rows else None, inspection.warnings)


@view.register
def _(evaluation: Evaluation) -> View:
    rows = []
    for name, measured in evaluation.models.items():
        named = measured.domains | ({"WikiText-2": measured.wikitext2} if measured.wikitext2 is not None else {})
        for on, found in named.items():
            rows.append((name, on, "nats_per_token", found.nats_per_token, found.standard_error))
            rows.append((name, on, "bits_per_byte", found.bits_per_byte, None))
        scores = ((task, metric, score) for task, of in measured.scores.items() for metric, score in of.items())
        rows += [(name, task, metric, score.value, score.error) for task, metric, score in scores]
    rows += [("pruned", on, "kl", kl.mean, kl.standard_error) for on, kl in (evaluation.kl or {}).items()]
    columns = ("model", "on", "measure", "value", "standard_error")
    by_name = {name: measured.domains for name, measured in evaluation.models.items() if measured.domains}
    means = [math.exp(statistics.mean(each.nats_per_token for each in of.values())) for of in by_name.values()]
    title = evaluation.model + ("" if evaluation.against is None else f" against {evaluation.against}")
    if means:
        title += f": perplexity {' to '.join(f'{mean:.2f}' for mean in means)}"
    picture, changes = None, evaluation.differences.domains if evaluation.differences else {}
    if changes:
        picture = partial(_changes_plot, about=AS_IN_TABLE, changes=changes, unit="nats per token")
    elif evaluation.pruned.domains:
        picture = partial(_losses_plot, losses=evaluation.pruned.domains)
    tables = [*rows_measured.text_tables(evaluation), rows_measured.task_table(evaluation)]
    return View(title, tables, [dict(zip(columns, row, strict=True)) for row in rows], picture, evaluation.notes)


@view.register
def _(bench: BenchResult) -> View:
    rows = [
        {"model": name, "num_params": each.size.num_params, "num_bytes": each.size.num_bytes}
        | {"peak_bytes": each.peak_bytes}
        | {key: value for key, value in dataclasses.asdict(each.speed).items() if not isinstance(value, tuple)}
        for name, each in bench.models.items()
    ]
    ups = [faster(phase, up.measured) for phase, up in bench.speed_ups.items()]
    speed = bench.pruned.speed
    alone = f"{speed.prefill_tokens_per_second:,.1f} tokens/s prefill, {speed.decode_tokens_per_second:,.1f} decode"
    picture = partial(_speed_up_plot, bench) if ups else None
    title = f"{bench.pruned.model}: {' and '.join(ups) or alone}"
    return View(title, rows_measured.bench_tables(bench), rows, picture, bench.notes)


@view.register
def _(record: RecoveryRecord) -> View:
    models = {"dense": record.dense, "pruned": record.before, "recovered": record.after}
    rows = [
        {"model": name, "domain": domain, **dataclasses.asdict(verdict)}
        for name, verdicts in models.items()
        for domain, verdict in verdicts.items()
    ]
    tables = [rows_measured.verdict_table(record), rows_measured.recovery_task_table(record)]
    return View(rows_measured.recovery_headline(record), tables, rows, partial(_kl_plot, record), record.notes)
