"""The published methods of `benchmarks/published`: each removes the share of all parameters that it says."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_ids, tiny_llama, tiny_qwen2

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "published"))

import flap
import gisp
import llm_pruner
import units
import wanda_sp
from pruned import count_parameters

pytestmark = pytest.mark.slow  # what is compared with, which no user runs

SIZES = {"intermediate_size": 192, "num_attention_heads": 6, "hidden_size": 48, "num_layers": 4, "tied": True}
METHODS = {module.__name__: module for module in (flap, wanda_sp, llm_pruner, gisp)}


def not_zero(name: str, parameter: torch.Tensor) -> int:
    """The numbers in use: all of FLAP's biases, which are 0 where nothing went; elsewhere those not 0."""
    is_bias_of_reader = name.endswith(("o_proj.bias", "down_proj.bias"))
    return parameter.numel() if is_bias_of_reader else int(parameter.count_nonzero())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("num_groups", [6, 2], ids=["heads", "grouped"])
def test_removes_the_share(name: str, build: Any, num_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What remains is `1 - share` of all parameters, and as many numbers of the model are not 0."""
    monkeypatch.setattr(gisp, "OUR_STEP", 0.1)
    model = build(num_key_value_heads=num_groups, **SIZES)
    total = count_parameters(model)
    pruned = METHODS[name].prune(model, tiny_ids(batch=6, length=128), 0.25, 0)
    assert pruned.model is model
    assert 1 - pruned.num_parameters / total == pytest.approx(0.25, abs=0.003)
    assert sum(not_zero(*named) for named in model.named_parameters()) == pruned.num_parameters
    assert model(tiny_ids()).logits.isfinite().all()


@pytest.mark.parametrize("num_groups", [6, 2], ids=["heads", "grouped"])
def test_cut_is_zeroing(num_groups: int) -> None:
    """A model cut to units computes what it computes with the other units zeroed, whole layers too."""
    model = tiny_qwen2(num_key_value_heads=num_groups, **SIZES)
    kept = units.everything(model)
    kept.heads[0] = False
    kept.heads[1, [0, 1, 2, 4]] = False
    kept.channels[2] = False
    kept.channels[3, ::3] = False
    zeroed, total = copy.deepcopy(model), count_parameters(model)
    gisp.zero(zeroed, kept)
    num_zeros = units.cut(model, kept)
    assert count_parameters(model) - num_zeros == total - units.num_removed(zeroed, kept)
    torch.testing.assert_close(model(tiny_ids()).logits, zeroed(tiny_ids()).logits)


def test_gisp_is_nested() -> None:
    """One run gives every share, and a larger one removes all that a smaller one does."""
    model = tiny_llama(**SIZES)
    shares = gisp.trajectory(model, tiny_ids(batch=4, length=32), [0.1, 0.2], 0, 0.05, 2)
    small, large = shares
    assert (large.heads <= small.heads).all()
    assert (large.channels <= small.channels).all()
    assert large.channels.sum() < small.channels.sum() < small.channels.numel()
