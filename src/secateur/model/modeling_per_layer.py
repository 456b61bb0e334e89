"""Causal language models whose layers have their own widths, built on transformers' modelling.

A checkpoint with `per_layer_config` in its config.json carries this file, so that
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads it. `secateur.load`
uses the package's own copy and needs no trust. `PerLayer<Stock>` is transformers' class `<Stock>`,
with each layer built from that layer's config. Needs only torch and transformers. Not handled:
layers that `type(layer)(config, index)` does not build.
"""

from functools import cache
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError("A model with per-layer widths needs transformers 5.14 or newer; upgrade it.")

PREFIX = "PerLayer"


class PerLayerModel(PreTrainedModel):
    """What every `PerLayer<Stock>` adds to `<Stock>`."""

    _auto_class = "AutoModelForCausalLM"  # makes save_pretrained write this file and auto_map

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        overrides = config.to_dict().get("per_layer_config", {})
        config.per_layer_config = None  # stock modelling builds one width only
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.per_layer_config = overrides or None
        layers = _layers(self)
        for index, layer_config in enumerate(config.per_layer_config):
            layers[index] = type(layers[index])(layer_config, index)
        self.init_weights()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Switch the attention of the layers' own configs too."""
        super().set_attn_implementation(*args, **kwargs)
        for module in _layers(self).modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = self.config._attn_implementation

    def _get_static_cache_init_shape(self) -> None:
        """Let each layer's static cache take the shape of its first keys."""


@cache
def per_layer_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the model class `stock` with layers built from `config.per_layer_config`."""
    members = {"__module__": __name__, "config_class": per_layer_config_class(stock.config_class)}
    return type(PREFIX + stock.__name__, (PerLayerModel, stock, GenerationMixin), members)


@cache
def per_layer_config_class(stock: Any) -> type[PreTrainedConfig]:
    """Return the config class `stock`, which validates layer by layer."""

    def validate_architecture(self: PreTrainedConfig) -> None:
        for layer_config in self.per_layer_config:
            stock.validate_architecture(layer_config)

    members = {
        "__module__": __name__,
        "_auto_class": "AutoConfig",
        "validate_architecture": validate_architecture,
    }
    return strict(type(PREFIX + stock.__name__, (stock,), members))


def _layers(model: PreTrainedModel) -> Any:
    """Return the decoder's list of layers: the first list in a model of text alone."""
    return next(each for each in model.modules() if isinstance(each, torch.nn.ModuleList))


def is_per_layer(config: PreTrainedConfig) -> bool:
    """Say whether a config is of `PerLayer<Stock>`; Gemma 4's own is not."""
    return type(config).__module__ == __name__


def __getattr__(name: str) -> type:
    # transformers looks up auto_map's names here, e.g. PerLayerLlamaForCausalLM.
    stock = (
        getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    )
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return (
        per_layer_config_class(stock)
        if issubclass(stock, PreTrainedConfig)
        else per_layer_class(stock)
    )
