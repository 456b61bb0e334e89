"""The last step of a prune: what it trains on, that it resumes, and that it is never worse."""

import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from models import logits_of, tiny_llama
from recipes import grouped
from reference import kl_per_token
from stops import Stopped, killed_in, lines_of
from texts import learning_text
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoConfig

import secateur
from secateur.facts import mean_kl, mean_nats
from secateur.model.bind import bind
from secateur.pruning.open import open_model
from secateur.pruning.resolve import checked, resolve
from secateur.recipe import Recipe, RecoverySettings, parse_recipe
from secateur.recovery import train
from secateur.recovery.loss import loss_in_forward, teacher_in_forward
from secateur.recovery.polish import Lesson, learn, polish
from secateur.recovery.train import training_folder
from secateur.recovery.weights import training_bytes
from secateur.store import Services, Store, place_beside
from tests.families import tiny_family

TRAINING = {"batch_tokens": 128, "learning_rate": 1e-3, "kl_share": 1.0}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def asked(recipe: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, "remove": 0.3, "polish": TRAINING}


@pytest.fixture(scope="module")
def uneven(asked: dict[str, Any]) -> dict[str, Any]:
    """To layers of different widths."""
    return {**asked, "protected_layers": [0]}


@pytest.fixture(scope="module")
def whole(checkpoints, uneven, tmp_path_factory) -> secateur.Result:
    """A prune with its polish, written."""
    return secateur.prune(checkpoints["llama"], grouped(uneven), out=tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="module")
def without(checkpoints, uneven, tmp_path_factory) -> Path:
    """Where the same prune without a polish has written."""
    out = tmp_path_factory.mktemp("without") / "out"
    secateur.prune(checkpoints["llama"], grouped({**uneven, "polish": False}), out=out)
    return out


def lesson_of(recipe: dict[str, Any], model: Any, **amounts: int) -> tuple[Lesson, Recipe]:
    tokenizer = tiny_tokenizer()
    resolved = resolve(checked(open_model(model, parse_recipe(grouped(recipe)), tokenizer))).recipe
    assert resolved.calibration.num_tokens is not None
    amounts["num_training_tokens"] = resolved.polish.num_tokens or 0
    text = learning_text(resolved.calibration, resolved.calibration.num_tokens, tokenizer, resolved.seed, **amounts)
    lesson = learn(model, bind(model), text, resolved, Services(), walked=False)
    assert lesson is not None
    return lesson, resolved


def rows(blocks: Any) -> set[tuple[int, ...]]:
    return {tuple(ids.tolist()) for ids in blocks}


def test_training_lowers_the_held_out_kl_and_the_result_says_so(whole):
    found, record = whole, whole.summary.polish
    assert record is not None and record.training.held and found.summary.has_layers_of_different_widths
    assert mean_kl(record.before) > mean_kl(record.after) > 0
    assert record.training.num_tokens == 1280 and found.recipe.polish.num_tokens == 1280
    # The run's last losses are those of the trained model, on the same held-out text.
    for domain, loss in found.summary.pruned_losses.items():
        assert loss.nats_per_token == pytest.approx(record.after[domain].nats_per_token, rel=1e-5)
    assert AutoConfig.from_pretrained(whole.out).use_cache  # as the dense one's; the Trainer turns it off
    # A training that leads away from the dense model wins nothing back, however well it predicts the text.
    turned = replace(record, before=record.after, training=replace(record.training, after=record.before))
    assert "won back" not in turned.headline
    losses = " -> ".join(f"{mean_nats(verdicts):.3f}" for verdicts in (turned.before, turned.after))
    assert f"nats per token, loss {losses} with" in turned.headline


