"""`depth` in a recipe: layers go before widths, count towards `remove`, and every record of the run says which."""

import copy
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from families import tiny_family
from models import logits_of, num_params, saved, tiny_gemma3, tiny_llama, tiny_qwen2
from recipes import grouped
from stops import lines_of
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

import secateur
from secateur.log import silent
from secateur.methods.depth import choose_layers, layer_kl
from secateur.methods.profile import first_blocks
from secateur.model.bind import bind, decoder_layers
from secateur.model.group import cut
from secateur.pruning import cut as depth_step
from secateur.pruning.cut import _narrow_readers, remove_depth
from secateur.pruning.inspect import inspect
from secateur.pruning.run import Run
from secateur.recipe import parse_recipe
from secateur.stream.walk import Walk

TOKENIZER = tiny_tokenizer()


def dense(factory: Any, quiet: tuple[int, ...] = (1, 3)) -> Any:
    """Return a model of six layers of which the `quiet` ones add little: these are what depth removes."""
    model = factory(num_layers=6)
    with torch.no_grad():
        for index in quiet:
            model.model.layers[index].self_attn.o_proj.weight *= 0.05
            model.model.layers[index].mlp.down_proj.weight *= 0.05
    return model


def cut_down(model: Any, short: dict[str, Any], out: Path | None = None) -> secateur.Result:
    return secateur.prune(model, grouped(short), tokenizer=TOKENIZER, out=out)


def by_hand(model: Any, kept: list[dict[str, Any]]) -> Any:
    """Do to a dense model what keep.json says, in its order: first the layers, then the units of those left."""
    assert kept[0]["group"] == "layers"
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layers[index] for index in kept[0]["keep"])
    model.config.num_hidden_layers = len(model.model.layers)
    if types := getattr(model.config, "layer_types", None):  # transformers reads no config whose layers do not agree
        model.config.layer_types = [types[index] for index in kept[0]["keep"]]
    arch = bind(model)
    for entry in kept[1:]:
        (group,) = (g for g in arch.select((entry["group"],)) if g.layer == entry["layer"])
        cut(decoder_layers(model, arch)[group.layer], group, torch.tensor(entry["keep"]))
    return model


def test_layers_and_widths_together_meet_remove_and_keep_json_repeats_them(small, tmp_path):
    asked = {"depth": 2, "remove": 0.4, "budget": "curve", "compensate": "none", "protected_layers": [2, -1]}
    result = cut_down(dense(tiny_qwen2), {**small, **asked}, tmp_path / "out")
    before = num_params(dense(tiny_qwen2))
    assert abs(before - num_params(result.model) - 0.4 * before) <= 8 * 144
    # The dense model's layers 2 and 5 are protected: the second and the last of those left.
    assert result.layers == (0, 2, 4, 5) and {layer for layer, _ in result.keeps} == {0, 2}
    assert result.model.model.layers[1].mlp.up_proj.out_features == 112
    expected = by_hand(dense(tiny_qwen2), json.loads((tmp_path / "out" / "keep.json").read_text()))
    torch.testing.assert_close(logits_of(secateur.load(tmp_path / "out")), logits_of(expected), atol=1e-6, rtol=0)
    # No further layers leave a model of per-layer widths.
    with pytest.raises(secateur.SecateurError, match=r"^remove\.depth: .* from a model of per-layer"):
        inspect(tmp_path / "out", parse_recipe(grouped({**small, "remove": 0.1, "depth": 1})))


def test_every_layer_is_logged_with_its_kl_and_patch(small, tmp_path, monkeypatch):
    model, runs = dense(tiny_llama, quiet=(0, 2, 3)), []
    with torch.no_grad():  # what enters the first layer is small, so that it must be quieter than the others
        model.model.layers[0].self_attn.o_proj.weight *= 0.01
        model.model.layers[0].mlp.down_proj.weight *= 0.01
    monkeypatch.setattr(depth_step, "remove_depth", lambda run: runs.append(run) or remove_depth(run))
    gone = 3 * num_params(model.model.layers[0])
    asked = {**small, "depth": 3, "remove": gone / num_params(model)}
    result = cut_down(copy.deepcopy(model), asked, tmp_path / "out")
    lines = lines_of(tmp_path / "out", "layer")
    assert lines_of(tmp_path / "out", "group") == [] and {len(keep) for keep in result.keeps.values()} == {112}
    assert num_params(result.model) == num_params(model) - gone
    assert [line["layer"] for line in lines] == [0, 2, 3]
    assert sorted(line["chosen"] for line in lines) == [1, 2, 3]
    batches = first_blocks(runs[0].batches(), 1)
    assert sum(len(batch.ids_BT) for batch in batches) == 2
    run = dataclasses.replace(runs[0], model=model, arch=bind(model))
    assert _narrow_readers(run, run.batches()) == {}  # nothing is left to the widths here
    kl_without = partial(layer_kl, model, run.arch, batches, readers={})
    expected = choose_layers(kl_without, range(6), 3, silent)
    by_choice = sorted(lines, key=lambda line: line["chosen"])
    assert [(line["layer"], line["kl"]) for line in by_choice] == list(expected.items())
    # Nothing stands before the first layer, so it is not patched; of two neighbours both are, into the same layer.
    assert "error_after" not in lines[0]
    for line in lines[1:]:
        assert set(line["error_after"]) == {"prose", "code"} and line["step"] == 1
        assert max(line["error_after"].values()) < 0.9


