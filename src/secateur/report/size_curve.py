"""What sizes of a model cost, for people. In: a `Measurement`. Out: tables, and a page with its
picture.
"""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression

from secateur.facts import OTHER_TEXT, OWN_ANSWERS
from secateur.log import human_bytes
from secateur.report.page import Chart, Page, Section, Table, Tables, render, terminal
from secateur.report.records import Measurement, SizeCost, nats_at
from secateur.result_directory import PAGE_FILE, write_summary

# Marks on the curve: nats per token lost on the model's own answers, or on text of other sources
# without these.
TOO_FAR = "too far"
MARKS = {"hardly noticed": 0.05, "with a polish": 0.5, TOO_FAR: 1.0}
# Of the texts that judge, the first one of these that is there is what marks go by.
FIRST = (OWN_ANSWERS, OTHER_TEXT)
# A picture ends at so many nats.
MOST_NATS = 2.5


def write_measurement(directory: Path, measurement: Measurement) -> Measurement:
    """Write the page and `result.json`; return the measurement with the digests of its files."""
    (directory / PAGE_FILE).write_text(render(measurement_page(measurement)), encoding="utf-8")
    return write_summary(directory, measurement)


def measurement_table(measurement: Measurement) -> Tables:
    """Return what the terminal shows: a table, and the marks."""
    return terminal([_sizes(measurement)], _notes(measurement), warnings=measurement.warnings)


def measurement_page(measurement: Measurement) -> Page:
    """Return the page: the picture first, then the tables, and what was cut to foretell from."""
    judged = *_first(measurement.sizes), "mean of domains"
    lines = {
        name: [(cost.removed, cost.lost.get(name, _mean(cost))) for cost in measurement.sizes]
        for name in judged
    }
    chart = Chart(
        "Nats per token lost, by the share of all parameters that goes",
        lines,
        marked(measurement),
        MOST_NATS,
    )
    probes = _table(measurement, "Cut and judged", measurement.probes)
    sections = [
        Section(
            "curve",
            "How much can go",
            [f"{name}: {text}" for name, text in _notes(measurement)],
            chart=chart,
        ),
        Section("sizes", "Size by size", tables=[_sizes(measurement)]),
        Section("probes", "What this rests on", tables=[probes], code=measurement.command),
    ]
    title = f"{measurement.model}: what smaller costs, by secateur"
    verdict = ", ".join(
        f"{name} {bound}" for name, bound in _bounds(measurement).items()
    ).capitalize()
    return Page(title, f"{verdict}.", measurement.warnings, sections)


def marked(measurement: Measurement) -> dict[str, float]:
    """Return the largest share at which each mark is kept, in thousandths; no size may be too
    far.
    """
    first = _first(measurement.sizes)[0]
    shares = range(1, int(1000 * measurement.sizes[-1].removed) + 1)
    lost = [nats_at(measurement.probes, first, share / 1000, measurement.units) for share in shares]
    kept = {name: bisect_right(lost, nats) for name, nats in MARKS.items()}
    return {name: num / 1000 for name, num in kept.items() if name != TOO_FAR or num < len(lost)}


def _bounds(measurement: Measurement) -> dict[str, str]:
    shares = marked(measurement).items()
    return {name: f"{'from' if name == TOO_FAR else 'up to'} {share:.1%}" for name, share in shares}


def _first(costs: Sequence[SizeCost]) -> list[str]:
    """Return what is told first of what judged: other text, and before it the model's own answers,
    if it gives any.
    """
    return [name for name in FIRST if name in costs[0].lost]


def _domains(cost: SizeCost) -> list[str]:
    return [name for name in cost.lost if name not in FIRST]


def _mean(cost: SizeCost) -> float:
    return sum(cost.lost[name] for name in _domains(cost)) / len(_domains(cost))


def _sizes(measurement: Measurement) -> Table:
    # Every second one is shown.
    return _table(
        measurement,
        f"{measurement.model}: nats per token lost",
        measurement.sizes[1::2] or measurement.sizes,
    )


def _table(measurement: Measurement, caption: str, shown: Sequence[SizeCost]) -> Table:
    names = (*_first(shown), *_domains(shown[0]))
    rows = [[name, *(f"{cost.lost[name]:.3f}" for cost in shown)] for name in names]
    rows.append(["mean of domains", *(f"{_mean(cost):.3f}" for cost in shown)])
    rows.append(["parameters", *(f"{cost.num_params / 1e6:,.1f} M" for cost in shown)])
    # A token takes the less time the fewer weights it passes.
    probed = [probe.removed for probe in measurement.probes]
    for name, seconds in zip(("read", "written"), zip(*measurement.pace, strict=True), strict=True):
        line = linear_regression(probed, seconds)
        rates = (1 / (line.intercept + line.slope * cost.removed) for cost in shown)
        rows.append([f"tokens/s {name}", *(f"{rate:,.1f}" for rate in rates)])
    rows += [
        [kind, *(human_bytes(cost.num_bytes[kind]) for cost in shown)]
        for kind in shown[0].num_bytes
    ]
    return Table(caption, ("goes", *(f"{cost.removed:.1%}" for cost in shown)), rows)


def _notes(measurement: Measurement) -> list[tuple[str, str]]:
    first = _first(measurement.sizes)[0]
    bounds = _bounds(measurement).items()
    probes = ", ".join(f"{probe.removed:.1%}" for probe in measurement.probes)
    note = (
        f"without a polish, from models cut to {probes} and judged; the middle one is "
        f"{measurement.band:.0%} off"
    )
    return [
        *((name, f"{bound}, {MARKS[name]:g} nats per token on {first}") for name, bound in bounds),
        ("foretold", f"{note}, as a mean over texts, where the others foretell it"),
        (
            "tokens/s",
            "of one prompt, here: a line through the seconds per token of these models, timed by "
            "turns",
        ),
    ]
