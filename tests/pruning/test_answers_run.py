"""A run whose text is half what the dense model answers, which count alone; and any run judged by such answers."""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import opened, saved, tiny_llama
from recipes import grouped
from run_cli import run_cli
from stops import Stopped, killed_in
from tiny_tokenizer import tiny_tokenizer

import secateur
from secateur.errors import CheckpointError, RecipeError
from secateur.pruning.text import completed
from secateur.recipe import Domain, Recipe
from secateur.recovery.text import in_steps
from secateur.store import Store

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text")
    (place / "a.txt").write_text("".join(f"line {number}\n" for number in range(900)))
    chats = [[{"role": "user", "content": f"a{number}"}, {"role": "assistant", "content": "x"}] for number in range(60)]
    (place / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return place


def chatting(files: Path, **calibration: Any) -> dict[str, Any]:
    domains = {"chat": {"files": str(files / "chat.jsonl"), "answers": True}, "lines": {"files": str(files / "a.txt")}}
    text = {"num_tokens": 1152, "sequence_length": 32, "domains": domains, **calibration}
    return {"align": 8, "calibration": text, "polish": {"num_tokens": 640, "batch_tokens": 64}}


@pytest.fixture(scope="module")
def pruned(files: Path, tmp_path_factory: pytest.TempPathFactory) -> secateur.Result:
    out = tmp_path_factory.mktemp("run") / "out"
    return secateur.prune(tiny_llama(), grouped(chatting(files)), tokenizer=TOKENIZER, out=out)


def test_a_run_learns_by_answers_and_is_judged_by_them(pruned, checkpoints):
    facts, ours = pruned.summary.calibration, pruned.summary.own_answers
    assert facts.num_tokens == {"chat": 576, "lines": 576} and facts.num_held_out_tokens["chat"] == 64
    assert set(pruned.summary.pruned_losses) == {"chat", "lines"}
    # What the model draws is what it finds likely, and only that counts.
    chat = pruned.summary.dense_losses["chat"]
    assert chat.num_tokens < 64
    assert chat.nats_per_token < pruned.summary.dense_losses["lines"].nats_per_token
    assert "answers of the dense model" in (pruned.out / "report.html").read_text()
    assert pruned.summary.polish.before["chat"].num_tokens < 64
    # `evaluate` finds the same and keeps it.
    found = secateur.evaluate(pruned.out, checkpoints["llama"]).own_answers
    assert found.nats == pytest.approx(ours.nats, rel=1e-4)
    assert (found.num_tokens, found.ended, found.shown) == (ours.num_tokens, ours.ended, ours.shown)
    kept = json.loads((pruned.out / "evaluation.json").read_text())["own_answers"]
    assert kept == json.loads(json.dumps(asdict(found)))
    assert secateur.evaluate(pruned.out).own_answers is None


def test_prompts_of_ones_own_judge_but_for_those_that_the_run_had(pruned, files, checkpoints, tmp_path):
    dense, out = checkpoints["llama"], tmp_path / "out"
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"{word}"}) + "\n" for word in ("new", "a7", "other", "new")))
    asked = Domain(files=(str(own),), column="prompt", answers=True)
    found = secateur.evaluate(pruned.out, dense, prompts=asked, out=out)
    assert found.own_answers is not None
    assert {pair.prompt for pair in found.own_answers.shown} == {"new", "other"} and found.own_answers.num_prompts == 2
    assert f"own answers are to 2 prompts of {own}; 1 that the run had to ask are left out." in found.notes
    had = Domain(files=(str(files / "chat.jsonl"),), answers=True)
    with pytest.raises(RecipeError, match="had all 60 of them"):
        secateur.evaluate(pruned.out, dense, prompts=had, out=out)
    command = run_cli("evaluate", pruned.out, "--prompts", f"{own}:prompt", "--out", out)
    assert command.status == 2 and "--prompts: needs a dense model" in command.stderr


def polished(files: Path, out: Path, **polish: Any) -> Any:
    """Return the run of a text that is nearly all lines, which a model learns by going its own way."""
    asked = chatting(files)
    asked["calibration"]["domains"]["lines"]["share"] = 15
    asked["polish"] |= {"kl_share": 0.01, "learning_rate": 0.02, **polish}
    return secateur.prune(tiny_llama(), grouped(asked), tokenizer=TOKENIZER, out=out)


def test_a_polish_that_leads_away_from_the_dense_model_on_its_answers_is_undone(files: Path, tmp_path: Path) -> None:
    undone, untrained = polished(files, tmp_path / "undone"), polished(files, tmp_path / "untrained", num_tokens=0)
    before, training = undone.summary.polish.before, undone.summary.polish.training
    # The text won more than the answers lost.
    gain = before["lines"].nats_per_token - training.after["lines"].nats_per_token
    loss = training.after["chat"].kl - before["chat"].kl
    assert not training.held and gain > 2 * loss > 0
    assert any("moved away from the dense one on its answers" in note for note in undone.summary.warnings)
    for name, weight in untrained.model.state_dict().items():
        assert torch.equal(undone.model.state_dict()[name], weight)


