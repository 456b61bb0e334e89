"""What a unit costs per decoded token, on a machine whose seconds are the weights that its linears multiply."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny_llama, tiny_qwen2
from torch import nn

from secateur.errors import RecipeError
from secateur.model.bind import bind
from secateur.pruning import latency
from secateur.pruning.latency import REPEATS, WARM_UPS, Timing, _slope, _take_turns, measure_latency

SECONDS_PER_WEIGHT = 1e-6
FACTORIES = {"llama": tiny_llama, "qwen2": tiny_qwen2}


class Machine:
    """A clock that only products move, by the same for each weight and token."""

    seconds = 0.0

    def ran(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            self.seconds += module.weight.numel() * inputs[0].shape[-2] * SECONDS_PER_WEIGHT


@pytest.fixture
def machine(monkeypatch) -> Iterator[Machine]:
    clock = Machine()
    monkeypatch.setattr(latency, "now", lambda device: clock.seconds)
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    handle = nn.modules.module.register_module_forward_hook(clock.ran)
    yield clock
    handle.remove()


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_prices_are_the_seconds_of_the_weights_that_go(factory, machine):
    model = factory()
    generator = torch.get_rng_state()
    prices, timings = measure_latency(bind(model), ("ffn", "kv_heads"), model)
    assert torch.equal(torch.get_rng_state(), generator)
    hidden, ffn, head_dim = (
        model.config.hidden_size,
        model.config.intermediate_size,
        model.model.layers[0].self_attn.head_dim,
    )
    unit = {"ffn": 3 * hidden, "kv_heads": (2 + 1 + 1 + 2) * head_dim * hidden}  # two query heads read a KV head
    num_units = {"ffn": ffn, "kv_heads": 2}
    layer = sum(unit[name] * num_units[name] for name in unit)
    for name, weights in unit.items():
        assert prices.per_unit[name] == pytest.approx(weights * SECONDS_PER_WEIGHT)
    assert prices.per_layer == pytest.approx(layer * SECONDS_PER_WEIGHT)
    head = model.lm_head.weight.numel()
    assert prices.total == pytest.approx((3 * layer + head) * SECONDS_PER_WEIGHT)
    whole = 3 * layer * SECONDS_PER_WEIGHT
    expected = [("ffn", 3 * ffn), *(("ffn", 3 * count) for count in (28, 56, 84)), ("kv_heads", 6), ("kv_heads", 3)]
    gone = [unit[name] * (3 * num_units[name] - units) for name, units in expected]
    assert {(t.group, t.num_units) for t in timings} == set(expected) | {("kv_heads", 6)}
    for timing in timings:
        assert timing.quartiles == pytest.approx((timing.seconds, timing.seconds))
    found = {(timing.group, timing.num_units): timing.seconds for timing in timings}
    for place, weights in zip(expected, gone, strict=True):
        assert found[place] == pytest.approx(whole - weights * SECONDS_PER_WEIGHT)


def test_a_deep_model_is_timed_on_few_layers_and_priced_whole(machine, monkeypatch):
    model = tiny_llama(num_layers=6)
    layer_bytes = sum(parameter.numel() for parameter in model.model.layers[0].parameters()) * 4
    monkeypatch.setattr(latency, "LEAST_BYTES", 2 * layer_bytes)
    prices, timings = measure_latency(bind(model), ("ffn",), model)
    assert timings[0].num_units == 2 * 112
    assert prices.per_layer == pytest.approx(timings[0].seconds / 2)
    head = model.lm_head.weight.numel() * SECONDS_PER_WEIGHT
    assert prices.total == pytest.approx(6 * prices.per_layer + head)


@pytest.mark.parametrize(("step_seconds", "num_rounds"), [(1.0, WARM_UPS + REPEATS), (1 / 16, 24)])
def test_copies_take_turns_and_the_first_two_rounds_do_not_count(step_seconds, num_rounds, monkeypatch):
    clock, order, told = [0.0], [], []

    def step(key):
        order.append(key)
        clock[0] += step_seconds
        return float(order.count(key)), -float(order.count(key))

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    keys = [("", 0), ("ffn", 8)]
    spans, rests = _take_turns({key: lambda key=key: step(key) for key in keys}, lambda *said: told.append(said))
    assert order == keys * num_rounds  # three seconds at least
    counted = [float(number) for number in range(WARM_UPS + 1, num_rounds + 1)]
    assert spans == dict.fromkeys(keys, counted)
    assert rests == {key: [-number for number in counted] for key in keys}
    assert told[:4] == [("latency", done, REPEATS) for done in (0, 0, 0, 1)]
    assert told[-1] == ("latency", REPEATS, REPEATS)


def test_a_price_is_the_slope_and_no_slope_is_an_error():
    def timings(*seconds: float) -> list[Timing]:
        return [Timing("ffn", units, s, (s, s)) for units, s in zip((100, 50, 25), seconds, strict=True)]

    assert _slope(timings(3.0, 2.0, 1.5)) == pytest.approx(0.02)
    with pytest.raises(RecipeError, match=r"no price for ffn, .* \(100: 1500.000 ms, 50: 2000.000 ms"):
        _slope(timings(1.5, 2.0, 3.0))
    with pytest.raises(RecipeError, match="no price for ffn"):
        _slope(timings(1.0, 1.0, 1.0))  # what costs nothing has no price either
    with pytest.raises(RecipeError, match="no layer has more than one unit"):
        _slope(timings(1.0, 1.0, 1.0)[:1])
