"""Targets other than parameters: prices add up to what a cut model really loses, and each target is met."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from models import opened, tiny_gemma3, tiny_llama, tiny_qwen2
from recipes import grouped
from tiny_tokenizer import tiny_tokenizer

import secateur
from secateur.errors import RecipeError
from secateur.facts import Costs, Size, Workload
from secateur.log import RunLog
from secateur.methods.budget import Prices, round_plans, round_shares, uniform_plan
from secateur.methods.curve import GroupProfile, curve_plan
from secateur.methods.depth import remove_layers
from secateur.methods.prices import Seconds, least_costs
from secateur.model.bind import bind, decoder_layers
from secateur.model.group import cut
from secateur.model.per_layer import record_widths
from secateur.pruning.inspect import inspect
from secateur.pruning.latency import Timing, with_seconds
from secateur.pruning.open import Opened
from secateur.pruning.resolve import recipe_prices, resolve
from secateur.recipe_file import parse_recipe
from secateur.report.card import model_card
from secateur.report.rows import headline
from secateur.store import Services, Store

TOKENIZER = tiny_tokenizer()
FACTORIES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gemma3": tiny_gemma3}
LENGTH = 40
GROUPS = {
    "parameters": ["ffn", "kv_heads"],
    "kv_bytes": ["kv_heads"],
    "latency": ["ffn", "kv_heads"],
}
SECONDS = Seconds(total=0.01, per_layer=0.003, per_unit={"ffn": 1.7e-5, "kv_heads": 3.1e-4})


def recipe_of(target: str, **changes: Any) -> dict[str, Any]:
    recipe = {"target": target, "groups": GROUPS[target], "align": 8, "calibration": {"sequence_length": LENGTH}}
    return recipe | changes


def priced(recipe: dict[str, Any], model: Any) -> Prices:
    """Return the model's prices by a recipe in short; those of a latency are known."""
    return recipe_prices(bare(model, recipe, SECONDS))


def bare(model: Any, recipe: dict[str, Any], seconds: Seconds | None = None) -> Opened:
    """Return the model opened with a recipe that need not fit it."""
    asked = parse_recipe(grouped(recipe))
    return Opened(None, model, bind(model), Size.of(model), asked, model.device, seconds=seconds)


def costs(model: Any) -> Costs:
    return least_costs(model, Workload(prompt_tokens=LENGTH))


