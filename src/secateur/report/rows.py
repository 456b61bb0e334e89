"""Numbers for people, as rows of terminal, card and page: of a run, an inspection, what was
measured after.
"""

import math
from collections.abc import Callable, Iterator, Mapping

from rich.box import SIMPLE_HEAD
from rich.text import Text

from secateur.data.blocks import NGRAM_TOKENS
from secateur.facts import (
    ANSWER_TOKENS,
    Loss,
    OwnAnswers,
    Trained,
    Verdict,
    geometric_mean_perplexity,
    mean_kl,
    mean_nats,
)
from secateur.log import human_bytes
from secateur.report.page import Table, Tables, code, escaped, markdown, terminal
from secateur.report.records import (
    NOT_TOLD_APART,
    BenchResult,
    Change,
    Evaluation,
    Inspection,
    ModelFigures,
    Quality,
    RecoveryRecord,
    Spread,
    Summary,
    VocabularyFacts,
    change,
    mean_change,
    plus_minus,
)

# The cells of a row; what a note is about, and the note.
Cells = tuple[str, ...]
Note = tuple[str, str]
SIDES = ("dense", "pruned", "difference")
# Warn of a larger share of common n-grams.
MUCH_OVERLAP = 0.1


def summary_table(summary: Summary) -> Tables:
    """Return what a run ends with: quality by domain and size, dense and pruned, and the
    verdict.
    """
    caption = f"{summary.model}: {headline(summary)}"
    shown = terminal(
        [quality_and_size(summary, caption)], note_rows(summary), warnings=summary.warnings
    )
    return Tables(shown, Text(f"{verdict(summary)}.\n{beside_verdict(summary)}"))


def quality_and_size(summary: Summary, caption: str = "") -> Table:
    """Return quality by domain, if measured, sizes and widths: dense, pruned and difference."""
    first = f"nats/token{of_dense(summary)} (perplexity)" if summary.dense_losses else ""
    return Table(caption, (first, *SIDES), [*quality_rows(summary), *figure_rows(summary)])


def listed(amounts: Mapping[str, int | float], form: str) -> str:
    """Return amounts with their names, each written in the form of a format specification."""
    return ", ".join(f"{name} {amount:{form}}" for name, amount in amounts.items())


def headline(summary: Summary) -> str:
    """Say how much was removed, of what, and what was asked."""
    parameters = f"{summary.remove_reached:.1%} of all {summary.dense_size.num_params:,} parameters"
    return f"{parameters} removed (asked {summary.remove_asked:.1%}; tied weights counted once)"


def verdict(summary: Summary) -> str:
    """Say in at most 90 characters how much smaller the model is, and what that cost."""
    smaller = f"{summary.remove_reached:.0%} smaller"
    if (answers := summary.own_answers) is not None:
        lost, text = answers.nats_lost, "the dense model's own answers"
    elif summary.other_text is not None:
        lost, text = change(*summary.other_text).nats_per_token, OTHER_SOURCES
    else:
        return f"{smaller}; what that cost was not measured"
    cost = f"lost {lost:.2f} nats a token" if lost >= 0.005 else "lost nothing"
    return f"{smaller}; {cost} on {text} ({_times(lost)} perplexity)"


def _times(nats: float) -> str:
    return f"x{math.exp(nats):.2f}" if nats < LARGEST_RATIO else "x1000+"


def beside_verdict(
    summary: Summary, speed_ups: Mapping[str, Spread] | None = None, *, asked_tasks: bool = False
) -> str:
    """Say what other text cost, how much faster the model is, and what was not measured.

    `speed_ups`: by phase, if `secateur bench` has measured them. `asked_tasks`: whether `evaluate`
    has.
    """
    sentences, others = list[str](), list[str]()
    if summary.own_answers is not None and summary.other_text is not None:
        others.append(f"{_times(change(*summary.other_text).nats_per_token)} on {OTHER_SOURCES}")
    if changes := loss_changes(summary):
        others.append(
            f"{_times(mean_change(changes.values()).nats_per_token)} on text like what it was "
            "trained on"
        )
    if others:
        sentences.append(f"Perplexity: {', '.join(others)}.")
    if speed_ups:
        sentences.append(
            f"{' and '.join(faster(*pair) for pair in speed_ups.items()).capitalize()}."
        )
    unknown = [
        *([] if asked_tasks else ["tasks"]),
        "other languages",
        "long text",
        *([] if speed_ups else ["speed"]),
    ]
    return " ".join([*sentences, f"Not measured: {', '.join(unknown)}."])


