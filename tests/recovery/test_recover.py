"""Recovery end to end on tiny models: what it writes, that it resumes, and which ways to train win back."""

import html
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from models import tiny_ids
from recipes import grouped
from run_cli import run_cli
from safetensors.torch import load_file
from stops import Stopped, killed_in, lines_of
from transformers import AutoModelForCausalLM

import secateur
from secateur import recover
from secateur.facts import TrainingRecord, mean_kl, mean_nats
from secateur.formats.save import Verification
from secateur.model.checkpoint import load_model
from secateur.recipe import RecoverySettings, as_recipe
from secateur.recovery import open as recovery_open
from secateur.recovery import train as trainer_module
from secateur.recovery.judge import objective
from secateur.recovery.open import open_job, prepare
from secateur.recovery.train import Work, train_guarded
from secateur.recovery.weights import check_training, weight_size
from secateur.report.records import RecoveryRecord
from secateur.result_directory import mismatches, read_digests
from secateur.store import HOW, Services, Store, place_beside

# A random dense model knows nothing of the text, so only its predictions can be learnt.
TRAINING = {"batch_tokens": 128, "learning_rate": 1e-3, "kl_share": 1.0}
CHANGES = {"recover": {"num_tokens": 2048, **TRAINING}}
WEIGHTS, WORDS = "model.safetensors", "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def unproved(monkeypatch) -> None:
    """No reload, but of the results that several tests look at."""
    monkeypatch.setattr("secateur.formats.save.verify_reload", lambda *_: Verification(0.0))


