"""A bench for people: the tables that the terminal and the report share. In: a `BenchResult`. Out: tables."""

from collections.abc import Callable, Iterator

from rich.console import Group

from secateur.measured import BenchResult, ModelFigures
from secateur.page import Table
from secateur.tables import human_bytes, terminal


def bench_table(result: BenchResult) -> Group:
    """Return the figures of each model, the speed-up against the ideal, and what the run was."""
    return terminal(bench_tables(result), _notes(result))


def bench_tables(result: BenchResult) -> list[Table]:
    """Return the figures of each model, and the speed-up against the ideal, empty for one model alone."""
    work = result.workload
    caption = f"batch {work.batch}, {work.prompt_tokens} prompt tokens, {work.new_tokens} new tokens"
    models = result.models
    figures = [(label, *(cell(each) for each in models.values())) for label, cell in _ROWS.items()]
    speed_ups = []
    for label, found in result.speed_ups.items():
        measured = _spread(found.measured.median, (found.measured.lowest, found.measured.highest), 2)
        speed_ups.append((label, measured, f"{found.ideal:.2f}x", f"{found.share_of_ideal:.0%}"))
    return [
        Table(caption, ("median (lowest to highest)", *models), figures),
        Table("speed-up against the ideal", ("", "measured", "ideal", "of ideal"), speed_ups),
    ]


def _spread(median: float, extremes: tuple[float, float], digits: int = 1) -> str:
    return f"{median:.{digits}f} ({extremes[0]:.{digits}f} to {extremes[1]:.{digits}f})"


_ROWS: dict[str, Callable[[ModelFigures], str]] = {
    "prefill, tokens/s": lambda each: _spread(each.speed.prefill_tokens_per_second, each.speed.prefill_range),
    "decode, tokens/s": lambda each: _spread(each.speed.decode_tokens_per_second, each.speed.decode_range),
    "first token, s": lambda each: _spread(each.speed.first_token_seconds, each.speed.first_token_range, 3),
    "parameters": lambda each: f"{each.size.num_params:,}",
    "weights": lambda each: human_bytes(each.size.num_bytes),
    "peak memory": lambda each: "not measured" if each.peak_bytes is None else human_bytes(each.peak_bytes),
    "cache per token": lambda each: human_bytes(each.costs.kv_cache_bytes_per_token),
    "read per new token": lambda each: human_bytes(each.costs.decode_bytes_per_token),
    "GFLOP per prompt token": lambda each: f"{each.costs.prefill_flops_per_token / 1e9:.4g}",
}


def _notes(result: BenchResult) -> Iterator[tuple[str, str]]:
    settings = result.settings
    for name, figures in result.models.items():
        yield name, f"{figures.model}, {figures.dtype}"
    threads = f", {result.num_threads} threads" if settings.device == "cpu" else ""
    yield "run", f"{settings.engine} on {settings.device}{threads}{', torch.compile' if settings.compiled else ''}"
    if result.dense is not None:
        yield "speed-up", "median of the ratios within each repeat, in which the models take turns"
        yield "ideal", "decode: ratio of bytes read per new token; prefill: ratio of operations per prompt token"
    yield "peak memory", "weights and the most a run allocates, by torch's count"
