"""One group's step, whatever kind its units are of; and the same step again from what was kept of it.

In: the walk standing before the group's layer, how many units to keep. Out: the layer with fewer units, the kept
indices, the line of the run log. `STEPS` says what is done with a kind of unit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from secateur.arch_group import Group, Kind
from secateur.channels import cut_channels, prune_channels
from secateur.expert_channels import cut_expert_channels, prune_expert_channels
from secateur.experts import cut_experts, prune_experts
from secateur.memory import release_freed
from secateur.ranks import from_first
from secateur.recipe import Recipe
from secateur.selection import Method, Task
from secateur.walk import Walk

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step:
    """What is done with one kind of unit.

    `prune`: measure, select, repair and cut; returns the kept indices and the log line. `cut`: the cut alone, of the
    layer and these indices. What the repair changed is `group.parts.refitted`.
    """

    prune: Callable[[Task], tuple[Tensor, dict[str, Any]]]
    cut: Callable[[nn.Module, Group, Tensor], None]


STEPS: dict[Kind, Step] = {
    "channels": Step(prune_channels, cut_channels),
    "heads": Step(prune_channels, cut_channels),
    "experts": Step(prune_experts, cut_experts),
    "expert_channels": Step(prune_expert_channels, cut_expert_channels),
}
"""By `Group.kind`. A new kind of unit is a module with these two functions and an entry here."""


def method_of(recipe: Recipe) -> Method:
    """Return what of the recipe says how units are chosen and readers repaired."""
    return Method(
        score=recipe.score,
        obs_batch=recipe.obs_batch,
        compensate=recipe.compensate,
        damping=recipe.damping,
        damping_factors=recipe.damping_factors,
        target_mix=recipe.target_mix or 0.0,
        weighting=recipe.domain_weighting,
    )


@torch.no_grad()
def prune_group(
    walk: Walk,
    group: Group,
    num_keep: int,
    recipe: Recipe,
    shares: dict[str, float],
    seed: int,
    scores_U: Tensor | None = None,
) -> tuple[Int64[Tensor, "*E K"], dict[str, Any]]:
    """Measure, select, compensate and cut one group; return the kept indices and the log line.

    `scores_U`: the units' scores, where they were measured on the whole model before.
    """
    with walk.layer(group.layer):
        task = Task(walk, group, num_keep, method_of(recipe), shares, seed, scores_U, _decided)
        return STEPS[group.kind].prune(task)


@torch.no_grad()
def redo_group(layer: nn.Module, group: Group, stored: dict[str, Tensor]) -> Tensor:
    """Do to the layer, bit for bit, what `prune_group` did to such a layer, and return the kept indices.

    `stored`: what `outcome_of` said then.
    """
    keep = stored["keep"].to(next(layer.parameters()).device)
    STEPS[group.kind].cut(layer, group, keep)
    for name, parameter in group.parts.refitted(layer).items():
        parameter.copy_(stored[name])
    return keep


def outcome_of(layer: nn.Module, group: Group, keep: Tensor) -> dict[str, Tensor]:
    """Return what a layer as it was before the group's step does not tell: which units stay, what was refitted."""
    return {"keep": keep, **group.parts.refitted(layer)}


def _decided(compute: Callable[[], T], /) -> T:
    """Return on every rank what the first computes; memory that it freed goes back to the system."""
    found = from_first(compute)
    release_freed()
    return found
