"""The loop: rounds over layers over groups, on the pruned stream.

In: a run. Out: its model with smaller linears and a config that says so, and which units stayed. Every step is one line
of the run log.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from secateur.arch import Group, decoder_layers
from secateur.budget import Plan
from secateur.cut import add_zero_biases, original_units
from secateur.group_step import outcome_of, prune_group, redo_group
from secateur.layers_on_device import send_home
from secateur.memory import peak_bytes, release_freed
from secateur.on_disk import LayersOnDisk, embeddings_on_disk
from secateur.per_layer import record_widths
from secateur.round_plan import layer_seed, plan_round, whole_model_scores
from secateur.run import Keeps, Run
from secateur.safety_net import SafetyNet
from secateur.walk import Walk


def prune_in_place(run: Run) -> Keeps:
    """Prune the model, all rounds, and return each group's kept units by their original indices.

    Layers of a recipe with `depth` have gone before, by `remove_depth`; keeps number layers as the model then does.
    With `max_loss_rise` the last round that held is what stays. Raises RecipeError if not even the first one held.
    """
    assert run.arch.num_layers == len(run.resolved.layers), "remove_depth comes first"
    keeps = {(group.layer, group.name): torch.arange(group.num_units) for group in run.resolved.groups}
    if run.resolved.recipe.compensate == "bias":
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
        run.services.store.keep(name, outcome_of(layer, group, keep), line)
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
    if run.resolved.recipe.compensate == "bias":
        for group in run.resolved.groups:
            assert group.bias_switch is not None
            setattr(run.model.config, group.bias_switch.config_key, True)
    record_widths(run.model, run.arch)
