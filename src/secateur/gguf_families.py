"""What llama.cpp computes under an architecture's name: a row per model type of transformers, two tables.

A new family is a row here and one in `tests/test_llama_cpp.py`. Not handled: images; experts in some of the
layers only, unless in all but the first few.
"""

from collections.abc import Callable
from typing import Any

from secateur.gguf_family import GgufFamily, head_dim


def _windowless(period: int) -> Callable[[Any], list[str]]:
    """Return `layer_types` where the last of every `period` layers has no window."""

    def layer_types(config: Any) -> list[str]:
        layers = range(1, config.num_hidden_layers + 1)
        return ["sliding_attention" if layer % period else "full_attention" for layer in layers]

    return layer_types


def _scaled_by(large: int) -> Callable[[Any], int]:
    """Return by what attention is scaled: of its sizes llama.cpp knows the largest by its number of layers."""
    return lambda config: (
        config.hidden_size // config.num_attention_heads if config.num_hidden_layers == large else head_dim(config)
    )


_SILU: dict[str, Any] = {"hidden_act": "silu"}
_PLAIN = _SILU | {"attention_bias": False}
_UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
_GEMMA = {"tie_word_embeddings": True, "attention_bias": False, "use_bidirectional_attention": None}
_GEMMA |= {"hidden_activation": "gelu_pytorch_tanh"}
# Experts in every layer; `norm_topk_prob`: whether the weights of a token's experts are made to sum to one.
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_WINDOW_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}  # of Gemma 3's layers with a window, not in the file
_LLAMA = GgufFamily("llama", _SILU, interleaved_rotary=True)
_GRANITE_SCALES = {
    "attention_multiplier": "attention_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_LATENT = _PLAIN | {"rope_parameters.mscale": lambda config: config.rope_parameters.get("mscale_all_dim")}
_COHERE = _PLAIN | {"tie_word_embeddings": True}

FAMILIES = {
    "cohere": GgufFamily(
        "command-r",
        _COHERE | {"use_qk_norm": False},
        "layer_norm_eps",
        {"logit_scale": "logit_scale"},
        full_width_heads=True,
    ),
    "cohere2": GgufFamily(
        "cohere2",
        _COHERE | {"layer_types": _windowless(4)},
        "layer_norm_eps",
        {"logit_scale": "logit_scale"},
        full_width_heads=True,
        window_period=4,
    ),
    "deepseek_v2": GgufFamily(
        "deepseek2", _LATENT | {"topk_method": "greedy", "norm_topk_prob": False}, latent_attention=True
    ),
    "deepseek_v3": GgufFamily("deepseek2", _LATENT | {"rope_interleave": True}, latent_attention=True),
    "ernie4_5": GgufFamily("ernie4_5", _SILU | {"use_bias": False}),
    "exaone4": GgufFamily(
        "exaone4",
        _SILU | {"sliding_window": None, "num_hidden_layers": lambda config: min(config.num_hidden_layers, 63)},
        full_width_heads=True,
    ),
    # Rows of its `query_key_value`, as of GPT-NeoX's, lie head by head and are put in order by that name.
    "falcon": GgufFamily(
        "falcon",
        {"activation": "gelu", "alibi": False, "parallel_attn": True, "bias": False},
        "layer_norm_epsilon",
        full_width_heads=True,
    ),
    "gemma": GgufFamily("gemma", _GEMMA, norm_offset=1),
    "gemma2": GgufFamily(
        "gemma2",
        _GEMMA | {"layer_types": _windowless(2), "query_pre_attn_scalar": _scaled_by(46)},
        scales={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        norm_offset=1,
        window_period=2,
    ),
    "gemma3_text": GgufFamily(
        "gemma3",
        _GEMMA
        | {
            "layer_types": _windowless(6),
            "rope_parameters.sliding_attention": _WINDOW_ROTARY,
            "query_pre_attn_scalar": _scaled_by(62),
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        norm_offset=1,
        window_period=6,
    ),
    "glm": GgufFamily("chatglm", _SILU, full_width_heads=True),
    "glm4": GgufFamily("glm4", _SILU),
    "glm4_moe": GgufFamily("glm4moe", _SILU | {"n_group": 1, "topk_group": 1}),
    "gpt2": GgufFamily(
        "gpt2",
        {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        "layer_norm_epsilon",
        full_width_heads=True,
        transposed=("c_attn", "c_proj", "c_fc"),
    ),
    "gpt_neox": GgufFamily(
        "gptneox",
        {"hidden_act": "gelu", "attention_bias": True, **_UNTIED},
        "layer_norm_eps",
        {"use_parallel_residual": "parallel_residual"},
        full_width_heads=True,
    ),
    "gpt_oss": GgufFamily(
        "gpt-oss",
        _SILU | _UNTIED | {"attention_bias": True, "layer_types": _windowless(2)},
        window_period=2,
        fused_gate="gate_up_proj",
        alternating_gate=True,
        transposed=("gate_proj", "up_proj", "down_proj"),
    ),
    "granite": GgufFamily("granite", _SILU, scales=_GRANITE_SCALES, interleaved_rotary=True),
    "granitemoe": GgufFamily(
        "granitemoe", _SILU, scales=_GRANITE_SCALES, interleaved_rotary=True, fused_gate="input_linear"
    ),
    "hunyuan_v1_dense": GgufFamily("hunyuan-dense", _PLAIN),
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": GgufFamily(
        "mistral3",
        _SILU | {f"rope_parameters.{key}": 1.0 for key in ("mscale", "mscale_all_dim")},
        interleaved_rotary=True,
    ),
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "nemotron": GgufFamily(
        "nemotron", {"hidden_act": "relu2", **_UNTIED}, "norm_eps", full_width_heads=True, norm_offset=1
    ),
    "olmo": GgufFamily("olmo", _PLAIN, 1e-5, {"clip_qkv": "clamp_kqv"}, interleaved_rotary=True, full_width_heads=True),
    "olmo2": GgufFamily("olmo2", _PLAIN | _UNTIED, full_width_heads=True),
    "olmo3": GgufFamily(
        "olmo2", _PLAIN | _UNTIED | {"layer_types": _windowless(4)}, full_width_heads=True, window_period=4
    ),
    "olmoe": GgufFamily(
        "olmoe",
        _PLAIN
        | _UNTIED
        | {"norm_topk_prob": False, "clip_qkv": None, "num_key_value_heads": lambda config: config.num_attention_heads},
        full_width_heads=True,
    ),
    "phi": GgufFamily(
        "phi2", {"hidden_act": "gelu_new", "qk_layernorm": False, **_UNTIED}, "layer_norm_eps", full_width_heads=True
    ),
    "phi3": GgufFamily("phi3", _SILU, full_width_heads=True),
    "qwen2": GgufFamily("qwen2", _SILU, full_width_heads=True),
    "qwen2_moe": GgufFamily(
        "qwen2moe", _SILU | _UNTIED | _EVERY_LAYER | {"norm_topk_prob": False}, full_width_heads=True
    ),
    "qwen3": GgufFamily("qwen3", _PLAIN),
    "qwen3_moe": GgufFamily("qwen3moe", _PLAIN | _EVERY_LAYER | {"norm_topk_prob": True}),
    "seed_oss": GgufFamily("seed_oss", _SILU | {"attention_out_bias": False, "mlp_bias": False}),
    "smollm3": GgufFamily(
        "smollm3",
        _PLAIN
        | {
            "mlp_bias": False,
            "no_rope_layers": lambda config: [int((layer + 1) % 4 > 0) for layer in range(config.num_hidden_layers)],
        },
        interleaved_rotary=True,
    ),
    "stablelm": GgufFamily(
        "stablelm", _SILU | _UNTIED | {"qk_layernorm": False}, "layer_norm_eps", full_width_heads=True
    ),
    "starcoder2": GgufFamily("starcoder2", {"hidden_act": "gelu_pytorch_tanh"}, "norm_epsilon", full_width_heads=True),
}

# Where layers have widths of their own: the two architectures that read them layer by layer and compute what these
# families do. The first is that of Nemotron's pruned Llamas, the second OpenELM's, which has norms of queries and keys.
_DECI = GgufFamily("deci", _SILU, interleaved_rotary=True)
PER_LAYER = {
    "ernie4_5": GgufFamily("deci", _SILU),
    "llama": _DECI,
    "ministral": _DECI,
    "mistral": _DECI,
    "qwen2": _DECI,
    "qwen3": GgufFamily(
        "openelm",
        _PLAIN | {"tie_word_embeddings": True, "rope_parameters.rope_type": "default"},
        fused_qkv=True,
    ),
    "seed_oss": _DECI,
}
