"""What a report says of the result: quality by domain and task, speed and memory, dense against pruned.

In: a `ResultFiles`. Out: sections with plots and tables. Pure; rows that the model card has too come from `tables`.
"""

import shlex
from collections.abc import Sequence

from secateur.bench_tables import bench_tables
from secateur.facts import Loss
from secateur.measured import BenchResult
from secateur.page import Section, Table
from secateur.plots import Series, Text, dot_plot
from secateur.result_files import ResultFiles
from secateur.tables import figure_rows, loss_rows

SpeedFigures = tuple[str, float, float, float]


def quality(files: ResultFiles) -> Section:
    """Loss by domain, before and after, with standard errors."""
    summary, title = files.summary, "Quality by domain"
    by_name = summary.losses_by_name()
    if not by_name:
        return Section("quality", title, ("Not measured: the recipe says evaluate: false.",))
    domains = list(summary.dense_losses)
    series = [Series(name, name, *_means_and_bars([losses[d] for d in domains])) for name, losses in by_name.items()]
    worst = max(domains, key=lambda d: summary.pruned_losses[d].nats_per_token - summary.dense_losses[d].nats_per_token)
    rise = summary.pruned_losses[worst].nats_per_token - summary.dense_losses[worst].nats_per_token
    text = (
        f"Held-out text of the calibration's own domains, in nats per token; lower is better. Worst change: "
        f"{rise:+.3f} on {worst}. Bars and ± are one standard error over blocks of "
        f"{summary.calibration.sequence_length} tokens.",
    )
    described = Text("quality-plot", "Held-out loss by domain", f"{text[0]} The table has every number.")
    rows = list(loss_rows(summary, errors=True))
    table = Table("Nats per token ± standard error (perplexity)", ("domain", *by_name), rows)
    return Section("quality", title, text, (dot_plot(described, domains, series, "nats per token"),), (table,))


def speed_figures(files: ResultFiles) -> list[SpeedFigures]:
    """Return (phase, dense and pruned tokens per second, speed-up) where `secateur bench` has measured them."""
    bench = files.bench
    if bench is None or bench.dense is None:
        return []
    before, after = bench.dense.speed, bench.pruned.speed
    rates = {
        "prefill": (before.prefill_tokens_per_second, after.prefill_tokens_per_second),
        "decode": (before.decode_tokens_per_second, after.decode_tokens_per_second),
    }
    return [(phase, *rates[phase], up.measured.median) for phase, up in bench.speed_ups.items()]


def _means_and_bars(losses: Sequence[Loss]) -> tuple[list[float], list[tuple[float, float]]]:
    return [loss.nats_per_token for loss in losses], [(loss.standard_error, loss.standard_error) for loss in losses]


def speed(files: ResultFiles) -> Section:
    """Size, and speed and memory beside the ideal where `secateur bench` has measured them."""
    summary, bench, title = files.summary, files.bench, "Speed and memory"
    sizes = Table("Size", ("", "dense", "pruned"), list(figure_rows(summary)))
    if bench is not None and bench.dense is not None:
        return Section("speed", title, (_how_timed(bench),), (_speed_up_plot(bench),), (*bench_tables(bench), sizes))
    command = f"secateur bench DIR --against {shlex.quote(summary.model)}"
    text = f"{command} times both models in turns and adds the ideal speed-up, peak memory and cache size."
    return Section("speed", title, (text,), (), (sizes,))


def _how_timed(bench: BenchResult) -> str:
    work = bench.workload
    return (
        f"secateur bench: {bench.settings.engine} on {bench.settings.device}, batch {work.batch}, {work.prompt_tokens} "
        f"prompt and {work.new_tokens} new tokens, {work.repeats} repeats in turns. Bars reach from the slowest to the "
        "fastest repeat. Ideal: operations per prompt token and bytes read per decoded token, dense over pruned."
    )


def _speed_up_plot(bench: BenchResult) -> str:
    ups = bench.speed_ups
    measured = [up.measured for up in ups.values()]
    reach = [(each.median - each.lowest, each.highest - each.median) for each in measured]
    series = [
        Series("measured", "pruned", [each.median for each in measured], reach),
        Series("ideal", "ideal", [up.ideal for up in ups.values()]),
    ]
    described = Text("speed-plot", "Speed-up, measured and ideal", "The table has the numbers.")
    return dot_plot(described, list(ups), series, "times the dense speed", reference=1.0)
