"""The step before the first round: whole layers go, and what they added linearly is folded into the layers before them.

In: a run whose model is dense. Out: the run as the rounds need it: the model with fewer layers, its architecture bound
anew, the plans keyed by the layers that are left. A line of the run log per layer.
"""

import dataclasses
import math
import time
from typing import Any

import torch
from torch import Tensor

from secateur.arch import Arch, decoder_layers, linear
from secateur.depth import fold_patch, narrow_readers, remove_layers
from secateur.depth_choice import choose_layers
from secateur.memory import peak_bytes, release_freed
from secateur.probe import first_blocks
from secateur.ranks import from_first
from secateur.resolve_depth import TOKENS_PER_INPUT, protected_layers, removed_layers
from secateur.run import Run
from secateur.safety_net import watched_losses
from secateur.walk import Batch


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
            first_blocks(batches, recipe.probe_blocks),
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
    spare = min(len(domain.calibration_NT) for domain in domains) - recipe.probe_blocks
    after = recipe.probe_blocks if spare >= num_blocks else 0
    unprotected = set(range(run.arch.num_layers)) - protected_layers(recipe, run.arch)
    damping = run.resolved.damping if recipe.compensate == "least_squares" else None
    blocks = first_blocks(batches, num_blocks, after=after)
    return narrow_readers(run.model, run.arch, blocks, dict.fromkeys(unprotected, share), damping, from_first)


def _patch(run: Run, arch: Arch, layer: int, position: int, batches: list[Batch]) -> dict[str, Any]:
    """Fold `layer`, now at `position`, into the one before it, if that can be; return what the held-out text says."""
    recipe = run.resolved.recipe
    if position == 0 or recipe.compensate != "least_squares" or not arch.mlp_adds_directly:
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
    run.services.store.keep(name, {"weight": weight}, patch)
    return patch