@pytest.mark.parametrize(("rate", "ends"), [(0.3, r"\d\.\d{4}"), (1e30, "inf")], ids=["ruined", "diverged"])
def test_a_training_that_does_not_help_leaves_the_bytes_of_a_run_without(
    rate, ends, checkpoints, uneven, without, tmp_path
):
    ruinous = {**TRAINING, "num_tokens": 256, "learning_rate": rate}
    found = secateur.prune(checkpoints["llama"], grouped({**uneven, "polish": ruinous}), out=tmp_path / "ruined")
    assert found.summary.polish is not None and not found.summary.polish.training.held
    assert re.search(rf"polish: held-out KL did not fall \([\d.]+ -> {ends} nats", " ".join(found.summary.warnings))
    assert (tmp_path / "ruined" / WEIGHTS).read_bytes() == (without / WEIGHTS).read_bytes()


def test_an_uncut_model_stays_as_it_is(asked):
    model = tiny_llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    lesson, recipe = lesson_of(asked, model)
    record = polish(model, lesson, recipe.seed, Services(), torch.device("cpu"))
    assert mean_kl(record.before) == mean_kl(record.training.after) == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters()), "as they came"


def test_what_the_dense_model_leaves_teaches_as_the_model_itself(asked):
    """The loss by states and head, against the dense model asked live and the formula in float64."""
    dense, student, with_gradients = tiny_llama(), tiny_llama(seed=1), list[bool]()
    lesson, _ = lesson_of(asked, dense)
    dense.register_forward_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    trainer = object.__new__(train.Distiller)
    trainer.settings, trainer.judge, trainer.teacher = lesson.settings, lesson.judge, None
    ids_BT = torch.stack([block.ids_T for block in lesson.text.blocks[:2]])
    inputs = {"input_ids": ids_BT, "weight": torch.ones(2), "states": torch.stack(lesson.states[:2])}
    inside = loss_in_forward(student, bind(student), lesson.settings.kl_share, in_shards=False)
    with inside, teacher_in_forward(dense, bind(dense), in_shards=False):
        found = float(trainer.compute_loss(student, inputs).detach())
        trainer.teacher = dense
        del inputs["states"]
        assert with_gradients == []
        assert found == pytest.approx(float(trainer.compute_loss(student, inputs).detach()), rel=1e-6)
    assert with_gradients == [False], "nothing is kept for gradients that nobody reads"
    expected = float(kl_per_token(logits_of(dense, ids_BT), logits_of(student, ids_BT))[:, :-1].mean())
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_tokens", [640, 2560], ids=["part of the calibration", "more than it"])
def test_the_walk_of_a_prune_gives_what_the_dense_model_would_be_asked_for(num_tokens, asked, monkeypatch):
    lessons: list[Lesson | None] = []

    def both(*arguments: Any, walked: bool) -> Lesson | None:
        assert walked
        lessons.extend(learn(*arguments, walked=each) for each in (False, True))
        return lessons[-1]

    monkeypatch.setattr("secateur.pruning.cut.learn", both)
    wanted = {**asked, "polish": {**TRAINING, "num_tokens": num_tokens}}
    secateur.prune(tiny_llama(), grouped(wanted), tokenizer=tiny_tokenizer())
    told, taken = lessons
    assert told is not None and taken is not None and len(taken.places) == min(num_tokens, 1280) // 32
    # Blocks pass one by one here, many at a time there, and by another attention.
    pairs = [*zip(told.states, taken.states, strict=True)]
    for domain, states in told.judge.states.items():
        pairs += zip(states, taken.judge.states[domain], strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"target_mix": 0.0}, {"rounds": 2}, {"depth": 1}], ids=str)
def test_without_such_a_stream_the_dense_model_is_asked(changes, asked, monkeypatch):
    ask = Mock(return_value=None)
    monkeypatch.setattr("secateur.pruning.cut.learn", ask)
    secateur.prune(tiny_llama(), grouped({**asked, **changes}), tokenizer=tiny_tokenizer())
    assert [call.kwargs for call in ask.call_args_list] == [{"walked": False}]


