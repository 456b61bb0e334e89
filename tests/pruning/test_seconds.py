"""The time that a run is said to take: operations over the rates of a short layer and of short products."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny_llama
from recipes import grouped
from tiny_tokenizer import tiny_tokenizer

from secateur.pruning import cost
from secateur.pruning.cost import seconds_for, work_of
from secateur.pruning.open import open_model
from secateur.pruning.resolve import checked, resolve
from secateur.recipe_file import parse_recipe
from secateur.recovery import cost as layers
from secateur.report.records import Work
from secateur.stream import device
from secateur.stream.device import CPU, best_seconds


def test_passes_and_training_at_a_layers_rate_and_the_rest_at_a_products(monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "layer_rate", lambda *facts: asked.append(facts) or 10.0)
    monkeypatch.setattr(cost, "measured_rates", lambda place, dtype, width: Work(1e9, 2.0, 4.0, 1e9, 5.0))
    found = seconds_for(Work(100.0, 20.0, 40.0, 80.0, 50.0), 4096, torch.bfloat16, CPU)
    assert found == Work(10.0, 10.0, 10.0, 18.0) and found.total == 48.0
    assert asked == [(CPU, torch.bfloat16, 2048, 512)]


def test_a_layers_rate_is_its_weights_products_over_its_seconds(monkeypatch):
    layers.layer_rate.cache_clear()
    timed = []
    monkeypatch.setattr(layers, "best_seconds", lambda work: timed.append(work()) or 2.0)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    found = layers.layer_rate(CPU, torch.float64, 128, 10)
    layers.layer_rate.cache_clear()
    assert torch.equal(torch.rand(4), expected)  # a run's random numbers stay its own
    assert found == (4 * 128 * 128 + 3 * 128 * 341 + 2 * 128) * 2 * 10 / 2.0
    (output,) = timed
    assert output.shape == (1, 10, 128) and output.dtype == torch.float64


def test_the_best_of_three(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 11.5, 20.0, 22.0])
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    done: list[int] = []
    assert best_seconds(lambda: done.append(1) or torch.zeros(2, 2)) == 1.5 and len(done) == 3


def test_rates_are_operations_and_bytes_over_seconds(monkeypatch):
    monkeypatch.setattr(cost, "best_seconds", lambda work: 2.0 if work() is not None else 0.0)
    cost.measured_rates.cache_clear()
    found = cost.measured_rates(CPU, torch.float32, 64, 16)
    cost.measured_rates.cache_clear()
    product = 2 * 16 * 64 * (4 * 64) / 2.0
    read_and_written = 2 * 4 * cost.COPIED / 2.0
    assert found == Work(product, product, 2 * 16 * cost.ROWS**2 / 2.0, product, read_and_written)


@pytest.mark.parametrize("target_mix", [0.5, 0.0])
def test_operations_of_statistics_by_hand(target_mix):
    domains = {"code": {"installed": "code"}}
    asked: dict[str, Any] = {"remove": 0.2, "groups": ["ffn", "kv_heads"], "target_mix": target_mix, "polish": False}
    asked |= {"calibration": {"num_tokens": 640, "sequence_length": 32, "domains": domains}}
    model = tiny_llama()
    opened = checked(open_model(model, parse_recipe(grouped(asked)), tiny_tokenizer()))
    resolved = resolve(opened)
    layer = model.model.layers[0]
    assert {group.name for group in resolved.groups} == {"ffn", "kv_heads"}
    ffn, heads = layer.mlp.down_proj.in_features, layer.self_attn.o_proj.in_features
    of_drift = 2 * ffn * layer.mlp.down_proj.out_features if target_mix else 0  # heads have none
    per_token = (ffn**2 + heads**2) * (1 + 1 / 8) + of_drift
    expected = model.config.num_hidden_layers * resolved.num_tokens * per_token
    assert work_of(opened, resolved).gram == pytest.approx(expected)