@pytest.fixture(scope="module")
def pruned(checkpoints, recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "pruned"
    secateur.prune(checkpoints["llama"], grouped({**recipe, "remove": 0.3}), out=out)
    return out


@pytest.fixture(scope="module")
def recovered(checkpoints, pruned, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("recovered") / "recovered"
    recover(pruned, checkpoints["llama"], CHANGES, out=out)
    return out


def record_of(directory: Path) -> RecoveryRecord:
    return RecoveryRecord.from_json((directory / "recovery.json").read_text(encoding="utf-8"), "there")


def training_with(**settings: Any) -> dict[str, Any]:
    return {"recover": {**CHANGES["recover"], **settings}}


def test_the_record_and_the_directory_are_complete_and_load_in_stock_transformers(recovered, pruned):
    record = record_of(recovered)
    assert mean_kl(record.before) > mean_kl(record.after) > 0
    assert record.training.held and record.after == record.training.after
    assert record.training.num_tokens == 2048 and record.reload_max_abs_difference == 0
    assert record.training.seconds > 0 and record.peak_bytes > 0
    assert all(seconds == round(seconds, 2) for seconds in record.seconds.values())
    names = {path.name for path in recovered.iterdir()}
    assert names == {path.name for path in pruned.iterdir()} | {"recovery.json"}
    assert [path.name for path in recovered.parent.iterdir()] == [recovered.name]
    model, info = AutoModelForCausalLM.from_pretrained(recovered, output_loading_info=True)
    assert not any(info.values()) and torch.isfinite(model(tiny_ids()).logits).all()
    for name in ("config.json", "tokenizer.json", "keep.json"):
        assert (recovered / name).read_bytes() == (pruned / name).read_bytes()
    assert yaml.safe_load((recovered / "recipe.yaml").read_text())["recover"]["num_tokens"] == 2048
    digests = read_digests(recovered)
    assert digests is not None and {WEIGHTS, "recovery.json", "README.md", "run.jsonl"} < set(digests)
    assert list(mismatches(recovered, digests, lambda *_: None)) == []


def test_links_of_the_pruned_directory_are_not_followed(pruned, checkpoints, tmp_path):
    source = Path(shutil.copytree(pruned, tmp_path / "source"))
    (tmp_path / "secret").write_text("a private key")
    for name in ("README.md", "run.jsonl", "NOTICE"):  # one of a .json file is refused
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(tmp_path / "secret")
    (source / "report.html").unlink()
    (source / "result.json").unlink()  # the report reads what is gone
    recover(source, checkpoints["llama"], CHANGES, out=tmp_path / "out")
    written = {path.name: path.read_text(errors="replace") for path in (tmp_path / "out").iterdir()}
    assert not any("a private key" in text for text in written.values())
    assert "NOTICE: is a link to a file outside" in " ".join(record_of(tmp_path / "out").notes)


def test_the_run_log_goes_on_and_the_report_and_the_card_tell_of_it(recovered, pruned):
    lines, before = lines_of(recovered), lines_of(pruned)
    assert lines[: len(before)] == before
    added = [line["event"] for line in lines[len(before) :]]
    assert {"recover_step", "recover_judged"} <= set(added)
    assert added.count("recover_step") == record_of(recovered).training.num_tokens // 128
    page = (recovered / "report.html").read_text(encoding="utf-8")
    told = "The recovery, on the text that guards it"
    assert told in page and told not in (pruned / "report.html").read_text(encoding="utf-8")
    assert record_of(recovered).headline in html.unescape(page)
    card = (recovered / "README.md").read_text(encoding="utf-8")
    assert card.index("## Recovery") < card.index("## How it was made")


def test_weights_on_disk_give_the_bytes_of_weights_in_memory(recovered, pruned, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery_open, "load_model", lambda checkpoint, **_: load_model(checkpoint))
    recover(pruned, checkpoints["llama"], CHANGES, out=tmp_path / "whole")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (recovered / name).read_bytes()


def train(
    pruned: Path, teacher: Path, place: Path, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[Work, Any, TrainingRecord]:
    """Train alone, without writing a result; return what was worked on, the verdicts before, the record."""
    work = prepare(open_job(pruned, teacher, as_recipe(training_with(**settings))), place, Services())
    work.pruned.to(dtype)
    return (work, *train_guarded(work))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    "settings",
    [{"train": "lora", "learning_rate": 1e-3}, {"train": "full", "blocks_per_device": 1, "learning_rate": 3e-4}],
)
def test_every_way_to_train_wins_back(pruned, checkpoints, tmp_path, settings):
    work, before, record = train(pruned, checkpoints["llama"], tmp_path / "out", **settings)
    assert record.held and mean_kl(record.after) < mean_kl(before)
    assert weights(work.pruned).keys() == set(load_file(pruned / WEIGHTS))
    unmoved = torch.equal(weights(work.pruned)[WORDS], load_file(pruned / WEIGHTS)[WORDS])
    assert unmoved == (settings["train"] != "full")


def test_words_that_do_not_learn_have_no_copy_and_the_result_the_same_bytes(pruned, checkpoints, tmp_path, monkeypatch):
    """Against all weights in float32, as shards have them: autocast would round those back."""
    monkeypatch.setattr("secateur.recovery.weights.multiplies_in_software", lambda *_: False)
    low, _, record = train(pruned, checkpoints["llama"], tmp_path / "low", torch.bfloat16)
    prepare = trainer_module.prepare_weights
    monkeypatch.setattr(trainer_module, "prepare_weights", lambda *facts, float_all: prepare(*facts, float_all=True))
    high, *_ = train(pruned, checkpoints["llama"], tmp_path / "high", torch.bfloat16)
    before = load_file(pruned / WEIGHTS)
    assert record.held
    for name, tensor in weights(low.pruned).items():
        assert torch.equal(tensor, weights(high.pruned)[name]), name
        assert torch.equal(tensor, before[name].to(torch.bfloat16)) == ("embed" in name or "lm_head" in name), name


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(secateur.RecipeError, match=r"^polish.train: lora needs .* pip install 'secateur\[recover\]'"):
        check_training(RecoverySettings(train="lora"), "polish")


def test_gradient_checkpointing_changes_nothing_and_cross_entropy_needs_no_teacher(pruned, checkpoints, tmp_path):
    found = []
    for checkpointing in (False, True):
        asked = {"kl_share": 0.0, "gradient_checkpointing": checkpointing, "learning_rate": 1e-4}
        work, before, record = train(pruned, checkpoints["llama"], tmp_path / str(checkpointing), **asked)
        assert work.teacher is None
        # Without a teacher the loss says whether it helped, whatever the KL did.
        assert record.held and mean_nats(record.after) < mean_nats(before)
        assert objective(before, 0.25, (), before) == pytest.approx(0.25 * mean_kl(before) + 0.75 * mean_nats(before))
        found.append(weights(work.pruned))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_per_layer_widths_and_removed_layers_are_recovered(checkpoints, recipe, tmp_path):
    asked = {**recipe, "remove": 0.45, "depth": 1, "budget": "curve", "align": 4}
    secateur.prune(checkpoints["llama"], grouped(asked), out=tmp_path / "pruned")
    assert "per_layer_config" in json.loads((tmp_path / "pruned" / "config.json").read_text())
    record = recover(tmp_path / "pruned", checkpoints["llama"], CHANGES, out=tmp_path / "out")
    assert record is not None and record.training.held
    model = secateur.load(tmp_path / "out")
    assert model.config.num_hidden_layers == 2 and torch.isfinite(model(tiny_ids()).logits).all()


def test_without_a_rate_the_size_of_the_weights_gives_it(checkpoints, pruned, recipe, tmp_path):
    training = {"num_tokens": 256, "batch_tokens": 64, "learning_rate": None}
    asked = grouped({**recipe, "remove": 0.3, "polish": training})
    secateur.prune(checkpoints["llama"], asked, out=tmp_path / "polished")
    logs = [lines_of(tmp_path / "polished", "polish_step")]
    for way in ("layers", "lora"):
        work, *_ = train(pruned, checkpoints["llama"], tmp_path / way, train=way, **training)
        logs.append([line for line in work.services.log.lines if line["event"] == "recover_step"])
    small = weight_size(secateur.load(pruned))
    for lines, rate in zip(logs, (0.0005 * small, 0.0005 * small, 0.005 * small), strict=True):
        assert max(line["learning_rate"] for line in lines) == pytest.approx(rate, rel=1e-6)


def test_the_command_line_end_to_end(pruned, checkpoints, texts, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(training_with(learning_rate=3e-4)), encoding="utf-8")
    options = ["--tokens", "640", "--recipe", file, "--domain", f"prose={texts['prose']}", "--out", tmp_path / "out"]
    done = run_cli("recover", pruned, "--teacher", checkpoints["llama"], *options)
    assert done.status == 0, done.stderr
    assert " recover\n" in done.stderr
    assert "with 640 tokens" in " ".join(done.stdout.split())
    assert list(record_of(tmp_path / "out").before) == ["prose"]


def swap_two_tokens(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = vocabulary
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("config.json", lambda read: read.update(vocab_size=321), "it gives 321 logits and"),
        ("config.json", lambda read: read.update(num_hidden_layers=5), "weights and config disagree, missing: model"),
        ("tokenizer.json", swap_two_tokens, "its tokenizer (257 tokens) is not that of"),
    ],
)
def test_mismatches_are_refused_before_anything_runs(file, change, sentence, pruned, checkpoints, tmp_path):
    teacher = shutil.copytree(checkpoints["llama"], tmp_path / "teacher")
    content = json.loads((teacher / file).read_text())
    change(content)
    (teacher / file).write_text(json.dumps(content), encoding="utf-8")
    progress = Mock()
    with pytest.raises(secateur.CheckpointError, match=re.escape(sentence)) as caught:
        recover(pruned, teacher, CHANGES, out=tmp_path / "out", other_dense=True, progress=progress)
    assert "\n" not in str(caught.value) and not progress.called and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"recover": {"num_tokens": 64}}, "leave less than one step"),
        ({"recover": {"learning_rat": 2}}, "did you mean 'learning_rate'"),
        ({"recover": {"num_tokens": 10**7}}, "tokens of text after packing"),
        ({"remove": {"share": 0.4}}, "remove: says how to prune, and .* is pruned already"),
    ],
)
def test_what_the_recipe_has_wrong_is_one_sentence(pruned, checkpoints, tmp_path, changes, sentence):
    with pytest.raises(secateur.SecateurError, match=sentence) as caught:
        recover(pruned, checkpoints["llama"], changes, out=tmp_path / "out")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_directory_without_a_recipe_needs_domains(checkpoints, tmp_path):
    with pytest.raises(secateur.RecipeError, match=r"has no recipe\.yaml"):
        recover(checkpoints["llama"], checkpoints["llama"], CHANGES, out=tmp_path / "out")