def faster(phase: str, ratio: Spread) -> str:
    """Say how much faster a phase runs, with the range over repeats, or that it is not told."""
    spread = f"({ratio.lowest:.2f} to {ratio.highest:.2f})"
    if not ratio.is_told:
        return f"{phase} speed is {NOT_TOLD_APART} {spread}"
    return f"{phase} runs {ratio.median:.2f} {spread} times as fast"


def caveats(summary: Summary) -> Iterator[str]:
    """Yield what a reader must know about the numbers: the run's notes, overlap of texts."""
    yield from summary.warnings
    overlap = summary.calibration.held_out_overlap.items()
    much = {
        domain: share for domain, share in overlap if share is not None and share > MUCH_OVERLAP
    }
    if much:
        yield (
            f"Much of the held-out text's {NGRAM_TOKENS}-grams occur in the calibration text "
            f"({listed(much, '.0%')}), so the quality there is flattered."
        )


OTHER_SOURCES = "text of other sources"
# Nats a token, above which a ratio of perplexities says nothing more.
LARGEST_RATIO = math.log(1000)


def _nats(loss: Loss) -> str:
    return f"{loss.nats_per_token:.3f} ({loss.perplexity:.2f})"


def quality_rows(summary: Summary) -> Iterator[Cells]:
    """Yield (label, dense, pruned, difference) on own answers, on other text, and on domains, whose
    mean comes last.

    The difference is over the same documents and has its error; a model's own error would be mostly
    that documents differ, in which both models agree.
    """
    yield from answer_rows(summary.own_answers)
    if summary.other_text is not None:
        yield _compared(OTHER_SOURCES, *summary.other_text)
    changes, both = loss_changes(summary), (summary.dense_losses, summary.pruned_losses)
    if not changes:
        return
    yield "text like what it was trained on:", "", "", ""
    for domain in changes:
        yield _compared(domain, *(losses[domain] for losses in both))
    means = map(geometric_mean_perplexity, both)
    mean = mean_change(changes.values()).text()
    yield (
        "mean (geometric mean)",
        *(f"{math.log(perplexity):.3f} ({perplexity:.2f})" for perplexity in means),
        mean,
    )


def _compared(label: str, *losses: Loss) -> Cells:
    """Return the nats per token and the perplexity of one model, or of two with their
    difference.
    """
    differences = [change(*losses).text()] if len(losses) > 1 else []
    return label, *map(_nats, losses), *differences


def loss_changes(summary: Summary) -> dict[str, Change]:
    """Return pruned minus dense by domain, over the same documents."""
    return {
        domain: change(dense, summary.pruned_losses[domain])
        for domain, dense in summary.dense_losses.items()
    }


def figure_rows(summary: Summary) -> Iterator[Cells]:
    """Yield (label, dense, pruned, difference): parameters, bytes, widths."""

    def row(
        label: str, before: int, after: int, show: Callable[[int], str] = "{:,}".format
    ) -> Cells:
        return label, show(before), show(after), f"{after / before - 1:+.1%}"

    dense, pruned = summary.dense_size, summary.pruned_size
    yield row("parameters", dense.num_params, pruned.num_params)
    yield row("bytes", dense.num_bytes, pruned.num_bytes, human_bytes)
    if (vocabulary := summary.vocabulary) is not None:
        yield row("vocabulary", vocabulary.num_before, vocabulary.num_after, "{:,} tokens".format)
    if len(set(summary.num_layers)) > 1:
        yield row("layers", *summary.num_layers)
    for group, (before, least, most) in summary.widths.items():
        label = f"{group} units per layer"
        yield (
            row(label, before, least)
            if least == most
            else (label, f"{before:,}", f"{least:,} to {most:,}", "")
        )


