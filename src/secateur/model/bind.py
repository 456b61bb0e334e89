"""A model's architecture: its decoder layers, head and groups, as `structure` finds them."""

from dataclasses import replace
from typing import Any

from torch import nn

from secateur.model.guesses import EXPERT_CHANNELS, EXPERTS, sized
from secateur.model.modules import ScaledHead, head_at, linears_for_conv, text_model
from secateur.model.structure import Arch, structure_of, text_config
from secateur.model.twin import of_layer

__all__ = [
    "EXPERTS",
    "EXPERT_CHANNELS",
    "Arch",
    "bind",
    "decoder_layers",
    "head_of",
    "head_width",
    "layer_configs",
    "num_kv_heads",
    "text_config",
    "text_model",
]


def head_width(config: Any) -> int:
    """Return head_dim; it follows from hidden_size if the config does not state it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def num_kv_heads(config: Any) -> int:
    """Return the heads of keys and values; those of queries in families without grouped queries."""
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else config.num_attention_heads
    counts = (getattr(config, key, None) for key in ("num_key_value_heads", "num_kv_heads", "num_attention_heads"))
    return next(count for count in counts if count)


def layer_configs(model: Any) -> list[Any]:
    """Return each layer's config, which is the model's if all layers have one."""
    config: Any = model.config.get_text_config()
    return list(config.per_layer_config) if config.is_heterogeneous else [config] * config.num_hidden_layers


def bind(model: Any) -> Arch:
    """Return the model's architecture, with real sizes. Works on the meta device.

    GPT-2's linears become `TransposedLinear`, which saves the same. Raises ArchError if the model
    cannot be run layer by layer.
    """
    arch, offers = structure_of(model)
    linears_for_conv(model.get_submodule(arch.layers))
    layers, config = decoder_layers(model, arch), text_config(model)
    return replace(
        arch,
        mlp_adds_directly=all(offer.adds_directly for layer in offers for offer in layer),
        groups=tuple(
            sized(offer, layer, index, of_layer(config, index))
            for index, layer in enumerate(layers)
            for offer in offers[index]
        ),
        num_layers=len(layers),
        params_per_layer=tuple(sum(p.numel() for p in layer.parameters()) for layer in layers),
    )


def head_of(model: nn.Module, arch: Arch) -> nn.Module:
    """Return what maps the last hidden state to logits: the head and the model's scaling."""
    head = head_at(model, arch.head)
    return head if arch.logits is None else ScaledHead(head, arch.logits)


def decoder_layers(model: nn.Module, arch: Arch) -> list[nn.Module]:
    """Return the model's decoder layers in order."""
    return list(model.get_submodule(arch.layers).children())
