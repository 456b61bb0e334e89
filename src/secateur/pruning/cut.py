"""What goes leaves a model: tokens, whole layers, then units round by round; and what is left is
polished.

In: runs with their weights, still dense. Out: each with its model cut in place, and which units
stay.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.methods.depth import (
    choose_layers,
    fold_patch,
    layer_kl,
    narrow_readers,
    remove_layers,
)
from secateur.methods.profile import PROBE_BLOCKS, first_blocks
from secateur.model.bind import Arch, decoder_layers
from secateur.model.group import Keeps, linear
from secateur.pruning.loop import prune_together
from secateur.pruning.resolve import NARROW_TOKENS_PER_INPUT, free_layers, removed_layers
from secateur.pruning.run import Run, watched_losses
from secateur.pruning.trimmed import without_tokens
from secateur.ranks import size
from secateur.recovery.polish import learn, polish
from secateur.report.records import PolishRecord
from secateur.stream.device import peak_bytes, release_freed
from secateur.stream.walk import Batch


class Cut(NamedTuple):
    """A run whose model is cut and polished, and which units of it stay. `peak`: bytes of memory
    until then.
    """

    run: Run
    keeps: Keeps
    polish: PolishRecord | None
    peak: int


def cut_and_polish(
    dense: Run, copies: Sequence[Run] = (), *, force: bool = False, cut: bool = True
) -> Iterator[Cut]:
    """Take tokens, layers and units from the models, in place, and polish them; yield each when it
    is done.

    `copies`: runs of several sizes, on copies of the model of `dense`; none: that run itself.
    `force`: a trim may cost more than was foretold. Without `cut` the dense model is polished, by
    what the recipe would polish the pruned one by.
    """
    runs, services = list(copies or [dense]), dense.services
    if dense.trim is not None:
        runs = [without_tokens(dense, dense.trim, force=force)]
    first = runs[0]
    walked = cut and _walk_has_dense_states(first)
    lesson = learn(
        first.model, first.arch, first.text, first.resolved.recipe, services, walked=walked
    )
    if lesson is not None and walked:
        runs[0] = dataclasses.replace(first, after_dense=partial(lesson.take_states, first.model))

    # Whole layers go first, then units, round by round. Models of equal layers have one dense
    # stream.
    keeps = dict[int, Keeps]()
    if cut:
        with services.log.time("prune"):
            runs = [remove_depth(run) for run in runs]
            whole = [run for run in runs if not run.resolved.depth]
            alone = [[run] for run in runs if run.resolved.depth]
            for together in filter(None, (whole, *alone)):
                keeps |= {
                    id(run): keep
                    for run, keep in zip(together, prune_together(together), strict=True)
                }

    for run in runs:
        polished, device = None, run.device
        if lesson is not None:
            with run.on_host():
                polished = polish(
                    run.model, lesson, first.resolved.recipe.seed, run.services, device
                )
        yield Cut(run, keeps.get(id(run), Keeps()), polished, peak_bytes())


def _walk_has_dense_states(run: Run) -> bool:
    """Whether the prune's dense stream ends in what the polish asks the dense model for, on the
    same text.
    """
    resolved = run.resolved
    whole = run.trim is None and not resolved.depth and size() == 1 and run.supports is None
    walks_once = len(resolved.plans) == 1 and resolved.removals[0] > 0 and resolved.target_mix > 0
    return whole and walks_once


def remove_depth(run: Run) -> Run:
    """Remove the recipe's `depth` layers in place; before `prune_together`.

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

    # Which layers go: those that the recipe names, or the cheapest ones.
    batches = run.batches()
    named = removed_layers(resolved.recipe, dense)
    costs = {} if named else _cheapest_layers(run, batches)
    removed, order = sorted(named or costs), list(costs)

    # They go one by one, each folded into the layer before it.
    arch = dense
    services.progress("remove layers", 0, resolved.depth)
    for done, layer in enumerate(removed):
        start = time.perf_counter()
        patch = _patch(run, arch, layer, layer - done, batches)
        arch = remove_layers(run.model, arch, [layer - done])
        choice = {"chosen": order.index(layer) + 1, "kl": costs[layer]} if costs else {}
        took = {"seconds": round(time.perf_counter() - start, 3), "peak_bytes": peak_bytes()}
        services.log.write({"event": "layer", "layer": layer, **choice, **patch, **took})
        release_freed()
        services.progress("remove layers", done + 1, resolved.depth)
    layers = tuple(index for index in range(dense.num_layers) if index not in removed)
    return dataclasses.replace(
        run, arch=arch, resolved=resolved.with_layers(layers), dense_losses=dense_losses
    )


def _cheapest_layers(run: Run, batches: list[Batch]) -> dict[int, float]:
    """Return the KL of each layer to remove, in the order chosen."""
    recipe, arch, progress = run.resolved.recipe, run.arch, run.services.progress

    def choose() -> list[tuple[int, float]]:
        blocks, readers = first_blocks(batches, PROBE_BLOCKS), _narrow_readers(run, batches)
        kl_without = partial(layer_kl, run.model, arch, blocks, readers=readers)
        layers = free_layers(recipe, arch)
        return list(choose_layers(kl_without, layers, run.resolved.depth, progress).items())

    return dict(run.services.store.value("removed layers", choose))


def _narrow_readers(run: Run, batches: list[Batch]) -> dict[int, Tensor]:
    """Return FFN readers about as narrow as the widths will be; none if none gets narrower."""
    resolved, arch = run.resolved, run.arch
    recipe, plan = resolved.recipe, resolved.plans[-1]
    ffns = [group for group in resolved.groups if group.name == "ffn" and group.kind == "channels"]
    kept, total = sum(plan.num_keep[ffn.key] for ffn in ffns), sum(ffn.num_units for ffn in ffns)
    if kept == total:
        return {}
    # The plan is for the layers expected to stay, so only its share is of use.
    domains, widest = run.text.domains, max(group.num_units for group in ffns)
    num_blocks = math.ceil(
        NARROW_TOKENS_PER_INPUT * widest / (len(domains) * run.text.sequence_length)
    )
    spare = min(len(domain.calibration) for domain in domains) - PROBE_BLOCKS
    after = PROBE_BLOCKS if spare >= num_blocks else 0
    free = free_layers(recipe, arch)
    damping = resolved.damping if recipe.repair.compensate == "least_squares" else None
    blocks = first_blocks(batches, num_blocks, after=after)
    shares = {ffn.layer: kept / total for ffn in arch.ffns if ffn.layer in free}
    return narrow_readers(run.model, arch, blocks, [shares], damping, run.services.progress)[0]


def _patch(run: Run, arch: Arch, layer: int, position: int, batches: list[Batch]) -> dict[str, Any]:
    """Fold `layer`, now at `position`, into the one before if possible; return the verdict."""
    recipe, store = run.resolved.recipe, run.services.store
    if position == 0 or recipe.repair.compensate != "least_squares" or not arch.mlp_adds_directly:
        return {}
    ffn = next((group for group in arch.ffns if group.layer == position - 1), None)
    if ffn is None:  # its FFN is of experts, which no linear reads
        return {}
    before = decoder_layers(run.model, arch)[position - 1]
    name, weight = f"patch for layer {layer}", linear(before, ffn.reader.module).weight
    stored = store.find(name)
    if stored is not None:
        tensors, patch = stored
        with torch.no_grad():
            weight.copy_(tensors["weight"])
        return patch
    patch = dataclasses.asdict(fold_patch(run.model, arch, position, batches, run.resolved.damping))
    store.save(name, {"weight": weight}, patch)
    return patch
