"""One family in GGUF: what llama.cpp's architecture takes for granted, and the sizes that a config gives it.

In: a checkpoint's config. Out: a row of the table in `gguf_families`, head size, rotary settings, widths by layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from secateur.modeling_per_layer import is_per_layer


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """A row of the table below.

    `takes`: what llama.cpp takes for granted: key of the config -> its value, or a function of the config; a key that a
    config lacks counts as None. `eps`: the key of the norms' epsilon, or its value; `rms_norm_eps` alone is of RMS
    norms. `scales`: key of the config -> the writer's `add_` method. `interleaved_rotary`: it rotates channels 2i and
    2i+1 where transformers rotates i and i + head_dim/2, so the rows of q and k are reordered. `full_width_heads`: it
    needs query heads * head_dim to be the hidden size. `norm_offset`: what transformers adds to the weights of norms
    and llama.cpp does not. `window_period`: of so many layers all but the last have a sliding window; 0: none has.
    `fused_gate`: the file keeps an expert's gate and input in one matrix of that name, llama.cpp apart;
    `alternating_gate`: their rows take turns. `transposed`: modules that hold their weight transposed. `fused_qkv`:
    the file keeps q, k and v apart, llama.cpp in one matrix. `latent_attention`: keys and values of all heads are
    read off one latent vector, DeepSeek's MLA.
    """

    architecture: str
    takes: Mapping[str, Any] = field(default_factory=dict)
    eps: str | float = "rms_norm_eps"
    scales: Mapping[str, str] = field(default_factory=dict)
    interleaved_rotary: bool = False
    full_width_heads: bool = False
    norm_offset: int = 0
    window_period: int = 0
    fused_gate: str = ""
    alternating_gate: bool = False
    transposed: tuple[str, ...] = ()
    fused_qkv: bool = False
    latent_attention: bool = False


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
