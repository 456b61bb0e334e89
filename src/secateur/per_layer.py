"""Layers of different widths: from a model's real tensors to a config that says so, and to a class that reads it.

In: a model whose layers were cut or skipped. Out: the same model, its config derived from its tensors. Equal widths
give the plain config of the family; different ones `per_layer_config` in transformers' form and a class that saves and
loads it. Not handled: families whose linears have other names than Llama's or Phi-3's.
"""

from collections import Counter
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.arch import Arch, decoder_layers, linear
from secateur.errors import RecipeError
from secateur.modeling_per_layer import (
    PerLayerModel,
    SkippedAttn,
    SkippedMLP,
    build_layer,
    per_layer_class,
    per_layer_config_class,
    skip_sublayer,
)

# Of a sublayer that is not there. Only legal, so that modelling which builds layers before it skips parts can build it,
# and different from the other layers', so that modelling which knows no `skip` stops instead of inventing weights.
_ABSENT = {"attention": {"num_attention_heads": 1, "num_key_value_heads": 1}, "mlp": {"intermediate_size": 1}}


def layer_widths(layer: nn.Module) -> dict[str, Any]:
    """Return the layer's widths under the config's names, read from its linears, and what it skips.

    q heads = o_proj inputs / head_dim; kv heads = k_proj outputs / head_dim (or half of what is left of qkv_proj).
    """
    sublayers: Any = layer
    widths: dict[str, Any] = {}
    skip = []
    if isinstance(sublayers.self_attn, SkippedAttn):
        skip.append("attention")
    else:
        head_dim = sublayers.self_attn.head_dim
        num_heads = linear(layer, "self_attn.o_proj").in_features // head_dim
        if hasattr(sublayers.self_attn, "qkv_proj"):
            num_key_value_heads = (linear(layer, "self_attn.qkv_proj").out_features // head_dim - num_heads) // 2
        else:
            num_key_value_heads = linear(layer, "self_attn.k_proj").out_features // head_dim
        widths |= {"num_attention_heads": num_heads, "num_key_value_heads": num_key_value_heads, "head_dim": head_dim}
    if isinstance(sublayers.mlp, SkippedMLP):
        skip.append("mlp")
    else:
        widths["intermediate_size"] = linear(layer, "mlp.down_proj").in_features
    return widths | {"skip": skip} if skip else widths


def check_can_skip(model: PreTrainedModel, arch: Arch) -> None:
    """Raise RecipeError if the family's layers cannot do without their attention or MLP. No weight is read."""
    layer, configs = decoder_layers(model, arch)[0], getattr(model.config, "per_layer_config", None)
    for sublayer in ("attention", "mlp"):
        try:
            with torch.device("meta"):
                skip_sublayer(cast(Any, type(layer))(configs[0] if configs else model.config, 0), sublayer, 0)
        except ValueError:
            raise RecipeError(
                f"sublayers: a {type(layer).__name__} of family {arch.family} cannot be built without its {sublayer}; "
                f"leave sublayers out."
            ) from None


def split_widths(widths: list[dict[str, Any]]) -> tuple[dict[str, int], dict[int, dict[str, Any]]]:
    """Return (what most layers have, per layer what it has instead). Of equally frequent widths the largest counts."""
    names = sorted({name for layer in widths for name in layer} - {"skip"})
    base = {}
    for name in names:
        counts = Counter(layer[name] for layer in widths if name in layer)
        base[name] = max(counts, key=lambda width: (counts[width], width))
    overrides = {}
    for index, layer in enumerate(widths):
        absent = {name: width for part in layer.get("skip", ()) for name, width in _ABSENT[part].items()}
        different = {name: value for name, value in (absent | layer).items() if base.get(name) != value}
        if different:
            overrides[index] = different
    return base, overrides


def record_widths(model: PreTrainedModel, arch: Arch) -> None:
    """Derive the config from the layers as they are, and make the model's class one that saves and loads them.

    Layers of one width: the plain config and the stock class. Else `per_layer_config`, the class `PerLayer...` and, in
    each layer, its own config and counts (heads per key-value head). Parameters stay the tensors that they are.
    """
    layers, config = decoder_layers(model, arch), cast(Any, model.config)
    widths = [layer_widths(layer) for layer in layers]
    base, overrides = split_widths(widths)
    was_per_layer = isinstance(model, PerLayerModel)
    stock, stock_config = type(model), type(config)
    if was_per_layer:
        stock, stock_config = stock.__bases__[1], stock_config.__bases__[0]
    if was_per_layer or overrides:
        vars(config).pop("auto_map", None)  # saving writes it anew; the source's names files that are not carried
    config.per_layer_config = None
    if {layer.get("num_attention_heads") for layer in widths} == {config.num_attention_heads}:
        base.pop("head_dim")  # the config says or derives the right one as it is
    for name, width in base.items():
        setattr(config, name, width)
    model.__class__ = per_layer_class(stock) if overrides else stock
    config.__class__ = per_layer_config_class(stock_config) if overrides else stock_config
    if overrides:
        config.per_layer_config = overrides
        assert config.per_layer_attributes, "stock modelling would build the skipped parts and make up their weights"
    for index, layer in enumerate(layers):
        _adopt_config(layer, model.config.per_layer_config[index], index)


def _adopt_config(layer: nn.Module, config: Any, index: int) -> None:
    """Give every module of the layer the attributes that it has when it is built from `config`."""
    with torch.device("meta"):
        built = build_layer(type(layer), config, index)
    for name, module in built.named_modules():
        ours = layer.get_submodule(name)
        assert type(ours) is type(module), f"layer {index}: {name} is a {type(ours).__name__}"
        for key, value in vars(module).items():
            if not key.startswith("_") and key != "training":
                setattr(ours, key, value)
    shapes, theirs = ({name: p.shape for name, p in each.named_parameters()} for each in (layer, built))
    assert shapes == theirs, f"layer {index}: its tensors and its config disagree"
