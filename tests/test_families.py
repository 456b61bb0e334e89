"""Every family and group, on tiny random models: what the cuts promise holds for each row of `families.FAMILIES`.

Permuting units changes nothing; a cut, saved and reloaded by stock transformers, equals a mask; the walk equals the
forward pass, with its shortcut to the middle of a layer too; a model cut in one layer alone runs; parameters are as
many as the plan says.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.arch import bind, decoder_layers, head_of, linear
from secateur.arch_spec import load_specs
from secateur.cut import cut, zero_units
from secateur.depth import states_for_head
from secateur.per_layer import record_widths
from secateur.prices import parameter_prices
from secateur.taylor import taylor_scores
from secateur.walk import Walk, make_batches
from tests.families import FAMILIES, tiny_family
from tests.models import tiny_ids
from tests.test_exactness import logits_of, prune_tiny, random_calibration

ROWS = [
    pytest.param(name, group, id=f"{name}-{group}")
    for name, (model_type, _) in FAMILIES.items()
    for spec in load_specs().values()
    if model_type in spec.model_types
    for group in spec.groups
]


def num_params(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def kept_of(group: Any, share: float) -> torch.Tensor:
    """Return an uneven choice of units, one that the config can state."""
    count = next(n for n in range(round(group.num_units * share), group.num_units + 1) if n and group.allows(n))
    order = torch.randperm(group.num_units, generator=torch.Generator().manual_seed(group.layer))
    return order[:count].sort().values


def test_every_spec_has_a_row() -> None:
    tested = {model_type for model_type, _ in FAMILIES.values()}
    assert {model_type for spec in load_specs().values() for model_type in spec.model_types} == tested


@pytest.mark.parametrize(("name", "group_name"), ROWS)
def test_permuting_units_changes_nothing(name: str, group_name: str) -> None:
    model, ids_BT = tiny_family(name), tiny_ids()
    before = logits_of(model, ids_BT)
    arch = bind(model)
    torch.testing.assert_close(logits_of(model, ids_BT), before, atol=1e-6, rtol=1e-6)
    groups = arch.select((group_name,))
    assert len(groups) == arch.num_layers
    for group in groups:
        order = torch.arange(group.num_units).flip(0)
        cut(decoder_layers(model, arch)[group.layer], group, order, group.num_units)
    torch.testing.assert_close(logits_of(model, ids_BT), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "group_name"), ROWS)
def test_cut_saved_and_reloaded_by_stock_transformers_equals_mask(name: str, group_name: str, tmp_path: Path) -> None:
    model, ids_BT = tiny_family(name), tiny_ids()
    masked = copy.deepcopy(model)
    arch, dense_size = bind(model), num_params(model)
    bind(masked)
    groups = arch.select((group_name,))
    prices = parameter_prices(arch, groups, model)
    assert prices.total == dense_size
    kept = {}
    for group in groups:
        keep = kept_of(group, 0.6 if group.width == 1 else 0.5)
        kept[group.layer, group.name] = len(keep)
        assert 0 < len(keep) < group.num_units
        removed = torch.tensor(sorted(set(range(group.num_units)) - set(keep.tolist())))
        zero_units(decoder_layers(masked, arch)[group.layer], group, removed)
        cut(decoder_layers(model, arch)[group.layer], group, keep, group.num_units)
    record_widths(model, arch)
    assert num_params(model) == dense_size - prices.gone(groups, kept)
    expected = logits_of(masked, ids_BT)
    assert not torch.allclose(expected, logits_of(tiny_family(name), ids_BT), atol=1e-3)
    torch.testing.assert_close(logits_of(model, ids_BT), expected, atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is type(tiny_family(name))
    torch.testing.assert_close(logits_of(reloaded, ids_BT), expected, atol=1e-6, rtol=1e-6)
    assert num_params(reloaded) == num_params(model)
    assert bind(reloaded).select((group_name,))[0].num_units == kept[0, group_name]


@pytest.mark.parametrize(("name", "group_name"), ROWS)
def test_a_model_cut_in_one_layer_alone_runs(name: str, group_name: str) -> None:
    model = tiny_family(name)
    arch = bind(model)
    group = arch.select((group_name,))[1]
    keep = kept_of(group, 0.3)
    masked = copy.deepcopy(model)
    removed = torch.tensor(sorted(set(range(group.num_units)) - set(keep.tolist())))
    zero_units(decoder_layers(masked, arch)[1], group, removed)
    cut(decoder_layers(model, arch)[1], group, keep, group.num_units)
    torch.testing.assert_close(logits_of(model, tiny_ids()), logits_of(masked, tiny_ids()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("to_middle", [False, True])
def test_walk_equals_forward(name: str, to_middle: bool) -> None:
    model, ids_BT = tiny_family(name), tiny_ids(batch=5, length=24)
    arch = bind(model)
    walk = Walk(model, arch, make_batches("d", ids_BT, held_out=False, batch_tokens=48))
    assert len(walk.batches) == 3
    for index in range(arch.num_layers):
        if to_middle:
            entered = torch.cat(walk.hidden_BTD)
            assert len(list(walk.run(index, to_middle=True))) == 3
            assert torch.equal(entered, torch.cat(walk.hidden_BTD)) == (arch.middle is None)
        walk.advance(index)
    pairs = zip(walk.batches, walk.hidden_BTD, strict=True)
    with torch.no_grad():
        logits_PV = head_of(model, arch)(torch.cat([states_for_head(model, arch, *pair) for pair in pairs]))
    torch.testing.assert_close(logits_PV, logits_of(model, ids_BT)[:, :-1].flatten(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_rounds_of_measuring_and_compensating_run(name: str) -> None:
    """The whole loop: two rounds with the dense stream beside, layers put back from disk, every group of the family."""
    model = tiny_family(name)
    names = {group.name for group in bind(model).groups}
    groups = tuple(sorted(names - {"query_heads"}))
    keeps, lines = prune_tiny(model, random_calibration(), groups=groups, rounds=2, remove=0.12)
    assert {group for _, group in keeps} == set(groups)
    assert len(lines) == 2 * len(keeps)
    errors = [(line["error_after"][d], line["error_before"][d]) for line in lines for d in line.get("error_after", ())]
    assert len(errors) >= 2 * 2 * 3 and all(after <= before for after, before in errors)
    assert torch.isfinite(logits_of(model, tiny_ids())).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_taylor_scores_are_the_gradients_of_the_models_own_loss(name: str) -> None:
    model, ids_BT = tiny_family(name), tiny_ids(batch=2, length=12)
    arch = bind(model)
    group = arch.select(("ffn",))[1]
    scores = taylor_scores(model, arch, (group,), make_batches("d", ids_BT, held_out=False))[1, "ffn"]
    reader = linear(decoder_layers(model, arch)[1], group.reader.module)
    logits = model(ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids_BT[:, 1:].flatten()).backward()
    assert reader.weight.grad is not None
    of_reader = (reader.weight * reader.weight.grad).abs().sum(dim=0)
    assert bool((scores + 1e-6 >= of_reader).all())
    writers = [linear(decoder_layers(model, arch)[1], axis.module) for axis in group.writers]
    total = of_reader.sum() + sum((p * p.grad).abs().sum() for each in writers for p in each.parameters())
    torch.testing.assert_close(scores.sum(), total, atol=1e-4, rtol=1e-3)
