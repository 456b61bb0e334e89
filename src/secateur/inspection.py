"""`secateur inspect`: what a model is made of and what a run would leave of it, from the config alone.

In: a model reference and a recipe. Out: a frozen `Inspection`. No weight is read; the model exists on the meta device.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from secateur.arch_numbers import text_config
from secateur.budget import Plan, largest_remove, least_keep
from secateur.estimate import MemoryEstimate, MemoryPlan, memory_for
from secateur.inspection_groups import Possible, groups_to_inspect, possible_groups, serving_after
from secateur.latency import with_prices
from secateur.opening import Opened, open_model
from secateur.prices import Outcome, parameter_prices
from secateur.progress import Progress, silent
from secateur.recipe import MeasuredPrices, Recipe
from secateur.resolve import Resolved, checked, resolve
from secateur.run import Services
from secateur.serving import Serving
from secateur.summary import Size
from secateur.work import Work, disk_bytes, seconds_for, work_of


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """One kind of group over all layers that stay, but for protected ones. `num_keep`: mean units that a run leaves."""

    name: str
    unit: str
    num_layers: int
    num_units: int
    num_keep: int
    params_per_unit: int
    num_params: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model's structure and the outcome of a recipe's `remove`.

    `remove_asked` and `largest_remove` are shares of what the recipe's target counts, see `outcome`; `remove_reached`
    is one of all parameters. `prices`: seconds measured for target `latency`, as the recipe's key of that name.
    `possible`, `impossible`: every group of the family, and those that it cannot have with the reason. `serving`: what
    stands against serving the result, where asked. `operations` and `seconds` are of the whole run but for the choice
    of whole layers; `disk_bytes` the most that it writes.
    """

    model: str
    family: str
    dtype: str
    size: Size
    num_layers: tuple[int, int]  # before, after
    params_per_layer: int  # of the first one
    groups: tuple[GroupFacts, ...]
    remove_asked: float
    remove_reached: float
    outcome: Outcome
    prices: MeasuredPrices | None
    largest_remove: float
    align: int
    num_params_after: int
    num_bytes_after: int
    num_calibration_tokens: int
    memory: MemoryEstimate
    weights_on_disk: bool
    disk_bytes: int
    device: str
    operations: Work
    seconds: Work
    warnings: tuple[str, ...]
    possible: tuple[Possible, ...]
    impossible: dict[str, str]
    serving: Serving | None

    def to_json(self) -> str:
        """Return everything as indented JSON, the memory's peak included."""
        data = dataclasses.asdict(self)
        data["memory"]["peak"] = self.memory.peak
        data["prices"] = self.prices and self.prices.model_dump()
        return json.dumps(data, indent=2) + "\n"


def inspect(
    model: str | Path,
    recipe: Recipe | None = None,
    progress: Progress = silent,
    *,
    server: str | None = None,
    num_gpus: int = 1,
) -> Inspection:
    """Return what the model is made of. Raises the same errors as `prune` would before reading weights.

    Nothing of the model is measured, unless the recipe's target is `latency` and it has no `prices`; how fast the
    device multiplies matrices is, for a moment, so that seconds can be told. `server`: `vllm`, whose rules for so many
    GPUs are then looked up, or `llama.cpp`.
    """
    opened = open_model(model, recipe or Recipe(), weights=False)
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
        serving=None if server is None else serving_after(server, num_gpus, arch, opened.model, plan),
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
