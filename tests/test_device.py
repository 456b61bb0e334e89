"""A run computes on the device that its recipe names, whole or a layer at a time, and gives what the CPU gives.

The device is `pretend_device`, which refuses operations over two devices as a GPU does and computes on the processor,
so that results are equal to the bit.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch

import secateur
from secateur import pruning, walk

RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "heads": {"groups": ["ffn", "kv_heads"]},
    "curve": {"budget": "curve"},
    "search": {"budget": "search", "generations": 2, "offspring": 2},
    "global": {"budget": "global"},
    "taylor": {"score": "taylor"},
    "flap": {"score": "flap", "compensate": "bias"},
    "minimax": {"domain_weighting": "minimax"},
    "rounds": {"rounds": 2, "damping_factors": [1, 10]},
    "depth": {"depth": 1, "remove": 0.35},
    "hidden": {"hidden_size": 44, "remove": 0.25},
    "on disk": {"memory_budget": "0.1MB"},
    "net": {"rounds": 2, "max_loss_rise": 9.0},
}


@pytest.fixture(autouse=True)
def _same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "DEVICE_BATCH_TOKENS", walk.CPU_BATCH_TOKENS)
    pretend_device.device()


@pytest.fixture(scope="module")
def made_by_cpu(checkpoints: dict[str, Path], recipe: dict[str, Any]) -> dict[str, Any]:
    """Results of the CPU by recipe, made when first asked for."""
    return {}


@pytest.mark.parametrize("by_layers", [False, True], ids=["whole", "by layers"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_device_gives_what_the_cpu_gives(name, by_layers, checkpoints, recipe, made_by_cpu, tmp_path, monkeypatch):
    if by_layers:
        # As if the device held no more.
        planned = pruning.memory_for
        apart = partial(dataclasses.replace, one_layer_at_a_time=True, budget_bytes=10**6)
        monkeypatch.setattr(pruning, "memory_for", lambda *facts: apart(planned(*facts)))
    asked = {**recipe, **RECIPES[name]}
    if name not in made_by_cpu:
        on_cpu = {key: value for key, value in asked.items() if key != "memory_budget"}
        made_by_cpu[name] = secateur.prune(checkpoints["llama"], {**on_cpu, "device": "cpu"})
    expected = made_by_cpu[name]
    found = secateur.prune(checkpoints["llama"], {**asked, "device": "pretend"})
    for key, keep in expected.keeps.items():
        assert torch.equal(found.keeps[key], keep)
    theirs = expected.model.state_dict()
    for tensor_name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, theirs[tensor_name]), tensor_name
    assert found.summary.pruned_losses == expected.summary.pruned_losses
    assert found.summary.device == "pretend" and expected.summary.device == "cpu"
    assert any("one at a time" in note for note in found.summary.warnings) == by_layers
    assert {p.device.type for p in found.model.parameters()} == {"cpu"}