class Code:
    """An object whose pickle makes a file when it is opened as pickles are."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def interrupted(pruned, checkpoints, tmp_path_factory) -> Path:
    """What a recovery leaves that was stopped behind its first checkpoint."""
    place = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Stopped) as killed:
        recover(pruned, checkpoints["llama"], CHANGES, out=place / "out", progress=killed_in("recover"))
    assert killed.value.__notes__ == [HOW]
    assert not (place / "out").exists()
    return place


def test_a_run_killed_in_its_training_and_behind_it_ends_with_the_same_bytes(
    interrupted, recovered, pruned, checkpoints, tmp_path
):
    place = shutil.copytree(interrupted, tmp_path / "place")
    out, said = place / "out", list[str]()
    with pytest.raises(secateur.CheckpointError, match="had other inputs: recipe recover learning_rate was"):
        recover(pruned, checkpoints["llama"], training_with(learning_rate=3e-4), out=out)
    watch = Mock(side_effect=killed_in("verify", behind=-1))
    with pytest.raises(Stopped):
        recover(pruned, checkpoints["llama"], CHANGES, out=out, tell=said.append, progress=watch)
    assert any(line.startswith(f"{out}: goes on from the ") for line in said)
    seen = [done for name, done, _ in (call.args for call in watch.call_args_list) if name == "recover"]
    assert seen[0] > 0, "the trainer goes on where its checkpoint is"
    watch = Mock()
    recover(pruned, checkpoints["llama"], CHANGES, out=out, progress=watch)
    stages = {call.args[0] for call in watch.call_args_list}
    assert stages and "recover" not in stages, "what was trained is not trained again"
    assert (out / WEIGHTS).read_bytes() == (recovered / WEIGHTS).read_bytes()
    assert [line["step"] for line in lines_of(out, "recover_step")] == list(range(1, 17))
    assert [*place.iterdir()] == [out]


def test_pickles_in_it_are_opened_as_tensors_only(interrupted, pruned, checkpoints, tmp_path):
    place = shutil.copytree(interrupted, tmp_path / "place")
    [state] = place_beside(place / "out").glob("recover-*/trainer/checkpoint-*/optimizer.pt")
    torch.save(Code(tmp_path / "ran"), state)
    Store(state.parents[1]).save_files(state.parent)  # by somebody who also writes the digests
    with pytest.raises(secateur.CheckpointError, match="holds more than tensors, so it is not opened") as caught:
        recover(pruned, checkpoints["llama"], CHANGES, out=place / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    torch.load(state, weights_only=False)
    assert (tmp_path / "ran").exists(), "the pickle would have run"
