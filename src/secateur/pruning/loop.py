"""The loop: whole layers go first, then rounds over layers over groups, on the pruned stream.

In: a run. Out: its model with smaller linears and a config that says so, and which units stayed. Every step is one
line of the run log.
"""

import dataclasses
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from secateur.methods.budget import Plan
from secateur.methods.depth import choose_layers, fold_patch, narrow_readers, remove_layers
from secateur.methods.profile import first_blocks
from secateur.model.bind import Arch, decoder_layers
from secateur.model.group import Group, add_zero_biases, linear, original_units
from secateur.model.per_layer import record_widths
from secateur.pruning.group_step import outcome_of, prune_group, redo_group
from secateur.pruning.resolve_depth import TOKENS_PER_INPUT, protected_layers, removed_layers
from secateur.pruning.round_plan import layer_seed, plan_round, whole_model_scores
from secateur.pruning.run import Keeps, Run, SafetyNet, watched_losses
from secateur.ranks import from_first
from secateur.stream.device import peak_bytes, release_freed
from secateur.stream.offload import LayersOnDisk, embeddings_on_disk, send_home
from secateur.stream.walk import Batch, Walk


def remove_depth(run: Run) -> Run:
    """Remove as many layers as the recipe's `depth` says, in place; call it before `prune_in_place`.

    Which: the recipe's `removed_layers`, or else those of `choose_layers` on `probe_blocks` blocks per domain of the
    first round, in a model about as narrow as widths will make it, where the others must do without them. In what
    order: from the first layer on, so that each patch is fitted to what the layers before it give by then, as
    everywhere in a walk. Patched by least squares on all the blocks of the first round, where the recipe compensates
    so, the family adds what an FFN gives as it is, and a layer stands before. Everything after, the dense stream
    included, starts from this model; only the safety net still compares with the dense one.
    """
    resolved, dense, services = run.resolved, run.arch, run.services
    if not resolved.depth:
        return run
    dense_losses = watched_losses(run, "dense")
    batches = run.batches(1)
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
    recipe, dense = run.resolved.recipe, run.arch

    def chosen() -> list[tuple[int, float]]:
        costs = choose_layers(
            run.model,
            dense,
            first_blocks(batches, recipe.choose.probe_blocks),
            run.resolved.depth,
            readers=_narrow_readers(run, batches),
            protected=protected_layers(recipe, dense),
            progress=run.services.progress,
        )
        return list(costs.items())

    return dict(run.services.store.value("removed layers", chosen))


def _narrow_readers(run: Run, batches: list[Batch]) -> dict[int, Tensor]:
    """Return FFN readers about as narrow as widths will make them, from a few blocks that the probe does not see.

    None where no FFN becomes narrower.
    """
    recipe, plan = run.resolved.recipe, run.resolved.plans[-1]
    ffns = [group for group in run.resolved.groups if group.name == "ffn" and group.kind == "channels"]
    kept = sum(plan.num_keep[group.layer, group.name] for group in ffns)
    if kept == sum(group.num_units for group in ffns):
        return {}
    # Before layers are chosen plans are for those that are expected to stay; the share is what is of use.
    share = kept / sum(group.num_units for group in ffns)
    domains, widest = run.text.domains, max(group.num_units for group in ffns)
    num_blocks = math.ceil(TOKENS_PER_INPUT * widest / (len(domains) * run.text.sequence_length))
    spare = min(len(domain.calibration_NT) for domain in domains) - recipe.choose.probe_blocks
    after = recipe.choose.probe_blocks if spare >= num_blocks else 0
    unprotected = set(range(run.arch.num_layers)) - protected_layers(recipe, run.arch)
    damping = run.resolved.damping if recipe.repair.compensate == "least_squares" else None
    blocks = first_blocks(batches, num_blocks, after=after)
    return narrow_readers(run.model, run.arch, blocks, dict.fromkeys(unprotected, share), damping, from_first)


def _patch(run: Run, arch: Arch, layer: int, position: int, batches: list[Batch]) -> dict[str, Any]:
    """Fold `layer`, now at `position`, into the one before it, if that can be; return what the held-out text says."""
    recipe = run.resolved.recipe
    if position == 0 or recipe.repair.compensate != "least_squares" or not arch.mlp_adds_directly:
        return {}
    before = decoder_layers(run.model, arch)[position - 1]
    (ffn,) = (group for group in arch.select(("ffn",)) if group.layer == position - 1)
    name, weight = f"patch for layer {layer}", linear(before, ffn.reader.module).weight
    found = run.services.store.find(name)
    if found is not None:
        with torch.no_grad():
            weight.copy_(found[0]["weight"])
        return found[1]
    patch = dataclasses.asdict(fold_patch(run.model, arch, position, batches, run.resolved.damping, from_first))
    run.services.store.save(name, {"weight": weight}, patch)
    return patch


