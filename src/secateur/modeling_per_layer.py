"""Causal language models whose layers have widths of their own, built from transformers' own modelling.

A checkpoint with `per_layer_config` in its config.json carries this file, so that
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads it; `secateur.load` uses the package's
own copy and needs no trust. `PerLayer<Stock>` is transformers' class `<Stock>` with each layer built from the config of
that layer. Needs only torch and transformers. Not handled: layers that are not made by `type(layer)(config, index)`.
"""

from functools import cache
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError("A model with per-layer widths needs transformers 5.14 or newer; upgrade it.")

PREFIX = "PerLayer"


class SkippedAttn(nn.Module):  # with "Attention" in its name transformers would take this file for old-style modelling
    """Stands where a layer has no attention: adds nothing to the residual stream."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, cache: Any = None, past_key_values: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        cache = past_key_values if cache is None else cache  # the name before and after transformers 5.24
        if cache is not None:
            # transformers asks one layer, often the first, how many tokens the cache holds; so count them here too.
            seen = hidden_states[:, None, :, :1]
            cache.update(seen, seen, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class SkippedMLP(nn.Module):
    """Stands where a layer has no MLP: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


def skip_sublayer(layer: nn.Module, sublayer: str, layer_idx: int) -> None:
    """Take the layer's "attention" or "mlp" out, with the norms that only it has. Raises ValueError if none is known.

    Known are pre-norm layers (Llama and its kin) and those with a norm on either side (Gemma 2 and 3).
    """
    both_sides = hasattr(layer, "pre_feedforward_layernorm")
    norms = {
        "attention": ["input_layernorm", "post_attention_layernorm"] if both_sides else ["input_layernorm"],
        "mlp": ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        if both_sides
        else ["post_attention_layernorm"],
    }
    known = {"self_attn", "mlp", *norms["attention"], *norms["mlp"]}
    if sublayer not in norms or {name for name, _ in layer.named_children()} != known:
        raise ValueError(f"layer {layer_idx}: cannot skip '{sublayer}' of a {type(layer).__name__}")
    if sublayer == "attention":
        layer.self_attn = SkippedAttn(layer_idx)
    else:
        layer.mlp = SkippedMLP()
    for name in norms[sublayer]:
        setattr(layer, name, nn.Identity())


def build_layer(layer_class: type[nn.Module], config: PreTrainedConfig, layer_idx: int) -> nn.Module:
    """Return a new layer with the widths of `config`, the config of this layer, without what it skips."""
    layer: Any = layer_class(config, layer_idx)
    for sublayer in getattr(config, "skip", ()):
        skip_sublayer(layer, sublayer, layer_idx)
    return layer


class PerLayerModel(PreTrainedModel):
    """What every `PerLayer<Stock>` adds to `<Stock>`."""

    _auto_class = "AutoModelForCausalLM"  # so that save_pretrained writes this file and auto_map

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        overrides = config.to_dict().get("per_layer_config", {})
        config.per_layer_config = None  # stock modelling builds one width only
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.per_layer_config = overrides or None
        layers = _layers(self)
        for index, layer_config in enumerate(config.per_layer_config):
            layers[index] = build_layer(type(layers[index]), layer_config, index)
        self.init_weights()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)
        layers = _layers(self)
        for module in layers.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = self.config._attn_implementation

    def _get_static_cache_init_shape(self) -> None:
        """Let every layer's static cache take the shape of the first keys that it gets."""


@cache
def per_layer_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return transformers' model class `stock` with layers built from `config.per_layer_config`."""
    members = {"__module__": __name__, "config_class": per_layer_config_class(stock.config_class)}
    return type(PREFIX + stock.__name__, (PerLayerModel, stock, GenerationMixin), members)


@cache
def per_layer_config_class(stock: Any) -> type[PreTrainedConfig]:
    """Return transformers' config class `stock`, checking layer by layer; Llama's asks for one number of heads."""

    def validate_architecture(self: PreTrainedConfig) -> None:
        for layer_config in self.per_layer_config:
            stock.validate_architecture(layer_config)

    members = {"__module__": __name__, "_auto_class": "AutoConfig", "validate_architecture": validate_architecture}
    return strict(type(PREFIX + stock.__name__, (stock,), members))


def _layers(model: PreTrainedModel) -> Any:
    """Return the decoder's list of layers; in GPT-2 and Falcon it is called h."""
    decoder: Any = model.get_decoder()
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


def is_per_layer(config: PreTrainedConfig) -> bool:
    """Tell a config of a `PerLayer<Stock>` from those whose family reads `per_layer_config` itself, as Gemma 4."""
    return type(config).__module__ == __name__


def __getattr__(name: str) -> type:
    # auto_map names PerLayerLlamaForCausalLM and the like, which transformers looks up in this module.
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return per_layer_config_class(stock) if issubclass(stock, PreTrainedConfig) else per_layer_class(stock)
