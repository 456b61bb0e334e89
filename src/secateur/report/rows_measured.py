"""Rows of what was measured on finished models: evaluation, speed, recovery."""

import math
from collections.abc import Callable, Iterator

from secateur.facts import Trained, Verdict, mean_kl, mean_nats
from secateur.log import human_bytes
from secateur.report.measured import (
    BenchResult,
    Change,
    Evaluation,
    ModelFigures,
    Quality,
    RecoveryRecord,
    Spread,
    change,
    plus_minus,
)
from secateur.report.page import Table
from secateur.report.rows import OTHER_TEXT, Tables, answer_rows, code, escaped, lost_cell, markdown, terminal

Row = tuple[str, ...]


def evaluation_table(evaluation: Evaluation) -> Tables:
    """Return text, KL and tasks, for dense, pruned and difference, or for one model."""
    notes = [(f"note: {note}",) for note in (*_legend(evaluation), *evaluation.notes)]
    return terminal([*text_tables(evaluation), task_table(evaluation)], notes)


def text_tables(evaluation: Evaluation) -> list[Table]:
    """Return nats per token, bits per byte and KL by domain."""
    columns = (*_models(evaluation), *(["difference"] if evaluation.differences else []))
    of_kl = ("domain", "mean", "same token first")
    answers = list(answer_rows(evaluation.own_answers))
    return [
        Table("the dense model's own answers", ("", "dense", "pruned", "difference"), answers),
        Table("nats/token (perplexity)", ("domain", *columns), list(_nats_rows(evaluation))),
        Table("bits/byte", ("domain", *columns), list(_bits_rows(evaluation))),
        Table("KL(dense || pruned), nats/token", of_kl, list(_kl_rows(evaluation))),
    ]


def task_table(evaluation: Evaluation) -> Table:
    """Return the scores by task and metric, and their differences if measured."""
    changes = evaluation.differences.tasks if evaluation.differences else None
    scores = [measured.scores for measured in evaluation.models.values()]
    rows = []
    for task, by_metric in scores[-1].items():
        for metric in by_metric:
            cells = [of[task][metric].text() for of in scores]
            if changes is not None:
                cells.append(changes[task][metric].text("+"))
            rows.append((task_label(task, metric), *cells))
    columns = (*_models(evaluation), *(["difference"] if changes is not None else []))
    return Table("score ± standard error", ("task", *columns), rows)


def task_label(task: str, metric: str) -> str:
    """Return the label of a row of scores; it names the harness's filter, if any."""
    return f"{task}, {metric.removesuffix(',none')}"


def _models(evaluation: Evaluation) -> list[str]:
    return list(evaluation.models) if evaluation.dense else ["model"]


def _nats_rows(evaluation: Evaluation) -> Iterator[Row]:
    models, changes = list(evaluation.models.values()), evaluation.differences

    def row(label: str, parts: list[Quality], change: Change | None) -> Row:
        cells = [f"{part.nats_per_token:.3f} ({part.perplexity:.2f})" for part in parts]
        if change is not None:
            cells.append(change.text())
        return label, *cells

    yield row(OTHER_TEXT, [each.other_text for each in models], changes and changes.other_text)
    for domain in evaluation.pruned.domains:
        yield row(domain, [each.domains[domain] for each in models], changes.domains[domain] if changes else None)


def _bits_rows(evaluation: Evaluation) -> Iterator[Row]:
    for domain in evaluation.pruned.domains:
        bits = [each.domains[domain].bits_per_byte for each in evaluation.models.values()]
        change = [f"{bits[1] - bits[0]:+.4f}"] if len(bits) == 2 else []
        yield domain, *(f"{value:.4f}" for value in bits), *change


def _kl_rows(evaluation: Evaluation) -> Iterator[Row]:
    for domain, kl in (evaluation.kl or {}).items():
        yield domain, _kl_cell(kl), f"{kl.top1_agreement:.1%}"


def _legend(evaluation: Evaluation) -> Iterator[str]:
    pruned = evaluation.pruned
    if pruned.domains:
        num_tokens = sum(part.num_tokens for part in pruned.domains.values())
        yield f"domains: {num_tokens:,} predicted tokens; KL in nats per token, over all tokens that both models have."
    if pruned.tasks is not None:
        sources = sorted(set(pruned.tasks.sources.values())) or ["the hub"]
        yield f"tasks: lm-evaluation-harness {pruned.tasks.lm_eval_version}, rows from {', '.join(sources)}."
    yield "± is one standard error, of a difference over the same documents or questions."


def bench_table(result: BenchResult) -> Tables:
    """Return each model's figures, the speed-up and the ideal, and how the run was made."""
    return terminal(bench_tables(result), _notes(result), warnings=result.notes)


def bench_tables(result: BenchResult) -> list[Table]:
    """Return each model's figures, and the speed-up beside the ideal, if there are two models."""
    work = result.workload
    caption = f"batch {work.batch}, {work.prompt_tokens} prompt tokens, {work.new_tokens} new tokens"
    models = result.models
    figures = [(label, *(cell(each) for each in models.values())) for label, cell in _ROWS.items()]
    speed_ups = []
    for label, speed_up in result.speed_ups.items():
        measured, ideal = speed_up.measured, speed_up.ideal
        share = f"{measured.median / ideal:.0%}" if measured.is_told else ""
        speed_ups.append((label, measured.ratio_text(), f"{ideal:.2f}x", share))
    return [
        Table(caption, ("median (lowest to highest)", *models), figures),
        Table("speed-up, median and range of the repeats' ratios", ("", "measured", "ideal", "of ideal"), speed_ups),
    ]


