"""One group's step: what is measured, what the cut gets, what a later run repeats, and what the summary counts."""

import dataclasses
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from recipes import grouped

import secateur
from secateur.data.blocks import JudgedText
from secateur.errors import CheckpointError
from secateur.formats.save import Verification
from secateur.methods.select import Task
from secateur.pruning import group_step
from secateur.pruning.cut import Cut
from secateur.pruning.group_step import method_of, prune_group
from secateur.pruning.like import read_keeps, write_keeps
from secateur.pruning.open import onload
from secateur.pruning.prepare import Prepared
from secateur.pruning.result import group_widths, summary_of
from secateur.pruning.run import Run
from secateur.pruning.text import Drawn
from secateur.stream.statistics import pool
from secateur.stream.walk import Walk
from tests.models import logits_of, opened, tiny_llama
from tests.pruning.test_rounds import run_of
from tests.tiny_tokenizer import tiny_tokenizer


def step(run: Run, num_keep: int = 64) -> dict[str, Any]:
    """Prune the run's first group; return the line of it."""
    group = run.resolved.groups[0]
    walk = Walk(run.model, run.arch, run.batches(), dense=bool(run.resolved.target_mix))
    if run.resolved.target_mix:
        walk.advance_dense(0)
    return prune_group(Task(walk, group, num_keep, method_of(run.resolved.recipe), run.shares, 0))[1]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, Mock]:
    """What the step calls, by name: called as ever and noted."""
    spies = {name: Mock(wraps=getattr(group_step, name)) for name in ("measure", "select")}
    for name, spy in spies.items():
        monkeypatch.setattr(group_step, name, spy)
    return spies


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"gram": True, "drift": True, "to_middle": True}),
        ({"target_mix": 0.0}, {"gram": True, "drift": False, "to_middle": True}),
        ({"score": "wanda", "compensate": "none"}, {"gram": False, "drift": False, "to_middle": True}),
        ({"score": "wanda"}, {"gram": True, "drift": True, "to_middle": True}),
        ({"score": "obs", "compensate": "none"}, {"gram": True, "drift": False, "to_middle": True}),
        ({"groups": ["kv_heads", "ffn"]}, {"gram": True, "drift": False, "to_middle": False}),
    ],
)
def test_no_more_is_measured_than_the_step_needs(asked, expected, spied):
    step(run_of(tiny_llama(), **asked), num_keep=1 if "groups" in asked else 64)
    (call,) = spied["measure"].call_args_list
    assert call.kwargs == {**expected, "hand": None}


def test_domains_count_by_the_weights_found_for_this_reader(spied, monkeypatch):
    """All weight on one domain: units are chosen as that domain alone would choose them."""
    weigh = Mock(return_value={"d0": 1.0, "d1": 0.0})
    monkeypatch.setattr(group_step, "minimax_weights", weigh)
    run = run_of(tiny_llama(), domain_weighting="minimax", damping=0.01)
    assert step(run)["domain_weights"] == {"d0": 1.0, "d1": 0.0}
    by_domain, shares, weight, columns, num_keep, damping = weigh.call_args.args
    assert set(by_domain) == {"d0", "d1"} and shares == run.shares and (num_keep, damping) == (64, 0.01)
    assert weight.shape == (48, 112) and columns.tolist() == [[unit] for unit in range(112)]
    _, chosen_by = spied["select"].call_args.args
    expected = pool(by_domain, {"d0": 1.0, "d1": 0.0})
    torch.testing.assert_close(chosen_by.gram.full(), expected.gram.full(), rtol=0, atol=0)
    whole = run_of(tiny_llama(), domain_weighting="minimax")
    assert "domain_weights" not in step(whole, num_keep=112) and weigh.call_count == 1


def test_widths_are_the_least_and_the_most_of_a_kind_and_dense_where_nothing_was_cut():
    groups = run_of(tiny_llama(), groups=["ffn", "kv_heads"]).arch.select(("ffn", "kv_heads"))
    keeps = {(0, "ffn"): torch.arange(40), (1, "ffn"): torch.arange(72), (0, "kv_heads"): torch.arange(1)}
    assert group_widths(groups, keeps) == {"ffn": (112, 40, 112), "kv_heads": (2, 1, 2)}
    experts = {(layer, "ffn"): torch.zeros(6, 50, dtype=torch.long) for layer in range(3)}
    assert group_widths(tuple(g for g in groups if g.name == "ffn"), experts) == {"ffn": (112, 50, 50)}


