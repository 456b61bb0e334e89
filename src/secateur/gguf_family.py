"""One family in GGUF: which specs there are, and the sizes that a config gives it.

In: a checkpoint's config. Out: head size, rotary settings, widths by layer.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from secateur.arch_spec import GgufSpec, load_specs
from secateur.modeling_per_layer import is_per_layer


def gguf_specs(*, per_layer: bool) -> dict[str, GgufSpec]:
    """Return by model type how a model goes into GGUF, if it can; `per_layer`: one whose layers differ in width."""
    rows = {model_type: row for spec in load_specs().values() for model_type, row in spec.gguf.items()}
    return {key: row.per_layer for key, row in rows.items() if row.per_layer} if per_layer else rows


def head_dim(config: PreTrainedConfig) -> int:
    """Return the channels of one attention head."""
    sizes: Any = config
    return getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads


def rotary(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rotary settings, `rope_type` and `rope_theta` among them; those of layers without a sliding window.

    Hunyuan's `dynamic` with a fixed `alpha` is a larger theta, theta * alpha^(d / (d - 2)). A model without rotary
    positions gets transformers' default, which nothing reads.
    """
    settings: Any = config
    parameters = getattr(settings, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0}
    found = dict(parameters.get("full_attention", parameters))
    if alpha := found.get("alpha") if found["rope_type"] == "dynamic" else None:
        dim = head_dim(config)
        found |= {"rope_type": "default", "rope_theta": found["rope_theta"] * alpha ** (dim / (dim - 2))}
    return found


@dataclass(frozen=True, slots=True)
class LayerWidths:
    """Heads and FFN channels of one layer."""

    num_heads: int
    num_kv_heads: int
    ffn_width: int


def layer_widths(config: PreTrainedConfig) -> list[LayerWidths]:
    """Return every layer's widths."""
    sizes: Any = config
    layers = sizes.per_layer_config if is_per_layer(config) else [sizes] * sizes.num_hidden_layers
    return [LayerWidths(layer.num_attention_heads, num_kv_heads(layer), _ffn_width(layer)) for layer in layers]


def num_kv_heads(config: PreTrainedConfig) -> int:
    """Return the heads of keys and values."""
    sizes: Any = config
    if sizes.model_type == "falcon" and not sizes.new_decoder_architecture:
        return 1 if sizes.multi_query else sizes.num_attention_heads
    found = (getattr(sizes, key, None) for key in ("num_key_value_heads", "num_kv_heads", "num_attention_heads"))
    return next(number for number in found if number)


def _ffn_width(sizes: Any) -> int:
    if hasattr(sizes, "n_inner"):
        return sizes.n_inner or 4 * sizes.hidden_size
    return sizes.ffn_hidden_size if hasattr(sizes, "ffn_hidden_size") else sizes.intermediate_size
