"""An evaluation for people: the tables that the terminal and the report share. In: an `Evaluation`. Out: tables."""

from collections.abc import Iterator

from rich.console import Group

from secateur.measured import Change, Evaluation, Quality, TaskScore
from secateur.page import Table
from secateur.tables import plus_minus, terminal

Row = tuple[str, ...]


def evaluation_table(evaluation: Evaluation) -> Group:
    """Return text, KL and tasks; of dense, pruned and difference, or of the one model alone."""
    notes = [(f"note: {note}",) for note in (*_legend(evaluation), *evaluation.notes)]
    return terminal([*text_tables(evaluation), task_table(evaluation)], notes)


def text_tables(evaluation: Evaluation) -> list[Table]:
    """Return nats per token, bits per byte and KL by domain."""
    columns = (*_models(evaluation), *(["difference"] if evaluation.differences else []))
    of_kl = ("domain", "mean", "95% of tokens below", "same token first")
    return [
        Table("nats/token (perplexity)", ("domain", *columns), list(_nats_rows(evaluation))),
        Table("bits/byte", ("domain", *columns), list(_bits_rows(evaluation))),
        Table("KL(dense || pruned), nats/token", of_kl, list(_kl_rows(evaluation))),
    ]


def task_table(evaluation: Evaluation) -> Table:
    """Return the scores by task and metric, with the differences where they were measured."""
    changes = evaluation.differences.tasks if evaluation.differences else None
    scores = [measured.scores for measured in evaluation.models.values()]
    rows = []
    for task, by_metric in scores[-1].items():
        for metric in by_metric:
            cells = [of[task][metric].text() for of in scores]
            if changes is not None:
                change = changes[task][metric]
                cells.append(TaskScore(change.difference, change.standard_error).text("+"))
            rows.append((task_label(task, metric), *cells))
    columns = (*_models(evaluation), *(["difference"] if changes is not None else []))
    return Table("score ± standard error", ("task", *columns), rows)


def task_label(task: str, metric: str) -> str:
    """Return what a row of scores is about; the harness's filter is named where there is one."""
    return f"{task}, {metric.removesuffix(',none')}"


def _models(evaluation: Evaluation) -> list[str]:
    return list(evaluation.models) if evaluation.dense else ["model"]


def _nats_rows(evaluation: Evaluation) -> Iterator[Row]:
    models, changes = list(evaluation.models.values()), evaluation.differences
    for domain in evaluation.pruned.domains:
        yield domain, *_nats([each.domains[domain] for each in models], changes.domains[domain] if changes else None)
    if evaluation.pruned.wikitext2 is not None:
        label = f"WikiText-2, blocks of {evaluation.settings['wikitext2_length']}"
        parts = [each.wikitext2 for each in models if each.wikitext2 is not None]
        yield label, *_nats(parts, changes.wikitext2 if changes else None)


def _nats(parts: list[Quality], change: Change | None) -> Iterator[str]:
    for part in parts:
        yield f"{part.nats_per_token:.3f} ({part.perplexity:.2f})"
    if change is not None:
        yield f"{change.nats_per_token:+.3f}{plus_minus(change.standard_error)}"


def _bits_rows(evaluation: Evaluation) -> Iterator[Row]:
    for domain in evaluation.pruned.domains:
        bits = [each.domains[domain].bits_per_byte for each in evaluation.models.values()]
        change = [f"{bits[1] - bits[0]:+.4f}"] if len(bits) == 2 else []
        yield domain, *(f"{value:.4f}" for value in bits), *change


def _kl_rows(evaluation: Evaluation) -> Iterator[Row]:
    for domain, kl in (evaluation.kl or {}).items():
        yield domain, f"{kl.mean:.3f}{plus_minus(kl.standard_error)}", f"{kl.p95:.2f}", f"{kl.top1_agreement:.1%}"


def _legend(evaluation: Evaluation) -> Iterator[str]:
    pruned = evaluation.pruned
    if pruned.domains:
        num_tokens = sum(part.num_tokens for part in pruned.domains.values())
        yield f"domains: {num_tokens:,} predicted tokens; KL in nats per token, over the whole vocabulary."
    if pruned.tasks is not None:
        sources = sorted(set(pruned.tasks.sources.values())) or ["the hub"]
        yield f"tasks: lm-evaluation-harness {pruned.tasks.lm_eval_version}, rows from {', '.join(sources)}."
    yield "± is one standard error, of a difference over the same blocks or questions."