def _spread(figure: Spread, digits: int = 1) -> str:
    digits = 0 if figure.median >= 100 else digits  # or two models' numbers are wider than 80 columns
    low, middle, high = (f"{value:,.{digits}f}" for value in (figure.lowest, figure.median, figure.highest))
    return f"{middle} ({low} to {high})"


_ROWS: dict[str, Callable[[ModelFigures], str]] = {
    "prefill, tokens/s": lambda each: _spread(each.speed.prefill),
    "decode, tokens/s": lambda each: _spread(each.speed.decode),
    "first token, s": lambda each: _spread(each.speed.first_token_seconds, 3),
    "parameters": lambda each: f"{each.size.num_params:,}",
    "weights": lambda each: human_bytes(each.size.num_bytes),
    "cache per token": lambda each: human_bytes(each.costs.kv_cache_bytes_per_token),
    "read per new token": lambda each: human_bytes(each.costs.decode_bytes_per_token),
    "GFLOP per prompt token": lambda each: f"{each.costs.prefill_flops_per_token / 1e9:.4g}",
}


def _notes(result: BenchResult) -> Iterator[tuple[str, str]]:
    for name, figures in result.models.items():
        yield name, f"{figures.model}, {figures.dtype}"
    yield "run", _run(result)
    if result.speed_ups:
        yield "speed-up", "median of the ratios within each repeat, in which the models take turns"
        yield "ideal", "decode: ratio of bytes read per new token; prefill: ratio of operations per prompt token"


def _run(result: BenchResult) -> str:
    many = "s" if result.num_threads > 1 else ""
    threads = f", {result.num_threads} thread{many}" if result.device == "cpu" else ""
    return f"transformers on {result.device}{threads}"


def recovery_table(record: RecoveryRecord) -> Tables:
    """Return what `secateur recover` ends with."""
    tables = [judged_table(record), verdict_table(record, GUARDED)]
    return terminal(tables, [("recovery", record.headline), *cost_rows(record)])


GUARDED = "On the text that guards the training"


def judged_table(record: RecoveryRecord) -> Table:
    """Return what judges the models: nats per token of the dense one, and how many more the others have."""
    if not record.judged:
        return Table("", (), [])
    dense, *others = record.judged.values()
    rows: list[Row] = []
    if answers := [each.answers for each in others if each.answers is not None]:
        rows.append(("own answers", f"{answers[0].dense_nats:.3f}", *(lost_cell(each) for each in answers)))
    rows.append(
        (OTHER_TEXT, f"{dense.other.nats_per_token:.3f}", *(change(dense.other, s.other).text() for s in others))
    )
    for name, loss in dense.domains.items():
        rows.append((name, f"{loss.nats_per_token:.3f}", *(change(loss, s.domains[name]).text() for s in others)))
    return Table(f"{record.pruned}: nats/token on what judges", ("", *record.judged), rows)


def verdict_table(record: Trained, caption: str = "", name: str = "recovered") -> Table:
    """Return nats per token and KL of every model, by domain, and their means."""
    name += "" if record.training.held else " (undone)"
    columns = {"dense": record.dense, "pruned": record.before, name: record.training.after}
    rows = [
        (domain, *(f"{of[domain].nats_per_token:.3f}, {_kl_cell(of[domain])}" for of in columns.values()))
        for domain in record.dense
    ]
    rows.append(("mean", *(f"{mean_nats(of):.3f}, {mean_kl(of):.3f}" for of in columns.values())))
    rows.append(("geometric-mean perplexity", *(f"{math.exp(mean_nats(of)):.2f}" for of in columns.values())))
    return Table(caption, ("nats/token, KL to dense", *columns), rows)


def _kl_cell(verdict: Verdict) -> str:
    return f"{verdict.kl:.3f}{plus_minus(verdict.standard_error)}"


def cost_rows(record: RecoveryRecord) -> Iterator[tuple[str, str]]:
    """Yield what the recovery took (tokens, seconds, memory), reload and notes."""
    ours = record.training
    rate = ours.num_tokens / ours.seconds if ours.seconds else 0.0
    took = f"{ours.seconds:,.1f} s, {rate:,.0f} tokens/s"
    yield "training", f"{ours.num_tokens:,} tokens, {took}"
    yield "guarded by", f"{record.num_held_out_tokens:,} held-out tokens, never trained on"
    yield "peak memory", f"{human_bytes(record.peak_bytes)} resident, interpreter included"
    yield "reload", f"in a fresh process: largest logit difference {record.reload_max_abs_difference:g}"
    for note in record.notes:
        yield "note", note


def recovery_card(record: RecoveryRecord) -> str:
    """Return the model card's section on the recovery, in Markdown."""
    about = f"{record.pruned}: {record.headline}. Figures elsewhere on this card are of the model before recovery."
    judged = [*markdown(judged_table(record)), "", f"{GUARDED}:", ""] if record.judged else []
    lines = ["## Recovery", "", escaped(about), "", *judged, *markdown(verdict_table(record)), ""]
    lines += [f"- teacher: {escaped(record.teacher)}"]
    lines += [f"- command: {code(record.command)}"] if record.command else []
    lines += [f"- {label}: {escaped(text)}" for label, text in cost_rows(record)]
    return "\n".join(lines) + "\n"
