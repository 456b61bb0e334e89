"""The walk equals a plain forward at every place that it can stand, with a second stream and two shapes of batches."""

import copy
from typing import Any

import pytest
import torch
from families import tiny_family
from models import tiny_ids, tiny_llama
from reference import FLOAT32_STEP
from torch import Tensor, nn

from secateur.model.bind import bind, decoder_layers
from secateur.model.modules import forwards_replaced
from secateur.stream.walk import Batch, Walk, make_batches

TOLERANCE = 3 * 112 * FLOAT32_STEP  # three layers, each a sum over 112 inputs
# Serial, parallel, layers that give tuples, layers of two kinds with their own masks.
FAMILIES = ["llama", "phi", "falcon-new", "gemma2", "opt"]


def batches() -> list[Batch]:
    """Two shapes: other blocks of a batch, other tokens of a block."""
    first = make_batches("a", tiny_ids(batch=5, length=24), held_out=False, batch_tokens=48)
    return first + make_batches("b", tiny_ids(batch=1, length=11, seed=1), held_out=True)


@torch.no_grad()
def entered(model: nn.Module, batches: list[Batch]) -> list[list[Tensor]]:
    """Return, per batch, what enters each layer and what leaves the last, in float64."""
    whole: Any = copy.deepcopy(model).double()
    layers = decoder_layers(whole, bind(whole))
    found: list[list[Tensor]] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: found[-1].append(inputs[0]))
    layers[-1].register_forward_hook(lambda _, __, out: found[-1].append(out[0] if isinstance(out, tuple) else out))
    for batch in batches:
        found.append([])
        whole(batch.ids_BT, use_cache=False)
    return found


def assert_at(hidden_BTD: list[Tensor], expected: list[list[Tensor]], layer: int) -> None:
    for hidden, each in zip(hidden_BTD, expected, strict=True):
        error = float((hidden.double() - each[layer]).abs().max())
        assert error <= TOLERANCE * float(each[layer].abs().max()), layer


@pytest.mark.parametrize("to_end", [False, True])
@pytest.mark.parametrize("to_middle", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_running_gives_the_layers_output_again_and_again(family: str, to_middle: bool, to_end: bool) -> None:
    model = tiny_family(family)
    expected, walk = entered(model, batches()), Walk(model, bind(model), batches())
    walk.advance(0)
    ways = [{}, {"to_middle": to_middle}, {}, {"to_middle": to_middle, "to_end": to_end}]
    for way in ways:
        found = list(walk.run(1, **way))
        assert [batch for batch, _ in found] == walk.batches
        assert_at([output for _, output in found], expected, 2)
    # Attention again would be wrong, and so would be the layer again.
    if not to_end:
        walk.advance(1)
    assert_at(walk.hidden_BTD, expected, 2)
    walk.advance(2)
    assert_at(walk.hidden_BTD, expected, 3)


def test_a_run_leaves_no_hook_and_no_replaced_forward() -> None:
    model = tiny_llama()
    walk = Walk(model, bind(model), batches())
    for way in ({}, {"to_middle": True}, {"to_end": True}):
        list(walk.run(0 if way == {} else 1, **way))
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())
    with pytest.raises(RuntimeError), forwards_replaced(walk.layers, lambda *_: None):
        raise RuntimeError
    assert not any("forward" in layer.__dict__ for layer in walk.layers)


def test_the_dense_stream_passes_layers_before_their_cut() -> None:
    model = tiny_llama()
    before, arch = entered(model, batches()), bind(model)
    walk = Walk(model, arch, batches(), dense=True)
    assert_at(walk.dense_BTD, before, 0)
    for layer in range(3):
        list(walk.run(layer, to_middle=True))
        walk.advance_dense(layer)  # through all of the layer, where the other stream stands in its middle
        with torch.no_grad():
            walk.layers[layer].mlp.down_proj.weight[:, ::2] = 0
        assert_at(walk.dense_BTD, before, layer + 1)
        walk.advance(layer)
        assert_at(walk.hidden_BTD, entered(model, batches()), layer + 1)


def test_a_hidden_state_passes_without_moving_a_stream() -> None:
    model = tiny_llama()
    walk = Walk(model, bind(model), batches(), dense=True)
    before = [each.clone() for each in walk.hidden_BTD]
    found = walk.through(0, 2 * walk.hidden_BTD[0])
    assert not torch.allclose(found, walk.through(0, walk.hidden_BTD[0]))
    pairs = list(zip(before, walk.hidden_BTD, walk.dense_BTD, strict=True))
    assert all(torch.equal(old, now) and torch.equal(old, dense) for old, now, dense in pairs)


@pytest.mark.parametrize(
    ("num_blocks", "batch_tokens", "sizes"),
    [(5, 48, [2, 2, 1]), (5, 47, [1] * 5), (2, 5, [1, 1]), (3, None, [3]), (25, None, [21, 4])],
)
def test_batches_hold_all_blocks_in_order_and_other_devices_get_larger_ones(num_blocks, batch_tokens, sizes) -> None:
    ids_NT = tiny_ids(batch=num_blocks, length=24)
    found = make_batches("mine", ids_NT, held_out=True, batch_tokens=batch_tokens)
    assert [len(batch.ids_BT) for batch in found] == sizes
    assert torch.equal(torch.cat([batch.ids_BT for batch in found]), ids_NT)
    assert [batch.first_block for batch in found] == [sum(sizes[:place]) for place in range(len(sizes))]
    assert {(batch.domain, batch.held_out) for batch in found} == {("mine", True)}
    ids_NT = torch.empty(600, 32, dtype=torch.int64, device="meta")
    assert [len(batch.ids_BT) for batch in make_batches("mine", ids_NT, held_out=False)] == [256, 256, 88]
