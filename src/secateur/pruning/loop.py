"""The loop: whole layers go first, then rounds over layers over groups, on the pruned stream."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from secateur.methods.budget import Plan
from secateur.methods.depth import choose_layers, fold_patch, narrow_readers, remove_layers
from secateur.methods.profile import PROBE_BLOCKS, first_blocks
from secateur.model.bind import Arch, decoder_layers
from secateur.model.group import Group, add_zero_biases, linear, original_units
from secateur.model.kept_units import Keeps
from secateur.model.per_layer import record_widths
from secateur.pruning.group_step import outcome_of, prune_group, redo_group
from secateur.pruning.resolve import NARROW_TOKENS_PER_INPUT, protected_layers, removed_layers
from secateur.pruning.round_plan import layer_seed, plan_round
from secateur.pruning.run import LossWatch, Run, watched_losses
from secateur.stream.device import peak_bytes, release_freed
from secateur.stream.offload import LayersOnDisk, embeddings_on_disk, offload
from secateur.stream.walk import Batch, Walk


def remove_depth(run: Run) -> Run:
    """Remove the recipe's `depth` layers in place; call it before `prune_together`.

    Which: the recipe's `remove.layers`, or those of `choose_layers` on the first block of each
    domain of the first round, in a model about as narrow as the widths will make it. Layers go from
    the first on, so that each fold is fitted to what the layers before it then give. They are
    folded on all blocks of the first round if the recipe compensates by least squares and the
    family adds an FFN's output as it is. All that follows starts from this model; only the safety
    net compares with the dense one.
    """
    resolved, dense, services = run.resolved, run.arch, run.services
    if not resolved.depth:
        return run
    dense_losses = run.dense_losses or watched_losses(run, "dense")
    batches = run.batches()
    named = removed_layers(resolved.recipe, dense)
    costs = {} if named else _chosen(run, batches)
    gone, order = sorted(named or costs), list(costs)
    layers = tuple(index for index in range(dense.num_layers) if index not in gone)
    arch = dense
    services.progress("remove layers", 0, resolved.depth)
    for done, layer in enumerate(gone):
        start = time.perf_counter()
        patch = _patch(run, arch, layer, layer - done, batches)
        arch = remove_layers(run.model, arch, [layer - done])
        choice = {"chosen": order.index(layer) + 1, "kl": costs[layer]} if costs else {}
        line = {"event": "layer", "layer": layer, **choice, **patch}
        services.log.write({**line, "seconds": round(time.perf_counter() - start, 3), "peak_bytes": peak_bytes()})
        release_freed()
        services.progress("remove layers", done + 1, resolved.depth)
    return dataclasses.replace(run, arch=arch, resolved=resolved.with_layers(layers), dense_losses=dense_losses)


def _chosen(run: Run, batches: list[Batch]) -> dict[int, float]:
    """Return the KL of each layer to remove, in the order chosen."""
    recipe, arch, progress = run.resolved.recipe, run.arch, run.services.progress

    def chosen() -> list[tuple[int, float]]:
        blocks, depth = first_blocks(batches, PROBE_BLOCKS), run.resolved.depth
        readers, protected = _narrow_readers(run, batches), protected_layers(recipe, arch)
        costs = choose_layers(run.model, arch, blocks, depth, readers=readers, protected=protected, progress=progress)
        return list(costs.items())

    return dict(run.services.store.value("removed layers", chosen))


def _narrow_readers(run: Run, batches: list[Batch]) -> dict[int, Tensor]:
    """Return FFN readers about as narrow as the widths will be; none if none gets narrower."""
    recipe, plan = run.resolved.recipe, run.resolved.plans[-1]
    ffns = [group for group in run.resolved.groups if group.name == "ffn" and group.kind == "channels"]
    kept, total = sum(plan.num_keep[each.key] for each in ffns), sum(each.num_units for each in ffns)
    if kept == total:
        return {}
    # The plan is for the layers expected to stay, so only its share is of use.
    domains, widest = run.text.domains, max(group.num_units for group in ffns)
    num_blocks = math.ceil(NARROW_TOKENS_PER_INPUT * widest / (len(domains) * run.text.sequence_length))
    spare = min(len(domain.calibration) for domain in domains) - PROBE_BLOCKS
    after = PROBE_BLOCKS if spare >= num_blocks else 0
    unprotected = set(range(run.arch.num_layers)) - protected_layers(recipe, run.arch)
    damping = run.resolved.damping if recipe.repair.compensate == "least_squares" else None
    blocks = first_blocks(batches, num_blocks, after=after)
    with_ffn = {group.layer for group in run.arch.select(("ffn",))}
    shares = dict.fromkeys(unprotected & with_ffn, kept / total)
    return narrow_readers(run.model, run.arch, blocks, [shares], damping, run.services.progress)[0]


def _patch(run: Run, arch: Arch, layer: int, position: int, batches: list[Batch]) -> dict[str, Any]:
    """Fold `layer`, now at `position`, into the one before if possible; return the verdict."""
    recipe = run.resolved.recipe
    if position == 0 or recipe.repair.compensate != "least_squares" or not arch.mlp_adds_directly:
        return {}
    ffn = next((group for group in arch.select(("ffn",)) if group.layer == position - 1), None)
    if ffn is None:  # its FFN is of experts, which no linear reads
        return {}
    before = decoder_layers(run.model, arch)[position - 1]
    name, weight = f"patch for layer {layer}", linear(before, ffn.reader.module).weight
    found = run.services.store.find(name)
    if found is not None:
        with torch.no_grad():
            weight.copy_(found[0]["weight"])
        return found[1]
    patch = dataclasses.asdict(fold_patch(run.model, arch, position, batches, run.resolved.damping))
    run.services.store.save(name, {"weight": weight}, patch)
    return patch


@dataclasses.dataclass(slots=True)
class _Member:
    """A model that is cut: its run, the units that stay so far, and in a round its plan and its stream."""

    run: Run
    watch: LossWatch
    keeps: Keeps
    plan: Plan = field(init=False)
    walk: Walk = field(init=False)

    @classmethod
    def of(cls, run: Run) -> "_Member":
        """Return the whole model, with what its recipe adds to its readers."""
        assert run.arch.num_layers == len(run.resolved.layers), "remove_depth comes first"
        groups, layers = run.resolved.groups, decoder_layers(run.model, run.arch)
        if run.resolved.recipe.repair.compensate == "bias":
            for group in groups:
                add_zero_biases(layers[group.layer], group)
        keeps = {group.key: torch.arange(group.num_units) for group in groups}
        return cls(run, LossWatch(run), keeps)

    @property
    def target_mix(self) -> float:
        """The part of the drift that is made up for, by which a dense stream runs beside."""
        return self.run.resolved.target_mix


def prune_together(runs: Sequence[Run]) -> list[Keeps]:
    """Prune the models, all rounds; return each group's kept units by their original indices.

    Several are copies of one dense model, on the same text, that lose different shares in one round each.
    One walk carries a pruned stream of each beside one dense stream; each becomes what it would be alone,
    to the byte.

    Call `remove_depth` first; layers are numbered as the model then does. Raises RecipeError if
    a protected domain allows no further round.
    """
    run, num_rounds = runs[0], len(runs[0].resolved.plans)
    assert len(runs) == 1 or {len(each.resolved.plans) for each in runs} == {1}, "several go in one round"
    scratch = TemporaryDirectory(prefix="prune-", dir=run.services.scratch)
    # A trim leaves embedding and head in memory.
    on_disk = run.weights_on_disk and run.dense_tokens is None
    with scratch as folder, embeddings_on_disk(run.model, Path(folder), are_there=on_disk) as unload:
        dense_layers, members = LayersOnDisk(Path(folder), "dense"), [_Member.of(each) for each in runs]
        for number in range(1, num_rounds + 1):
            # No width left to remove in this round: skip it.
            if any(each.resolved.removals[number - 1] > 0 for each in runs):
                _begin_round(members, number)
                unload()
                # Two alternating sets of files: one stays mapped until the next round replaces it.
                finished = LayersOnDisk(Path(folder), f"finished-{number % 2}") if run.weights_on_disk else None
                _one_round(members, number, dense_layers, finished)
            for member in members:
                member.watch.after_round(number)
                _update_config(member.run)
    return [member.keeps for member in members]


def _begin_round(members: list[_Member], number: int) -> None:
    """Plan the round of each member, and bring their streams to the first layer."""
    first = members[0].run
    batches = first.batches()
    for member in members:
        member.plan = plan_round(member.run, number, batches, member.watch.allowed_rise())
    # A round that the store has whole needs no stream, unless somebody waits for it.
    steps = ((each.run, group) for each in members for group in each.run.resolved.groups)
    idle = all(run.services.store.has(_step_name(number, group)) for run, group in steps) and first.after_dense is None
    for member in members:
        dense = bool(member.target_mix) and member is members[0]
        member.walk = Walk(member.run.model, member.run.arch, [] if idle else batches, dense=dense)
        member.walk.dense_BTD = members[0].walk.dense_BTD


def _one_round(members: list[_Member], number: int, dense_layers: LayersOnDisk, finished: LayersOnDisk | None) -> None:
    run, num_rounds = members[0].run, len(members[0].run.resolved.plans)
    stage, num_layers = f"prune, round {number} of {num_rounds}", run.arch.num_layers
    run.services.progress(stage, 0, num_layers * len(members))
    for index in range(num_layers):
        if members[0].target_mix:
            groups = [group for group in run.resolved.groups if group.layer == index]
            _advance_dense(members[0].walk, index, groups, dense_layers, is_last=number == num_rounds)
        for place, member in enumerate(members):
            _one_layer(member, index, number)
            if finished is not None:
                layer = member.walk.layers[index]
                offload(layer)  # it is mapped again and must be in its file only
                finished.save(index, layer, [])
                finished.restore(index, layer)
            release_freed()
            run.services.progress(stage, index * len(members) + place + 1, num_layers * len(members))
    if number == 1 and run.after_dense is not None:
        run.after_dense(members[0].walk)


def _one_layer(member: _Member, index: int, number: int) -> None:
    """Prune the layer's groups, and move the member's stream through what is left."""
    for group in member.run.resolved.groups:
        if group.layer == index:
            key = (index, group.name)
            keep = _group_step(member.run, member.walk, group, number, member.plan.num_keep[key])
            member.keeps[key] = original_units(member.keeps[key], keep.cpu())
    if index + 1 < member.run.arch.num_layers:
        member.walk.advance(index)


def _group_step(run: Run, walk: Walk, group: Group, number: int, num_keep: int) -> Tensor:
    """Prune the group, or repeat the stored step; return the kept indices."""
    layer, recipe, name = walk.layers[group.layer], run.resolved.recipe, _step_name(number, group)
    found = run.services.store.find(name)
    if found is not None:
        stored, line = found
        keep = redo_group(layer, group, stored)
    else:
        start, seed = time.perf_counter(), layer_seed(recipe.seed, number, group.layer)
        kept = run.kept.get(group.key)
        keep, line = prune_group(walk, group, num_keep, recipe, run.shares, seed, kept)
        seconds = round(time.perf_counter() - start, 3)
        line = {"event": "group", "round": number, **line, "seconds": seconds, "peak_bytes": peak_bytes()}
        run.services.store.save(name, outcome_of(layer, group, keep), line)
    run.services.log.write(line)
    return keep


def _step_name(number: int, group: Group) -> str:
    return f"round-{number}-layer-{group.layer}-{group.name}"


def _advance_dense(walk: Walk, index: int, groups: list[Group], dense_layers: LayersOnDisk, *, is_last: bool) -> None:
    """Move the dense stream through the layer as it was before the first round."""
    if index in dense_layers.indices:
        with dense_layers.restored(index, walk.layers[index]):
            walk.advance_dense(index)
        return
    if not is_last:
        dense_layers.save(index, walk.layers[index], groups)
    walk.advance_dense(index)


def _update_config(run: Run) -> None:
    """Derive the config from the tensors, never from the intent."""
    if run.resolved.recipe.repair.compensate == "bias":
        for key in {group.bias_switch.config_key for group in run.resolved.groups if group.bias_switch}:
            setattr(run.model.config, key, True)
    record_widths(run.model, run.arch)
