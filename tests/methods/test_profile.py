"""The profile equals brute force, level by level and domain by domain; the model is as before afterwards."""

import copy
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from models import tiny_gemma3, tiny_ids, tiny_llama, tiny_qwen2
from reference import kl_per_token

from secateur.errors import NumericsError
from secateur.methods.profile import PROBE_BLOCKS, ProfileSettings, _refitted, first_blocks, profile
from secateur.model.bind import bind
from secateur.model.group import linear
from secateur.stream.walk import Batch, make_batches

SHARES = {"prose": 0.6, "code": 0.4}
SETTINGS = ProfileSettings(weighting="energy", shares=SHARES, damping=1e-6, align=16, perturbation=0.3)


def ids_of(domain: str) -> torch.Tensor:
    ids_NT = tiny_ids(batch=10, length=40, seed=len(domain))
    return ids_NT % 40 if domain == "code" else ids_NT


def batches_of(batch_tokens: int = 80) -> list[Batch]:
    batches = []
    for domain in SHARES:
        batches += make_batches(domain, ids_of(domain), held_out=False, batch_tokens=batch_tokens)
        batches += make_batches(domain, tiny_ids(length=40, seed=9), held_out=True)
    return batches


def reader_of(model, group):
    return linear(model.model.layers[group.layer], group.reader.module)


def run(model, reader, ids_BT):
    """Return the logits, the reader's inputs and its outputs without bias."""
    seen = []
    handle = reader.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        logits = model(ids_BT, use_cache=False).logits
    handle.remove()
    ((x, y),) = seen
    return logits, x.flatten(0, 1).double(), (y - reader.bias if reader.bias is not None else y).flatten(0, 1).double()


@torch.no_grad()
def refit_into(reader, refit, level):
    reader.weight.copy_(refit(level))


@pytest.mark.parametrize(
    ("factory", "names"), [(tiny_llama, ("ffn",)), (tiny_qwen2, ("ffn", "kv_heads")), (tiny_gemma3, ("ffn",))]
)
def test_errors_and_slopes_are_those_measured_with_refitted_readers_and_the_model_is_as_before(factory, names):
    model = factory(num_layers=2)
    before, groups, refits = copy.deepcopy(model), bind(model).select(names), {}

    def recorded(group, *args):
        refits[group.layer, group.name] = partial(_refitted, group, *args[:-1])
        return _refitted(group, *args)

    with patch("secateur.methods.profile._refitted", recorded):
        profiles = profile(model, bind(model), groups, batches_of(), SETTINGS)
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then) and now.requires_grad == then.requires_grad, name
    assert list(profiles) == [(group.layer, group.name) for group in groups]
    for group in groups:
        key, found = (group.layer, group.name), profiles[group.layer, group.name]
        assert found.levels == ((112, 96, 80, 64, 48, 32, 16) if group.name == "ffn" else (2, 1))
        assert found.errors[0] == 0 and list(found.errors) == sorted(set(found.errors)) and found.errors[-1] < 1
        own = copy.deepcopy(before)
        reader = reader_of(own, group)
        clean = {domain: run(own, reader, ids_of(domain))[1:] for domain in SHARES}
        first = {domain: ids_of(domain)[:PROBE_BLOCKS] for domain in SHARES}
        dense = {domain: run(own, reader, ids_BT)[0] for domain, ids_BT in first.items()}
        probed = 80 if group.name == "ffn" else 1  # nearest to 0.7 x 112, and to 0.7 x 2 below 2
        for level, error in zip(found.levels, found.errors, strict=True):
            refit_into(reader, refits[key], level)
            assert int((reader.weight != 0).any(dim=0).sum()) == level * group.width
            weight_FH = reader.weight.detach().double().T
            expected = sum(
                SHARES[domain] * float((x @ weight_FH - y).square().sum() / y.square().sum())
                for domain, (x, y) in clean.items()
            )
            assert error == pytest.approx(expected, rel=1e-3, abs=1e-9)
            for domain, ids_BT in first.items() if level == probed else ():
                kl = kl_per_token(dense[domain], run(own, reader, ids_BT)[0])[:, :-1]
                assert found.slopes[domain] == pytest.approx(float(kl.mean()) / error, rel=2e-3)


def test_batches_of_other_sizes_and_a_listener_change_nothing():
    model = tiny_llama(num_layers=2)
    arch, steps = bind(model), []
    groups = arch.select(("ffn",))
    first, other = (
        profile(model, arch, groups, batches_of(size), SETTINGS, progress=lambda *step: steps.append(step))
        for size in (40, 400)
    )
    assert steps == [("profile", done, 2) for done in (0, 1, 2)] * 2
    for key in first:
        assert first[key].errors == pytest.approx(other[key].errors, rel=1e-4)
        assert first[key].slopes == pytest.approx(other[key].slopes, rel=1e-3)


def test_a_silent_group_has_no_slope_and_a_broken_one_is_named():
    model = tiny_llama(num_layers=2)
    arch = bind(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    found = profile(model, arch, arch.select(("ffn",)), batches_of(), SETTINGS)
    assert set(found[0, "ffn"].slopes.values()) == {0.0} and found[1, "ffn"].slopes["code"] > 0
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(NumericsError, match="layer 1 on, domain prose"):
        profile(model, arch, arch.select(("ffn",)), batches_of(), SETTINGS)


@torch.no_grad()
def test_errors_are_shares_of_the_energy_under_any_weighting():
    model, refits = tiny_llama(num_layers=1), []
    before, arch = copy.deepcopy(model), bind(model)
    (group,) = arch.select(("ffn",))
    with patch("secateur.methods.profile._refitted", lambda *args: refits.append(args) or _refitted(*args)):
        (found,) = profile(model, arch, (group,), batches_of(), replace(SETTINGS, weighting="tokens")).values()
    parts = [run(before, reader_of(before, group), ids_of(domain))[1:] for domain in SHARES]
    x_TF, y_TH = (torch.cat(each) for each in zip(*parts, strict=True))
    weight_HF = _refitted(*refits[0][:-1], 48)
    lost = float((x_TF @ weight_HF.double().T - y_TH).square().sum() / y_TH.square().sum())
    assert found.errors[found.levels.index(48)] == pytest.approx(lost, rel=1e-3)


def test_first_blocks_are_the_same_whoever_has_them():
    ids_NT = tiny_ids(batch=10, length=8)
    mine = make_batches("a", ids_NT, held_out=False, batch_tokens=32)
    apart = make_batches("a", tiny_ids(batch=4, length=8, seed=5), held_out=True)
    assert [batch.first_block for batch in mine] == [0, 4, 8]
    chosen = first_blocks([*apart, *mine], 5, after=2)
    assert [(batch.first_block, len(batch.ids_BT)) for batch in chosen] == [(2, 2), (4, 3)]
    assert torch.equal(torch.cat([batch.ids_BT for batch in chosen]), ids_NT[2:7])
    (of_a_rank,) = first_blocks(mine[1:], 5, after=2)
    assert torch.equal(of_a_rank.ids_BT, ids_NT[4:7]) and not of_a_rank.held_out
    assert [len(batch.ids_BT) for batch in first_blocks(mine, 5)] == [4, 1]
    assert first_blocks(mine, 0) == [] and first_blocks(mine, 3, after=10) == []