def prune_in_place(run: Run) -> Keeps:
    """Prune the model, all rounds, and return each group's kept units by their original indices.

    Layers of a recipe with `depth` have gone before, by `remove_depth`; keeps number layers as the model then does.
    With `max_loss_rise` the last round that held is what stays. Raises RecipeError if not even the first one held.
    """
    assert run.arch.num_layers == len(run.resolved.layers), "remove_depth comes first"
    keeps = {(group.layer, group.name): torch.arange(group.num_units) for group in run.resolved.groups}
    if run.resolved.recipe.repair.compensate == "bias":
        layers = decoder_layers(run.model, run.arch)
        for group in run.resolved.groups:
            add_zero_biases(layers[group.layer], group)
    scratch = TemporaryDirectory(prefix="prune-", dir=run.services.scratch)
    with scratch as folder, embeddings_on_disk(run.model, Path(folder), are_there=run.weights_on_disk) as unload:
        dense_layers, net = LayersOnDisk(Path(folder), "dense"), SafetyNet(run, Path(folder))
        for number in range(1, len(run.resolved.plans) + 1):
            # Of nothing that is left to the widths there is nothing to measure.
            if run.resolved.removals[number - 1] > 0:
                batches = run.batches(number)
                scores = whole_model_scores(run, number, batches)
                plan = plan_round(run, number, batches, net.allowed_rise(), scores)
                net.before_round(keeps)
                # Through a round that the store has whole no stream needs to go.
                walked = [] if _is_finished(run, number) else batches
                walk = Walk(run.model, run.arch, walked, dense=bool(run.resolved.target_mix))
                unload()
                # Two sets of files by turns: a round's are mapped until the next one's take their place.
                finished = LayersOnDisk(Path(folder), f"finished-{number % 2}") if run.weights_on_disk else None
                _one_round(run, walk, plan, number, scores, keeps, dense_layers, finished)
            if not net.holds(number, keeps):
                break
            _update_config(run)
            if run.after_round is not None:
                run.after_round(number, keeps)
    _update_config(run)
    return keeps


def _one_round(
    run: Run,
    walk: Walk,
    plan: Plan,
    number: int,
    scores: Keeps,
    keeps: Keeps,
    dense_layers: LayersOnDisk,
    finished: LayersOnDisk | None,
) -> None:
    num_rounds = len(run.resolved.plans)
    stage = f"prune, round {number} of {num_rounds}"
    run.services.progress(stage, 0, run.arch.num_layers)
    for index in range(run.arch.num_layers):
        groups = [group for group in run.resolved.groups if group.layer == index]
        if run.resolved.target_mix:
            _advance_dense(walk, index, groups, dense_layers, is_last=number == num_rounds)
        for group in groups:
            key = (group.layer, group.name)
            keep = _group_step(run, walk, group, number, plan.num_keep[key], scores.get(key))
            keeps[key] = original_units(keeps[key], keep.cpu())
        if index + 1 < run.arch.num_layers:
            walk.advance(index)
        if finished is not None:
            send_home(walk.layers[index])  # mapped anew, it is to lie in its file and nowhere else
            finished.keep(index, walk.layers[index], [])
            finished.put_back(index, walk.layers[index])
        release_freed()
        run.services.progress(stage, index + 1, run.arch.num_layers)


def _group_step(run: Run, walk: Walk, group: Group, number: int, num_keep: int, scores_U: Tensor | None) -> Tensor:
    """Prune the group and return the kept indices, or do again what the store knows of it."""
    layer, recipe, name = walk.layers[group.layer], run.resolved.recipe, _step_name(number, group)
    found = run.services.store.find(name)
    if found is not None:
        stored, line = found
        keep = redo_group(layer, group, stored)
    else:
        start, seed = time.perf_counter(), layer_seed(recipe.seed, number, group.layer)
        keep, line = prune_group(walk, group, num_keep, recipe, run.shares, seed, scores_U)
        seconds = round(time.perf_counter() - start, 3)
        line = {"event": "group", "round": number, **line, "seconds": seconds, "peak_bytes": peak_bytes()}
        run.services.store.save(name, outcome_of(layer, group, keep), line)
    run.services.log.write(line)
    return keep


def _is_finished(run: Run, number: int) -> bool:
    return all(run.services.store.has(_step_name(number, group)) for group in run.resolved.groups)


def _step_name(number: int, group: Group) -> str:
    return f"round-{number}-layer-{group.layer}-{group.name}"


def _advance_dense(walk: Walk, index: int, groups: list[Group], dense_layers: LayersOnDisk, *, is_last: bool) -> None:
    """Move the dense stream through the layer as it was before the first round."""
    if index in dense_layers.indices:
        with dense_layers.in_place(index, walk.layers[index]):
            walk.advance_dense(index)
        return
    if not is_last:
        dense_layers.keep(index, walk.layers[index], groups)
    walk.advance_dense(index)


def _update_config(run: Run) -> None:
    """Derive the config from the tensors, never from the intent."""
    if run.resolved.recipe.repair.compensate == "bias":
        for group in run.resolved.groups:
            assert group.bias_switch is not None
            setattr(run.model.config, group.bias_switch.config_key, True)
    record_widths(run.model, run.arch)
