"""A run computes on the device that its recipe names, whole or a layer at a time, and gives what the CPU gives.

The device is `pretend_device`, which refuses operations over two devices as a GPU does and computes on the processor,
so that results are equal to the bit.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
from models import saved, tiny_llama
from recipes import grouped
from safetensors.torch import load_file
from stops import Stopped, killed_in
from tiny_tokenizer import tiny_tokenizer
from torch import nn

import secateur
from secateur.errors import CheckpointError, RecipeError
from secateur.pruning import cost as estimate
from secateur.pruning import prepare as preparation
from secateur.pruning import trim
from secateur.stream import walk
from secateur.stream.device import LayersOnDevice, fetch, float64_device, offload
from tests.vocabulary.test_tokenizer import NUM_PADDING, made

pytestmark = pytest.mark.usefixtures("unproved")

RECIPES: dict[str, dict[str, Any]] = {
    # Every measurement and every sum that a run can ask for.
    "layers, then curves in rounds": {
        "groups": ["ffn", "kv_heads"],
        "depth": 1,
        "remove": 0.35,
        "budget": "curve",
        "rounds": 2,
        "domain_weighting": "minimax",
    },
    "flap": {"score": "flap", "compensate": "none", "evaluate": False},
    "on disk": {"memory_budget": "0.1MB", "evaluate": False},
    "tokens": {"remove": 0.3, "vocabulary": "auto"},
}
# What is run with all of the model on the device, too.
WHOLE = ("layers, then curves in rounds", "tokens")


@pytest.fixture(autouse=True)
def _same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "DEVICE_BATCH_TOKENS", walk.CPU_BATCH_TOKENS)
    pretend_device.device()
    float64_device.cache_clear()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of few channels, each operation of the device costs, whatever its size; some of its tokens can go."""
    tokenizer, _ = made("byte-level")
    sizes = {"intermediate_size": 48, "vocab_size": len(tokenizer) + NUM_PADDING}
    return saved(tmp_path_factory.mktemp("llama"), tiny_llama(tied=True, **sizes), tokenizer)


@pytest.fixture(scope="module")
def on_cpu(llama: Path) -> Callable[[dict[str, Any]], secateur.Result]:
    """Prune on the CPU, once for each recipe."""

    @cache
    def pruned(asked: str) -> secateur.Result:
        return secateur.prune(llama, grouped({**json.loads(asked), "device": "cpu"}))

    return lambda asked: pruned(json.dumps(asked))


