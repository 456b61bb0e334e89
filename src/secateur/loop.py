"""The loop: rounds over layers over groups, on the pruned stream.

In: a model, its bound architecture, a run in concrete numbers and the calibration set. Out: the same model with smaller
linears and a config that says so, and which units stayed. Every step is one line of the run log.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.arch import Arch, Group, decoder_layers
from secateur.budget import GroupKey, Plan
from secateur.calibration import CalibrationSet, rotated
from secateur.cut import add_zero_biases
from secateur.group_step import prune_group
from secateur.memory import peak_bytes, release_freed
from secateur.on_disk import DenseLayers, embeddings_on_disk
from secateur.original_readers import OriginalReaders
from secateur.per_layer import record_widths
from secateur.progress import Progress, silent
from secateur.resolve import Resolved
from secateur.walk import Batch, Walk, make_batches

Keeps = dict[GroupKey, Tensor]


@dataclass(frozen=True, slots=True)
class Run:
    """Everything the loop works on. `originals` keeps uncompensated readers, where they are to be compared with.

    `scratch`: a directory for files of this run alone; None: where the system has temporary files.
    """

    model: PreTrainedModel
    arch: Arch
    resolved: Resolved
    calibration: CalibrationSet
    originals: OriginalReaders | None = None
    log: Callable[[dict[str, Any]], None] = lambda line: None
    progress: Progress = silent
    scratch: Path | None = None


def prune_in_place(run: Run) -> Keeps:
    """Prune the model, all rounds, and return each group's kept units by their original indices."""
    keeps = {(group.layer, group.name): torch.arange(group.num_units) for group in run.resolved.groups}
    if run.resolved.recipe.compensate == "bias":
        layers = decoder_layers(run.model, run.arch)
        for group in run.resolved.groups:
            add_zero_biases(layers[group.layer], group)
    with TemporaryDirectory(prefix="prune-", dir=run.scratch) as folder, embeddings_on_disk(run.model, Path(folder)):
        dense_layers = DenseLayers(Path(folder))
        for number, plan in enumerate(run.resolved.plans, start=1):
            _one_round(run, plan, number, keeps, dense_layers)
    _update_config(run)
    return keeps


def _one_round(run: Run, plan: Plan, number: int, keeps: Keeps, dense_layers: DenseLayers) -> None:
    stage = f"prune, round {number} of {len(run.resolved.plans)}"
    run.progress(stage, 0, run.arch.num_layers)
    recipe = run.resolved.recipe
    walk = Walk(run.model, run.arch, _batches(run, number), dense=bool(recipe.target_mix))
    shares = {domain.name: domain.share for domain in run.calibration.domains}
    for index in range(run.arch.num_layers):
        groups = [group for group in run.resolved.groups if group.layer == index]
        _advance_dense(walk, index, groups, dense_layers, is_last=number == len(run.resolved.plans))
        for group in groups:
            start, key = time.perf_counter(), (group.layer, group.name)
            seed = (recipe.seed * 1_000_003 + number) * 1_000_003 + index
            keep, line = prune_group(walk, group, plan.num_keep[key], recipe, shares, seed, run.originals)
            keeps[key] = keeps[key][keep.cpu()]
            seconds = round(time.perf_counter() - start, 3)
            run.log({"event": "group", "round": number, **line, "seconds": seconds, "peak_bytes": peak_bytes()})
        walk.advance(index)
        release_freed()
        run.progress(stage, index + 1, run.arch.num_layers)


def _advance_dense(walk: Walk, index: int, groups: list[Group], dense_layers: DenseLayers, *, is_last: bool) -> None:
    """Move the dense stream, if there is one, through the layer as it was before the first round."""
    if not walk.dense_BTD:
        return
    if index in dense_layers.counts:
        with dense_layers.in_place(index, walk.layers[index]):
            walk.advance_dense(index)
        return
    if not is_last:
        dense_layers.keep(index, walk.layers[index], groups)
    walk.advance_dense(index)


def _batches(run: Run, number: int) -> list[Batch]:
    device = next(run.model.parameters()).device
    batches: list[Batch] = []
    for domain in rotated(run.calibration, number - 1).domains:
        batches += make_batches(domain.name, domain.calibration_NT.to(device), held_out=False)
        batches += make_batches(domain.name, domain.held_out_NT.to(device), held_out=True)
    return batches


def _update_config(run: Run) -> None:
    """Derive the config from the tensors, never from the intent."""
    if run.resolved.recipe.compensate == "bias":
        for group in run.resolved.groups:
            assert group.bias_switch is not None
            setattr(run.model.config, group.bias_switch.config_key, True)
    record_widths(run.model, run.arch)
