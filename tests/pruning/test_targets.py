"""Prices in parameters add up to what a cut model really loses, and a share of them is met."""

from typing import Any

import pytest
import torch
from models import num_params, tiny_gemma3, tiny_llama, tiny_qwen2

from secateur.methods.budget import Prices, params_gone, prices_of
from secateur.methods.depth import remove_layers
from secateur.model.bind import bind, decoder_layers
from secateur.model.group import cut
from secateur.model.per_layer import record_widths

FACTORIES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gemma3": tiny_gemma3}
MIXED = ("ffn", "kv_heads")


def priced(model: Any) -> Prices:
    """Return the prices of a model."""
    return prices_of(bind(model), model)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("names", [MIXED, ("query_heads",), ("kv_heads",)])
def test_prices_are_what_a_cut_model_really_loses(factory, names):
    model = factory(num_attention_heads=8, num_key_value_heads=4)
    arch, prices, before = bind(model), priced(model), num_params(model)
    groups = arch.select(names)
    num_keep = {(g.layer, g.name): 64 if g.name == "ffn" else g.num_units // 2 for g in groups}
    for group in groups:
        kept = torch.arange(num_keep[group.layer, group.name])
        cut(decoder_layers(model, arch)[group.layer], group, kept)
    record_widths(model, arch)
    assert before - num_params(model) == params_gone(groups, num_keep) > 0
    assert prices.total == before


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_a_layers_price_is_what_a_model_without_it_loses(factory):
    model = factory()
    arch, prices, before = bind(model), priced(model), num_params(model)
    remove_layers(model, arch, [1])
    assert before - num_params(model) == prices.taken((0, 2)) == prices.per_layer[1] > 0
    assert prices.with_only((0, 2)).total == num_params(model)
