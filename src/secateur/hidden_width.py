"""Hidden width: which channels of the residual stream all layers can spare, and their removal with readers refitted.

In: a model, calibration batches, how many channels to keep. Out: the kept channels; the same model, narrower. Without
recovery afterwards the damage is large: the same channels must go everywhere, so none is spare everywhere.

Letters: D hidden size, K channels that stay, H reader outputs.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.arch import Arch, decoder_layers
from secateur.hidden_cut import check_hidden_size, cut_hidden, hidden_of, is_tied
from secateur.hidden_drift import make_up_for_drift
from secateur.hidden_norms import NormMeasurement, measured_norms, readers_of
from secateur.on_disk import LayersOnDisk
from secateur.ranks import from_first, is_first
from secateur.recipe import Recipe
from secateur.repair import repair
from secateur.score import damped_gram, inverse_of, keep_highest
from secateur.walk import Batch, Walk

# Rows of a reader that are refitted and judged at a time: what a head of 150,000 words gives would fill the memory.
MAX_ROWS = 16384


@torch.no_grad()
def channel_scores(
    model: PreTrainedModel, arch: Arch, batches: list[Batch], shares: dict[str, float], recipe: Recipe
) -> Float[Tensor, " D"]:
    """Return what every channel is worth: the share of output energy that is lost without it, summed over all norms.

    s_j = sum over norms |W_j|^2 / [H^-1]_jj with W all linears that read the norm's output and H its damped Gram
    matrix pooled over domains: the error that is left when channel j goes and the readers are refitted. A head that is
    tied to the embedding is not refitted, so there it is |W_j|^2 H_jj. One walk; one norm's matrices at a time.
    Source: OBS (Hassibi and Stork 1993), summed over norms as Muralidharan et al. do with the mean outputs of norms,
    arXiv 2407.14679, section 2.2.
    """
    scores_D = torch.zeros(hidden_of(arch).num_channels, dtype=torch.float64)
    calibration = [batch for batch in batches if not batch.held_out]
    for key, norm in measured_norms(model, arch, calibration, shares, recipe.domain_weighting):
        pooled, is_head = norm.measured.pooled, key[0] == arch.num_layers
        assert pooled.gram is not None
        refitted = not (is_head and is_tied(model, arch))
        if is_first():
            gram = pooled.gram
            lost_D = 1 / inverse_of(damped_gram(gram, recipe.damping)).diagonal() if refitted else gram.diagonal()
            share_D = norm.square_DD.diagonal().to(lost_D.device) * lost_D / max(float(pooled.energy), 1e-30)
            scores_D += share_D.cpu()
    return from_first(lambda: scores_D)


@torch.no_grad()
def narrow(
    model: PreTrainedModel,
    arch: Arch,
    batches: list[Batch],
    shares: dict[str, float],
    keep: Int64[Tensor, " K"],
    recipe: Recipe,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
    scratch: Path | None = None,
) -> Arch:
    """Keep only the channels `keep` (sorted) of the residual stream, in place; return the architecture bound anew.

    With `compensate: least_squares` the linears that read a norm are refitted, as `repair` does, so that from the
    channels that stay they give what they gave from all; a tied head, which is the embedding, is not. All is measured
    on the dense stream: fitting what the narrow model's stream gives to what the dense one gave was measured worse.
    After the cut, where the family adds what an MLP gives as it is, `make_up_for_drift` takes its share `target_mix`.
    A line of the log per refitted linear, or per MAX_ROWS rows of it. `scratch`: a directory for the dense layers.

    Raises RecipeError or ArchError as `cut_hidden`, before anything is measured; NumericsError as `repair`.
    """
    check_hidden_size(arch, len(keep))
    keep = keep.to(next(model.parameters()).device)
    if recipe.compensate != "least_squares":
        return cut_hidden(model, arch, keep)
    dense = Walk(model, arch, batches) if recipe.target_mix and arch.mlp_adds_directly else None
    with TemporaryDirectory(prefix="hidden-", dir=scratch) as folder:
        dense_layers = LayersOnDisk(Path(folder), "dense")
        _refit_readers(model, arch, batches, shares, keep, recipe, log, dense_layers if dense else None)
        narrowed = cut_hidden(model, arch, keep)
        if dense is not None:
            make_up_for_drift(model, narrowed, dense, dense_layers, keep, shares, recipe, log)
    return narrowed


def _refit_readers(
    model: PreTrainedModel,
    arch: Arch,
    batches: list[Batch],
    shares: dict[str, float],
    keep: Tensor,
    recipe: Recipe,
    log: Callable[[dict[str, Any]], None],
    dense_layers: LayersOnDisk | None,
) -> None:
    """Refit every reader but a tied head, in place; before a layer changes it is written to `dense_layers`."""
    readers, tied, layers = readers_of(model, arch), is_tied(model, arch), decoder_layers(model, arch)
    for (layer, norm), measured in measured_norms(model, arch, batches, shares, recipe.domain_weighting):
        if layer == arch.num_layers and tied:
            continue
        if dense_layers is not None and layer < arch.num_layers and layer not in dense_layers.indices:
            dense_layers.keep(layer, layers[layer], [])
        for name, reader in readers[layer, norm].items():
            for line in _refit(reader, measured, keep, recipe):
                log({"event": "hidden", "layer": layer, "norm": norm, "reader": name, **line})


def _refit(reader: nn.Linear, norm: NormMeasurement, keep: Tensor, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Refit the columns that stay, in place, some rows at a time; yield what the held-out text says of these."""
    for start in range(0, reader.out_features, MAX_ROWS):
        rows_HD = reader.weight[start : start + MAX_ROWS]
        part = nn.Linear(rows_HD.shape[1], len(rows_HD), bias=False, device="meta")
        part.weight = nn.Parameter(rows_HD, requires_grad=False)
        repaired = repair(part, norm.measured, keep, recipe)
        assert repaired.guard is not None
        if repaired.weight_HS is not None:
            rows_HD[:, keep] = repaired.weight_HS.to(rows_HD)
        guard = dataclasses.asdict(repaired.guard)
        yield {"first_row": start, **guard, "damping": repaired.damping, "condition": repaired.condition}


def remove_channels(
    model: PreTrainedModel,
    arch: Arch,
    batches: list[Batch],
    shares: dict[str, float],
    hidden_size: int,
    recipe: Recipe,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
    scratch: Path | None = None,
) -> tuple[Arch, Int64[Tensor, " K"]]:
    """Make the model `hidden_size` channels wide, in place; return its architecture and the channels that stayed.

    `channel_scores` says which stay, `narrow` does it. Raises as they do, before anything is measured where it can.
    """
    check_hidden_size(arch, hidden_size)
    keep = keep_highest(channel_scores(model, arch, batches, shares, recipe), hidden_size)
    return narrow(model, arch, batches, shares, keep, recipe, log, scratch), keep