def shares(tokenizer: Any, **calibration: Any) -> dict[str, float]:
    """Return the domains' shares of the tokens."""
    of = opened(tiny_llama(), Recipe(calibration=calibration))
    domains = completed(replace(of, tokenizer=tokenizer)).recipe.calibration.domains
    total = sum(domain.share for domain in domains.values())
    return {name: domain.share / total for name, domain in domains.items()}


def test_half_of_the_default_text_is_answers_where_there_is_a_chat_template() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    plain, found = shares(bare), shares(TOKENIZER)
    assert "answers" not in plain
    with pytest.raises(RecipeError, match="has no chat template"):
        shares(bare, answers=0.5)
    assert found.pop("answers") == pytest.approx(0.5)
    assert found == pytest.approx({name: share / 2 for name, share in plain.items()})


def test_the_share_of_answers_is_what_is_asked_for(files: Path) -> None:
    text = {"a": {"files": "a.txt"}, "b": {"files": "b.txt", "share": 3}}
    assert shares(TOKENIZER, domains=text) == {"a": 0.25, "b": 0.75}
    assert shares(TOKENIZER, domains=text, answers=0) == {"a": 0.25, "b": 0.75}
    found = shares(TOKENIZER, domains=text, answers=0.25)
    assert found == pytest.approx({"a": 0.1875, "b": 0.5625, "answers": 0.25})
    assert shares(TOKENIZER, domains=text, answers=1) == {"answers": 1.0}
    asked = {"files": "c.jsonl", "answers": True}
    chat = {**text, "c": asked}
    assert shares(TOKENIZER, domains=chat)["c"] == 0.2
    assert shares(TOKENIZER, domains=chat, answers=0.6)["c"] == pytest.approx(0.6)
    # None leaves prompts that come with secateur out.
    shipped = {"a": {"files": "a.txt"}, "answers": {"answers": True}}
    assert shares(TOKENIZER, domains=shipped, answers=0) == {"a": 1.0}
    # What is asked for twice changes nothing.
    once = completed(replace(opened(tiny_llama(), Recipe(calibration={"answers": 0.3})), tokenizer=TOKENIZER))
    again = completed(once).recipe.calibration.domains
    for name, domain in once.recipe.calibration.domains.items():
        assert again[name].share == pytest.approx(domain.share)
    # No share beside prompts is an error.
    for domains in ({"c": asked}, {"a": {"files": "a.txt"}, "c": asked}, {"c": {"answers": True}}):
        with pytest.raises(RecipeError, match="domain 'c' is of answers; leave out one of them"):
            shares(TOKENIZER, domains=domains, answers=0)


def test_answers_to_other_prompts_are_not_taken_for_those_to_these(files: Path, tmp_path: Path) -> None:
    saved(tmp_path / "model", tiny_llama())
    text = shutil.copytree(files, tmp_path / "text")
    prune = partial(secateur.prune, tmp_path / "model", grouped(chatting(text)), out=tmp_path / "out")
    with pytest.raises(Stopped):
        prune(progress=killed_in("prune, round 1 of 1"))
    chats = text / "chat.jsonl"
    chats.write_text(chats.read_text().replace('"a', '"b').replace('"bssistant', '"assistant'))
    with pytest.raises(CheckpointError, match="the set of prompts has changed"):
        prune()


def test_a_killed_run_goes_on_with_the_conversations_that_it_had(tmp_path: Path) -> None:
    store, done = Store(tmp_path), list[str]()

    def step(name: str) -> dict[str, torch.Tensor]:
        done.append(name)
        if name == "c":
            raise KeyboardInterrupt
        return {"ids": torch.tensor([len(name)])}

    steps = [(name, partial(step, name)) for name in ("a", "b", "c")]
    with pytest.raises(KeyboardInterrupt):
        in_steps(store, "x")(steps)
    assert done == ["a", "b", "c"]
    with pytest.raises(KeyboardInterrupt):
        in_steps(Store(tmp_path), "x")(steps)
    assert done == ["a", "b", "c", "c"]
    # A measurement of the same prompts serves, one of others does not.
    other = Store()
    other.before = Store(tmp_path)
    assert len(in_steps(other, "x")(steps[:2])) == 2 and done == ["a", "b", "c", "c"]
    in_steps(other, "y")(steps[:2])
    assert done == ["a", "b", "c", "c", "a", "b"]


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


def test_a_model_without_a_chat_template_is_not_asked(checkpoints, recipe, tmp_path):
    plain = shutil.copytree(checkpoints["llama"], tmp_path / "plain")
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    summary = secateur.prune(plain, grouped({**recipe, "remove": 0.2})).summary
    assert summary.own_answers is None and summary.other_text is not None
