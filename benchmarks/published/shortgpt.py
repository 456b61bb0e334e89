"""ShortGPT as published: the layers of the lowest block influence go, all at once, no repair.

Men et al., arXiv 2403.03853. The authors have published no code.
"""

from typing import Any

import torch
from pruned import Pruned, count_parameters
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def block_influence(model: PreTrainedModel, blocks_NT: Tensor) -> Tensor:
    """Return BI_i = 1 - mean over tokens t of cos(X_it, X_i+1,t), one number per layer.

    X_i: the input of layer i, X_i+1: its output before any final norm. Equation 1 of the paper.
    """
    layers: Any = model.model.layers
    sums_L, num_tokens = torch.zeros(len(layers), dtype=torch.float64), blocks_NT.numel()

    def note(index: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            cosines = nn.functional.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
            sums_L[index] += cosines.double().sum()

        return hook

    handles = [layer.register_forward_hook(note(index)) for index, layer in enumerate(layers)]
    for ids_T in blocks_NT:
        model.model(ids_T[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return 1 - sums_L / num_tokens


def prune(model: PreTrainedModel, blocks_NT: Tensor, share: float, seed: int) -> Pruned:
    """Remove the number of layers whose share of all parameters is nearest to `share`.

    Nothing is random. A result is an ordinary checkpoint with fewer layers.
    """
    layers: Any = model.model.layers
    total, per_layer = count_parameters(model), count_parameters(layers[0])
    num_removed = min(max(round(share * total / per_layer), 1), len(layers) - 1)
    influence_L = block_influence(model, blocks_NT)
    removed = set(influence_L.argsort(stable=True)[:num_removed].tolist())
    model.model.layers = nn.ModuleList(layer for index, layer in enumerate(layers) if index not in removed)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for index, kind in enumerate(model.config.layer_types) if index not in removed]
    return Pruned(model, count_parameters(model), "none", f"layers removed: {sorted(removed)}")
