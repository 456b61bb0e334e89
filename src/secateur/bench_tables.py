"""The tables that `secateur bench` shows. In: a `BenchResult`. Out: rich renderables."""

from collections.abc import Callable, Iterator

from rich.console import Group
from rich.table import Table

from secateur.benchmark import BenchResult, ModelFigures
from secateur.tables import human_bytes


def bench_table(result: BenchResult) -> Group:
    """Return the figures of each model, the speed-up against the ideal, and what the run was."""
    workload, models = result.workload, _models(result)
    title = f"batch {workload.batch}, {workload.prompt_tokens} prompt tokens, {workload.new_tokens} new tokens"
    table = Table("median (lowest to highest)", title=title, title_justify="left", title_style="bold")
    for name in models:
        table.add_column(name, justify="right")
    for label, cell in _ROWS.items():
        table.add_row(label, *(cell(figures) for figures in models.values()))
    notes = Table.grid(padding=(0, 2))
    for label, text in _notes(result):
        notes.add_row(label, text)
    return Group(table, *_speed_up_tables(result), notes)


def _models(result: BenchResult) -> dict[str, ModelFigures]:
    return {"model": result.pruned} if result.dense is None else {"dense": result.dense, "pruned": result.pruned}


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


def _speed_up_tables(result: BenchResult) -> Iterator[Table]:
    table = Table("speed-up", "measured", "ideal", "of ideal")
    for label, found in (("prefill", result.prefill), ("decode", result.decode)):
        if found is None:
            return
        measured = _spread(found.measured.median, (found.measured.lowest, found.measured.highest), 2)
        table.add_row(label, measured, f"{found.ideal:.2f}", f"{found.share_of_ideal:.0%}")
    yield table


def _notes(result: BenchResult) -> Iterator[tuple[str, str]]:
    settings, models = result.settings, _models(result)
    for name, figures in models.items():
        yield name, f"{figures.model}, {figures.dtype}"
    threads = f", {result.num_threads} threads" if settings.device == "cpu" else ""
    yield "run", f"{settings.engine} on {settings.device}{threads}{', torch.compile' if settings.compiled else ''}"
    if result.dense is not None:
        yield "speed-up", "median of the ratios within each repeat, in which the models take turns"
        yield "ideal", "decode: ratio of bytes read per new token; prefill: ratio of operations per prompt token"
    yield "peak memory", "weights and the most a run allocates, by torch's count"
