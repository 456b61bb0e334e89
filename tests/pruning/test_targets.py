"""Prices in parameters add up to what a cut model really loses, and a share of them is met."""

import dataclasses
from typing import Any

import pytest
import torch
from models import num_params, tiny_gemma3, tiny_llama, tiny_qwen2

from secateur.methods.budget import Prices, params_gone, prices_of, round_plans, round_shares, uniform_plan
from secateur.methods.curve import GroupProfile, curve_plan
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


@pytest.mark.parametrize("names", [MIXED, ("kv_heads",)])
@pytest.mark.parametrize("remove", [0.05, 0.1, 0.2])
def test_a_share_is_met_within_half_a_step_per_group(names, remove):
    model = tiny_llama(num_attention_heads=24, num_key_value_heads=24, hidden_size=96)
    arch, prices = bind(model), priced(model)
    groups = arch.select(names)
    # As if any number of heads could be stated: what a family's config refuses is another matter.
    plan = uniform_plan(tuple(dataclasses.replace(group, divides=None) for group in groups), prices, remove, 8)
    half_steps = [g.params_per_unit * (8 if g.width == 1 else 1) / 2 for g in groups if g.layer == 0]
    assert abs(plan.removed_share - remove) * prices.total <= 3 * min(half_steps) + 1e-6
    plans = round_plans(groups, prices, plan, round_shares(2), 8)
    assert plans[0].cost_before == prices.total and plans[0].cost_after > plans[1].cost_after


@pytest.mark.parametrize("names", [MIXED, ("kv_heads",)])
def test_curve_meets_a_share_within_one_level(names):
    model = tiny_qwen2(num_attention_heads=8, num_key_value_heads=8, num_layers=4)
    arch, prices = bind(model), priced(model)
    groups, remove = arch.select(names), 0.1
    profiles = {}
    for group in groups:
        levels = tuple(range(group.num_units, 0, -8 if group.width == 1 else -1))
        errors = tuple(0.01 * (group.layer + 1) * number for number in range(len(levels)))
        profiles[group.layer, group.name] = GroupProfile(levels, errors, {"prose": 1.0})
    dearest = max(group.params_per_unit * (8 if group.width == 1 else 1) for group in groups)
    plan = curve_plan(groups, profiles, prices, remove)
    assert 0 <= (plan.removed_share - remove) * prices.total < dearest * 4
    assert plan.cost_before - plan.cost_after == params_gone(groups, plan.num_keep)
