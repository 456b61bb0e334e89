"""Causal attention in blocks: its value and its hand-made gradient against torch's, and what it leaves to torch."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateur.recovery import attention
from secateur.recovery.attention import BLOCK, CausalInBlocks, attention_in_training, causal_attention

ATTENTION = nn.functional.scaled_dot_product_attention


def inputs(num_heads=6, groups=2, length=2 * BLOCK + 7, dtype=torch.float64, value_size=8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (num_heads, 8), (groups, 8), (groups, value_size)
    made = [torch.randn(2, length, heads, size, generator=generator, dtype=dtype) for heads, size in shapes]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]  # strided, as models give them


@pytest.mark.parametrize(("groups", "value_size"), [(1, 8), (2, 8), (6, 8), (2, 5)])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 7])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_value_and_gradient_are_those_of_torch(groups, value_size, length, scale):
    sizes = {"groups": groups, "length": length, "value_size": value_size}
    ours, theirs = inputs(**sizes), inputs(**sizes)
    found = causal_attention(*ours, scale=scale)
    expected = ATTENTION(*theirs, is_causal=True, scale=scale, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    outer = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    (found * outer).sum().backward()
    (expected * outer).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-12)


def test_in_bfloat16_it_errs_by_its_rounding():
    exact = inputs()
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    causal_attention(*rounded).square().sum().backward()
    causal_attention(*exact).square().sum().backward()
    for mine, other in zip(rounded, exact, strict=True):
        assert mine.grad is not None and other.grad is not None
        assert float((mine.grad - other.grad).norm() / other.grad.norm()) < 2e-2


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Count the attentions that are computed in blocks."""
    made: list[int] = []
    real = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *args, **kw: made.append(1) or real(*args, **kw))
    return made


def test_it_takes_the_place_of_torchs_while_it_is_entered(calls):
    query, key, value = inputs()
    with CausalInBlocks():
        found = ATTENTION(query, key, value, is_causal=True, scale=0.7, enable_gqa=True)
    assert len(calls) == 1
    expected = ATTENTION(query, key, value, is_causal=True, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert len(calls) == 1


def test_layers_that_are_computed_again_keep_torchs(calls):
    query, key, value = inputs()
    with attention_in_training(recomputed=True):
        again = checkpoint(partial(ATTENTION, is_causal=True, enable_gqa=True), query, key, value, use_reentrant=False)
        again.sum().backward()
    assert not calls
    assert query.grad is not None


def test_under_autocast_it_computes_in_its_dtype():
    query, key, value = inputs(dtype=torch.float32)
    with CausalInBlocks(), torch.autocast("cpu", torch.bfloat16):
        found = ATTENTION(query, key, value.bfloat16(), is_causal=True, enable_gqa=True)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert query.grad is not None and query.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"is_causal": True, "dropout_p": 0.1},
        {"attn_mask": torch.ones(BLOCK, BLOCK, dtype=torch.bool).tril()},
        {"is_causal": True, "key_length": BLOCK + 1},
    ],
)
def test_what_is_not_plainly_causal_is_left_to_torch(calls, asked):
    query, key, value = inputs(groups=6, length=BLOCK)
    if length := asked.get("key_length"):
        _, key, value = inputs(groups=6, length=length)
    asked = {name: what for name, what in asked.items() if name != "key_length"}
    torch.manual_seed(0)
    expected = ATTENTION(query, key, value, **asked)
    torch.manual_seed(0)
    with CausalInBlocks():
        found = ATTENTION(query, key, value, **asked)
    assert not calls
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
