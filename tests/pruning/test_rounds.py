"""The loop over rounds: seeds, slopes at the round's own cut, the safety net's arithmetic, and memory that is freed."""

import ctypes
import dataclasses
import gc
import os
import sys
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from models import opened, tiny_gemma3, tiny_llama
from recipes import grouped

from secateur.data.blocks import LearningText
from secateur.errors import RecipeError
from secateur.log import RunLog
from secateur.methods.profile import ProfileSettings
from secateur.model.bind import bind, decoder_layers
from secateur.model.group import cut
from secateur.pruning import cut as cutting
from secateur.pruning import loop, run
from secateur.pruning.loop import layer_seed, prune_together
from secateur.pruning.resolve import resolve
from secateur.pruning.run import LossWatch, Run, watched_losses
from secateur.recipe import parse_recipe
from secateur.store import Services
from secateur.stream.losses import predicted_tokens
from secateur.stream.statistics import Gram, Statistics
from secateur.stream.walk import Walk
from tests.families import tiny_family
from tests.model.test_exactness import prune_tiny, random_calibration

RANDOM = {"score": "random", "compensate": "none"}


def run_of(model: Any, text: LearningText | None = None, **short: Any) -> Run:
    """Return a run on random text with what a recipe in short asks for."""
    settings = {"align": 8, "remove": 0.3, "calibration": {"num_tokens": 4096}, **short}
    resolved, log = resolve(opened(model, parse_recipe(grouped(settings)))), RunLog()
    text = text or random_calibration(blocks=2)
    return Run(model=model, arch=resolved.arch, resolved=resolved, text=text, services=Services(log=log))


def test_a_seed_is_of_one_layer_in_one_round_of_one_draw():
    found = [layer_seed(seed, number, layer) for seed in range(4) for number in range(1, 5) for layer in range(200)]
    assert len(set(found)) == len(found)


def test_random_units_are_drawn_anew_in_every_layer_and_round_and_for_every_seed(monkeypatch):
    spy = Mock(wraps=loop.prune_group)
    monkeypatch.setattr(loop, "prune_group", spy)
    drawn = [prune_together([run_of(tiny_llama(), seed=seed, rounds=2, **RANDOM)])[0] for seed in (0, 1)]
    assert len({call.args[0].seed for call in spy.call_args_list}) == spy.call_count == 2 * 6
    chosen = [tuple(keep.tolist()) for keeps in drawn for keep in keeps.values()]
    assert len(chosen) == 6 and len(set(chosen)) == 6
    # Not even by much the same numbers: of 112 channels two draws have about kept^2 / 112 in common.
    first, second = (set(chosen[layer]) for layer in (0, 1))
    assert len(first & second) < 0.8 * len(first)


def settings_for(run: Run, number: int) -> ProfileSettings:
    """Return the settings that the profiles of a round are measured with."""
    with patch.object(loop, "profile", return_value={}) as spy:
        loop.profiles_of(run, number, [])
    return spy.call_args.args[-1]


def settings_of(model: Any, number: int, **short: Any) -> ProfileSettings:
    return settings_for(run_of(model, budget="curve", rounds=2, **short), number)


def test_slopes_are_measured_at_the_share_that_this_round_takes():
    """Of what is left in parameters: of channels and heads together, and in the second round of what the first left."""
    model, asked = tiny_llama(), {"groups": ["ffn", "kv_heads"], "remove": 0.4}
    plans = run_of(model, budget="curve", rounds=2, **asked).resolved.plans
    prices = {"ffn": 3 * 48, "kv_heads": 6 * 12 * 48}

    def size(num_keep: dict[tuple[int, str], int]) -> int:
        return sum(count * prices[name] for (_, name), count in num_keep.items())

    whole = size({(layer, name): count for layer in range(3) for name, count in (("ffn", 112), ("kv_heads", 2))})
    first, second = (size(plan.num_keep) for plan in plans)
    assert whole > first > second
    assert settings_of(model, 1, **asked).perturbation == pytest.approx(1 - first / whole, rel=1e-12)
    arch = bind(model)
    for group in arch.select(("ffn", "kv_heads")):
        count = plans[0].num_keep[group.layer, group.name]
        cut(decoder_layers(model, arch)[group.layer], group, torch.arange(count))
    assert settings_of(tiny_llama(), 2, **asked).perturbation == pytest.approx(1 - second / whole, rel=1e-12)
    run = run_of(tiny_llama(), budget="curve", rounds=2, **asked)
    settings = settings_for(dataclasses.replace(run, model=model), 2)
    assert settings.perturbation == pytest.approx(1 - second / first, rel=1e-12)
    # And as the recipe asks.
    found = settings_of(tiny_llama(), 1, damping=0.25, domain_weighting="tokens")
    assert (found.damping, found.align) == (0.25, 8)
    assert found.weighting == "tokens" and found.shares == {"d0": 0.5, "d1": 0.5}


@pytest.mark.parametrize(
    ("factory", "asked", "expected"),
    [(tiny_llama, {}, True), (tiny_llama, {"target_mix": 0.0}, False), (tiny_gemma3, {}, False)],
)
def test_the_dense_stream_runs_beside_where_drift_is_made_up_for(factory, asked, expected, monkeypatch):
    spy = Mock(wraps=Walk)
    monkeypatch.setattr(loop, "Walk", spy)
    prune_together([run_of(factory(), **asked)])
    assert [call.kwargs["dense"] for call in spy.call_args_list] == [expected]


@pytest.mark.parametrize(("rounds", "num_kept"), [(1, 0), (2, 3)])
def test_layers_as_they_were_are_kept_for_a_round_that_follows(rounds, num_kept):
    with patch.object(loop.LayersOnDisk, "save", autospec=True, side_effect=loop.LayersOnDisk.save) as save:
        prune_together([run_of(tiny_llama(), rounds=rounds)])
    assert [call.args[1] for call in save.call_args_list] == list(range(num_kept))