def by_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the device held no more than a layer."""
    planned, apart = estimate.memory_for, partial(dataclasses.replace, one_layer_at_a_time=True, budget_bytes=10**6)
    for module in (preparation, trim):
        monkeypatch.setattr(module, "memory_for", lambda *facts: apart(planned(*facts)))


@pytest.mark.parametrize(
    ("name", "by_layers"), [*((name, True) for name in RECIPES), *((name, False) for name in WHOLE)]
)
def test_a_device_gives_what_the_cpu_gives(name, by_layers, llama, recipe, on_cpu, monkeypatch):
    asked = {**recipe, **RECIPES[name]}
    expected = on_cpu({key: value for key, value in asked.items() if key != "memory_budget"})
    if by_layers:
        by_layers_alone(monkeypatch)
    found = secateur.prune(llama, grouped({**asked, "device": "pretend"}))
    assert found.keeps.keys() == expected.keeps.keys() and found.recipe.remove == expected.recipe.remove
    assert all(torch.equal(found.keeps[key], keep) for key, keep in expected.keeps.items())
    theirs = expected.model.state_dict()
    for tensor_name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, theirs[tensor_name]), tensor_name
    assert found.summary.pruned_losses == expected.summary.pruned_losses
    assert found.summary.dense_losses == expected.summary.dense_losses
    assert found.summary.device == "pretend:0" and expected.summary.device == "cpu"
    assert any("one at a time" in note for note in found.summary.warnings) == by_layers
    assert {p.device.type for p in found.model.parameters()} == {"cpu"}


def test_a_device_without_float64_has_its_solves_done_on_the_cpu(llama, recipe, on_cpu, monkeypatch):
    asked = {**recipe, "groups": ["ffn", "kv_heads"], "evaluate": False}
    expected = on_cpu(asked)
    monkeypatch.setattr(pretend_device, "LACKING", {torch.float64})
    found = secateur.prune(llama, grouped({**asked, "device": "pretend"}))
    assert float64_device(torch.device("pretend:0")) == torch.device("cpu")
    assert all(torch.equal(found.keeps[key], keep) for key, keep in expected.keeps.items())
    theirs = expected.model.state_dict()
    for tensor_name, tensor in found.model.state_dict().items():
        close = 1e-3 * float(theirs[tensor_name].abs().max())
        torch.testing.assert_close(tensor, theirs[tensor_name], rtol=0, atol=close)


def test_bfloat16_is_computed_in_float32_and_stored_as_it_was_also_if_interrupted(recipe, tmp_path):
    low = saved(tmp_path / "low", tiny_llama(intermediate_size=48).to(torch.bfloat16))
    asked = {**recipe, "compute_dtype": "float32", "rounds": 2, "target_mix": 0.5}
    result = secateur.prune(low, grouped(asked), out=tmp_path / "whole")
    assert any("computed in float32" in note for note in result.summary.warnings)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert result.summary.dense_size.num_bytes == 2 * result.summary.dense_size.num_params
    dense, stored = (load_file(tmp_path / name / "model.safetensors") for name in ("low", "whole"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    # What was not cut is what it was.
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert torch.equal(stored[name], dense[name])
    assert all(torch.equal(tensor, stored[name]) for name, tensor in result.model.state_dict().items())
    secateur.load(tmp_path / "whole")

    with pytest.raises(Stopped):
        secateur.prune(low, grouped(asked), out=tmp_path / "out", progress=killed_in("prune, round 2 of 2"))
    stays = grouped({**asked, "compute_dtype": "stored"})
    with pytest.raises(CheckpointError, match="computes in float32 was True and is False"):
        secateur.prune(low, stays, out=tmp_path / "out")
    secateur.prune(low, grouped(asked), out=tmp_path / "out")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not any("float32" in note for note in secateur.prune(low, stays).summary.warnings)


def test_offloading_keeps_what_was_changed():
    layers = [nn.Linear(4, 4).requires_grad_(False) for _ in range(3)]
    hosts = [layer.weight for layer in layers]
    onloaded, x = LayersOnDevice(layers, pretend_device.device()), torch.ones(1, 4).to("pretend")
    with torch.inference_mode():
        layers[0](x)
        layers[1](x)
    assert layers[0].weight is hosts[0] and layers[1].weight.device.type == "pretend"
    layers[1].weight.mul_(2)  # in place, on the device
    offload(layers[1])
    assert layers[1].weight.device.type == "cpu" and torch.equal(layers[1].weight, 2 * hosts[1])
    layers[2].weight.add_(1)  # on the host, after its copy was prefetched
    found, bias = layers[2](x).cpu(), layers[2].bias.cpu()
    assert torch.equal(found, nn.functional.linear(torch.ones(1, 4), hosts[2], bias))
    fetch(layers[0])
    layers[0].weight = nn.Parameter(torch.zeros(2, 4).to("pretend"), requires_grad=False)  # cut, on the device
    onloaded.end()
    assert [layer.weight.device.type for layer in layers] == ["cpu"] * 3 and layers[0].weight.shape == (2, 4)


def test_all_of_the_model_or_its_layers_by_the_memory_of_the_device(checkpoints, recipe, monkeypatch):
    asked = {**recipe, "evaluate": False, "device": "pretend", "groups": ["kv_heads"], "remove": 0.1}
    least = {**asked, "calibration": {**recipe["calibration"], "num_tokens": 320}}
    whole = secateur.prune(checkpoints["llama"], grouped({**least, "device_budget": "1GB"}))
    assert not any("one at a time" in note for note in whole.summary.warnings)
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 600_000)
    apart = secateur.prune(checkpoints["llama"], grouped(least))
    assert any("one at a time" in note for note in apart.summary.warnings)
    with pytest.raises(RecipeError, match=r"machine.device_budget: 10.0 kB cannot work; .* still needs"):
        secateur.prune(checkpoints["llama"], grouped({**least, "device_budget": "0.01MB"}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("device", "gpu", "machine.device: torch finds no 'gpu' here"),
        ("device", "cuda:99", "machine.device: torch finds no 'cuda:99' here"),
        ("device", "meta", "machine.device: 'meta' holds no numbers"),
        ("compute_dtype", "float32", "machine.compute_dtype: float32 does not go with memory_budget, which keeps"),
    ],
)
def test_what_cannot_be(key, value, said, checkpoints, recipe):
    with pytest.raises(RecipeError, match=said):
        secateur.prune(checkpoints["llama"], grouped({**recipe, "memory_budget": "1GB", key: value}))


def test_a_model_in_memory_stays_where_it_is(recipe):
    model = tiny_llama()
    with pytest.raises(RecipeError, match=r"machine\.device: is pretend, and the model in memory is on cpu"):
        secateur.prune(model, grouped({**recipe, "device": "pretend"}), tokenizer=tiny_tokenizer())
    with pytest.raises(RecipeError, match=r"machine\.device_budget: a model in memory"):
        secateur.prune(model, grouped({**recipe, "device_budget": "1GB"}), tokenizer=tiny_tokenizer())
