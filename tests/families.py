"""Model types as tiny random models: one row per structure that the type's checkpoints have.

A row is (model type, what its config says besides the common sizes). Rows of one family differ where its checkpoints
do: parallel blocks, norms before or after, fused linears.
"""

from typing import Any

import pytest
import torch
from models import randomised, sizes
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

SIZES = {key: value for key, value in sizes().items() if key != "tie_word_embeddings"}
HEADS = {"head_dim": 16}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
SCALAR = {"query_pre_attn_scalar": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ROTATED_PART = {"hidden_size": 64}  # a quarter of a head, which must be an even number
FALCON = {"ffn_hidden_size": 112, "bias": True}
QWEN_MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
GLM_MOE = HEADS | QWEN_MOE | {"n_routed_experts": 9, "n_group": 3, "topk_group": 2, "use_qk_norm": True}
LLAMA4 = HEADS | {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size_mlp": 80, "moe_layers": [0, 2]}
LLAMA4 |= {"attention_chunk_size": 8, "no_rope_layers": [1, 1, 0]}
MLA = {"num_key_value_heads": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_shared_experts": 1}
MLA |= {"first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16}
MLA |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
GROUPED = MLA | {"n_routed_experts": 9, "n_group": 3, "topk_group": 2}
SHARED = QWEN_MOE | {"num_experts": 6, "shared_expert_intermediate_size": 80}
GRANITE = {"residual_multiplier": 0.5, "logits_scaling": 4.0}
# What sees images, as small as it can be.
SIGLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP |= {"image_size": 8, "patch_size": 4}
PIXTRAL = {**SIGLIP, "model_type": "pixtral", "head_dim": 8}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 1, "fullatt_block_indexes": [0]}
OF_2 = {"embed_dim": 16, "hidden_size": 48}
OF_2_5 = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 48}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}

# name -> (model type, overrides)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", HEADS),
    "mistral": ("mistral", {"sliding_window": 8}),
    "ministral": ("ministral", HEADS | TWO_KINDS),
    "ministral3": ("ministral3", HEADS),
    "qwen3_5": ("qwen3_5_text", HEADS | LINEAR),
    "gemma": ("gemma", HEADS),
    "gemma2": ("gemma2", HEADS | TWO_KINDS | SCALAR | {"final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", HEADS | TWO_KINDS | SCALAR),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", TWO_KINDS),
    "granite": ("granite", GRANITE | {"embedding_multiplier": 3.0, "attention_multiplier": 0.2}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0]}),
    "stablelm": ("stablelm", ROTATED_PART | {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", ROTATED_PART | {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "gpt2": ("gpt2", {"n_inner": 112}),
    "gpt2-derived-width": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", ROTATED_PART),
    "gpt_neox-serial": ("gpt_neox", ROTATED_PART | {"use_parallel_residual": False}),
    "opt": ("opt", {"ffn_dim": 112, "word_embed_proj_dim": 48}),
    "opt-post-norm": ("opt", {"ffn_dim": 112, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "falcon-multi-query": ("falcon", FALCON | {"multi_query": True}),
    "falcon-new": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-serial-alibi": ("falcon", FALCON | {"parallel_attn": False, "multi_query": False, "alibi": True}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", HEADS | TWO_KINDS | {"logit_scale": 0.25}),
    "glm": ("glm", HEADS),
    "glm4": ("glm4", HEADS),
    "exaone4": ("exaone4", TWO_KINDS),
    "nemotron": ("nemotron", HEADS),
    "hunyuan_dense": ("hunyuan_v1_dense", HEADS),
    "ernie4_5": ("ernie4_5", HEADS),
    "seed_oss": ("seed_oss", HEADS),
    "mixtral": ("mixtral", HEADS | {"num_local_experts": 6}),
    "qwen2_moe": ("qwen2_moe", SHARED),
    "qwen2_moe-mixed": ("qwen2_moe", SHARED | {"mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", HEADS | QWEN_MOE | {"num_local_experts": 6, "norm_topk_prob": True}),
    "qwen3_moe-mixed": ("qwen3_moe", HEADS | QWEN_MOE | {"num_local_experts": 6, "mlp_only_layers": [1]}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", HEADS | TWO_KINDS | {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", GRANITE | {"num_local_experts": 6}),
    "llama4": ("llama4_text", LLAMA4),
    "phimoe": ("phimoe", HEADS | {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "glm4_moe": ("glm4_moe", GLM_MOE),
    "deepseek_v2": ("deepseek_v2", MLA | {"n_routed_experts": 6}),
    "deepseek_v2-groups": ("deepseek_v2", GROUPED | {"topk_method": "group_limited_greedy"}),
    "gemma3_multimodal": ("gemma3", {"text_config": HEADS | TWO_KINDS | SCALAR, "vision_config": SIGLIP}),
    "qwen2_vl": ("qwen2_vl", {"text_config": MROPE, "vision_config": QWEN_VISION | OF_2}),
    "qwen2_5_vl": ("qwen2_5_vl", {"text_config": MROPE, "vision_config": QWEN_VISION | OF_2_5}),
    "mistral3": ("mistral3", {"text_config": HEADS | {"model_type": "mistral"}, "vision_config": PIXTRAL}),
    "deepseek_v3": ("deepseek_v3", GROUPED),
}

# One row of each kind of structure; those beside them in a comment run with the slow tests, in the same checks.
KINDS = frozenset(
    (
        "qwen2",  # gated, biases on queries, keys and values: llama, mistral, granite, smollm3, seed_oss, ernie4_5
        "gemma2",  # four norms a layer, two kinds of attention, heads of their own width: gemma, gemma3, glm4
        "qwen3_5",  # linear attention between: nothing but channels goes
        "phi",  # no gate, attention and FFN side by side: stablelm-parallel, gpt_neox, falcon, cohere
        "phi3",  # all maps fused: glm
        "olmo2",  # norms over all heads, and behind the FFN: olmo3, exaone4
        "nemotron",  # no gate, a squared relu, norms that add one: starcoder2
        "gpt2-derived-width",  # transposed maps, a width that no config states: gpt2
        "opt-post-norm",  # another width of the embedding, biases everywhere: opt
        "falcon-multi-query",  # queries, keys and values in one map
        "cohere2",  # one norm for both, logits scaled: cohere
        "mixtral",  # experts: granitemoe, phimoe, olmoe, qwen3_moe
        "qwen2_moe-mixed",  # and a shared one, and layers without: qwen2_moe, qwen3_moe-mixed
        "gpt_oss",  # experts in transposed stacks with biases
        "llama4",  # one expert by the router's sigmoid, layers without
        "deepseek_v3",  # latent attention, groups of experts, a correction of the router: deepseek_v2, glm4_moe
        "qwen2_vl",  # a decoder below what sees: qwen2_5_vl
        "gemma3_multimodal",  # mistral3
    )
)

_DENSE = ("kv_heads", "query_heads", "ffn")
_MIXTURE = ("kv_heads", "query_heads", "experts", "expert_ffn")
# Rows of other groups than heads and channels: what each can lose, and nothing else.
_OTHERS: dict[tuple[str, ...], str] = {
    ("ffn",): """qwen3_5 olmo2 olmo3 stablelm stablelm-parallel gpt2 gpt2-derived-width gpt_neox gpt_neox-serial opt
        opt-post-norm falcon-multi-query falcon-new falcon-serial-alibi qwen2_vl qwen2_5_vl""",
    ("kv_heads", "ffn"): "phi3",
    _MIXTURE: "mixtral qwen3_moe granitemoe phimoe",
    (*_MIXTURE, "shared"): "qwen2_moe",
    (*_MIXTURE, "shared", "ffn"): "qwen2_moe-mixed",
    (*_MIXTURE, "ffn"): "qwen3_moe-mixed",
    ("experts", "expert_ffn"): "olmoe gpt_oss",
    ("kv_heads", "query_heads", "experts", "ffn"): "llama4 glm4_moe",
    ("experts", "ffn"): "deepseek_v2 deepseek_v2-groups deepseek_v3",
}
GROUPS: dict[str, tuple[str, ...]] = dict.fromkeys(FAMILIES, _DENSE)
GROUPS |= {name: groups for groups, names in _OTHERS.items() for name in names.split()}


DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]


def row(name: str, *others: Any) -> Any:
    """Return the row's parameters of a test; a row that is of another's kind is slow."""
    marks = () if name in KINDS else (pytest.mark.slow,)
    labels = (other if isinstance(other, str) else "-".join(other) for other in others)
    return pytest.param(name, *others, id="-".join((name, *labels)), marks=marks)


def tiny_family(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Return the row's model, random, in eval mode; `overrides` replace config values.

    `dtype`: of its parameters; buffers keep the one in which the family computes them.
    """
    model_type, special = FAMILIES[name]
    config_class = CONFIG_MAPPING[model_type]
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    if "text_config" in special:
        special = special | {"text_config": SIZES | special["text_config"]}
        known = set()
    sizes = {key: value for key, value in SIZES.items() if key in known} | special | overrides
    config = config_class(**sizes)
    auto = AutoModelForCausalLM if config_class in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype)
    adds_one = model_type.startswith(("gemma", "qwen3_5", "nemotron"))
    return randomised(model, seed, norm_mean=0 if adds_one else 1)