def test_the_summary_counts_refusals_and_what_is_gone():
    model = tiny_llama()
    run = run_of(model)
    first = opened(model, run.resolved.recipe)
    keeps = {(layer, "ffn"): torch.arange(64) for layer in range(3)}
    for line in ({"step": 1.0}, {"step": 0.0}, {}, {"step": 0}, {"step": 0.25}):
        run.services.log.write({"event": "group", **line})
    run.services.log.write({"event": "note", "text": "noted."})
    run.services.log.seconds["prune"] = 1.236
    cut_down = tiny_llama(intermediate_size=64)
    after = dataclasses.replace(run, model=cut_down)
    none: dict[str, Any] = {"dense": None, "pruned": None, "command": ""}
    drawn = Drawn(run.text, JudgedText(run.text.held_out), {})
    placement = onload(first, one_at_a_time=False, in_float32=False)
    ready, cut = Prepared(first, run, drawn, placement, ()), Cut(after, keeps, None, peak=1)
    found = summary_of(ready, cut, None, **none)
    assert found.guard_refusals == 2
    assert found.widths == {"ffn": (112, 64, 64)} and found.num_layers == (3, 3)
    dense, pruned = (sum(p.numel() for p in each.parameters()) for each in (model, cut_down))
    assert (found.dense_size.num_params, found.pruned_size.num_params) == (dense, pruned)
    assert found.remove_reached == pytest.approx(1 - pruned / dense, rel=1e-12)
    assert (found.remove_asked, found.device, found.family) == (0.3, "cpu", "llama")
    assert "noted." in found.warnings and found.seconds["prune"] == 1.24
    assert (found.reload_max_abs_difference, found.loaded_by) == (None, None)
    proved = summary_of(ready, cut, Verification(0.5), **none)
    assert (proved.reload_max_abs_difference, proved.loaded_by) == (0.5, "AutoModelForCausalLM")
    assert (proved.like, proved.vocabulary) == (None, None)


def test_keep_json_names_layers_if_some_went_and_then_units(tmp_path):
    keeps = {(0, "ffn"): torch.tensor([1, 5]), (1, "ffn"): torch.tensor([[0], [2]])}
    write_keeps(tmp_path, (0, 2), keeps)
    layers = '{"group": "layers", "keep": [0, 2]}'
    first, second = ('{"layer": 0, "group": "ffn", "keep": [1, 5]}', '{"layer": 1, "group": "ffn", "keep": [[0], [2]]}')
    assert (tmp_path / "keep.json").read_text() == f"[{layers}, {first}, {second}]\n"
    stayed, found = read_keeps(tmp_path, 3)
    assert stayed == (0, 2) and found.keys() == keeps.keys()
    assert all(torch.equal(found[key], keep) for key, keep in keeps.items())
    write_keeps(tmp_path, (), {(0, "ffn"): torch.tensor([1])})
    assert (tmp_path / "keep.json").read_text() == '[{"layer": 0, "group": "ffn", "keep": [1]}]\n'
    assert read_keeps(tmp_path, 3)[0] == (0, 1, 2)


def test_a_result_that_does_not_reload_is_not_there(small, tmp_path, monkeypatch):
    def is_another(directory: Path, *_: object) -> None:
        raise CheckpointError(f"{directory}: does not hold this model.")

    refuse = Mock(side_effect=is_another)
    monkeypatch.setattr("secateur.formats.save.verify_reload", refuse)
    model = tiny_llama()
    said = re.escape(f"{tmp_path / 'out'}: does not hold this model; nothing was written.")
    with pytest.raises(CheckpointError, match=f"^{said}$"):
        secateur.prune(model, grouped(small), tokenizer=tiny_tokenizer(), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    _, ids, logits = refuse.call_args.args
    assert torch.equal(logits_of(model, ids), logits), "the logits are those of the pruned model"
