"""The ideal: bytes and operations counted by hand on a tiny model, and by torch's own counter."""

from typing import Any

import pytest
import torch
from models import tiny_llama, tiny_qwen2
from torch.utils.flop_counter import FlopCounterMode

from secateur.data.blocks import DEFAULT_SEQUENCE_LENGTH, block_length
from secateur.errors import RecipeError
from secateur.evaluation.bench import (
    decode_bytes_per_token,
    kv_cache_bytes_per_token,
    least_costs,
    prefill_flops_per_token,
)
from secateur.facts import Workload
from tests.families import tiny_family

# Width 48, FFN 112, 4 heads of 12 with 2 for keys and values, vocabulary 320, 3 layers, float32.
LINEARS = 3 * (48 * 48 + 2 * 24 * 48 + 48 * 48 + 3 * 112 * 48)
NORMS = 3 * 2 * 48 + 48
HEAD = 320 * 48


@pytest.mark.parametrize("tied", [False, True])
def test_decode_bytes_counted_by_hand(tied):
    # Untied, the embedding is not read but for one row; tied, it is read once, as the head.
    cache = (10 + 4 / 2) * 2 * 3 * 24 * 4
    expected = 4 * (LINEARS + NORMS + HEAD) / 2 + 4 * 48 + cache
    assert decode_bytes_per_token(tiny_llama(tied=tied), Workload(2, prompt_tokens=10, new_tokens=4)) == expected


def test_decode_bytes_count_biases_and_the_dtype():
    biases = 3 * (48 + 24 + 24)
    workload = Workload(1, prompt_tokens=8, new_tokens=2)
    expected = 2 * (LINEARS + NORMS + biases + HEAD) + 2 * 48 + 9 * 2 * 3 * 24 * 2
    assert decode_bytes_per_token(tiny_qwen2().to(torch.bfloat16), workload) == expected


def test_prefill_operations_counted_by_hand():
    attention = 4 * 3 * 48 * 11 / 2
    assert prefill_flops_per_token(tiny_llama(), 10) == 2 * LINEARS + attention + 2 * HEAD / 10


def test_prefill_operations_equal_those_torch_counts():
    model, num_tokens = tiny_llama(attn_implementation="eager"), 10
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.arange(num_tokens)[None], logits_to_keep=1, use_cache=False)
    # torch counts the whole attention matrix, of which causal attention needs half and the diagonal.
    masked_half = 4 * 3 * 48 * (num_tokens - (num_tokens + 1) / 2) * num_tokens
    counted = (counter.get_total_flops() - masked_half) / num_tokens
    # Some versions of transformers make the rotary angles by a matrix product, too.
    assert counted == pytest.approx(prefill_flops_per_token(model, num_tokens), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cache_bytes_equal_a_real_cache(dtype):
    model = tiny_llama().to(dtype)
    with torch.inference_mode():
        output = model(torch.arange(7)[None], use_cache=True)
    cache = output.get("cache", output.get("past_key_values"))
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes_per_token(model) * 7 == real


def test_the_meta_device_is_enough():
    with torch.device("meta"):
        shape = type(tiny_llama())(tiny_llama().config)
    assert least_costs(shape, Workload()) == least_costs(tiny_llama(), Workload())


def test_a_block_is_as_long_as_the_model_allows():
    config = tiny_llama().config
    assert [block_length(asked, config) for asked in (None, 1, 256)] == [256, 1, 256]
    with pytest.raises(RecipeError, match="257 is longer than the model's 256 positions; give at most 256"):
        block_length(257, config)
    config.max_position_embeddings = 100_000
    assert block_length(None, config) == DEFAULT_SEQUENCE_LENGTH


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
