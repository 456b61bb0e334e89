"""A result's identity from end to end: lineage, card, what is refused, what `push` would send."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError
from models import saved, tiny_llama
from recipes import grouped
from run_cli import run_cli
from shown import assert_sentences, refusal

import secateur
from secateur.report.push import push
from secateur.report.records import read_result, read_summary
from secateur.report.report import CARD_FILE
from secateur.report.rows import note_rows

TIMED = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1)


@pytest.fixture(scope="module")
def places(checkpoints, recipe, texts, tmp_path_factory) -> dict[str, Path]:
    """`once` is pruned from `dense`, and `twice` from `once`; `other` is another model of the same shape."""
    root = tmp_path_factory.mktemp("a place of mine")
    dense = Path(shutil.copytree(checkpoints["llama"], root / "dense"))
    (dense / CARD_FILE).write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    saved(root / "other", tiny_llama(seed=1))
    asked = grouped({**recipe, "remove": 0.2})
    (root / "recipe.yaml").write_text(yaml.safe_dump(asked))
    (root / "mine.txt").write_text("a domain of my own\n" * 2000)
    prose = f"calibration.domains={{prose: {{files: [{texts['prose']}]}}}}"
    domains = ("--domain", f"mine={root / 'mine.txt'}", "--set", prose)
    outcome = run_cli("prune", dense, root / "once", "--recipe", root / "recipe.yaml", *domains)
    assert outcome.status == 0, outcome.stderr
    secateur.prune(root / "once", {**asked, "output": {"evaluate": False}}, out=root / "twice")
    return {name: root / name for name in ("dense", "once", "twice", "other")}


@pytest.fixture
def once(places, tmp_path) -> Path:
    return Path(shutil.copytree(places["once"], tmp_path / "once"))


@pytest.fixture(scope="module")
def judged(places, tmp_path_factory) -> Path:
    """`once` with what later commands write."""
    found = Path(shutil.copytree(places["once"], tmp_path_factory.mktemp("a place of mine") / "once"))
    for command in ("evaluate", "bench"):
        assert run_cli(command, found, "--against", places["dense"], *(TIMED if command == "bench" else ())).status == 0
    return found


def metadata(directory: Path) -> dict:
    return yaml.safe_load((directory / CARD_FILE).read_text().split("---\n")[1])


def names_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def test_the_lineage_and_the_licence_go_back_to_the_original(places):
    once, twice = (read_summary(places[name]) for name in ("once", "twice"))
    assert [each.name for each in once.lineage] == ["dense"]
    assert [each.name for each in twice.lineage] == ["dense", "once"] and twice.lineage[0] == once.lineage[0]
    sizes = once.dense_size.num_params, once.pruned_size.num_params, twice.pruned_size.num_params
    assert [each.num_params for each in twice.lineage] == list(sizes[:2])
    said = dict(note_rows(twice))["lineage"]
    assert said == f"dense → once → this; {1 - sizes[2] / sizes[0]:.1%} of all {sizes[0]:,} parameters of dense removed"
    assert said in (places["twice"] / CARD_FILE).read_text()
    notes = dict(note_rows(once))
    assert once.lineage[0].fingerprint[:16] in notes["dense model"] and "lineage" not in notes
    card = metadata(places["once"])
    assert (card["license"], card["language"]) == ("apache-2.0", ["en"]) and "base_model" not in card
    assert {"secateur", "pruned"} <= set(card["tags"])
    assert metadata(places["twice"])["license"] == "apache-2.0", "read from the card of `once`"


def test_what_is_written_names_no_place_of_this_machine_but_the_recipe(judged):
    files = [file for file in judged.iterdir() if file.is_file() and file.suffix != ".safetensors"]
    texts = {file.name: file.read_bytes() for file in files}
    assert {"README.md", "result.json", "bench.json", "evaluation.json", "report.html", "run.jsonl"} < set(texts)
    named = [name for name, raw in texts.items() if re.search(rb"/tmp|a place of mine|is_local|name_or_path", raw)]
    assert named == ["recipe.yaml"], "from which evaluate and recover read the text again"
    command = "secateur prune dense once --recipe recipe.yaml --domain mine=mine.txt --set calibration.domains=..."
    assert f"- command: `{command}`" in texts["README.md"].decode()


def test_another_model_is_refused_and_named_where_it_is_meant(once, places):
    outcome = run_cli("bench", once, "--against", places["other"], *TIMED)
    assert outcome.status == 2 and not (once / "bench.json").exists()
    outcome = run_cli("bench", once, "--against", places["other"], "--other-dense", *TIMED)
    assert outcome.status == 0 and "note: dense is here" in outcome.stdout
    (note, *_) = json.loads((once / "bench.json").read_text())["notes"]
    assert note.startswith("dense is here other (") and "not dense (fingerprint" in note
    assert "not dense (fingerprint" in (once / "report.html").read_text()
    assert run_cli("bench", places["twice"], "--against", places["dense"], *TIMED).status == 0  # the original
    assert "not dense (fingerprint" in secateur.evaluate(once, places["other"], other_dense=True).notes[0]


def test_swapped_arguments(once, places):
    for words in ("bench --against", "evaluate --out x --against", "recover --out x --teacher"):
        verb, *options = words.split()
        outcome = run_cli(verb, places["dense"], *options, once)
        assert outcome.status == 2 and "so the two are swapped" in outcome.stderr


def test_nothing_is_written_into_what_is_no_result(places):
    before = names_in(places["dense"])
    assert run_cli("evaluate", places["dense"], "--domain", "code").status == 2
    outcome = run_cli("bench", places["dense"], *TIMED)
    assert outcome.status == 0 and "Written to" not in outcome.stdout
    assert names_in(places["dense"]) == before


def test_a_dry_run_lists_what_would_be_sent(places):
    outcome = run_cli("push", places["once"], "me/tiny-pruned", "--dry-run")
    assert outcome.status == 0 and outcome.stderr == ""
    for said in ("model.safetensors", "recipe.yaml", "library_name: transformers"):
        assert said in outcome.stdout
    assert outcome.stdout.endswith("Would go to me/tiny-pruned, private; nothing was sent.\n")
    found = push(places["once"], "me/tiny-pruned", dry_run=True, public=True)
    assert found.url is None and not found.private
    assert found.files["model.safetensors"] == (places["once"] / "model.safetensors").stat().st_size
    assert any("hub id of the dense model" in note for note in found.notes)
    assert set(found.files) == names_in(places["once"])


@dataclass
class Hub:
    """What the client of the hub is asked for; an upload lands in a directory."""

    place: Path
    asked: dict[str, Any] = field(default_factory=dict[str, Any])
    endpoint = "https://hub"

    def create_repo(self, repo: str, **asked: Any) -> None:
        self.asked |= asked

    def model_info(self, repo: str) -> Any:
        return SimpleNamespace(private=self.asked["private"])

    def upload_folder(self, *, repo_id: str, folder_path: Path, **asked: Any) -> None:
        self.asked |= asked
        shutil.copytree(folder_path, self.place)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    found = Hub(tmp_path / "sent")
    monkeypatch.setattr("secateur.report.push.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("secateur.report.push.get_token", lambda: "hf_x")
    monkeypatch.setattr("secateur.report.push.HfApi", lambda: found)
    return found


def test_what_the_hub_answers_is_told_and_what_is_public_already_gets_nothing_unless_meant(places, hub, monkeypatch):
    answers: dict[str, Exception] = {"cut off": OSError("it is down")}
    for status in (401, 403, 500):
        answer: Any = SimpleNamespace(status_code=status, headers={}, request=None)
        answers[f"status {status}"] = HfHubHTTPError("it is down", response=answer)
    said, upload = dict[str, str](), hub.upload_folder
    for name, error in answers.items():
        monkeypatch.setattr(hub, "upload_folder", Mock(side_effect=error))
        said[name] = refusal(push, places["once"], "me/tiny-pruned")
    monkeypatch.setattr(hub, "upload_folder", upload)
    monkeypatch.setattr(hub, "model_info", lambda repo: SimpleNamespace(private=False))
    said["public already"] = refusal(push, places["once"], "me/tiny-pruned")
    assert_sentences("push/hub", said)
    assert not hub.place.exists()
    assert push(places["once"], "me/tiny-pruned", public=True).url == "https://hub/me/tiny-pruned"
    assert hub.place.is_dir()


def test_nothing_is_sent_but_what_the_run_and_later_commands_wrote(judged, hub, tmp_path):
    once = Path(shutil.copytree(judged, tmp_path / "once"))
    known = names_in(once) - {name for name in names_in(once) if name.split("/")[0] == "evaluation"}
    (tmp_path / "private.json").write_text("{}")
    (once / "more.json").symlink_to(tmp_path / "private.json")
    for name in ("notes.txt", ".hidden", "secret.json", "model.gguf", "evaluation/more.txt", "src/a.py"):
        (once / name).parent.mkdir(exist_ok=True)
        (once / name).write_text("mine")
    outcome = run_cli("push", once, "me/tiny-pruned")
    assert outcome.status == 0 and outcome.stdout.endswith("Pushed to https://hub/me/tiny-pruned, private.\n")
    assert names_in(hub.place) == known and hub.asked["private"] and "*.safetensors" in hub.asked["delete_patterns"]


def test_what_is_sent_holds_no_place_and_is_whole(once, hub):
    # Text that looks like a path and is none stays as it is.
    card = (once / CARD_FILE).read_text().replace("# dense, pruned", "# 1/2 of </script> or a/b, pruned")
    (once / CARD_FILE).write_text(card.replace("---\n", "---\nbase_model: me/dense\n", 1))  # as a note asks for
    outcome = run_cli("push", once, "me/tiny-pruned", "--public")
    assert outcome.status == 0 and "hub id" not in outcome.stdout
    assert metadata(hub.place)["base_model"] == "me/dense" and metadata(hub.place)["license"] == "apache-2.0"
    for file in (path for path in hub.place.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        assert not re.search(rb"/tmp|a place of mine", file.read_bytes()), file
    assert (hub.place / CARD_FILE).read_text().split("---\n", 2)[2] == card.split("---\n", 2)[2]
    assert not hub.asked["private"]
    assert read_result(hub.place).recipe.calibration.domains["prose"].files == ("prose.txt",)
    outcome = run_cli("verify", hub.place)
    assert outcome.status == 0, outcome.stdout


def test_what_is_not_sent(places, once, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.report.push.get_token", lambda: None)
    said = {name: refusal(push, once, name, dry_run=True) for name in ("tiny", "a/b/c", "me/ti ny")}
    said["a model of somebody else's"] = refusal(push, places["dense"], "me/tiny", dry_run=True)
    said["offline"] = refusal(push, once, "me/tiny")
    monkeypatch.setattr("secateur.report.push.constants.HF_HUB_OFFLINE", False)
    said["without a token"] = refusal(push, once, "me/tiny")
    weights = Path(shutil.move(once / "model.safetensors", tmp_path))
    said["without weights"] = refusal(push, once, "me/tiny", dry_run=True)
    (once / "model.safetensors").symlink_to(weights)
    said["with a link to weights"] = refusal(push, once, "me/tiny", dry_run=True)
    weights.replace(once / "model.safetensors")
    (once / CARD_FILE).write_text("---\n- a list\n---\n")
    said["with a card without metadata"] = refusal(push, once, "me/tiny", dry_run=True)
    (once / "result.json").write_text((once / "result.json").read_text().replace("llama", "mamba"))
    said["damaged"] = refusal(push, once, "me/tiny", dry_run=True)
    assert_sentences("push/refused", said, tmp_path, places["dense"].parent)
