"""What a GGUF file says about a model beside its tensors: architecture, sizes, rotary positions.

In: a checkpoint's config. Out: keys on a `gguf.GGUFWriter`, and the refusal of what llama.cpp cannot run. Tokenizers
are in `gguf_tokenizer`. Not handled: widths that differ by layer, mixtures of experts, images.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from secateur.checkpoint import Checkpoint
from secateur.errors import ArchError


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """What llama.cpp does under an architecture's name, where architectures differ.

    `interleaved_rotary`: it rotates channels 2i and 2i+1 where transformers rotates i and i + head_dim/2, so the rows
    of q and k are reordered. `full_width_heads`: it needs query heads * head_dim to be the hidden size.
    `attention_bias`: it reads biases of all attention linears. `norm_offset`: what transformers adds to the weights of
    norms and llama.cpp does not. `tied`: it has no head of its own. `window_period`: of so many layers all but the last
    have a sliding window; 0: none has.
    """

    architecture: str
    activation: str = "silu"
    interleaved_rotary: bool = False
    full_width_heads: bool = False
    attention_bias: bool = False
    norm_offset: int = 0
    tied: bool = False
    window_period: int = 0


_LLAMA = GgufFamily("llama", interleaved_rotary=True, attention_bias=True)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": GgufFamily("qwen2", full_width_heads=True),
    "qwen3": GgufFamily("qwen3"),
    "gemma": GgufFamily("gemma", "gelu_pytorch_tanh", norm_offset=1, tied=True),
    "gemma3_text": GgufFamily("gemma3", "gelu_pytorch_tanh", norm_offset=1, window_period=6),
}
ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
# Layers with a window are rotated by this base, which llama.cpp does not read from the file.
_WINDOW_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}


def gguf_family(checkpoint: Checkpoint) -> GgufFamily:
    """Return how the checkpoint's family goes into GGUF. Raises ArchError for what llama.cpp would not run as it is."""
    config: Any = checkpoint.config
    if config.model_type not in FAMILIES:
        raise ArchError(
            f"{checkpoint.reference}: GGUF export knows the families {', '.join(sorted(FAMILIES))}, "
            f"not '{config.model_type}'; convert it with llama.cpp's own script."
        )
    family = FAMILIES[config.model_type]
    where = f"{checkpoint.reference}: llama.cpp's {family.architecture}"
    query_channels = config.num_attention_heads * head_dim(config)
    if family.full_width_heads and query_channels != config.hidden_size:
        raise ArchError(
            f"{where} needs query heads * head_dim to be the hidden size {config.hidden_size}, got {query_channels}; "
            "prune groups other than attention heads."
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        raise ArchError(f"{where} computes hidden_act {family.activation}, got {activation}.")
    if getattr(config, "attention_bias", False) and not family.attention_bias:
        raise ArchError(f"{where} has no attention biases, the config says attention_bias.")
    if family.tied and not config.tie_word_embeddings:
        raise ArchError(f"{where} has no head of its own, the config says tie_word_embeddings: false.")
    if getattr(config, "use_bidirectional_attention", False):
        raise ArchError(f"{where} is causal, the config says use_bidirectional_attention.")
    if family.window_period:
        _check_gemma3(config, family, where)
    if rotary(config)["rope_type"] not in ROTARY_TYPES:
        raise ArchError(
            f"{checkpoint.reference}: rope_type '{rotary(config)['rope_type']}' has no counterpart in GGUF; "
            f"allowed: {', '.join(ROTARY_TYPES)}."
        )
    return family


def _check_gemma3(config: Any, family: GgufFamily, where: str) -> None:
    """Raise ArchError where the config differs from what llama.cpp takes for granted in Gemma 3."""
    num_layers, period = config.num_hidden_layers, family.window_period
    windowless = [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"]
    # Of its sizes llama.cpp knows the largest by the number of layers.
    scaled_by = config.hidden_size // config.num_attention_heads if num_layers == 62 else head_dim(config)
    for key, got, expected in (
        ("the layers of full_attention", windowless, list(range(period - 1, num_layers, period))),
        ("rope_parameters of sliding_attention", config.rope_parameters["sliding_attention"], _WINDOW_ROTARY),
        ("query_pre_attn_scalar", config.query_pre_attn_scalar, scaled_by),
        ("attn_logit_softcapping", config.attn_logit_softcapping, None),
        ("final_logit_softcapping", config.final_logit_softcapping, None),
    ):
        if got != expected:
            raise ArchError(f"{where} takes {key} to be {expected}, got {got}.")


def context_length(config: PreTrainedConfig) -> int:
    """Return for how many tokens llama.cpp computes what the model does.

    A sliding window changes nothing up to its own length; architectures without one are right up to there.
    """
    sizes: Any = config
    window = None if FAMILIES[sizes.model_type].window_period else getattr(sizes, "sliding_window", None)
    return min(sizes.max_position_embeddings, window or sizes.max_position_embeddings)


def add_metadata(writer: Any, config: PreTrainedConfig) -> None:
    """Write the keys that describe the model's shape to a `gguf.GGUFWriter`."""
    sizes: Any = config
    writer.add_vocab_size(sizes.vocab_size)
    writer.add_context_length(context_length(config))
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
    if FAMILIES[sizes.model_type].window_period:
        writer.add_sliding_window(sizes.sliding_window)
    _add_rotary(writer, rotary(config))


def head_dim(config: PreTrainedConfig) -> int:
    """Return the channels of one attention head."""
    sizes: Any = config
    return getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads


def rotary(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rotary settings, `rope_type` and `rope_theta` among them; those of layers without a sliding window."""
    settings: Any = config
    return settings.rope_parameters.get("full_attention", settings.rope_parameters)


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
