"""`secateur inspect`: what a model is made of and what a run would leave of it, from the config alone.

In: a model reference and a recipe. Out: a frozen `Inspection`. No weight is read; the model exists on the meta device.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from secateur.arch import Group, bind
from secateur.budget import largest_remove, least_keep
from secateur.checkpoint import meta_model, open_checkpoint
from secateur.estimate import MemoryEstimate, estimate_memory
from secateur.recipe import Recipe
from secateur.resolve import resolve
from secateur.summary import Size


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """One kind of group over all layers but protected ones. `num_keep`: mean units that a run leaves."""

    name: str
    unit: str
    num_layers: int
    num_units: int
    num_keep: int
    params_per_unit: int
    num_params: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model's structure and the outcome of a recipe's `remove`."""

    model: str
    family: str
    dtype: str
    size: Size
    groups: tuple[GroupFacts, ...]
    remove_asked: float
    remove_reached: float
    largest_remove: float
    align: int
    num_params_after: int
    num_bytes_after: int
    num_calibration_tokens: int
    memory: MemoryEstimate
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        """Return everything as indented JSON, the memory's peak included."""
        data = dataclasses.asdict(self)
        data["memory"]["peak"] = self.memory.peak
        return json.dumps(data, indent=2) + "\n"


def inspect(model: str | Path, recipe: Recipe | None = None) -> Inspection:
    """Return what the model is made of. Raises the same errors as `prune` would before reading weights."""
    recipe = recipe or Recipe()
    checkpoint = open_checkpoint(model, weights=False)
    shape = meta_model(checkpoint.config)
    arch, size = bind(shape), Size.of(shape)
    resolved = resolve(recipe, arch, shape.config, size.num_params)
    plan, bytes_per_param = resolved.plans[-1], size.num_bytes // size.num_params
    assert resolved.recipe.align is not None and resolved.recipe.calibration.num_tokens is not None
    least = least_keep(resolved.groups, resolved.recipe.align, recipe.min_keep)
    facts = []
    for name in recipe.groups:
        members = [group for group in resolved.groups if group.name == name]
        facts.append(_facts(members, round(mean(plan.num_keep[group.layer, name] for group in members))))
    return Inspection(
        model=checkpoint.reference,
        family=arch.family,
        dtype=str(shape.dtype).removeprefix("torch."),
        size=size,
        groups=tuple(facts),
        remove_asked=recipe.remove,
        remove_reached=plan.removed_fraction,
        largest_remove=largest_remove(resolved.groups, size.num_params, least),
        align=resolved.recipe.align,
        num_params_after=plan.num_params_after,
        num_bytes_after=plan.num_params_after * bytes_per_param,
        num_calibration_tokens=resolved.recipe.calibration.num_tokens,
        memory=estimate_memory(resolved, shape.config, size.num_bytes, bytes_per_param),
        warnings=resolved.warnings,
    )


def _facts(members: list[Group], num_keep: int) -> GroupFacts:
    first = members[0]
    num_params = sum(group.num_units * group.params_per_unit for group in members)
    return GroupFacts(
        first.name, first.unit, len(members), first.num_units, num_keep, first.params_per_unit, num_params
    )