DENSE = {"d0": 2.0, "d1": 4.0}


def protected(**shares: float) -> dict[str, Any]:
    domains = {name: {"files": ["x.txt"], **({"protect": shares[name]} if name in shares else {})} for name in DENSE}
    return {"budget": "curve", "calibration": {"num_tokens": 4096, "domains": domains}}


def test_a_protected_domain_may_rise_by_its_share_of_the_dense_loss(monkeypatch):
    losses = [DENSE, {"d0": 2.25, "d1": 9.0}, {"d0": 3.0, "d1": 4.0}]
    monkeypatch.setattr(run, "watched_losses", Mock(side_effect=losses))
    watch = LossWatch(run_of(tiny_llama(), rounds=3, **protected(d0=0.5)))
    assert watch.allowed_rise() == {"d0": 1.0}
    watch.after_round(1)
    assert watch.allowed_rise() == {"d0": 0.75}
    watch.after_round(2)
    said = r"domains\.d0\.protect: its held-out loss has risen from 2\.000 to 3\.000 nats"
    with pytest.raises(RecipeError, match=said):
        watch.allowed_rise()
    # What layers took counts against the limits.
    measure = Mock(return_value={"d0": 2.5, "d1": 5.0})
    monkeypatch.setattr(run, "watched_losses", measure)
    found = run_of(tiny_llama(), rounds=3, **protected(d1=0.5))
    watch = LossWatch(dataclasses.replace(found, dense_losses=DENSE))
    assert watch.allowed_rise() == {"d1": 1.0}
    measure.assert_called_once_with(watch.run, "without layers")


@pytest.mark.parametrize(
    ("asked", "is_watched"),
    [({}, False), ({"rounds": 2}, True), (protected(d1=0.5), True), (protected(), False)],
)
def test_losses_are_watched_where_the_recipe_asks_for_them(asked, is_watched):
    found = watched_losses(run_of(tiny_llama(), **asked), "dense")
    assert set(found) == ({"d0", "d1"} if is_watched else set())


@pytest.mark.parametrize(
    ("blocks", "fitted_to", "asked", "damping"),
    [
        # 4 x 112 tokens of two domains: 7 blocks of 32 each, after the block that layers are judged on.
        (12, slice(1, 8), {}, 0.001),
        (7, slice(7), {"compensate": "none", "score": "wanda"}, None),  # there are no others
    ],
)
def test_narrow_readers_are_fitted_to_text_that_neither_judges_nor_is_held_out(blocks, fitted_to, asked, damping):
    text = random_calibration(blocks=blocks)
    run = run_of(tiny_llama(num_layers=6), text, depth=2, remove=0.45, protected_layers=[0], **asked)
    with patch.object(cutting, "narrow_readers", return_value=[{}]) as spy:
        cutting._narrow_readers(run, run.batches())
    _, _, batches, (shares,), found, *_ = spy.call_args.args
    assert found == damping and not any(batch.held_out for batch in batches)
    for domain in text.domains:
        mine = torch.cat([batch.ids_BT for batch in batches if batch.domain == domain.name])
        assert torch.equal(mine, domain.calibration.ids_NT[fitted_to])
    (share,) = set(shares.values())
    num_keep = run.resolved.plans[-1].num_keep
    assert sorted(shares) == [1, 2, 3, 4, 5]
    assert share == pytest.approx(sum(num_keep.values()) / (112 * len(num_keep)), rel=1e-12)


def test_after_a_trim_a_protected_domain_may_rise_as_much_in_fewer_nats_per_token():
    domains = {"d0": {"files": ["x"], "protect": 0.1}}
    found = run_of(tiny_llama(), calibration={"num_tokens": 4096, "domains": domains})
    held_out = found.held_out["d0"].ids_NT[:, 1:].numel()
    watch = object.__new__(run.LossWatch)
    watch.run, watch.dense, watch.now = found, {"d0": 2.0}, {"d0": 2.05}
    assert watch.allowed_rise() == {"d0": pytest.approx(0.15, rel=1e-12)}
    dense_tokens = predicted_tokens(found.held_out) | {"d0": {0: held_out // 2, 1: held_out // 4}}
    watch.run = dataclasses.replace(found, dense_tokens=dense_tokens)
    share = (held_out // 2 + held_out // 4) / held_out
    assert watch.allowed_rise() == {"d0": pytest.approx(0.15 * share, rel=1e-12)}


@pytest.mark.parametrize("group", ["ffn", "kv_heads", "expert_ffn", "experts"])
def test_no_statistics_outlive_their_group(group, monkeypatch):
    left: list[object] = []

    def count() -> None:
        # The caller has just finished a layer.
        left.extend(each for each in gc.get_objects() if type(each) in (Statistics, Gram))

    monkeypatch.setattr(loop, "release_freed", count)
    model = tiny_family("mixtral") if "expert" in group else tiny_llama()
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            prune_tiny(model, random_calibration(), groups=(group,), remove=0.2 if group == "ffn" else 0.1)
    finally:
        gc.enable()
    assert not left


# A process of its own: glibc gives large tensors of a thread, where tests may run, memory by another way.
PAGES = """
import resource
import torch
from secateur.stream.device import keeping_freed

def pages_cleared(num_tensors):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(num_tensors):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keeping_freed():
    print(pages_cleared(1))
    print(pages_cleared(5))
print(pages_cleared(5))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_serves_the_next_tensors_of_a_run_alone(warm):
    done = warm.run([sys.executable, "-c", PAGES], env=dict(os.environ))
    first, inside, behind = map(int, done.stdout.split())
    assert 5 * inside < first and behind > 4 * first