def amount(target: str, model: Any) -> float:
    if target == "parameters":
        return sum(parameter.numel() for parameter in model.parameters())
    return costs(model).kv_cache_bytes_per_token


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("parameters", ["ffn", "kv_heads"]),
        ("parameters", ["query_heads"]),
        ("kv_bytes", ["kv_heads"]),
    ],
)
def test_prices_are_what_a_cut_model_really_loses(factory, target, names):
    model = factory(num_attention_heads=8, num_key_value_heads=4)
    arch = bind(model)
    prices, before = priced(recipe_of(target, groups=names), model), amount(target, model)
    groups = arch.select(tuple(names))
    num_keep = {(g.layer, g.name): 64 if g.name == "ffn" else g.num_units // 2 for g in groups}
    for group in groups:
        kept = torch.arange(num_keep[group.layer, group.name])
        cut(decoder_layers(model, arch)[group.layer], group, kept, group.num_units)
    record_widths(model, arch)
    assert before - amount(target, model) == prices.gone(groups, num_keep) > 0
    assert prices.total == round(before)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("target", ["parameters", "kv_bytes"])
def test_a_layers_price_is_what_a_model_without_it_loses(factory, target):
    model = factory()
    arch = bind(model)
    prices, before = priced(recipe_of(target), model), amount(target, model)
    remove_layers(model, arch, [1])
    assert before - amount(target, model) == prices.of_all_but((0, 2)) == prices.per_layer[1] > 0
    assert prices.with_only((0, 2)).total == round(amount(target, model))


@pytest.mark.parametrize("target", GROUPS)
@pytest.mark.parametrize("remove", [0.1, 0.25, 0.4])
def test_each_target_is_met_within_half_a_step_per_group(target, remove):
    model = tiny_llama(num_attention_heads=24, num_key_value_heads=24, hidden_size=96)
    arch = bind(model)
    prices = priced(recipe_of(target, remove=remove), model)
    groups = arch.select(tuple(GROUPS[target]))
    # As if any number of heads could be stated: what a family's config refuses is another matter.
    plan = uniform_plan(tuple(dataclasses.replace(group, divides=None) for group in groups), prices, remove, 8)
    half_steps = [prices.of(g) * (8 if g.width == 1 else 1) / 2 for g in groups if g.layer == 0]
    assert abs(plan.removed_share - remove) * prices.total <= 3 * min(half_steps) + 1e-6
    plans = round_plans(groups, prices, plan, round_shares(2), 8)
    assert plans[0].cost_before == prices.total and plans[0].cost_after > plans[1].cost_after


@pytest.mark.parametrize("target", GROUPS)
def test_curve_meets_each_target_within_one_level(target):
    model = tiny_qwen2(num_attention_heads=8, num_key_value_heads=8, num_layers=4)
    arch = bind(model)
    prices = priced(recipe_of(target), model)
    groups = arch.select(tuple(GROUPS[target]))
    profiles = {}
    for group in groups:
        levels = tuple(range(group.num_units, 0, -8 if group.width == 1 else -1))
        errors = tuple(0.01 * (group.layer + 1) * number for number in range(len(levels)))
        profiles[group.layer, group.name] = GroupProfile(levels, errors, {"prose": 1.0})
    dearest = max(prices.of(group) * (8 if group.width == 1 else 1) for group in groups)
    plan = curve_plan(groups, profiles, prices, 0.2)
    assert 0 <= (plan.removed_share - 0.2) * prices.total < dearest * 4
    assert plan.cost_before - plan.cost_after == prices.gone(groups, plan.num_keep)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": "kv_bytes", "groups": ["ffn"]},
            r"remove.groups: ffn has nothing in the KV cache.*use groups: \[kv_heads\]",
        ),
        ({"target": "kv_bytes", "groups": ["kv_heads", "ffn"]}, "ffn has nothing in the KV cache"),
        ({"target": "kv_bytes", "groups": ["query_heads"]}, "query_heads has nothing in the KV cache"),
        ({"target": "latency", "compensate": "bias"}, "repair.compensate: family qwen2 cannot store a bias"),
        ({"target": "latncy"}, "unknown remove.target 'latncy'; .* did you mean 'latency'"),
        (
            {"target": "kv_bytes", "groups": ["kv_heads"], "remove": 0.9},
            r"0.9 of all [\d,]+ bytes of KV cache per token is out of reach",
        ),
    ],
)
def test_what_cannot_be_is_said_in_the_targets_own_terms(changes, message, recipe, monkeypatch):
    monkeypatch.setattr("secateur.pruning.latency.measure_latency", None)  # nothing is measured before
    with pytest.raises(RecipeError, match=message):
        secateur.prune(tiny_qwen2(), grouped({**recipe, **changes}), tokenizer=TOKENIZER)


def test_latency_without_seconds_is_refused_where_none_are_measured():
    """As in a study, whose cells measure none."""
    model = tiny_llama()
    with pytest.raises(RecipeError, match=r"remove\.target: latency plans with seconds that prune and inspect measure"):
        recipe_prices(bare(model, {"target": "latency", "groups": ["ffn"]}))


def test_what_is_out_of_reach_is_said_in_seconds(recipe, monkeypatch):
    monkeypatch.setattr("secateur.pruning.latency.measure_latency", lambda *_: (SECONDS, []))
    with pytest.raises(RecipeError, match=r"0\.9 of all 10 ms per decoded token is out of reach"):
        secateur.prune(tiny_qwen2(), grouped({**recipe, "target": "latency", "remove": 0.9}), tokenizer=TOKENIZER)


