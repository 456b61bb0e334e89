"""A recovery's numbers for people: the terminal's table, the same rows for the model card and the report.

In: a `RecoveryRecord` or a `Cost`. Out: rich renderables, rows of text, Markdown.
"""

import math
from collections.abc import Iterator

from rich.console import Group
from rich.table import Table

from secateur.recover_cost import Cost
from secateur.recover_judge import Verdicts, mean_kl, mean_nats, won_back
from secateur.recover_record import RecoveryRecord, Score
from secateur.tables import human_bytes

TASK_COLUMNS = ("task", "dense", "pruned", "recovered", "gain")


def recovery_table(record: RecoveryRecord) -> Group:
    """Return what `secateur recover` ends with."""
    columns = models(record)
    table = Table(title=headline(record), title_justify="left", title_style="bold")
    table.add_column("nats/token, KL to dense", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for label, cells in verdict_rows(record):
        table.add_row(label, *cells)
    scores = Table()
    for name in TASK_COLUMNS:
        scores.add_column(name, justify="right" if scores.columns else "left", overflow="fold")
    for label, cells in task_rows(record):
        scores.add_row(label, *cells)
    notes = Table.grid(padding=(0, 2))
    for label, text in cost_rows(record):
        notes.add_row(label, text)
    return Group(table, *([scores] if scores.row_count else []), notes)


def headline(record: RecoveryRecord) -> str:
    """Say how much of what was lost came back."""
    if not record.training.held:
        return f"{record.pruned}: held-out KL did not fall, so the weights are those that were given"
    won = won_back(record.dense, record.before, record.after)
    share = "nothing had been lost" if math.isnan(won) else f"{won:.1%} of the lost log-perplexity won back"
    return f"{record.pruned}: {share} with {record.training.num_tokens:,} tokens"


def models(record: RecoveryRecord) -> dict[str, Verdicts]:
    """Return the verdicts of every model that was judged, by what it is called."""
    training = record.training
    name = "recovered" if training.held else "recovered (undone)"
    return {"dense": record.dense, "pruned": record.before, name: training.after}


def verdict_rows(record: RecoveryRecord) -> Iterator[tuple[str, list[str]]]:
    """Yield (label, a cell per model): nats per token and KL, domain by domain and their means."""
    columns = models(record)
    for domain in record.dense:
        yield domain, [f"{of[domain].nats_per_token:.3f}, {of[domain].kl:.3f}" for of in columns.values()]
    yield "mean", [f"{mean_nats(of):.3f}, {mean_kl(of):.3f}" for of in columns.values()]
    yield "geometric-mean perplexity", [f"{math.exp(mean_nats(of)):.2f}" for of in columns.values()]


def task_rows(record: RecoveryRecord) -> Iterator[tuple[str, list[str]]]:
    """Yield (task and metric, the cells of TASK_COLUMNS): scores and the gain, each with its standard error."""
    found = record.tasks
    for task, metrics in found.recovered.items() if found else ():
        for metric, score in metrics.items():
            assert found is not None
            cells = [_score(found.dense[task][metric]), _score(found.pruned[task][metric]), _score(score)]
            yield f"{task}, {metric.removesuffix(',none')}", [*cells, _score(found.gains[task][metric], sign="+")]


def _score(score: Score, sign: str = "") -> str:
    error = "" if score.error is None else f" ± {score.error:.3f}"
    return f"{score.value:{sign}.3f}{error}"


def cost_rows(record: RecoveryRecord) -> Iterator[tuple[str, str]]:
    """Yield what the recovery took: tokens, seconds, operations, memory; proof of reload; notes."""
    ours = record.training
    rate = ours.num_tokens / ours.seconds if ours.seconds else 0.0
    yield (
        "training",
        f"{ours.num_tokens:,} tokens, {ours.seconds:,.1f} s, {rate:,.0f} tokens/s, {ours.flops:.3g} FLOPs",
    )
    yield (
        "judged on",
        f"{record.num_held_out_tokens:,} held-out tokens, never trained on; {record.judge_flops:.3g} FLOPs",
    )
    yield "peak memory", f"{human_bytes(record.peak_bytes)} resident, interpreter included"
    if record.tasks is not None:
        sources = ", ".join(sorted(set(record.tasks.sources.values()))) or "the hub"
        asked = f"at most {record.tasks.limit:,} questions each" if record.tasks.limit else "all questions"
        yield "tasks", f"lm-evaluation-harness {record.tasks.lm_eval_version}, rows from {sources}, {asked}"
        yield "±", "one standard error, of a gain over the same questions; higher is better, but for perplexity"
        yield from (("note", note) for note in record.tasks.notes)
    yield "reload", f"in a fresh process: largest logit difference {record.reload_max_abs_difference:g}"
    for note in record.notes:
        yield "note", note


def cost_table(cost: Cost) -> Table:
    """Return what `--dry-run` shows."""
    table = Table.grid(padding=(0, 2))
    for part, flops in cost.flops.items():
        tokens = f"{cost.num_tokens:,} tokens, " if part == "training" else ""
        seconds = f", {cost.seconds[part]:,.0f} s at the speed of one step timed here" if cost.seconds else ""
        table.add_row(part, f"{tokens}{flops:.3g} FLOPs{seconds}")
    table.add_row("total", f"{sum(cost.flops.values()):.3g} FLOPs, {sum(cost.seconds.values()):,.0f} s")
    table.add_row("held out", f"{cost.num_held_out_tokens:,} tokens, never trained on")
    table.add_row("peak memory", f"about {human_bytes(cost.peak_bytes)} beyond the interpreter")
    table.add_row("scratch on disk", f"{human_bytes(cost.scratch_bytes)} of checkpoints until the end")
    return table


def recovery_card(record: RecoveryRecord) -> str:
    """Return the model card's part on the recovery, in Markdown."""
    columns = models(record)
    lines = [
        "## Recovery",
        "",
        f"{headline(record)}. The table shows held-out nats per token and KL to the dense model; figures elsewhere on "
        "this card are of the model before recovery.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(f"| {label} | " + " | ".join(cells) + " |" for label, cells in verdict_rows(record)),
        "",
        *_task_card(record),
        f"- teacher: {record.teacher}",
    ]
    if record.command:
        lines.append(f"- command: `{record.command}`")
    lines += [f"- {label}: {text}" for label, text in cost_rows(record)]
    return "\n".join(lines) + "\n"


def _task_card(record: RecoveryRecord) -> Iterator[str]:
    if record.tasks is not None:
        yield "| " + " | ".join(TASK_COLUMNS) + " |"
        yield "|---|" + "---:|" * (len(TASK_COLUMNS) - 1)
        yield from (f"| {label} | " + " | ".join(cells) + " |" for label, cells in task_rows(record))
        yield ""
