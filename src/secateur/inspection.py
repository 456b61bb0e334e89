"""`secateur.inspect`: what a model is made of and what a run would leave of it, from the config alone.

In: a model reference and a recipe. Out: a frozen `Inspection`. No weight is read; the model exists on the meta device.
"""

from pathlib import Path
from statistics import mean
from typing import Any

import torch

from secateur.arch_numbers import text_config
from secateur.budget import Plan, largest_remove, least_keep
from secateur.estimate import MemoryPlan, memory_for
from secateur.inspect_record import GroupFacts, Inspection, Work
from secateur.inspection_groups import groups_to_inspect, possible_groups, serving_after
from secateur.latency import with_prices
from secateur.opening import Opened, open_model
from secateur.prices import parameter_prices
from secateur.progress import Progress, silent
from secateur.recipe import Recipe, as_recipe
from secateur.resolve import Resolved, checked, resolve
from secateur.run import Services
from secateur.work import disk_bytes, seconds_for, work_of


def inspect(
    model: str | Path,
    recipe: Recipe | dict[str, Any] | Path | str | None = None,
    *,
    check_for: str | None = None,
    tp: int = 1,
    progress: Progress = silent,
) -> Inspection:
    """Say what a model is made of, and what a run of the recipe would leave of it and cost, from its config alone.

    `model`: a local directory, a hub id, a `.gguf` file or `smollm2-135m`; no weight is read. `recipe`: as in `prune`.
    `check_for`: `vllm` or `llama.cpp`, to say what keeps it from running the result; `tp`: vLLM's tensor-parallel size.
    `progress`: called with (stage, done, total).

    Returns an `Inspection`: groups, widths before and after, bytes, memory, disk, seconds. For the seconds it measures,
    for a moment, how fast the device multiplies matrices; for target `latency` without `prices` also a few layers.

    Raises the errors that `prune` would before it reads weights: RecipeError, CheckpointError or ArchError.
    """
    return _inspection(model, as_recipe(recipe), check_for, tp, progress)


def _inspection(model: str | Path, recipe: Recipe, check_for: str | None, tp: int, progress: Progress) -> Inspection:
    opened = open_model(model, recipe, weights=False)
    recipe, notes = groups_to_inspect(opened.recipe, opened.arch)
    opened = with_prices(checked(opened.asking(recipe)), Services(progress=progress))
    resolved, arch, size = resolve(opened), opened.arch, opened.size
    memory, operations = memory_for(opened, resolved), work_of(opened, resolved)
    plan, bytes_per_param = resolved.plans[-1], size.num_bytes // size.num_params
    parameters = parameter_prices(arch, resolved.groups, opened.model).with_only(resolved.layers)
    num_params = parameters.total - parameters.gone(resolved.groups, plan.num_keep)
    least = least_keep(resolved.groups, resolved.align, recipe.min_keep)
    taken = resolved.prices.of_all_but(resolved.layers) / resolved.prices.total
    return Inspection(
        model=opened.name,
        family=arch.family,
        dtype=str(opened.model.dtype).removeprefix("torch."),
        size=size,
        num_layers=(arch.num_layers, len(resolved.layers)),
        params_per_layer=arch.params_per_layer[0],
        groups=tuple(_facts(name, resolved, plan) for name in recipe.groups),
        remove_asked=recipe.remove,
        remove_reached=1 - num_params / size.num_params,
        outcome=resolved.outcome(plan.num_keep),
        prices=opened.recipe.prices,
        largest_remove=taken + largest_remove(resolved.groups, resolved.prices, least),
        align=resolved.align,
        num_params_after=num_params,
        num_bytes_after=num_params * bytes_per_param,
        num_calibration_tokens=resolved.num_tokens,
        memory=memory.estimate,
        weights_on_disk=memory.weights_on_disk,
        disk_bytes=disk_bytes(opened, resolved, memory),
        device=str(opened.device),
        operations=operations,
        seconds=_seconds(opened, operations, memory),
        warnings=(*notes, *resolved.warnings),
        possible=possible_groups(arch),
        impossible=arch.omits,
        serving=None if check_for is None else serving_after(check_for, tp, arch, opened.model, plan),
    )


def _seconds(opened: Opened, operations: Work, memory: MemoryPlan) -> Work:
    dtype = torch.float32 if memory.in_float32 else opened.model.dtype
    return seconds_for(operations, text_config(opened.model).hidden_size, dtype, opened.device)


def _facts(name: str, resolved: Resolved, plan: Plan) -> GroupFacts:
    members = [group for group in resolved.groups if group.name == name]
    num_keep = round(mean(plan.num_keep[group.layer, name] for group in members))
    first = members[0]
    num_params = sum(group.num_units * group.params_per_unit for group in members)
    return GroupFacts(
        first.name, first.unit, len(members), first.num_units, num_keep, first.params_per_unit, num_params
    )
