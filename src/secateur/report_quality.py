"""What a report says of the result: quality by domain and task, speed and memory, dense against pruned.

In: a `ResultFiles`. Out: sections with plots and tables. Pure; rows that the model card has too come from `tables`.
"""

import shlex
from collections.abc import Sequence

from secateur.benchmark import BenchResult, ModelFigures, SpeedUp
from secateur.loss import Loss
from secateur.page import Section, Table
from secateur.plots import Series, Text, dot_plot
from secateur.result_files import ResultFiles
from secateur.tables import figure_rows, human_bytes, loss_rows

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
    rows = [(domain, *cells) for domain, cells in loss_rows(summary, errors=True)]
    table = Table("Nats per token ± standard error (perplexity)", ("domain", *by_name), rows)
    return Section("quality", title, text, (dot_plot(described, domains, series, "nats per token"),), (table,))


def speed_figures(files: ResultFiles) -> list[SpeedFigures]:
    """Return (phase, dense and pruned tokens per second, speed-up) where `secateur bench` has measured them."""
    bench = files.bench
    if bench is None or bench.dense is None or bench.prefill is None or bench.decode is None:
        return []
    (prefill, decode), (prefill_after, decode_after) = _rates(bench.dense), _rates(bench.pruned)
    return [
        ("prefill", prefill, prefill_after, bench.prefill.measured.median),
        ("decode", decode, decode_after, bench.decode.measured.median),
    ]


def _means_and_bars(losses: Sequence[Loss]) -> tuple[list[float], list[tuple[float, float]]]:
    return [loss.nats_per_token for loss in losses], [(loss.standard_error, loss.standard_error) for loss in losses]


def speed(files: ResultFiles) -> Section:
    """Size, and speed and memory beside the ideal where `secateur bench` has measured them."""
    summary, bench, title = files.summary, files.bench, "Speed and memory"
    sizes = Table("Size", ("", "dense", "pruned"), list(figure_rows(summary)))
    if bench is not None and bench.dense is not None:
        text, plot, table = _against_ideal(bench)
        return Section("speed", title, text, (plot,), (table, sizes))
    command = f"secateur bench DIR --against {shlex.quote(summary.model)}"
    text = f"{command} times both models in turns and adds the ideal speed-up, peak memory and cache size."
    return Section("speed", title, (text,), (), (sizes,))


def _against_ideal(bench: BenchResult) -> tuple[Sequence[str], str, Table]:
    dense, pruned, work = bench.dense, bench.pruned, bench.workload
    assert dense is not None and bench.prefill is not None and bench.decode is not None
    ups = {"prefill": bench.prefill, "decode": bench.decode}
    text = (
        f"secateur bench: {bench.settings.engine} on {bench.settings.device}, batch {work.batch}, {work.prompt_tokens} "
        f"prompt and {work.new_tokens} new tokens, {work.repeats} repeats in turns. Bars reach from the slowest to the "
        "fastest repeat. Ideal: operations per prompt token and bytes read per decoded token, dense over pruned.",
    )
    reach = [(up.measured.median - up.measured.lowest, up.measured.highest - up.measured.median) for up in ups.values()]
    series = [
        Series("measured", "pruned", [up.measured.median for up in ups.values()], reach),
        Series("ideal", "ideal", [up.ideal for up in ups.values()]),
    ]
    described = Text("speed-plot", "Speed-up, measured and ideal", "The table has the numbers.")
    plot = dot_plot(described, list(ups), series, "times the dense speed", reference=1.0)
    rows: list[tuple[str, ...]] = [
        (f"{phase}, tokens/s", f"{before:.1f}", f"{after:.1f}", *_speed_up_cells(up))
        for (phase, up), before, after in zip(ups.items(), _rates(dense), _rates(pruned), strict=True)
    ]
    for label, before, after in (
        ("peak memory", dense.peak_bytes, pruned.peak_bytes),
        ("cache per token", dense.costs.kv_cache_bytes_per_token, pruned.costs.kv_cache_bytes_per_token),
    ):
        if before is not None and after is not None:
            rows.append((label, human_bytes(before), human_bytes(after), f"{after / before:.2f}x", "", ""))
    return text, plot, Table("secateur bench", ("", "dense", "pruned", "ratio", "ideal", "of ideal"), rows)


def _speed_up_cells(up: SpeedUp) -> tuple[str, str, str]:
    return f"{up.measured.median:.2f}x", f"{up.ideal:.2f}x", f"{up.share_of_ideal:.0%}"


def _rates(figures: ModelFigures) -> tuple[float, float]:
    return figures.speed.prefill_tokens_per_second, figures.speed.decode_tokens_per_second