def test_layers_that_are_named_go_as_if_they_had_been_chosen(small, tmp_path, monkeypatch):
    places = [tmp_path / "chosen", tmp_path / "named"]
    measured = cut_down(dense(tiny_qwen2), {**small, "depth": 2, "remove": 0.4}, places[0])
    assert measured.layers == (0, 2, 4, 5)
    # What `inspect` promises before they are chosen.
    promised = inspect(saved(tmp_path / "dense", dense(tiny_qwen2)), measured.recipe)
    assert promised.num_layers == measured.summary.num_layers == (6, 4)
    assert promised.num_params_after == measured.summary.pruned_size.num_params
    assert promised.remove_reached == pytest.approx(measured.summary.remove_reached)
    monkeypatch.setattr(depth_step, "choose_layers", lambda *_, **__: pytest.fail("nothing is left to choose"))
    named = cut_down(dense(tiny_qwen2), {**small, "removed_layers": [-3, 1], "remove": 0.4}, places[1])
    assert named.layers == measured.layers and named.recipe.remove.depth == 2
    for name in ("model.safetensors", "keep.json"):
        assert (places[0] / name).read_bytes() == (places[1] / name).read_bytes()
    (one, other), chosen = lines_of(places[1], "layer"), lines_of(places[0], "layer")
    assert "kl" not in one and one["error_after"] == chosen[0]["error_after"] and other["layer"] == 3
    page = (places[1] / "report.html").read_text()
    assert "Removed layers<" in page and "<td>named</td>" in page and "layer 3</th><td>" in page
    whole = dense(tiny_qwen2).model.layers
    for layer, number in zip(named.model.model.layers, named.layers, strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight, whole[number].self_attn.q_proj.weight)


def test_layers_are_chosen_in_a_model_as_narrow_as_widths_will_make_it(small, monkeypatch):
    model, spy = dense(tiny_llama), Mock(wraps=layer_kl)
    monkeypatch.setattr(depth_step, "layer_kl", spy)
    result = cut_down(model, {**small, "depth": 2, "remove": 0.45, "protected_layers": [0]})
    readers, *again = (call.kwargs["readers"] for call in spy.call_args_list)
    assert all(each is readers for each in again)
    assert sorted(readers) == [1, 2, 3, 4, 5]
    (kept,) = {len(keep) for (layer, _), keep in result.keeps.items()}
    for weight in readers.values():
        assert int(weight.abs().sum(0).count_nonzero()) == pytest.approx(kept, abs=0.1 * 112)


def test_the_dense_stream_is_that_of_the_model_without_the_layers(small, monkeypatch):
    after: list[tuple[Run, Any]] = []
    seen: list[list[torch.Tensor]] = []
    advance = Walk.advance_dense

    def spy_depth(run: Run) -> Run:
        shallow = remove_depth(run)
        after.append((shallow, copy.deepcopy(shallow.model)))
        return shallow

    def spy_walk(walk: Walk, index: int) -> None:
        advance(walk, index)
        if index == 4:
            seen.append(walk.dense_BTD)

    monkeypatch.setattr(depth_step, "remove_depth", spy_depth)
    monkeypatch.setattr(Walk, "advance_dense", spy_walk)
    cut_down(dense(tiny_llama, (1,)), {**small, "depth": 1, "remove": 0.35, "rounds": 2, "target_mix": 0.5})
    ((run, model),) = after
    patched, whole = (each.model.layers[0].mlp.down_proj.weight for each in (model, dense(tiny_llama, (1,))))
    assert run.arch.num_layers == 5 and not torch.equal(patched, whole)
    walk = Walk(model, run.arch, run.batches())
    for index in range(5):
        walk.advance(index)
    assert len(seen) == 2
    for stream in seen:
        torch.testing.assert_close(torch.cat(stream), torch.cat(walk.hidden_BTD), atol=1e-5, rtol=1e-5)


def test_a_layer_behind_experts_is_removed_without_being_folded_into_them(small):
    model = tiny_family("deepseek_v3")  # layer 0 alone has an FFN of channels
    found = cut_down(model, {**small, "remove": 0.5, "groups": ["ffn", "experts"], "removed_layers": [2]})
    assert found.layers == (0, 1) and model.config.num_hidden_layers == 2


def test_a_family_that_norms_what_an_ffn_gives_loses_layers_without_a_patch(small, tmp_path):
    result = cut_down(tiny_gemma3(num_layers=4), {**small, "depth": 1, "remove": 0.35}, tmp_path / "out")
    (line,) = lines_of(tmp_path / "out", "layer")
    assert "error_after" not in line and len(result.layers) == 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded), logits_of(result.model), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "layer"), [("qwen3_moe-mixed", 1), ("llama4", 0)])
def test_mixtures_with_dense_layers_lose_layers(name, layer, small, tmp_path):
    model = tiny_family(name)
    share = num_params(model.model.layers[layer]) / num_params(model) + 0.02
    result = cut_down(model, {**small, "removed_layers": [layer], "remove": share}, tmp_path / "out")
    assert result.layers == tuple({0, 1, 2} - {layer}) and result.summary.reload_max_abs_difference == 0
    assert result.summary.remove_reached == pytest.approx(share, abs=0.03)
