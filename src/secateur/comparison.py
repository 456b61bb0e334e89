"""Several results side by side on one page: what each costs in quality for its size and its speed.

In: results by name. Out: the page. Perplexities of models that saw different held-out text cannot be compared; the page
says so where that is the case.
"""

from collections.abc import Callable
from string import ascii_uppercase

from secateur.bench import Speed
from secateur.loss import geometric_mean_perplexity
from secateur.page import Page, Section, Table
from secateur.plots import Point, Text, pareto_front, pareto_plot
from secateur.result_files import ResultFiles
from secateur.summary import Losses, Size, Summary
from secateur.tables import human_bytes, plus_minus, speeds

QUALITY = "held-out perplexity"
NOT_MEASURED = "not measured"

Measure = Callable[[Size, Speed | None], float | None]


def comparison_page(results: dict[str, ResultFiles]) -> Page:
    """Return the page that compares results. In plots a letter stands for each: A, B, ..., Z, then 27, 28, ..."""
    letters = [ascii_uppercase[place] if place < 26 else str(place + 1) for place in range(len(results))]
    summaries = {letter: files.summary for letter, files in zip(letters, results.values(), strict=True)}
    names = [(letter, name, summaries[letter].model) for letter, name in zip(letters, results, strict=True)]
    who = Table("Letters", ("", "result", "model"), names, numbers=False)
    sections = [
        Section("results", "Results", tables=(who, _figures(summaries))),
        _pareto(summaries, "size", "weights, MB", lambda size, _: size.num_bytes / 1e6, more_is_better=False),
        _pareto(summaries, "speed", "decoded tokens per second", _decode_rate, more_is_better=True),
        Section("domains", "Quality by domain", tables=(_domains(summaries),)),
    ]
    return Page(f"{len(results)} results of secateur", _verdict(summaries), _notes(summaries), (), sections)


def _verdict(summaries: dict[str, Summary]) -> str:
    if _texts_differ(summaries):
        return "These results were measured on different held-out text, so none of them can be called the best."
    best = min(summaries, key=lambda letter: _perplexity(summaries[letter].pruned_losses) or float("inf"))
    perplexity = _perplexity(summaries[best].pruned_losses)
    if perplexity is None:
        return "No result here measured its quality."
    kept = 1 - summaries[best].remove_reached
    return f"Of these results {best} has the lowest {QUALITY}, {perplexity:.2f}, with {kept:.1%} of its parameters."


def _texts_differ(summaries: dict[str, Summary]) -> bool:
    return len({summary.calibration.content_hash for summary in summaries.values()}) > 1


def _notes(summaries: dict[str, Summary]) -> list[str]:
    notes = []
    if _texts_differ(summaries):
        notes.append(
            "These results have different calibration sets, and so different held-out text: their perplexities cannot "
            "be compared. secateur evaluate measures several models on the same text."
        )
    if len({summary.dense_speed for summary in summaries.values()}) > 1:
        notes.append(
            "Speeds were measured in different runs, so differences between results include the machine's drift; "
            "secateur bench times two models in turns."
        )
    return notes


def _figures(summaries: dict[str, Summary]) -> Table:
    header = ("", "removed", "parameters", "weights", f"{QUALITY}, dense → pruned", "prefill", "decode")
    rows = []
    for letter, summary in summaries.items():
        before, after = _perplexity(summary.dense_losses), _perplexity(summary.pruned_losses)
        quality = NOT_MEASURED if before is None else f"{before:.2f} → {after:.2f}"
        ratios = [f"{after / before:.2f}x" for _, before, after in speeds(summary)] or [NOT_MEASURED] * 2
        size = summary.pruned_size
        weights = human_bytes(size.num_bytes)
        rows.append((letter, f"{summary.remove_reached:.1%}", f"{size.num_params:,}", weights, quality, *ratios))
    return Table("Size, quality, speed against the dense model", header, rows)


def _domains(summaries: dict[str, Summary]) -> Table:
    domains = list(dict.fromkeys(domain for summary in summaries.values() for domain in summary.pruned_losses))
    rows = []
    for domain in domains:
        losses = [summary.pruned_losses.get(domain) for summary in summaries.values()]
        cells = [
            f"{loss.nats_per_token:.3f}{plus_minus(loss.standard_error)}" if loss else NOT_MEASURED for loss in losses
        ]
        rows.append((domain, *cells))
    return Table("Nats per token after pruning ± standard error", ("domain", *summaries), rows)


def _pareto(
    summaries: dict[str, Summary], name: str, x_label: str, measure: Measure, *, more_is_better: bool
) -> Section:
    title = f"Quality against {name}"
    points = _points(summaries, measure)
    if not points:
        return Section(name, title, (f"No result here measured both quality and {name}.",))
    best = "; ".join(point.label for point in pareto_front(points, more_is_better=more_is_better))
    side = "right" if more_is_better else "left"
    text = f"Lower and further {side} is better. Not beaten by another on both: {best}."
    described = Text(f"{name}-plot", title, f"{text} The table has the numbers.")
    plot = pareto_plot(described, points, x_label, QUALITY, more_is_better=more_is_better)
    rows = [(point.label, f"{point.x:,.1f}", f"{point.y:.2f}") for point in points]
    return Section(name, title, (text,), (plot,), (Table(title, ("", x_label, QUALITY), rows),))


def _points(summaries: dict[str, Summary], measure: Measure) -> list[Point]:
    """One point per result, and one per dense model, labelled with the results that come from it."""
    pruned, dense = [], {}
    for letter, summary in summaries.items():
        after, x_after = _perplexity(summary.pruned_losses), measure(summary.pruned_size, summary.pruned_speed)
        before, x_before = _perplexity(summary.dense_losses), measure(summary.dense_size, summary.dense_speed)
        if after is None or before is None or x_after is None or x_before is None:
            continue
        pruned.append(Point(letter, x_after, after))
        key = (summary.model, before)
        label = f"{dense[key].label}, {letter}" if key in dense else f"dense for {letter}"
        dense[key] = Point(label, dense[key].x if key in dense else x_before, before, is_dense=True)
    return [*pruned, *dense.values()]


def _perplexity(losses: Losses) -> float | None:
    return geometric_mean_perplexity(losses) if losses else None


def _decode_rate(_: Size, speed: Speed | None) -> float | None:
    return None if speed is None else speed.decode_tokens_per_second