def note_rows(summary: Summary) -> Iterator[Note]:
    """Yield what else a reader wants to know: cost, calibration, proof of reload."""
    yield "seconds", f"{listed(summary.seconds, '.1f')}; total {sum(summary.seconds.values()):.1f}"
    yield "peak memory", f"{human_bytes(summary.peak_bytes)} resident, interpreter included"
    yield from lineage_rows(summary)
    text = summary.calibration
    tokens = f"{listed(text.num_tokens, ',')} tokens in blocks of {text.sequence_length}"
    yield "calibration", f"{tokens}; sha256 {text.content_hash[:16]}"
    if summary.dense_losses:
        judged = f"{listed(text.num_judged_tokens, ',')} held-out tokens, seen by no statistic"
        yield "quality on", f"{judged}; ± is one standard error over the same documents"
    if summary.other_text is not None:
        loss = summary.other_text[0]
        yield (
            "other text",
            f"{loss.num_tokens:,} tokens of {len(loss.document_nats)} documents of prose that come "
            "with secateur, such as news, letters, law and stories; no domain holds them",
        )
    if (answers := summary.own_answers) is not None:
        yield (
            "own answers",
            f"the dense model's, greedy, up to {ANSWER_TOKENS} tokens, {answers.num_tokens:,} in "
            f"all, to {answers.num_prompts} prompts that come with secateur; ± is one standard "
            "error over prompts",
        )
    if summary.vocabulary is not None:
        yield from vocabulary_notes(summary.vocabulary)
    if summary.polish is not None:
        yield "polish", summary.polish.headline
    if summary.guard_refusals:
        yield "guard", f"groups whose compensation held-out text refused: {summary.guard_refusals}"
    if summary.reload_max_abs_difference is not None:
        yield "reload", f"stock transformers in {RELOADED} {summary.reload_max_abs_difference:g}"


RELOADED = "a fresh process: largest logit difference"


def lineage_rows(summary: Summary) -> Iterator[Note]:
    """Yield which model was pruned, and of one that was pruned before what went in all."""
    *earlier, dense = summary.lineage
    known = "not known" if dense.fingerprint is None else dense.fingerprint[:16]
    yield "dense model", f"{dense.name}, fingerprint {known}"
    if earlier:
        first, names = earlier[0], " → ".join(checkpoint.name for checkpoint in summary.lineage)
        share = 1 - summary.pruned_size.num_params / first.num_params
        yield (
            "lineage",
            f"{names} → this; {share:.1%} of all {first.num_params:,} parameters of {first.name} "
            "removed",
        )


def inspection_table(inspection: Inspection) -> Tables:
    """Return what `secateur inspect` shows: what goes, by kind of group, and what that takes."""
    size, rows = inspection.size, []
    for group in inspection.groups:
        cells = (
            f"{group.name} ({group.unit})",
            f"{group.num_layers:,}",
            f"{group.num_units:,}",
            f"{group.num_keep:,}",
            f"{group.params_per_unit:,}",
            f"{group.num_params:,}",
            f"{group.num_params / size.num_params:.1%}",
        )
        rows.append(cells)
    caption = (
        f"{inspection.model}: family {inspection.family}, {size.num_params:,} parameters, "
        f"{inspection.dtype}"
    )
    header = ("group (unit)", "layers", "units", "after", "per unit", "parameters", "share")
    # Without column rules a 70B model's numbers fit 80 characters.
    return terminal([Table(caption, header, rows)], _inspection_notes(inspection), SIMPLE_HEAD)


def _inspection_notes(inspection: Inspection) -> Iterator[Note]:
    size, memory = inspection.size, inspection.memory
    yield (
        "removing",
        f"asked {inspection.remove_asked:.1%}, reached {inspection.remove_reached:.1%} of total "
        f"parameters (tied weights once), widths in multiples of {inspection.align}; at most "
        f"{inspection.largest_remove:.1%}",
    )
    if len(set(inspection.num_layers)) > 1:
        yield "layers", "{} -> {}; a run measures which".format(*inspection.num_layers)
    yield "parameters", f"{size.num_params:,} -> {inspection.num_params_after:,}"
    yield "bytes", f"{human_bytes(size.num_bytes)} -> {human_bytes(inspection.num_bytes_after)}"
    weights = (
        "weights "
        f"{human_bytes(memory.weights)}{' (they stay on disk)' * inspection.weights_on_disk}"
    )
    polish = f", the polish {human_bytes(memory.polish)}" if memory.polish else ""
    yield (
        "memory",
        f"about {human_bytes(memory.peak)} at the peak of a run with "
        f"{inspection.num_calibration_tokens:,} calibration tokens ({weights}{polish}); the "
        "interpreter comes on top",
    )
    yield "disk", f"at most {human_bytes(inspection.disk_bytes)} while it runs"
    of_tokens = f"{inspection.num_token_params / size.num_params:.1%} of all parameters"
    yield "vocabulary", f"{inspection.num_tokens:,} tokens, {of_tokens}"
    yield from _possible_groups(inspection)
    for warning in inspection.warnings:
        yield "note", warning
    sizes = ", ".join(
        f"{kind} {' -> '.join(map(human_bytes, pair))}" for kind, pair in inspection.files.items()
    )
    yield "GGUF files", "; ".join(text for text in (sizes, inspection.files_problem) if text)