def test_stored_seconds_make_the_same_plan_without_measuring(monkeypatch, tmp_path):
    model, log = tiny_llama(), RunLog()
    measured = SECONDS, [Timing("ffn", 336, 0.009, (0.008, 0.01))]
    asked = parse_recipe(grouped({"target": "latency", "groups": ["ffn", "kv_heads"], "remove": 0.2}))
    monkeypatch.setattr("secateur.pruning.latency.measure_latency", lambda *_: measured)
    filled = with_seconds(opened(model, asked), Services(log=log, store=Store(tmp_path)))
    assert [line["event"] for line in log.lines] == ["latency", "seconds"] and "latency" in log.seconds
    monkeypatch.setattr("secateur.pruning.latency.measure_latency", None)
    again = with_seconds(opened(model, asked), Services(log=log, store=Store(tmp_path)))
    assert again.seconds == filled.seconds == measured[0] and len(log.lines) == 2
    assert resolve(again).plans == resolve(filled).plans


def test_a_latency_run_records_its_seconds(recipe, tmp_path, monkeypatch):
    out, taken = tmp_path / "out", Timing("ffn", 336, 0.009, (0.008, 0.01))
    settings = {**recipe, "target": "latency", "remove": 0.1, "evaluate": False}
    monkeypatch.setattr("secateur.pruning.latency.measure_latency", lambda *_: (SECONDS, [taken]))
    first = secateur.prune(tiny_llama(), grouped(settings), tokenizer=TOKENIZER, out=out)
    lines = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    assert lines[0] == {"event": "latency", "num_threads": 1, **json.loads(json.dumps(dataclasses.asdict(taken)))}
    assert lines[1] == {"event": "seconds", **dataclasses.asdict(SECONDS)}
    assert "latency" in first.summary.seconds
    assert first.summary.outcome.share_gone == pytest.approx(0.1, abs=1.7e-5 * 3 * 4 / 0.01)
    assert "of all 10 ms per decoded token removed" in headline(first.summary)


def test_summary_card_and_inspect_name_what_the_share_is_of(recipe, checkpoints):
    settings = {**recipe, "target": "kv_bytes", "groups": ["kv_heads"], "remove": 0.5}
    before = tiny_qwen2()
    result = secateur.prune(str(checkpoints["qwen2"]), grouped(settings))
    summary = result.summary
    old, new = (amount("kv_bytes", model) for model in (before, result.model))
    assert summary.outcome.share_gone == pytest.approx(1 - new / old, abs=1e-6)
    assert summary.outcome.share_gone == pytest.approx(0.5, abs=0.02)
    num_params = [amount("parameters", model) for model in (before, result.model)]
    assert summary.remove_reached == pytest.approx(1 - num_params[1] / num_params[0])
    card = model_card(summary)
    assert f"{1 - new / old:.1%} of all {old:,} bytes of KV cache per token removed (asked 50.0%)" in card
    assert f"with {summary.remove_reached:.1%} of all {num_params[0]:,} parameters" in card
    found = inspect(checkpoints["qwen2"], parse_recipe(grouped(settings)))
    assert found.outcome == summary.outcome and found.seconds_per_token is None
    assert found.remove_reached == pytest.approx(summary.remove_reached)


def test_inspect_shows_the_outcome_and_the_seconds(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.pruning.latency.measure_latency", lambda *_: (SECONDS, []))
    found = inspect(checkpoints["llama"], parse_recipe(grouped(recipe_of("latency", groups=["ffn"], remove=0.2))))
    assert found.seconds_per_token == SECONDS and found.outcome.total == "10 ms per decoded token"
    assert json.loads(found.to_json())["seconds_per_token"] == dataclasses.asdict(SECONDS)
