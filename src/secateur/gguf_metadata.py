"""What a GGUF file says about a model beside its tensors: architecture, sizes, experts, scales, rotary positions.

In: a checkpoint's config. Out: keys on a `gguf.GGUFWriter`. Tokenizers are in `gguf_tokenizer`, what an architecture
takes for granted in `arch_spec`, sizes in `gguf_family`.
"""

from typing import Any

from transformers import PreTrainedConfig

from secateur.arch_spec import GgufSpec
from secateur.gguf_family import head_dim, layer_widths, rotary


def context_length(config: PreTrainedConfig, family: GgufSpec) -> int:
    """Return for how many tokens llama.cpp computes what the model does.

    A sliding window changes nothing up to its own length; architectures without one are right up to there.
    """
    sizes: Any = config
    window = None if family.window_period else getattr(sizes, "sliding_window", None)
    return min(sizes.max_position_embeddings, window or sizes.max_position_embeddings)


def add_metadata(writer: Any, config: PreTrainedConfig, family: GgufSpec) -> None:
    """Write the keys that describe the model's shape to a `gguf.GGUFWriter`."""
    sizes: Any = config
    writer.add_vocab_size(sizes.vocab_size)
    writer.add_context_length(context_length(config, family))
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_hidden_layers)
    layers = layer_widths(config)
    writer.add_feed_forward_length(_one_or_all([layer.ffn_width for layer in layers]))
    writer.add_head_count(_one_or_all([layer.num_heads for layer in layers]))
    if family.latent_attention:
        _add_latent_attention(writer, sizes)
    else:
        writer.add_head_count_kv(_one_or_all([layer.num_kv_heads for layer in layers]))
        # Stated, or llama.cpp takes hidden size / heads, which pruned heads make wrong.
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(int(head_dim(config) * rotary(config).get("partial_rotary_factor", 1.0)))
    add_eps = writer.add_layer_norm_rms_eps if family.eps == "rms_norm_eps" else writer.add_layer_norm_eps
    add_eps(getattr(sizes, family.eps) if isinstance(family.eps, str) else family.eps)
    for key, name in family.scales.items():
        if (value := getattr(sizes, key)) is not None:
            getattr(writer, f"add_{name}")(value)
    if family.window_period:
        writer.add_sliding_window(sizes.sliding_window)
    _add_experts(writer, sizes)
    _add_rotary(writer, rotary(config), family)


def _one_or_all(values: list[int]) -> int | list[int]:
    return values if len(set(values)) > 1 else values[0]


def _add_latent_attention(writer: Any, sizes: Any) -> None:
    """Write what one KV head per layer holds, the latent vector and the rotated channels, and what a head reads off."""
    writer.add_head_count_kv(1)
    writer.add_key_length(sizes.kv_lora_rank + sizes.qk_rope_head_dim)
    writer.add_value_length(sizes.kv_lora_rank)
    writer.add_key_length_mla(sizes.qk_nope_head_dim + sizes.qk_rope_head_dim)
    writer.add_value_length_mla(sizes.v_head_dim)
    writer.add_kv_lora_rank(sizes.kv_lora_rank)
    writer.add_q_lora_rank(sizes.q_lora_rank or 0)


def _add_experts(writer: Any, sizes: Any) -> None:
    import gguf

    found = (getattr(sizes, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    num_experts = next((number for number in found if number), None)
    if num_experts is None:
        return
    writer.add_expert_count(num_experts)
    writer.add_expert_used_count(sizes.num_experts_per_tok)
    writer.add_expert_feed_forward_length(getattr(sizes, "moe_intermediate_size", None) or sizes.intermediate_size)
    if (width := getattr(sizes, "shared_expert_intermediate_size", None)) is not None:
        writer.add_expert_shared_feed_forward_length(width)
    if (num_shared := getattr(sizes, "n_shared_experts", None)) is not None:
        writer.add_expert_shared_count(num_shared)
        writer.add_leading_dense_block_count(sizes.first_k_dense_replace)
        writer.add_expert_weights_scale(sizes.routed_scaling_factor)
        writer.add_expert_weights_norm(sizes.norm_topk_prob)
        sigmoid = sizes.model_type != "deepseek_v2"
        writer.add_expert_gating_func(getattr(gguf.ExpertGatingFuncType, "SIGMOID" if sigmoid else "SOFTMAX"))
        if (getattr(sizes, "n_group", None) or 1) > 1:
            writer.add_expert_group_count(sizes.n_group)
            writer.add_expert_group_used_count(sizes.topk_group)


def _add_rotary(writer: Any, settings: dict[str, Any], family: GgufSpec) -> None:
    import gguf

    writer.add_rope_freq_base(settings["rope_theta"])
    kind = settings["rope_type"]
    if kind not in ("linear", "yarn"):  # llama3 is a tensor of its own
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(settings["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
        if settings.get("mscale_all_dim"):
            # A tenth for DeepSeek alone: llama.cpp's converter, TAG_DEEPSEEK2_YARN_LOG_MUL_FIX.
            share = 0.1 if family.latent_attention else 1.0
            writer.add_rope_scaling_yarn_log_mul(share * settings["mscale_all_dim"])
        if settings.get("llama_4_scaling_beta"):
            writer.add_attn_temperature_scale(settings["llama_4_scaling_beta"])
        if settings.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(settings["attention_factor"])
        if settings.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(settings["beta_fast"])
        if settings.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(settings["beta_slow"])
