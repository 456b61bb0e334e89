"""What sizes of a model cost, for people. In: a `Measurement`. Out: tables, and a page with its picture."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from secateur.log import human_bytes
from secateur.report.page import Chart, Page, Section, Table, render
from secateur.report.records import Measurement, SizeCost
from secateur.report.rows import Tables, terminal
from secateur.result_directory import PAGE_FILE, write_summary

# Marks on the curve: nats per token lost on the model's own answers, or on text of other sources without these.
MARKS = {"hardly noticed": 0.05, "with a polish": 0.5, "too far": 1.0}
# Of the texts that judge, the first one of these that is there is what marks go by.
ANSWERS, OTHER = "own answers", "other text"
# A table has the shares that are multiples of this, in percent; a picture ends at so many nats.
STEP, MOST_NATS = 10, 2.5


def write_measurement(directory: Path, measurement: Measurement) -> Measurement:
    """Write the page and `result.json`; return the measurement with the digests of its files."""
    (directory / PAGE_FILE).write_text(render(measurement_page(measurement)), encoding="utf-8")
    return write_summary(directory, measurement)


def measurement_table(measurement: Measurement) -> Tables:
    """Return what the terminal shows: a table for each form, and the marks."""
    return terminal(_tables(measurement), _notes(measurement), warnings=measurement.warnings)


def measurement_page(measurement: Measurement) -> Page:
    """Return the page: the picture first, then the tables, and what was cut to foretell from."""
    shares = marked(measurement)
    verdict = "; ".join(f"{name}: {_until(name)} {share:.1%}" for name, share in shares.items())
    lines = {
        (judged if form == next(iter(measurement.forms)) else f"{judged}, {form}"): _line(costs, judged)
        for form, costs in measurement.forms.items()
        for judged in (*_first(costs), "mean of domains")
    }
    chart = Chart("Nats per token lost, by the share of all parameters that goes", lines, shares, MOST_NATS)
    probes = _table("Cut and judged", measurement.probes, measurement.probes)
    sections = [
        Section("curve", "How much can go", [f"{name}: {text}" for name, text in _notes(measurement)], chart=chart),
        Section("sizes", "Size by size", tables=_tables(measurement)),
        Section("probes", "What this rests on", tables=[probes], code=measurement.command),
    ]
    title = f"{measurement.model}: what smaller costs, by secateur"
    return Page(title, f"{verdict[:1].upper()}{verdict[1:]}.", measurement.warnings, (), sections)


def marked(measurement: Measurement) -> dict[str, float]:
    """Return the largest share at which each mark is kept, of equal widths, by straight lines between sizes."""
    costs = next(iter(measurement.forms.values()))
    line = [(0.0, 0.0), *_line(costs, _first(costs)[0])]
    shares = dict[str, float]()
    for name, nats in MARKS.items():
        shares[name] = line[-1][0]
        for (left, before), (right, after) in pairwise(line):
            if after > nats:
                shares[name] = left + (right - left) * (nats - before) / (after - before)
                break
    return shares


def _until(mark: str) -> str:
    return "from" if mark == "too far" else "up to"


def _first(costs: Sequence[SizeCost]) -> list[str]:
    """Return what is told first of what judged: other text, and before it the model's own answers, if it gives any."""
    return [name for name in (ANSWERS, OTHER) if name in costs[0].lost]


def _domains(cost: SizeCost) -> list[str]:
    return [name for name in cost.lost if name not in (ANSWERS, OTHER)]


def _mean(cost: SizeCost) -> float:
    return sum(cost.lost[name] for name in _domains(cost)) / len(_domains(cost))


def _line(costs: Sequence[SizeCost], judged: str) -> list[tuple[float, float]]:
    return [(cost.removed, cost.lost[judged] if judged in cost.lost else _mean(cost)) for cost in costs]


def _tables(measurement: Measurement) -> list[Table]:
    tables = list[Table]()
    for form, costs in measurement.forms.items():
        shown = [cost for cost in costs if round(100 * cost.removed) % STEP in (0, 1, STEP - 1)]
        tables.append(_table(f"{measurement.model}, {form}: nats per token lost", shown, costs))
    return tables


def _table(caption: str, shown: Sequence[SizeCost], costs: Sequence[SizeCost]) -> Table:
    rows = [[name, *(f"{cost.lost[name]:.3f}" for cost in shown)] for name in (*_first(costs), *_domains(costs[0]))]
    rows.append(["mean of domains", *(f"{_mean(cost):.3f}" for cost in shown)])
    rows.append(["parameters", *(f"{cost.num_params / 1e6:,.1f} M" for cost in shown)])
    rows += [[kind, *(human_bytes(cost.num_bytes[kind]) for cost in shown)] for kind in costs[0].num_bytes]
    return Table(caption, ("goes", *(f"{cost.removed:.1%}" for cost in shown)), rows)


def _notes(measurement: Measurement) -> list[tuple[str, str]]:
    first = _first(next(iter(measurement.forms.values())))[0]
    marks = [
        (name, f"{_until(name)} {share:.1%}, {MARKS[name]:g} nats per token on {first}")
        for name, share in marked(measurement).items()
    ]
    probes = ", ".join(f"{probe.removed:.1%}" for probe in measurement.probes)
    told = f"without a polish, from models cut to {probes} and judged; the middle one is {measurement.band:.0%} off"
    return [*marks, ("foretold", f"{told}, as a mean over texts, where the others foretell it")]