def _possible_groups(inspection: Inspection) -> Iterator[Note]:
    shown = {group.name for group in inspection.groups}
    for group in (group for group in inspection.possible if group.name not in shown):
        size = (
            f"{group.num_units:,} in each of {group.num_layers} layers, {group.num_params:,} "
            "parameters"
        )
        yield "could also go", f"{group.name} ({group.unit}): {size}"
    for name, reason in inspection.impossible.items():
        yield "cannot go", f"{name}: {reason}"


def lost_cell(answers: OwnAnswers) -> str:
    """Return the nats lost per token with their error over prompts."""
    return f"{answers.nats_lost:+.3f} ± {answers.standard_error:.3f}"


def answer_rows(answers: OwnAnswers | None) -> Iterator[Cells]:
    """Yield (label, dense, pruned, difference) on the dense model's own answers."""
    if answers is None:
        return
    yield (
        "own answers, nats/token",
        f"{answers.dense_nats:.3f}",
        f"{answers.nats:.3f}",
        lost_cell(answers),
    )
    yield "same first choice there", "all", f"{answers.same_first:.1%}", ""
    for label, (before, after) in (
        ("answers that end", answers.ended),
        ("repeats itself", answers.repeated),
    ):
        yield label, f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points"


# Scripts of fewer tokens are not named, nor more than so many of those that lose most.
LEAST_TOKENS, MOST_SCRIPTS = 16, 5


def growth(before: int, after: int) -> float:
    """Return the share of tokens that the same text takes more."""
    return after / before - 1 if before else 0.0


def of_dense(summary: Summary) -> str:
    """Return which tokens losses are counted per, if not simply the model's own."""
    return "" if summary.vocabulary is None else " of the dense tokenizer"


def who_suffers(trim: VocabularyFacts) -> str:
    """Say what the trim costs the run's own domains, and which scripts lose most of their
    tokens.
    """
    before, after = (sum(column) for column in zip(*trim.by_domain.values(), strict=True))
    lost = [cut - dense for dense, cut in trim.nats.values()]
    own = f"takes {growth(before, after):.1%} more tokens"
    if lost:
        own += f" and loses {sum(lost) / len(lost):.2f} nats per token by it"
    shares = sorted(
        (
            (-growth(*counts), script)
            for script, counts in trim.scripts.items()
            if counts[0] >= LEAST_TOKENS
        ),
        reverse=True,
    )
    scripts = ", ".join(
        "{1:,} of {0:,} {2} tokens".format(*trim.scripts[script], script)
        for share, script in shares[:MOST_SCRIPTS]
        if share > 0
    )
    worse = (
        f" What is written in these scripts is predicted worse: {scripts} stay." if scripts else ""
    )
    return (
        f"The vocabulary was trimmed from {trim.num_before:,} to {trim.num_after:,} tokens. "
        f"Held-out text of the run's own domains {own}.{worse}"
    )


def vocabulary_notes(trim: VocabularyFacts) -> Iterator[Note]:
    """Yield what a trim does to text: more tokens and nats by domain."""
    growths = {name: growth(*pair) for name, pair in trim.by_domain.items()}
    yield "text growth", f"{listed(growths, '+.1%')} more tokens for the same held-out text"
    if trim.nats:
        more = {name: after - before for name, (before, after) in trim.nats.items()}
        foretold = "" if trim.foretold is None else f"; {trim.foretold:.3f} were foretold"
        yield (
            "trim alone",
            f"{listed(more, '+.3f')} nats per token of the dense tokenizer{foretold}",
        )


def evaluation_table(evaluation: Evaluation) -> Tables:
    """Return text, KL and tasks, for dense, pruned and difference, or for one model."""
    notes = [(f"note: {note}",) for note in (*_legend(evaluation), *evaluation.notes)]
    return terminal(figure_tables(evaluation), notes)


