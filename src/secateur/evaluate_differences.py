"""Pruned minus dense, with the standard error of the difference over the same blocks or questions.

In: what was measured of two models. Out: differences by domain, for WikiText-2, and by task and metric.
The two models answer the same questions, so the error is that of the paired differences, smaller than of two samples.
"""

import math
from typing import Any

from secateur.loss import standard_error
from secateur.measured import Change, Differences, Measured, Quality, TaskChange, task_metrics


def differences(dense: Measured, pruned: Measured, tasks: dict[str, dict[str, TaskChange]] | None) -> Differences:
    """Return the differences of text, in nats per token, and with them those of `tasks`."""
    wikitext2 = None
    if dense.wikitext2 is not None and pruned.wikitext2 is not None:
        wikitext2 = _change(dense.wikitext2, pruned.wikitext2)
    domains = {domain: _change(dense.domains[domain], part) for domain, part in pruned.domains.items()}
    return Differences(domains, wikitext2, tasks)


def task_changes(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, dict[str, TaskChange]]:
    """Return the differences by task and metric of what `task_parts` returns for each model."""
    return {
        name: {metric: _task_change(name, metric, dense, pruned) for metric in task_metrics(results)}
        for name, results in pruned["results"].items()
    }


def _change(dense: Quality, pruned: Quality) -> Change:
    pairs = zip(dense.block_nats, pruned.block_nats, strict=True)
    error = standard_error([after - before for before, after in pairs])
    return Change(pruned.nats_per_token - dense.nats_per_token, error)


def _task_change(name: str, metric: str, dense: dict[str, Any], pruned: dict[str, Any]) -> TaskChange:
    before, after = dense["results"][name][metric], pruned["results"][name][metric]
    old, new = (side["item_scores"].get(name, {}).get(metric, []) for side in (dense, pruned))
    paired = _is_mean(old, before) and _is_mean(new, after)
    return TaskChange(
        after - before, standard_error([b - a for a, b in zip(old, new, strict=True)]) if paired else None
    )


def _is_mean(scores: list[Any], value: float) -> bool:
    numbers = all(isinstance(score, int | float) for score in scores)
    return bool(scores) and numbers and math.isclose(sum(scores) / len(scores), value, rel_tol=1e-9, abs_tol=1e-12)
