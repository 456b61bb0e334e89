"""2SSP as published: FFN channels by the norm of their activations, then whole attentions, no repair.

Sandri, Cunegatti and Iacca, arXiv 2501.17771; official code github.com/FabrizioSandri/2SSP.
"""

from collections.abc import Callable
from typing import Any

import torch
from pruned import Pruned, count_parameters
from torch import Tensor, nn
from transformers import PreTrainedModel

# Section 4.3: how parameters are divided between the two stages.
ALPHA = 1.5


class NoAttention(nn.Module):
    """What stands where an attention was: adds nothing. No stock config can say this."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Return zeros of the input's shape, and no attention weights."""
        return torch.zeros_like(hidden_states), None


def num_attentions(num_layers: int, rate: float, num_ffn: int, num_attention: int) -> int:
    """Return round(L * rate^(|FFN| / |attention| / alpha)), equation 5; `rate`: of the layers."""
    return round(num_layers * rate ** (num_ffn / num_attention / ALPHA))


@torch.no_grad()
def activation_norms(model: PreTrainedModel, blocks_NT: Tensor) -> list[Tensor]:
    """Return, per layer, the mean over blocks of the L2 norm over tokens of each FFN channel."""
    layers: Any = model.model.layers
    norms = [torch.zeros(layer.mlp.down_proj.in_features) for layer in layers]

    def note(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            norms[index] += inputs[0][0].float().norm(dim=0)

        return hook

    handles = [layer.mlp.down_proj.register_forward_pre_hook(note(index)) for index, layer in enumerate(layers)]
    for ids_T in blocks_NT:
        model.model(ids_T[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [norm / len(blocks_NT) for norm in norms]


def keep_channels(mlp: Any, kept: Tensor) -> None:
    """Leave these channels of a gated MLP, in place."""
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        linear = getattr(mlp, name)
        linear.weight = nn.Parameter(linear.weight.data.index_select(axis, kept))
        if axis == 0 and linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.data[kept])
    mlp.gate_proj.out_features = mlp.up_proj.out_features = mlp.down_proj.in_features = len(kept)


@torch.no_grad()
def remove_attentions(model: PreTrainedModel, ids_T: Tensor, num_removed: int) -> list[int]:
    """Take out one attention after another, each time the one whose absence costs least loss.

    The loss is that of one calibration sample. Layers before the one on trial are not run again.
    """
    removed: list[int] = []
    for _ in range(num_removed):
        losses = losses_without(model, ids_T, removed)
        best = min(losses, key=lambda index: losses[index])
        model.model.layers[best].self_attn = NoAttention()
        removed.append(best)
    return removed


@torch.no_grad()
def losses_without(model: PreTrainedModel, ids_T: Tensor, removed: list[int]) -> dict[int, float]:
    """Return the sample's mean loss without each attention that is still there."""
    layers: Any = model.model.layers
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        calls.append((inputs[0], keywords))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    model.model(ids_T[None], use_cache=False)
    for handle in handles:
        handle.remove()
    losses: dict[int, float] = {}
    for index in range(len(layers)):
        if index in removed:
            continue
        attention, layers[index].self_attn = layers[index].self_attn, NoAttention()
        hidden = calls[index][0]
        for layer, (_, keywords) in zip(layers[index:], calls[index:], strict=True):
            hidden = layer(hidden, **keywords)
        logits = model.lm_head(model.model.norm(hidden))[0, :-1].float()
        losses[index] = float(nn.functional.cross_entropy(logits, ids_T[1:]))
        layers[index].self_attn = attention
    return losses


def prune(model: PreTrainedModel, blocks_NT: Tensor, share: float, seed: int) -> Pruned:
    """Remove `share` of all parameters: equal numbers of FFN channels, then whole attentions.

    The paper counts a rate of the layers alone, so the rate here is share x all / layers. The
    second stage judges by the first block, as the official code does by its first sample.
    """
    layers: Any = model.model.layers
    total, in_layers = count_parameters(model), sum(count_parameters(layer) for layer in layers)
    num_ffn, num_attention = count_parameters(layers[0].mlp), count_parameters(layers[0].self_attn)
    rate = share * total / in_layers
    num_removed = num_attentions(len(layers), rate, num_ffn, num_attention)
    per_layer = (share * total - num_removed * num_attention) / len(layers)
    width = layers[0].mlp.down_proj.in_features
    num_kept = round(width * (1 - per_layer / num_ffn))
    for layer, norms_F in zip(layers, activation_norms(model, blocks_NT), strict=True):
        keep_channels(layer.mlp, norms_F.topk(num_kept).indices.sort().values)
    model.config.intermediate_size = num_kept
    removed = remove_attentions(model, blocks_NT[0], num_removed)
    notes = f"{num_kept} of {width} channels; attentions removed, in order: {removed}; no stock config stores that"
    return Pruned(model, count_parameters(model), "none", notes)