def test_its_text_is_that_of_the_calibration_in_another_order(asked):
    lesson, recipe = lesson_of(asked, tiny_llama())
    text = learning_text(recipe.calibration, 1280, tiny_tokenizer(), recipe.seed)
    assert sorted(rows(block.ids_T for block in lesson.text.blocks)) == sorted(
        rows(ids for domain in text.domains for ids in domain.calibration.ids_NT)
    )
    prose = rows(text.domains[0].calibration.ids_NT)
    assert len({tuple(block.ids_T.tolist()) in prose for block in lesson.text.blocks[:8]}) == 2, "domains are mixed"
    for domain in text.domains:
        assert torch.equal(lesson.text.held_out[domain.name].ids_NT, domain.held_out.ids_NT)


def test_a_killed_run_goes_on_in_its_training_or_anew_and_ends_with_the_same_bytes(
    checkpoints, uneven, whole, tmp_path
):
    out, watch = tmp_path / "killed" / "out", Mock()
    out.parent.mkdir()
    with pytest.raises(Stopped):
        secateur.prune(checkpoints["llama"], grouped(uneven), out=out, progress=killed_in("polish"))
    assert not out.exists()
    anew = shutil.copytree(out.parent, tmp_path / "anew") / "out"
    secateur.prune(checkpoints["llama"], grouped(uneven), out=out, progress=watch)
    seen = [done for stage, done, _ in (call.args for call in watch.call_args_list) if stage == "polish"]
    assert seen[0] > 0, "it goes on where its last checkpoint is"
    (place,) = place_beside(anew).glob("polish-*")
    assert any(place.rglob("*.safetensors")), "the training had saved something"
    place.with_name("inputs.json").write_text("{}")
    secateur.prune(checkpoints["llama"], grouped(uneven), out=anew)
    for each in (out, anew):
        assert (each / WEIGHTS).read_bytes() == (whole.out / WEIGHTS).read_bytes()
        assert [path.name for path in each.parent.iterdir()] == ["out"]
    for each in (whole.out, out):
        assert len(lines_of(each, "polish_step")) == 10, "the curve is whole"


def test_other_settings_do_not_go_on_from_a_training_that_was_begun(tmp_path):
    services, places = Services(store=Store(tmp_path)), list[Path]()
    for changes in ({}, {"blocks_per_device": 1}, {"train": "lora"}):
        with training_folder(services, RecoverySettings(**changes), "polish") as place:
            places.append(place)
    assert len(set(places)) == 3 and all(place.parent == tmp_path for place in places)


def test_frozen_parameters_stay_frozen(asked):
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    lesson, recipe = lesson_of({**asked, "polish": {**TRAINING, "num_tokens": 128}}, model)
    polish(model, lesson, recipe.seed, Services(), torch.device("cpu"))
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert free == {name for name, _ in model.named_parameters()} - {"lm_head.weight"}


@pytest.mark.parametrize("prune", [secateur.prune, partial(secateur.prune_sizes, sizes=(0.1, 0.2))])
def test_a_prune_recovers_nothing(prune, checkpoints, asked, tmp_path):
    recipe = grouped({**asked, "recover": {"num_tokens": 128}})
    with pytest.raises(secateur.RecipeError, match="recover: is what secateur recover reads"):
        prune(checkpoints["llama"], recipe=recipe, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_activations_are_counted_by_the_widest_ffn_or_four_hidden_sizes():
    per_layer, unnamed = tiny_llama(), tiny_family("gpt2")
    per_layer.config.per_layer_config = {1: {"intermediate_size": 200}, 2: {"intermediate_size": 64}}
    settings = RecoverySettings(num_tokens=32, batch_tokens=32)
    for model, ffn in ((tiny_llama(), 112), (per_layer, 200), (unnamed, 4 * unnamed.config.hidden_size)):
        config = model.config
        numbers = config.num_hidden_layers * (10 * config.hidden_size + 4 * ffn) + 3 * config.vocab_size
        assert training_bytes(model, 1, 0, settings, 32, on_cpu=True) == 4 + 4 * 32 * numbers
