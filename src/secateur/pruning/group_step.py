"""One group's step for any kind of unit, and the same step again from what the store has.

In: the walk before the group's layer. Out: the cut layer, the kept indices, the log line.
"""

import copy
import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.facts import PerDomain
from secateur.methods.compensate import Method, repair
from secateur.methods.depth import remove_layers
from secateur.methods.experts import prune_expert_channels, prune_experts
from secateur.methods.scores import needs_gram
from secateur.methods.select import StepResult, Task, log_line, select
from secateur.model.bind import bind, decoder_layers, text_config
from secateur.model.checkpoint import meta_model
from secateur.model.group import Counts, Group, Kind, cut, linear, rows_of, unit_columns
from secateur.model.per_layer import record_widths
from secateur.model.stock import CausalLM
from secateur.recipe import Recipe
from secateur.stream.measure import measure, minimax_weights
from secateur.stream.statistics import decided, pool


def prune_channels(task: Task) -> StepResult:
    """Measure, select, compensate and cut one group; return the kept indices and the log line."""
    walk, group, method, layer = task.walk, task.group, task.method, task.layer
    is_mlp = group.kind != "heads"
    reader, num_units = linear(layer, group.reader.module), group.num_units_left(layer)
    gram = needs_gram(method.score) or method.compensate == "least_squares"
    measured = measure(
        walk,
        group,
        method.weighting,
        task.shares,
        gram=gram,
        drift=is_mlp and bool(walk.dense_BTD),
        to_middle=is_mlp,
        hand=task.hand,
    )
    weights = PerDomain()
    if measured.by_domain and task.num_keep < num_units:
        columns_UW = unit_columns(group.reader.segments, num_units, reader.weight.device)
        asked = task.shares, reader.weight.float(), columns_UW, task.num_keep, method.damping
        weights = decided(partial(minimax_weights, measured.by_domain, *asked))
        measured = dataclasses.replace(
            measured, pooled=pool(measured.by_domain, weights), by_domain={}
        )
    keep = decided(lambda: select(task, measured.pooled))
    columns = rows_of(keep, group.reader.segments, num_units)
    repaired = repair(reader, measured, columns, method)
    cut(layer, group, keep, repaired.weight_HS)
    line = log_line(group, len(keep), num_units, measured.energy)
    if repaired.guard is not None:
        line |= dataclasses.asdict(repaired.guard)
    return keep, line | ({"domain_weights": weights} if weights else {})


def model_left(
    config: Any, layers: Collection[int], num_keep: Counts, num_tokens: int | None
) -> CausalLM:
    """Return, on meta, the model of `config` with only these layers, units and so many tokens, or
    all.
    """
    model = meta_model(copy.deepcopy(config))
    arch = bind(model)
    if removed := set(range(arch.num_layers)) - set(layers):
        arch = remove_layers(model, arch, removed)
    modules = decoder_layers(model, arch)
    for group in arch.groups:
        count = num_keep.get(group.key, group.num_units)
        if count < group.num_units:
            cut(modules[group.layer], group, torch.arange(count, device="meta"))
    record_widths(model, arch)
    if num_tokens is not None:
        text_config(model).vocab_size = num_tokens
    return meta_model(model.config)  # as it will be built from its file


# Measures, selects, repairs and cuts, by `Group.kind`; returns the kept indices and the log line.
STEPS: dict[Kind, Callable[[Task], StepResult]] = {
    "channels": prune_channels,
    "heads": prune_channels,
    "experts": prune_experts,
    "expert_channels": prune_expert_channels,
}


def method_of(recipe: Recipe) -> Method:
    """Return the recipe's settings for choosing units and repairing readers."""
    return Method(
        score=recipe.choose.score,
        compensate=recipe.repair.compensate,
        damping=recipe.repair.damping,
        target_mix=recipe.repair.target_mix or 0.0,
        weighting=recipe.choose.domain_weighting,
    )


@torch.no_grad()
def prune_group(task: Task) -> StepResult:
    """Prune one group; return kept indices and log line."""
    with task.walk.layer(task.group.layer):
        return STEPS[task.group.kind](task)


@torch.no_grad()
def redo_group(layer: nn.Module, group: Group, stored: dict[str, Tensor]) -> Tensor:
    """Repeat a step bit for bit from what `outcome_of` returned; return the kept indices."""
    keep = stored["keep"].to(next(layer.parameters()).device)
    cut(layer, group, keep)
    for name, parameter in group.refitted(layer).items():
        parameter.copy_(stored[name])
    return keep


def outcome_of(layer: nn.Module, group: Group, keep: Tensor) -> dict[str, Tensor]:
    """Return what `redo_group` needs: the kept indices and the refitted parameters."""
    return {"keep": keep, **group.refitted(layer)}
