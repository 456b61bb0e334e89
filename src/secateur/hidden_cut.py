"""The cut of hidden width: the same channels of the residual stream go from every tensor that is as wide as the model.

In: a model, the sorted channels to keep. Out: the same model, narrower, an ordinary one of its
family. Nothing is measured here.
"""

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.arch import Arch, bind, decoder_layers, linear
from secateur.arch_hidden import Hidden
from secateur.errors import ArchError, RecipeError
from secateur.per_layer import record_widths

NormKey = tuple[int, str]
"""(layer, norm); the last norm has the number of layers in place of a layer."""


def hidden_of(arch: Arch) -> Hidden:
    """Return the family's residual stream. Raises ArchError if its spec has none."""
    if arch.hidden is None:
        raise ArchError(f"hidden_size: family {arch.family} cannot lose hidden width; leave hidden_size out.")
    return arch.hidden


def check_hidden_size(arch: Arch, hidden_size: int) -> None:
    """Raise RecipeError if the model cannot be made that wide, naming the nearest widths that it can have."""
    hidden = hidden_of(arch)
    lower = hidden_size // hidden.step * hidden.step
    if not 0 < hidden_size < hidden.num_channels:
        raise RecipeError(
            f"hidden_size: must be above 0 and below the model's own {hidden.num_channels}, got {hidden_size}."
        )
    if lower != hidden_size:
        allowed = " or ".join(str(width) for width in (lower, lower + hidden.step) if 0 < width < hidden.num_channels)
        raise RecipeError(
            f"hidden_size: family {arch.family} takes only multiples of its number of heads, {hidden.step}, got "
            f"{hidden_size}; use {allowed or 'another model'}."
        )


@torch.no_grad()
def cut_hidden(model: PreTrainedModel, arch: Arch, keep: Int64[Tensor, " K"]) -> Arch:
    """Keep only the channels `keep` of the residual stream, in place, and return the architecture bound anew.

    A norm divides by the root of the mean square over all channels, so every norm's multiplier grows by sqrt(D / K),
    with D channels before. The model then computes exactly what it did with the other channels set to zero all over,
    but for the norms' epsilon. Where the family multiplies embeddings by the square root of its width, the embedding
    makes up for that, and where it is also the head, the last norm undoes it there. Tied tensors stay tied. The config
    gets the new hidden_size, and head_dim, which would else follow from it.

    Raises ArchError or RecipeError if the family or its config cannot have that width.
    """
    hidden, config = hidden_of(arch), _config(model)
    if len(keep) != hidden.num_channels:
        check_hidden_size(arch, len(keep))
    factor = (hidden.num_channels / len(keep)) ** 0.5
    head_dim = (
        config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads
    )
    growth = _cut_embedding(model, arch, hidden, keep)
    for key, norm in norms_of(model, arch).items():
        _cut_norm(norm, keep, factor / growth if key[0] == arch.num_layers else factor, adds_one=hidden.norm_adds_one)
    for layer in decoder_layers(model, arch):
        for name in (name for _, names in hidden.readers for name in names):
            _cut_linear(linear(layer, name), keep, axis=1)
        for name in hidden.writers:
            _cut_linear(linear(layer, name), keep, axis=0)
    config.hidden_size, config.head_dim = len(keep), head_dim
    record_widths(model, arch)
    return bind(model)


def norms_of(model: nn.Module, arch: Arch) -> dict[NormKey, nn.Module]:
    """Return every norm over the stream, or over what is about to be added to it, in the order in which they run."""
    hidden, found = hidden_of(arch), {}
    for index, layer in enumerate(decoder_layers(model, arch)):
        for name in (*(norm for norm, _ in hidden.readers), *hidden.writer_norms):
            found[index, name] = layer.get_submodule(name)
    return found | {(arch.num_layers, hidden.norm): model.get_submodule(hidden.norm)}


def is_tied(model: nn.Module, arch: Arch) -> bool:
    """Say whether head and embedding are one tensor."""
    return model.get_submodule(arch.head).weight is model.get_submodule(hidden_of(arch).embedding).weight


def _config(model: PreTrainedModel) -> Any:
    return model.config


def _cut_embedding(model: nn.Module, arch: Arch, hidden: Hidden, keep: Tensor) -> float:
    """Cut embedding and head; return by how much the head grew on the way, which the last norm must undo."""
    embedding, head = (model.get_submodule(name) for name in (hidden.embedding, arch.head))
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    tied, growth = is_tied(model, arch), 1.0
    for name in hidden.embedding_scales:
        scale: Any = getattr(embedding, name)
        new = len(keep) ** 0.5
        if isinstance(scale, Tensor):
            # The model multiplies by the scale as its own dtype holds it.
            dtype = embedding.weight.dtype
            growth = float(scale.to(dtype)) / float(torch.tensor(new).to(dtype)) if not scale.is_meta else 1.0
            setattr(embedding, name, torch.full_like(scale, new))
        else:
            setattr(embedding, name, new)
    embedding.weight = _parameter(embedding.weight[:, _beside(keep, embedding.weight)] * growth, embedding.weight)
    embedding.embedding_dim = len(keep)
    head.weight = embedding.weight if tied else _parameter(head.weight[:, _beside(keep, head.weight)], head.weight)
    head.in_features = len(keep)
    return growth if tied else 1.0


def _cut_norm(norm: nn.Module, keep: Tensor, factor: float, *, adds_one: bool) -> None:
    weight: Any = norm.weight
    offset = float(adds_one)
    norm.weight = _parameter(
        ((weight[_beside(keep, weight)].float() + offset) * factor - offset).to(weight.dtype), weight
    )


def _cut_linear(module: nn.Linear, keep: Tensor, axis: int) -> None:
    keep = _beside(keep, module.weight)
    module.weight = _parameter(module.weight.index_select(axis, keep), module.weight)
    if axis == 0 and module.bias is not None:
        module.bias = _parameter(module.bias[keep], module.bias)
    module.out_features, module.in_features = module.weight.shape


def _beside(keep: Tensor, weight: Tensor) -> Tensor:
    """Return the indices where the weight is, since not every layer need be on the device."""
    return keep.to(weight.device)


def _parameter(value: Tensor, old: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
