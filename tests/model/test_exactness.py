"""Cut equals mask after save and stock reload; keeping all changes nothing; both streams are what the models give."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import opened
from recipes import grouped
from texts import documents_of

from secateur.data.blocks import LearningDomain, LearningText
from secateur.log import RunLog
from secateur.methods.budget import uniform_plan
from secateur.methods.select import Task
from secateur.model.bind import bind, head_of
from secateur.model.group import Group, linear, rows_of
from secateur.pruning import loop
from secateur.pruning.loop import prune_together
from secateur.pruning.resolve import resolve
from secateur.pruning.run import Run
from secateur.recipe import parse_recipe
from secateur.store import Services
from secateur.stream.losses import states_for_head
from secateur.stream.walk import Walk, make_batches
from tests.families import DTYPES
from tests.models import logits_of, tiny_gemma3, tiny_ids, tiny_llama, tiny_qwen2


def random_calibration(num_domains: int = 2, blocks: int = 8, length: int = 32) -> LearningText:
    domains = [
        LearningDomain(
            f"d{seed}",
            1 / num_domains,
            documents_of(tiny_ids(batch=blocks, length=length, seed=seed)),
            blocks,
            documents_of(tiny_ids(batch=2, length=length, seed=seed + 100)),
        )
        for seed in range(num_domains)
    ]
    return LearningText(tuple(domains), length)


@torch.no_grad()
def zero_units(layer: Any, group: Group, removed: torch.Tensor) -> None:
    """Set the removed units' reader columns to zero: the mask that a cut must equal."""
    linear(layer, group.reader.module).weight[:, rows_of(removed, group.reader.segments, group.num_units)] = 0


def check_walk(model: Any, ids_BT: torch.Tensor, close: float) -> None:
    """Walk several batches layer by layer: that is the forward pass of each, also by way of the middle of a layer."""
    arch = bind(model)
    walk = Walk(model, arch, make_batches("d", ids_BT, held_out=False, batch_tokens=2 * ids_BT.shape[1]))
    assert len(walk.batches) == 3
    for index in range(arch.num_layers):
        if index > 0:  # the first layer in one go, as a run with nothing to measure in it does
            entered = torch.cat(walk.hidden_BTD)
            assert len(list(walk.run(index, to_middle=True))) == 3
            assert torch.equal(entered, torch.cat(walk.hidden_BTD)) == (arch.middle is None)
        walk.advance(index)
    pairs = zip(walk.batches, walk.hidden_BTD, strict=True)
    with torch.no_grad():
        logits_PV = head_of(model, arch)(torch.cat([states_for_head(model, arch, *pair) for pair in pairs]))
    torch.testing.assert_close(logits_PV, logits_of(model, ids_BT)[:, :-1].flatten(0, 1), atol=close, rtol=close)


def prune_tiny(model: Any, calibration: LearningText, **recipe: Any) -> tuple[dict, list[dict[str, Any]]]:
    settings = {"align": 8, "remove": 0.15, "calibration": {"num_tokens": 4096}, **recipe}
    resolved, log = resolve(opened(model, parse_recipe(grouped(settings)))), RunLog()
    run = Run(model=model, arch=resolved.arch, resolved=resolved, text=calibration, services=Services(log=log))
    return prune_together([run])[0], [line for line in log.lines if line["event"] == "group"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factory", [tiny_llama, tiny_qwen2, tiny_gemma3])
def test_keep_all_leaves_every_weight_bit_identical(factory: Callable[..., Any], dtype: torch.dtype) -> None:
    model = factory().to(dtype)
    before = copy.deepcopy(model.state_dict())
    settings = {"align": 8, "remove": 0.15, "calibration": {"num_tokens": 4096}, "groups": ["kv_heads", "ffn"]}
    resolved = resolve(opened(model, parse_recipe(grouped(settings))))
    everything = uniform_plan(resolved.groups, resolved.prices, 0.15, 8)
    for group in resolved.groups:
        everything.num_keep[group.layer, group.name] = group.num_units
    keep_all = dataclasses.replace(resolved, plans=(everything,))
    keeps = prune_together(
        [Run(model=model, arch=keep_all.arch, resolved=keep_all, text=random_calibration(), services=Services())]
    )[0]
    assert {len(keep) for keep in keeps.values()} == {112, model.config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_dense_stream_stays_the_dense_model_in_later_rounds() -> None:
    """Three rounds and a mix of 1 on one domain: the stream that is followed is the original one."""
    model, dense = tiny_llama(), tiny_llama()
    calibration = random_calibration()
    seen: list[torch.Tensor] = []
    original = Walk.advance_dense

    def spy(walk: Walk, index: int) -> None:
        original(walk, index)
        if index == 2:
            seen.append(torch.cat(walk.dense_BTD))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Walk, "advance_dense", spy)
        prune_tiny(model, calibration, rounds=3, target_mix=1.0, groups=("query_heads", "ffn"), remove=0.3)
    blocks = [part for domain in calibration.domains for part in (domain.calibration.ids_NT, domain.held_out.ids_NT)]
    walk = Walk(dense, bind(dense), make_batches("d", torch.cat(blocks), held_out=False))
    for index in range(3):
        walk.advance(index)
    assert len(seen) == 3
    for stream in seen:
        torch.testing.assert_close(stream, torch.cat(walk.hidden_BTD), atol=1e-5, rtol=1e-5)


def test_a_part_of_the_drift_in_the_target_brings_the_model_nearer_to_the_dense_one() -> None:
    """Half of it, which is the default, and which is not the same as all of it."""
    calibration = random_calibration(num_domains=1, blocks=128)
    ids_NT = calibration.domains[0].held_out.ids_NT
    expected, found = logits_of(tiny_llama(), ids_NT), {}
    for mix in (None, 0.0, 0.5, 1.0):
        model = tiny_llama()
        prune_tiny(model, calibration, remove=0.25, **({} if mix is None else {"target_mix": mix}))
        found[mix] = logits_of(model, ids_NT)
    errors = {mix: float((logits - expected).square().mean()) for mix, logits in found.items()}
    assert errors[0.5] < errors[0.0]
    assert torch.equal(found[None], found[0.5]) and not torch.equal(found[1.0], found[0.5])


def test_every_layer_reads_the_stream_that_the_cut_layers_before_it_give() -> None:
    """What the walk has in front of the last layer is what the pruned model itself gives there."""
    model, seen = tiny_llama(), list[torch.Tensor]()
    original = loop.prune_group

    def spy(task: Task) -> Any:
        if task.group.layer == 2:
            seen.extend(hidden.clone() for hidden in task.walk.hidden_BTD)
        return original(task)

    calibration = random_calibration(num_domains=1, blocks=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "prune_group", spy)
        prune_tiny(model, calibration, remove=0.3)
    expected: list[torch.Tensor] = []
    handle = model.model.layers[2].register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0]))
    for part in (calibration.domains[0].calibration.ids_NT, calibration.domains[0].held_out.ids_NT):
        logits_of(model, part)
    handle.remove()
    torch.testing.assert_close(torch.cat(seen), torch.cat(expected), atol=1e-5, rtol=1e-5)
