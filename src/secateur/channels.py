"""Channels and heads: measure a group, choose its units, repair the reader, cut.

In: the walk standing before the group's layer, how many units to keep. Out: the layer with smaller linears, the kept
indices, and the line of the run log that says what was lost and given back.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from secateur.arch import Group, linear
from secateur.cut import cut, rows_of, unit_columns
from secateur.domain_weights import minimax_weights
from secateur.measure import Measurement, measure
from secateur.repair import Repair, repair
from secateur.score import needs_gram
from secateur.selection import Selection, Task, select
from secateur.stats import pool


@torch.no_grad()
def prune_channels(task: Task) -> tuple[Int64[Tensor, " K"], dict[str, Any]]:
    """Measure, select, compensate and cut one group; return the kept indices and the log line."""
    walk, group, method, layer = task.walk, task.group, task.method, task.layer
    is_mlp = not walk.arch.is_in_attention(group)
    reader, num_units = linear(layer, group.reader.module), group.parts.num_units_left(layer)
    measured = measure(
        walk,
        group,
        method.weighting,
        task.shares,
        gram=needs_gram(method.score) or method.compensate == "least_squares",
        drift=is_mlp and bool(walk.dense_BTD),
        to_middle=is_mlp,
    )
    weights: dict[str, float] = {}
    if measured.by_domain and task.num_keep < num_units:
        weights = task.decide(lambda: _weights(task, measured, reader))
        measured = dataclasses.replace(measured, pooled=pool(measured.by_domain, weights), by_domain={})
    selection = task.decide(
        lambda: select(layer, group, measured.pooled, task.num_keep, method, task.seed, task.scores_U)
    )
    columns = rows_of(selection.keep, group.reader.segments, num_units)
    repaired = repair(reader, measured, columns, method, task.decide)
    cut(layer, group, selection.keep, num_units, repaired.weight_HS, repaired.bias_H)
    line = _log_line(group, num_units, measured, selection, repaired)
    return selection.keep, line | ({"domain_weights": weights} if weights else {})


def cut_channels(layer: nn.Module, group: Group, keep: Int64[Tensor, " K"]) -> None:
    """Keep only these units of the group."""
    cut(layer, group, keep, group.parts.num_units_left(layer))


def _weights(task: Task, measured: Measurement, reader: nn.Linear) -> dict[str, float]:
    """Return the domains' weights where they depend on what a cut does to them."""
    segments, num_units = task.group.reader.segments, reader.in_features // task.group.width
    columns_UW, damping = unit_columns(segments, num_units, reader.weight.device), task.method.damping
    return minimax_weights(measured.by_domain, task.shares, reader.weight.float(), columns_UW, task.num_keep, damping)


def _log_line(
    group: Group, num_units: int, measured: Measurement, selection: Selection, repaired: Repair
) -> dict[str, Any]:
    line: dict[str, Any] = {
        "layer": group.layer,
        "group": group.name,
        "kept": len(selection.keep),
        "total": num_units,
        "output_energy": measured.energy,
        "score_quantiles": _quantiles(selection.scores),
    }
    if repaired.guard is not None:
        line |= dataclasses.asdict(repaired.guard) | {"damping": repaired.damping, "condition": repaired.condition}
    return line


def _quantiles(values: Tensor) -> list[float]:
    if not len(values):
        return []
    ordered = values.float().sort().values
    return [float(ordered[round(q * (len(ordered) - 1))]) for q in (0.0, 0.25, 0.5, 0.75, 1.0)]
