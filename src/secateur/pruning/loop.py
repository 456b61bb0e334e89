"""Rounds: what each group of units keeps is planned, then they go layer by layer, on the pruned
stream.

In: runs of models without the layers and tokens that go. Out: the models, cut in place, and which
units stay.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from secateur.methods.budget import (
    GroupProfile,
    Plan,
    Profiles,
    curve_plan,
    plan_of,
    predicted_rise,
)
from secateur.methods.profile import ProfileSettings, profile
from secateur.methods.select import Task
from secateur.model.bind import decoder_layers
from secateur.model.group import Group, GroupKey, Keeps, original_units
from secateur.model.per_layer import record_widths
from secateur.pruning.group_step import method_of, outcome_of, prune_group, redo_group
from secateur.pruning.run import LossWatch, Run, keep_statistics
from secateur.ranks import from_first
from secateur.stream.device import (
    LayersOnDisk,
    embeddings_on_disk,
    offload,
    peak_bytes,
    release_freed,
)
from secateur.stream.statistics import BY_DOMAIN
from secateur.stream.walk import Batch, Walk


class _Member:
    """A model that is cut: its run, the units that stay so far, and in a round its plan and its
    stream.
    """

    plan: Plan
    walk: Walk

    def __init__(self, run: Run) -> None:
        """Begin with the whole model."""
        assert run.arch.num_layers == len(run.resolved.layers), "whole layers go first"
        self.run, self.watch = run, LossWatch(run)
        self.keeps: Keeps = {
            group.key: torch.arange(group.num_units) for group in run.resolved.groups
        }


def prune_together(runs: Sequence[Run]) -> list[Keeps]:
    """Prune the models, all rounds; return each group's kept units by their original indices.

    Several are copies of one dense model, on the same text, that lose different shares in one round
    each. One walk carries a pruned stream of each beside one dense stream; each becomes what it
    would be alone, to the byte.

    Whole layers have gone; layers are numbered as the model then does. Raises RecipeError if
    a protected domain allows no further round.
    """
    run, num_rounds = runs[0], len(runs[0].resolved.plans)
    assert len(runs) == 1 or {len(sized.resolved.plans) for sized in runs} == {1}, (
        "several go in one round"
    )
    scratch = TemporaryDirectory(prefix="prune-", dir=run.services.scratch)
    # A trim leaves embedding and head in memory.
    on_disk = run.weights_on_disk and run.dense_tokens is None
    with (
        scratch as folder,
        embeddings_on_disk(run.model, Path(folder), are_there=on_disk) as unload,
    ):
        dense_layers = LayersOnDisk(Path(folder), "dense")
        members = [_Member(sized) for sized in runs]
        for number in range(1, num_rounds + 1):
            # No width left to remove in this round: skip it.
            if any(sized.resolved.removals[number - 1] > 0 for sized in runs):
                _begin_round(members, number)
                unload()
                # Two alternating sets of files: one stays mapped until the next round replaces it.
                finished = (
                    LayersOnDisk(Path(folder), f"finished-{number % 2}")
                    if run.weights_on_disk
                    else None
                )
                _one_round(members, number, dense_layers, finished)
            for member in members:
                member.watch.after_round(number)
                record_widths(member.run.model, member.run.arch)
    return [member.keeps for member in members]


def _begin_round(members: list[_Member], number: int) -> None:
    """Plan the round of each member, and bring their streams to the first layer."""
    first = members[0].run
    batches = first.batches()
    for member in members:
        member.plan = plan_round(member.run, number, batches, member.watch.allowed_rise())
    # A round that the store has whole needs no stream, unless somebody waits for it.
    steps = ((member.run, group) for member in members for group in member.run.resolved.groups)
    idle = (
        all(run.services.store.has(_step_name(number, group)) for run, group in steps)
        and first.after_dense is None
    )
    for member in members:
        # Where drift is made up for, a dense stream runs beside.
        dense = member is members[0] and member.run.resolved.target_mix > 0
        member.walk = Walk(member.run.model, member.run.arch, [] if idle else batches, dense=dense)
        member.walk.dense_BTD = members[0].walk.dense_BTD


def _one_round(
    members: list[_Member], number: int, dense_layers: LayersOnDisk, finished: LayersOnDisk | None
) -> None:
    run, num_rounds = members[0].run, len(members[0].run.resolved.plans)
    stage, num_layers = f"prune, round {number} of {num_rounds}", run.arch.num_layers
    run.services.progress(stage, 0, num_layers * len(members))
    for index in range(num_layers):
        if run.resolved.target_mix:
            groups = [group for group in run.resolved.groups if group.layer == index]
            _advance_dense(
                members[0].walk, index, groups, dense_layers, is_last=number == num_rounds
            )
        for place, member in enumerate(members):
            # Prune the layer's groups, and move the member's stream through what is left.
            for group in member.run.resolved.groups:
                if group.layer == index:
                    keep = _group_step(member, group, number)
                    member.keeps[group.key] = original_units(member.keeps[group.key], keep.cpu())
            if index + 1 < num_layers:
                member.walk.advance(index)
            if finished is not None:
                layer = member.walk.layers[index]
                offload(layer)  # it is mapped again and must be in its file only
                finished.save(index, layer, [])
                finished.restore(index, layer)
            release_freed()
            run.services.progress(
                stage, index * len(members) + place + 1, num_layers * len(members)
            )
    if number == 1 and run.after_dense is not None:
        run.after_dense(members[0].walk)


def _group_step(member: _Member, group: Group, number: int) -> Tensor:
    """Prune the group, or repeat the stored step; return the kept indices."""
    run, walk, plan = member.run, member.walk, member.plan
    layer, recipe, name = walk.layers[group.layer], run.resolved.recipe, _step_name(number, group)
    finished = run.services.store.find(name)
    if finished is not None:
        outcome, line = finished
        keep = redo_group(layer, group, outcome)
    else:
        start, seed = time.perf_counter(), layer_seed(recipe.seed, number, group.layer)
        kept, num_keep = run.resolved.kept.get(group.key), plan.num_keep[group.key]
        hand, statistics = None, dict[str, Tensor]()
        if run.supports is not None:
            hand = partial(run.supports.mix, name, plan.removed_share)
        elif run.keeps_statistics:
            hand = partial(keep_statistics, statistics)
        keep, line = prune_group(
            Task(walk, group, num_keep, method_of(recipe), run.shares, seed, kept, hand)
        )
        seconds = round(time.perf_counter() - start, 3)
        line = {
            "event": "group",
            "round": number,
            **line,
            "seconds": seconds,
            "peak_bytes": peak_bytes(),
        }
        run.services.store.save(name, outcome_of(layer, group, keep) | statistics, line)
    run.services.log.write(line)
    return keep


def _step_name(number: int, group: Group) -> str:
    return f"round-{number}-layer-{group.layer}-{group.name}"


def _advance_dense(
    walk: Walk, index: int, groups: list[Group], dense_layers: LayersOnDisk, *, is_last: bool
) -> None:
    """Move the dense stream through the layer as it was before the first round."""
    if index in dense_layers.indices:
        with dense_layers.restored(index, walk.layers[index]):
            walk.advance_dense(index)
        return
    if not is_last:
        dense_layers.save(index, walk.layers[index], groups)
    walk.advance_dense(index)


def plan_round(run: Run, number: int, batches: list[Batch], max_rise: dict[str, float]) -> Plan:
    """Return the plan of round `number`.

    `max_rise`: how much each protected domain's loss may still rise. Raises RecipeError if the
    round's share cannot go within these limits.
    """
    resolved = run.resolved
    if resolved.kept or resolved.is_uniform:
        return resolved.plans[number - 1]
    groups, prices = resolved.groups, resolved.prices_left
    remove = resolved.removals[number - 1]

    def planned() -> list[tuple[GroupKey, int]]:
        profiles = run.profiles or profiles_of(run, number, batches)
        plan = from_first(lambda: curve_plan(groups, profiles, prices, remove, max_rise))
        predicted = predicted_rise(profiles, plan.num_keep)
        run.services.log.write(
            {"event": "plan", "round": number, "budget": "curve", "predicted_rise": predicted}
        )
        return [*plan.num_keep.items()]

    num_keep = run.services.store.value(
        f"round-{number}-plan", planned, kind=list[tuple[GroupKey, int]]
    )
    return plan_of(groups, prices, dict(num_keep))


def profiles_of(run: Run, number: int, batches: list[Batch]) -> Profiles:
    """Return the profiles of the model as it is now; slopes are those of this round's share."""
    resolved, progress = run.resolved, run.services.progress
    groups, weighting = resolved.groups, resolved.recipe.choose.domain_weighting
    layers = decoder_layers(run.model, run.arch)

    def made() -> list[tuple[GroupKey, GroupProfile]]:
        # Slopes are measured at the width of an equal share for all groups.
        now = sum(g.num_units_left(layers[g.layer]) * g.params_per_unit for g in groups)
        then = sum(resolved.plans[number - 1].num_keep[g.key] * g.params_per_unit for g in groups)
        settings = ProfileSettings(
            # Weights by domain act through the slopes.
            weighting="energy" if weighting in BY_DOMAIN else weighting,
            shares=run.shares,
            damping=resolved.damping,
            align=resolved.align,
            perturbation=1 - then / now,
        )
        return [*profile(run.model, run.arch, groups, batches, settings, progress=progress).items()]

    kind = list[tuple[GroupKey, GroupProfile]]
    return dict(run.services.store.value(f"round-{number}-profiles", made, kind=kind))


def layer_seed(seed: int, number: int, layer: int) -> int:
    """Return a different seed for each layer and round."""
    return (seed * 1_000_003 + number) * 1_000_003 + layer
