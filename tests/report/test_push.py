"""A result's identity from end to end: lineage, card, what is refused, what `push` would send."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError
from models import saved, tiny_llama
from recipes import grouped
from run_cli import run_cli

import secateur
from secateur.errors import CheckpointError, RecipeError
from secateur.report.card import CARD_FILE
from secateur.report.push import push
from secateur.report.records import read_result, read_summary
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


def test_the_lineage_goes_back_to_the_original(places):
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


def test_the_card_has_the_hub_s_metadata(places):
    found = metadata(places["once"])
    assert found["license"] == "apache-2.0" and found["language"] == ["en"]
    assert "base_model" not in found and {"secateur", "pruned"} <= set(found["tags"])
    assert metadata(places["twice"])["license"] == "apache-2.0"  # read from the card of `once`


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
    verbs = {
        "bench": ("--against",),
        "evaluate": ("--out", once / "x", "--against"),
        "recover": ("--out", once / "x", "--teacher"),
    }
    for verb, options in verbs.items():
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


def test_a_repository_that_is_public_already_gets_nothing_unless_that_is_meant(places, hub, monkeypatch):
    monkeypatch.setattr(hub, "model_info", lambda repo: SimpleNamespace(private=False))
    with pytest.raises(CheckpointError, match=r"everybody can see this repository; give --public if that is meant"):
        push(places["once"], "me/tiny-pruned")
    assert not hub.place.exists()
    assert push(places["once"], "me/tiny-pruned", public=True).url == "https://hub/me/tiny-pruned"
    assert hub.place.is_dir()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the hub refuses with status 401; the token is not valid; run hf auth login."),
        (403, "the hub refuses with status 403; the token may not write there."),
        (500, "the hub refuses with status 500; it is down."),
        (None, "the hub cannot be reached or the upload failed (it is down); run the same command again"),
    ],
)
def test_what_the_hub_answers_is_told(status, said, places, hub, monkeypatch):
    def refuses(**_: Any) -> None:
        if status is None:
            raise OSError("it is down")
        answer: Any = SimpleNamespace(status_code=status, headers={}, request=None)
        raise HfHubHTTPError("it is down", response=answer)

    monkeypatch.setattr(hub, "upload_folder", refuses)
    with pytest.raises(CheckpointError, match=re.escape(f"push me/tiny-pruned: {said}")):
        push(places["once"], "me/tiny-pruned")


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


def test_a_result_that_is_not_whole_is_not_sent(once, tmp_path):
    weights = Path(shutil.move(once / "model.safetensors", tmp_path))
    for link in (False, True):
        if link:
            (once / "model.safetensors").symlink_to(weights)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: is gone, or a link to a file outside"):
            push(once, "me/tiny", dry_run=True)
    weights.replace(once / "model.safetensors")
    (once / CARD_FILE).write_text("---\n- a list\n---\n")
    with pytest.raises(CheckpointError, match=r"README.md: its first lines are no metadata \(.*\); correct them"):
        push(once, "me/tiny", dry_run=True)
    (once / "result.json").write_text((once / "result.json").read_text().replace("llama", "mamba"))
    with pytest.raises(CheckpointError, match=r"its result.json is damaged"):
        push(once, "me/tiny", dry_run=True)


def test_push_says_what_is_wrong(places, monkeypatch):
    for name in ("tiny", "a/b/c", "me/ti ny"):
        with pytest.raises(RecipeError, match="is no name on the hub; give OWNER/NAME"):
            push(places["once"], name, dry_run=True)
    with pytest.raises(CheckpointError, match=r"has no result.json"):
        push(places["dense"], "me/tiny", dry_run=True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        push(places["once"], "me/tiny")
    monkeypatch.setattr("secateur.report.push.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("secateur.report.push.get_token", lambda: None)
    with pytest.raises(CheckpointError, match="run hf auth login, or set HF_TOKEN"):
        push(places["once"], "me/tiny")
