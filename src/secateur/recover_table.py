"""A recovery's numbers for people: tables that the terminal, the model card and the report share.

In: a `RecoveryRecord` or a `Cost`. Out: tables, rows of text, Markdown.
"""

import math
from collections.abc import Iterator

from rich.console import Group

from secateur.evaluate_table import task_label
from secateur.page import Table
from secateur.recover_record import Cost, RecoveryRecord, Verdicts, mean_kl, mean_nats, won_back
from secateur.tables import human_bytes, markdown, terminal


def recovery_table(record: RecoveryRecord) -> Group:
    """Return what `secateur recover` ends with."""
    return terminal([verdict_table(record, recovery_headline(record)), recovery_task_table(record)], cost_rows(record))


def recovery_headline(record: RecoveryRecord) -> str:
    """Say how much of what was lost came back."""
    if not record.training.held:
        return f"{record.pruned}: held-out KL did not fall, so the weights are those that were given"
    won = won_back(record.dense, record.before, record.after)
    share = "nothing had been lost" if math.isnan(won) else f"{won:.1%} of the lost log-perplexity won back"
    return f"{record.pruned}: {share} with {record.training.num_tokens:,} tokens"


def recovery_models(record: RecoveryRecord) -> dict[str, Verdicts]:
    """Return the verdicts of every model that was judged, by what it is called."""
    training = record.training
    name = "recovered" if training.held else "recovered (undone)"
    return {"dense": record.dense, "pruned": record.before, name: training.after}


def verdict_table(record: RecoveryRecord, caption: str = "") -> Table:
    """Return nats per token and KL of every model, domain by domain, and their means."""
    columns = recovery_models(record)
    rows = [
        (domain, *(f"{of[domain].nats_per_token:.3f}, {of[domain].kl:.3f}" for of in columns.values()))
        for domain in record.dense
    ]
    rows.append(("mean", *(f"{mean_nats(of):.3f}, {mean_kl(of):.3f}" for of in columns.values())))
    rows.append(("geometric-mean perplexity", *(f"{math.exp(mean_nats(of)):.2f}" for of in columns.values())))
    return Table(caption, ("nats/token, KL to dense", *columns), rows)


def recovery_task_table(record: RecoveryRecord) -> Table:
    """Return every model's scores by task and metric, and the gain; no rows where no task was asked."""
    rows, found = [], record.tasks
    for task, metrics in found.recovered.items() if found else ():
        for metric in metrics:
            assert found is not None
            scores = [of[task][metric].text() for of in (found.dense, found.pruned, found.recovered)]
            rows.append((task_label(task, metric), *scores, found.gains[task][metric].text("+")))
    return Table(
        "score ± standard error; gain: recovered minus pruned", ("task", "dense", "pruned", "recovered", "gain"), rows
    )


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


def cost_table(cost: Cost) -> Group:
    """Return what `--dry-run` shows."""
    return terminal([], _cost_rows(cost))


def _cost_rows(cost: Cost) -> Iterator[tuple[str, str]]:
    for part, flops in cost.flops.items():
        tokens = f"{cost.num_tokens:,} tokens, " if part == "training" else ""
        seconds = f", {cost.seconds[part]:,.0f} s at the speed of one step timed here" if cost.seconds else ""
        yield part, f"{tokens}{flops:.3g} FLOPs{seconds}"
    yield "total", f"{sum(cost.flops.values()):.3g} FLOPs, {sum(cost.seconds.values()):,.0f} s"
    yield "held out", f"{cost.num_held_out_tokens:,} tokens, never trained on"
    yield "peak memory", f"about {human_bytes(cost.peak_bytes)} beyond the interpreter"
    yield "scratch on disk", f"{human_bytes(cost.scratch_bytes)} of checkpoints until the end"


def recovery_card(record: RecoveryRecord) -> str:
    """Return the model card's part on the recovery, in Markdown."""
    tasks = recovery_task_table(record)
    lines = [
        "## Recovery",
        "",
        f"{recovery_headline(record)}. The table shows held-out nats per token and KL to the dense model; figures "
        "elsewhere on this card are of the model before recovery.",
        "",
        *markdown(verdict_table(record)),
        "",
        *([*markdown(tasks), ""] if tasks.rows else []),
        f"- teacher: {record.teacher}",
    ]
    if record.command:
        lines.append(f"- command: `{record.command}`")
    lines += [f"- {label}: {text}" for label, text in cost_rows(record)]
    return "\n".join(lines) + "\n"
