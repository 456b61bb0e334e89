"""An evaluation for people: the terminal's tables. In: what `evaluate` returns. Out: a rich renderable."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table

from secateur.evaluate_differences import metrics
from secateur.tables import plus_minus

Row = tuple[str, ...]


def evaluation_table(evaluation: dict[str, Any]) -> Group:
    """Return text, KL and tasks; of dense, pruned and difference, or of the one model alone."""
    models = ("dense", "pruned", "difference") if evaluation["against"] else (evaluation["model"],)
    of_kl = ("mean", "95% of tokens below", "same token first")
    tables = (
        _table(("nats/token (perplexity)", *models), _nats_rows(evaluation)),
        _table(("bits/byte", *models), _bits_rows(evaluation)),
        _table(("KL(dense || pruned)", *of_kl), _kl_rows(evaluation)),
        _table(("task", *models), _task_rows(evaluation)),
    )
    notes = Table.grid(padding=(0, 2))
    for note in (*_legend(evaluation), *evaluation["notes"]):
        notes.add_row(f"note: {note}")
    return Group(*(table for table in tables if table.row_count), notes)


def _table(columns: Row, rows: Iterator[Row]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _sides(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    return [evaluation[which] for which in ("dense", "pruned") if which in evaluation]


def _nats_rows(evaluation: dict[str, Any]) -> Iterator[Row]:
    sides, changes = _sides(evaluation), evaluation.get("differences", {})
    for domain in evaluation["pruned"]["domains"]:
        yield domain, *_nats([side["domains"][domain] for side in sides], changes.get("domains", {}).get(domain))
    if "wikitext2" in evaluation["pruned"]:
        label = f"WikiText-2, blocks of {evaluation['settings']['wikitext2_length']}"
        yield label, *_nats([side["wikitext2"] for side in sides], changes.get("wikitext2"))


def _nats(parts: list[dict[str, Any]], change: dict[str, float] | None) -> Iterator[str]:
    for part in parts:
        yield f"{part['nats_per_token']:.3f} ({part['perplexity']:.2f})"
    if change is not None:
        yield f"{change['nats_per_token']:+.3f}{plus_minus(change['standard_error'])}"


def _bits_rows(evaluation: dict[str, Any]) -> Iterator[Row]:
    for domain in evaluation["pruned"]["domains"]:
        bits = [side["domains"][domain]["bits_per_byte"] for side in _sides(evaluation)]
        change = [f"{bits[1] - bits[0]:+.4f}"] if len(bits) == 2 else []
        yield domain, *(f"{value:.4f}" for value in bits), *change


def _kl_rows(evaluation: dict[str, Any]) -> Iterator[Row]:
    for domain, part in evaluation.get("kl", {}).items():
        mean = f"{part['mean']:.3f}{plus_minus(part['standard_error'])}"
        yield domain, mean, f"{part['p95']:.2f}", f"{part['top1_agreement']:.1%}"


def _task_rows(evaluation: dict[str, Any]) -> Iterator[Row]:
    sides = [side["tasks"] for side in _sides(evaluation) if "tasks" in side]
    for name, results in sides[-1]["results"].items() if sides else ():
        for metric in metrics(results):
            label = f"{name}, {metric.removesuffix(',none')}"
            cells = [_score(side["results"][name], metric) for side in sides]
            if "differences" in evaluation:
                change = evaluation["differences"]["tasks"][name][metric]
                cells.append(_with_error(f"{change['difference']:+.4g}", change["standard_error"]))
            yield label, *cells


def _score(results: dict[str, Any], metric: str) -> str:
    name, _, filter_name = metric.partition(",")
    return _with_error(f"{results[metric]:.4g}", results.get(f"{name}_stderr,{filter_name}"))


def _with_error(value: str, error: Any) -> str:
    return f"{value} ± {error:.2g}" if isinstance(error, float) else value


def _legend(evaluation: dict[str, Any]) -> Iterator[str]:
    pruned = evaluation["pruned"]
    if pruned["domains"]:
        num_tokens = sum(part["num_tokens"] for part in pruned["domains"].values())
        yield f"domains: {num_tokens:,} predicted tokens; KL in nats per token, over the whole vocabulary."
    if "tasks" in pruned:
        sources = sorted(set(pruned["tasks"]["sources"].values())) or ["the hub"]
        yield f"tasks: lm-evaluation-harness {pruned['tasks']['lm_eval_version']}, rows from {', '.join(sources)}."
    yield "± is one standard error, of a difference over the same blocks or questions."
