"""Pruned minus dense, with the standard error of the difference over the same blocks or questions.

In: two mappings as `evaluate` measures them. Out: differences by domain, for WikiText-2, and by task and metric.
The two models answer the same questions, so the error is that of the paired differences, smaller than of two samples.
"""

import math
from typing import Any

from secateur.loss import standard_error

# What a task is plotted by: the last of these that it has. Every metric is in the tables.
PLOTTED_METRICS = ("exact_match", "acc", "acc_norm")


def differences(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
    """Return {domains, wikitext2, tasks}; the first two in nats per token. What was not measured is left out."""
    found: dict[str, Any] = {
        "domains": {domain: _nats(dense["domains"][domain], part) for domain, part in pruned["domains"].items()}
    }
    if "wikitext2" in pruned:
        found["wikitext2"] = _nats(dense["wikitext2"], pruned["wikitext2"])
    if "tasks" in pruned:
        found["tasks"] = {
            name: {metric: _metric(name, metric, dense["tasks"], pruned["tasks"]) for metric in metrics(results)}
            for name, results in pruned["tasks"]["results"].items()
        }
    return found


def metrics(results: dict[str, Any]) -> list[str]:
    """Return the metrics ("acc,none") of one task's results in the harness's shape."""
    return [key for key in results if "," in key and "_stderr," not in key]


def _nats(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, float]:
    pairs = zip(dense["block_nats"], pruned["block_nats"], strict=True)
    return {
        "nats_per_token": pruned["nats_per_token"] - dense["nats_per_token"],
        "standard_error": standard_error([after - before for before, after in pairs]),
    }


def _metric(name: str, metric: str, dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, float | None]:
    """Return the difference; its error is None for groups and for metrics that are no mean over questions."""
    before, after = dense["results"][name][metric], pruned["results"][name][metric]
    old, new = (side["item_scores"].get(name, {}).get(metric, []) for side in (dense, pruned))
    paired = _is_mean(old, before) and _is_mean(new, after)
    error = standard_error([b - a for a, b in zip(old, new, strict=True)]) if paired else None
    return {"difference": after - before, "standard_error": error}


def _is_mean(scores: list[Any], value: float) -> bool:
    numbers = all(isinstance(score, int | float) for score in scores)
    return bool(scores) and numbers and math.isclose(sum(scores) / len(scores), value, rel_tol=1e-9, abs_tol=1e-12)
