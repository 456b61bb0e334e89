"""After the hidden cut: every MLP's last linear makes up for a part of how far the narrow model's stream has drifted.

In: the narrow model, the dense stream as it entered the first layer, the dense layers on disk. Out: the same model, its
FFN readers refitted from the first layer on. The drift is the dense stream's channels that stay minus the narrow one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from secateur.arch import Arch, linear
from secateur.measure import measure
from secateur.on_disk import LayersOnDisk
from secateur.recipe import Recipe
from secateur.repair import repair
from secateur.stats import BY_DOMAIN
from secateur.walk import Walk


@torch.no_grad()
def make_up_for_drift(
    model: nn.Module,
    arch: Arch,
    dense: Walk,
    dense_layers: LayersOnDisk,
    keep: Int64[Tensor, " K"],
    shares: dict[str, float],
    recipe: Recipe,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Refit the FFN readers by W + mix (x'r)' (x'x + ridge I)^-1 with x their inputs, r the drift, mix `target_mix`.

    `dense`: a walk of the model before the cut that stands before the first layer; its layers are those of the model,
    so while it moves they are put back from `dense_layers`. A line of the log per layer; the guard of `repair` judges.
    Raises NumericsError as `measure` and `repair`.
    """
    walk, ffn = Walk(model, arch, dense.batches), {group.layer: group for group in arch.select(("ffn",))}
    weighting = "energy" if recipe.domain_weighting in BY_DOMAIN else recipe.domain_weighting
    for index in range(arch.num_layers):
        if index in dense_layers.indices:
            with dense_layers.in_place(index, walk.layers[index]):
                dense.advance(index)
        if index in ffn:
            walk.dense_BTD = [hidden_BTD[..., keep] for hidden_BTD in dense.hidden_BTD]
            measured = measure(walk, ffn[index], weighting, shares, gram=True, drift=True, to_middle=True)
            reader = linear(walk.layers[index], ffn[index].reader.module)
            columns = torch.arange(reader.in_features, device=reader.weight.device)
            repaired = repair(reader, measured, columns, recipe, drift_alone=True)
            assert repaired.guard is not None
            if repaired.weight_HS is not None:
                reader.weight.copy_(repaired.weight_HS)
            line = {"event": "hidden", "layer": index, "reader": ffn[index].reader.module}
            log(line | dataclasses.asdict(repaired.guard) | {"damping": repaired.damping})
        walk.advance(index)
