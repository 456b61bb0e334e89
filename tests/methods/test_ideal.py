"""The ideal: bytes and operations counted by hand on a tiny model, and by torch's own counter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import opened, randomised, tiny_llama, tiny_qwen2
from tiny_tokenizer import tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import MambaConfig, MambaForCausalLM, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from secateur.data.answers import Speaker
from secateur.errors import CalibrationError, RecipeError
from secateur.evaluation.bench import (
    decode_bytes_per_token,
    kv_cache_bytes_per_token,
    least_costs,
    prefill_flops_per_token,
)
from secateur.facts import Workload
from secateur.model.bind import bind
from secateur.pruning.text import completed
from secateur.recipe import Recipe
from tests.families import tiny_family

# Width 48, FFN 112, 4 heads of 12 with 2 for keys and values, vocabulary 320, 3 layers, float32.
LINEARS = 3 * (48 * 48 + 2 * 24 * 48 + 48 * 48 + 3 * 112 * 48)
NORMS = 3 * 2 * 48 + 48
HEAD = 320 * 48


def test_decode_bytes_counted_by_hand():
    # Untied, the embedding is not read but for one row; tied, it is read once, as the head.
    cache = (10 + 4 / 2) * 2 * 3 * 24 * 4
    expected = 4 * (LINEARS + NORMS + HEAD) / 2 + 4 * 48 + cache
    for tied in (False, True):
        assert decode_bytes_per_token(tiny_llama(tied=tied), Workload(2, prompt_tokens=10, new_tokens=4)) == expected
    biases = 3 * (48 + 24 + 24)
    workload = Workload(1, prompt_tokens=8, new_tokens=2)
    expected = 2 * (LINEARS + NORMS + biases + HEAD) + 2 * 48 + 9 * 2 * 3 * 24 * 2
    assert decode_bytes_per_token(tiny_qwen2().to(torch.bfloat16), workload) == expected


def test_prefill_operations_equal_those_torch_counts():
    model, num_tokens = tiny_llama(attn_implementation="eager"), 10
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.arange(num_tokens)[None], logits_to_keep=1, use_cache=False)
    # torch counts the whole attention matrix, of which causal attention needs half and the diagonal.
    masked_half = 4 * 3 * 48 * (num_tokens - (num_tokens + 1) / 2) * num_tokens
    counted = (counter.get_total_flops() - masked_half) / num_tokens
    # Some versions of transformers make the rotary angles by a matrix product, too.
    assert counted == pytest.approx(prefill_flops_per_token(model, num_tokens), rel=1e-3)


def test_cache_bytes_counted_by_hand():
    for dtype in (torch.float32, torch.float16):
        assert kv_cache_bytes_per_token(tiny_llama().to(dtype)) == 2 * 3 * 24 * dtype.itemsize
    # One of three layers attends.
    assert kv_cache_bytes_per_token(tiny_family("qwen3_5")) == 4 * 2 * 2 * 16
    # A latent for keys and values together, and the rotated part of keys.
    assert kv_cache_bytes_per_token(tiny_family("deepseek_v2")) == 4 * 3 * (16 + 8)
    # Two heads share each head of keys and values, and the cache holds what is shared once.
    assert kv_cache_bytes_per_token(tiny_family("falcon-new")) == 4 * 3 * 2 * 2 * 12


def recurrent(**sizes: Any) -> Any:
    """Return a model of two recurrent layers and one that attends, which keeps no keys and values outside of it."""
    own = {"hidden_size": 48, "lru_width": 48, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 12}
    config = RecurrentGemmaConfig(**own, num_hidden_layers=3, num_key_value_heads=1, vocab_size=320, **sizes)
    return randomised(RecurrentGemmaForCausalLM(config), 0)


def test_recurrent_layers_do_not_attend():
    def operations(**sizes: Any) -> float:
        return prefill_flops_per_token(recurrent(**sizes), 11) - prefill_flops_per_token(recurrent(**sizes), 1)

    # At 11 tokens each attends to six on average, to one alone; the head runs once.
    head = 2 * 320 * 48 * (1 / 11 - 1)
    assert operations() == pytest.approx(4 * 48 * (6 - 1) + head)
    assert operations(block_types=["attention"] * 3) == pytest.approx(3 * 4 * 48 * (6 - 1) + head)
    mamba = MambaForCausalLM(MambaConfig(hidden_size=48, num_hidden_layers=2, vocab_size=320, state_size=4))
    costs = least_costs(mamba, Workload())
    assert costs.kv_cache_bytes_per_token == 0 < costs.prefill_flops_per_token


def test_a_model_without_keys_and_values_answers_nothing():
    of = replace(opened(recurrent(), Recipe()), tokenizer=tiny_tokenizer())
    assert not of.arch.caches and bind(tiny_family("qwen3_5")).caches
    assert completed(of) is of
    with pytest.raises(RecipeError, match="answers nothing, as the model keeps no keys and values while it writes"):
        completed(of.filled(calibration={"answers": 0.5}))
    # As `recover` asks, which has no share.
    with pytest.raises(CalibrationError, match="the model keeps no keys and values while it writes; leave them out"):
        _ = Speaker(of.model, of.arch, tiny_tokenizer(), "0", 32).rows


def test_a_token_needs_the_experts_that_it_is_sent_to_however_many_there_are() -> None:
    two, four, of_four = (
        tiny_family("qwen3_moe", num_local_experts=count, num_experts_per_tok=chosen)
        for count, chosen in ((8, 2), (8, 4), (4, 2))
    )
    one_expert = sum(stack[0].numel() for stack in two.parameters() if stack.ndim == 3)
    router = sum(weight[4:].nbytes for name, weight in two.named_parameters() if name.endswith("gate.weight"))
    assert one_expert > 0 and router > 0
    assert prefill_flops_per_token(four, 10) == prefill_flops_per_token(two, 10) + 2 * 2 * one_expert
    assert prefill_flops_per_token(of_four, 10) == prefill_flops_per_token(two, 10)

    def read(model: Any, batch: int) -> float:
        """Return the bytes of weights that a batch reads."""
        of_each = 4 * model.config.hidden_size + (256 + 32 / 2) * kv_cache_bytes_per_token(model)
        return (decode_bytes_per_token(model, Workload(batch)) - of_each) * batch

    assert read(two, 1) == pytest.approx(read(of_four, 1) + router)
    assert [read(two, batch) - read(two, 1) for batch in (3, 4, 9)] == pytest.approx(
        [4 * 4 * one_expert, 6 * 4 * one_expert, 6 * 4 * one_expert]
    )