def figure_tables(evaluation: Evaluation) -> list[Table]:
    """Return nats per token, bits per byte and KL by domain, and the tasks' scores."""
    models = evaluation.models.values()
    by_domain = {
        name: [model.domains[name] for model in models] for name in evaluation.pruned.domains
    }
    other = _compared(OTHER_SOURCES, *(model.other_text for model in models))
    nats = [other, *(_compared(name, *qualities) for name, qualities in by_domain.items())]
    bits = [_bits_row(name, qualities) for name, qualities in by_domain.items()]
    kl_rows = [
        (domain, _kl_cell(kl), f"{kl.top1_agreement:.1%}")
        for domain, kl in (evaluation.kl or {}).items()
    ]
    return [
        Table(
            "the dense model's own answers", ("", *SIDES), list(answer_rows(evaluation.own_answers))
        ),
        Table("nats/token (perplexity)", ("domain", *_columns(evaluation)), nats),
        Table("bits/byte", ("domain", *_columns(evaluation)), bits),
        Table("KL(dense || pruned), nats/token", ("domain", "mean", "same token first"), kl_rows),
        _task_table(evaluation),
    ]


def _columns(evaluation: Evaluation) -> Cells:
    return SIDES if evaluation.differences else tuple(evaluation.models)


def _bits_row(domain: str, qualities: list[Quality]) -> Cells:
    bits = [quality.bits_per_byte for quality in qualities]
    difference = [f"{bits[1] - bits[0]:+.4f}"] if len(bits) > 1 else []
    return domain, *(f"{value:.4f}" for value in bits), *difference


def _task_table(evaluation: Evaluation) -> Table:
    """Return the scores by task and metric, and their differences if measured."""
    changes = evaluation.differences.tasks if evaluation.differences else None
    scores = [measured.scores for measured in evaluation.models.values()]
    rows = []
    for task, by_metric in scores[-1].items():
        for metric in by_metric:
            cells = [of[task][metric].text() for of in scores]
            if changes is not None:
                cells.append(changes[task][metric].text("+"))
            # With the harness's filter, if any.
            rows.append((f"{task}, {metric.removesuffix(',none')}", *cells))
    return Table("score ± standard error", ("task", *_columns(evaluation)), rows)


def _legend(evaluation: Evaluation) -> Iterator[str]:
    pruned = evaluation.pruned
    if pruned.domains:
        num_tokens = sum(part.num_tokens for part in pruned.domains.values())
        yield (
            f"domains: {num_tokens:,} predicted tokens; KL in nats per token, over all tokens that "
            "both models have."
        )
    if pruned.tasks is not None:
        sources = sorted(set(pruned.tasks.sources.values())) or ["the hub"]
        yield (
            f"tasks: lm-evaluation-harness {pruned.tasks.lm_eval_version}, rows from "
            f"{', '.join(sources)}."
        )
    yield "± is one standard error, of a difference over the same documents or questions."


def bench_table(result: BenchResult) -> Tables:
    """Return each model's figures, the speed-up and the ideal, and how the run was made."""
    return terminal(bench_tables(result), _notes(result), warnings=result.notes)


def bench_tables(result: BenchResult) -> list[Table]:
    """Return each model's figures, and the speed-up beside the ideal, if there are two models."""
    work = result.workload
    caption = (
        f"batch {work.batch}, {work.prompt_tokens} prompt tokens, {work.new_tokens} new tokens"
    )
    models = result.models
    figures = [
        (label, *(cell(timed) for timed in models.values())) for label, cell in _ROWS.items()
    ]
    speed_ups = []
    for label, speed_up in result.speed_ups.items():
        measured, ideal = speed_up.measured, speed_up.ideal
        share = f"{measured.median / ideal:.0%}" if measured.is_told else ""
        speed_ups.append((label, measured.ratio_text(), f"{ideal:.2f}x", share))
    return [
        Table(caption, ("median (lowest to highest)", *models), figures),
        Table(
            "speed-up, median and range of the repeats' ratios",
            ("", "measured", "ideal", "of ideal"),
            speed_ups,
        ),
    ]


def _spread(figure: Spread) -> str:
    digits = 0 if figure.median >= 100 else 1  # or two models' numbers are wider than 80 columns
    low, middle, high = (
        f"{value:,.{digits}f}" for value in (figure.lowest, figure.median, figure.highest)
    )
    return f"{middle} ({low} to {high})"


