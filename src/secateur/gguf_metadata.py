"""What a GGUF file says about a model beside its tensors: architecture, sizes, rotary positions.

In: a checkpoint's config. Out: keys on a `gguf.GGUFWriter`, and the refusal of what llama.cpp cannot run. Tokenizers
are in `gguf_tokenizer`. Not handled: widths that differ by layer, sliding windows, mixtures of experts.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from secateur.checkpoint import Checkpoint
from secateur.errors import ArchError


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """`architecture`: llama.cpp's name. `interleaved_rotary`: it rotates channels 2i and 2i+1 where transformers
    rotates i and i + head_dim/2, so the rows of q and k are reordered. `full_width_heads`: it needs query heads *
    head_dim to be the hidden size."""

    architecture: str
    interleaved_rotary: bool
    full_width_heads: bool


FAMILIES = {
    "llama": GgufFamily("llama", interleaved_rotary=True, full_width_heads=False),
    "qwen2": GgufFamily("qwen2", interleaved_rotary=False, full_width_heads=True),
}
ROTARY_TYPES = ("default", "linear", "llama3", "yarn")


def gguf_family(checkpoint: Checkpoint) -> GgufFamily:
    """Return how the checkpoint's family goes into GGUF. Raises ArchError for what llama.cpp would not run as it is."""
    config: Any = checkpoint.config
    name = checkpoint.reference
    if config.model_type not in FAMILIES:
        raise ArchError(
            f"{name}: GGUF export knows the families {', '.join(sorted(FAMILIES))}, not '{config.model_type}'; "
            "convert it with llama.cpp's own script."
        )
    family = FAMILIES[config.model_type]
    query_channels = config.num_attention_heads * head_dim(config)
    if family.full_width_heads and query_channels != config.hidden_size:
        raise ArchError(
            f"{name}: llama.cpp's {family.architecture} needs query heads * head_dim to be the hidden size "
            f"{config.hidden_size}, got {query_channels}; prune groups other than attention heads."
        )
    if config.hidden_act != "silu":
        raise ArchError(f"{name}: llama.cpp's {family.architecture} computes hidden_act silu, got {config.hidden_act}.")
    if getattr(config, "use_sliding_window", False):
        raise ArchError(f"{name}: llama.cpp's {family.architecture} has no sliding window, the config uses one.")
    if rotary(config)["rope_type"] not in ROTARY_TYPES:
        raise ArchError(
            f"{name}: rope_type '{rotary(config)['rope_type']}' has no counterpart in GGUF; "
            f"allowed: {', '.join(ROTARY_TYPES)}."
        )
    return family


def add_metadata(writer: Any, config: PreTrainedConfig) -> None:
    """Write the keys that describe the model's shape to a `gguf.GGUFWriter`."""
    sizes: Any = config
    writer.add_vocab_size(sizes.vocab_size)
    writer.add_context_length(sizes.max_position_embeddings)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_hidden_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_attention_heads)
    writer.add_head_count_kv(sizes.num_key_value_heads)
    # Stated, or llama.cpp takes hidden size / heads, which pruned heads make wrong.
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    _add_rotary(writer, rotary(config))


def head_dim(config: PreTrainedConfig) -> int:
    """Return the channels of one attention head."""
    sizes: Any = config
    return getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads


def rotary(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rotary settings, `rope_type` and `rope_theta` among them."""
    settings: Any = config
    return settings.rope_parameters


def _add_rotary(writer: Any, settings: dict[str, Any]) -> None:
    import gguf

    writer.add_rope_freq_base(settings["rope_theta"])
    kind = settings["rope_type"]
    if kind not in ("linear", "yarn"):  # llama3 is a tensor of its own
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(settings["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
        if settings.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(settings["attention_factor"])
        if settings.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(settings["beta_fast"])
        if settings.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(settings["beta_slow"])
