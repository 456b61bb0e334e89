"""A run is judged by the dense model's own answers, on the path that a user runs."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from models import saved, tiny_llama
from recipes import grouped

import secateur


@pytest.fixture(scope="module")
def pruned(checkpoints, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "out"
    return secateur.prune(checkpoints["llama"], grouped({**recipe, "remove": 0.2}), out=out)


def test_a_run_that_names_its_tokens_is_asked_the_prompts_that_go_with_them(checkpoints, recipe, pruned):
    found = secateur.prune(checkpoints["llama"], grouped({**recipe, "remove": 0.2, "evaluate": 32})).summary
    assert (found.own_answers.num_prompts, pruned.summary.own_answers.num_prompts) == (1, 2)
    assert set(found.calibration.num_judged_tokens.values()) == {32}


def test_a_run_in_float32_is_judged_the_same_with_and_without_room_for_all_layers(recipe, monkeypatch, tmp_path):
    saved(tmp_path / "low", tiny_llama().to(torch.bfloat16))
    asked = grouped({**recipe, "remove": 0.2, "compute_dtype": "float32"})
    roomy = secateur.prune(tmp_path / "low", asked, out=tmp_path / "roomy")
    told = secateur.inspect(tmp_path / "low", asked)
    monkeypatch.setattr("secateur.pruning.cost.FREE_SHARE", 0.0)
    by_layer = secateur.prune(tmp_path / "low", asked, out=tmp_path / "by_layer")
    assert roomy.summary.own_answers == by_layer.summary.own_answers is not None
    # All layers are in float32 there, not two of the three.
    one_layer = sum(p.numel() for p in tiny_llama().model.layers[0].parameters())
    assert told.memory.weights - secateur.inspect(tmp_path / "low", asked).memory.weights == 4 * one_layer
    name = "model.safetensors"
    assert (tmp_path / "roomy" / name).read_bytes() == (tmp_path / "by_layer" / name).read_bytes()


def test_evaluate_finds_the_same_and_keeps_it(checkpoints, pruned):
    found = secateur.evaluate(pruned.out, checkpoints["llama"]).own_answers
    assert found.nats == pytest.approx(pruned.summary.own_answers.nats, rel=1e-4)
    assert found.num_tokens == pruned.summary.own_answers.num_tokens
    assert (found.ended, found.shown) == (pruned.summary.own_answers.ended, pruned.summary.own_answers.shown)
    kept = json.loads((pruned.out / "evaluation.json").read_text())["own_answers"]
    assert kept == json.loads(json.dumps(asdict(found)))
    assert secateur.evaluate(pruned.out).own_answers is None


def test_a_model_without_a_chat_template_is_not_asked(checkpoints, recipe, tmp_path):
    plain = shutil.copytree(checkpoints["llama"], tmp_path / "plain")
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    summary = secateur.prune(plain, grouped({**recipe, "remove": 0.2})).summary
    assert summary.own_answers is None and summary.other_text is not None