_ROWS: dict[str, Callable[[ModelFigures], str]] = {
    "prefill, tokens/s": lambda timed: _spread(timed.speed.prefill),
    "decode, tokens/s": lambda timed: _spread(timed.speed.decode),
    "parameters": lambda timed: f"{timed.size.num_params:,}",
    "weights": lambda timed: human_bytes(timed.size.num_bytes),
    "cache per token": lambda timed: human_bytes(timed.costs.kv_cache_bytes_per_token),
    "read per new token": lambda timed: human_bytes(timed.costs.decode_bytes_per_token),
    "GFLOP per prompt token": lambda timed: f"{timed.costs.prefill_flops_per_token / 1e9:.4g}",
}


def _notes(result: BenchResult) -> Iterator[Note]:
    for name, figures in result.models.items():
        yield name, f"{figures.model}, {figures.dtype}"
    threads = f", threads: {result.num_threads}" if result.device == "cpu" else ""
    yield "run", f"transformers on {result.device}{threads}"
    if result.speed_ups:
        yield "speed-up", "median of the ratios within each repeat, in which the models take turns"
        yield (
            "ideal",
            "decode: ratio of bytes read per new token; prefill: ratio of operations per prompt "
            "token",
        )


def recovery_table(record: RecoveryRecord) -> Tables:
    """Return what `secateur recover` ends with."""
    tables = [judged_table(record), verdict_table(record, GUARDED)]
    return terminal(tables, [("recovery", record.headline), *cost_rows(record)])


GUARDED = "On the text that guards the training"


def judged_table(record: RecoveryRecord) -> Table:
    """Return what judges the models: nats per token of the dense one, and how many more the others
    have.
    """
    if not record.judged:
        return Table("", (), [])
    rows: list[Cells] = []
    if answers := [model.answers for model in record.judged.values() if model.answers is not None]:
        rows.append(("own answers", f"{answers[0].dense_nats:.3f}", *map(lost_cell, answers)))
    texts = (
        [(OTHER_SOURCES, model.other), *model.domains.items()] for model in record.judged.values()
    )
    for (name, dense), *others in zip(*texts, strict=True):
        differences = (change(dense, loss).text() for _, loss in others)
        rows.append((name, f"{dense.nats_per_token:.3f}", *differences))
    return Table(f"{record.pruned}: nats/token on what judges", ("", *record.judged), rows)


def verdict_table(record: Trained, caption: str = "", name: str = "recovered") -> Table:
    """Return nats per token and KL of every model, by domain, and their means."""
    name += "" if record.training.held else " (undone)"
    columns = {"dense": record.dense, "pruned": record.before, name: record.training.after}
    rows = [
        (
            domain,
            *(
                f"{of[domain].nats_per_token:.3f}, {_kl_cell(of[domain])}"
                for of in columns.values()
            ),
        )
        for domain in record.dense
    ]
    rows.append(("mean", *(f"{mean_nats(of):.3f}, {mean_kl(of):.3f}" for of in columns.values())))
    return Table(caption, ("nats/token, KL to dense", *columns), rows)


def _kl_cell(verdict: Verdict) -> str:
    return f"{verdict.kl:.3f}{plus_minus(verdict.standard_error)}"


def cost_rows(record: RecoveryRecord) -> Iterator[Note]:
    """Yield what the recovery took (tokens, seconds, memory), reload and notes."""
    ours = record.training
    yield "training", f"{ours.num_tokens:,} tokens, {ours.seconds:,.1f} s"
    yield "guarded by", f"{record.num_held_out_tokens:,} held-out tokens, never trained on"
    yield "peak memory", f"{human_bytes(record.peak_bytes)} resident, interpreter included"
    yield "reload", f"in {RELOADED} {record.reload_max_abs_difference:g}"
    for note in record.notes:
        yield "note", note


def recovery_card(record: RecoveryRecord) -> str:
    """Return the model card's section on the recovery, in Markdown."""
    about = (
        f"{record.pruned}: {record.headline}. Figures elsewhere on this card are of the model "
        "before recovery."
    )
    judged = [*markdown(judged_table(record)), "", f"{GUARDED}:", ""] if record.judged else []
    lines = ["## Recovery", "", escaped(about), "", *judged, *markdown(verdict_table(record)), ""]
    lines += [f"- teacher: {escaped(record.teacher)}"]
    lines += [f"- command: {code(record.command)}"] if record.command else []
    lines += [f"- {label}: {escaped(text)}" for label, text in cost_rows(record)]
    return "\n".join(lines) + "\n"
