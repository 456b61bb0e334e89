"""Which model it is: fingerprints, hub ids, licences; which model a result was pruned from, and what is refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from models import tiny_llama

from secateur.errors import CheckpointError
from secateur.facts import Ancestor
from secateur.model.checkpoint import open_checkpoint
from secateur.model.identity import check_dense, identity, in_memory, is_result, lineage

CARD = """---
license: {license}
license_name: tiny
license_link: {link}
language: {language}
---
# A model
"""


@pytest.fixture
def dense(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "dense"))


@pytest.fixture
def other(tmp_path) -> Path:
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def made_from(dense: Path, out: Path, *earlier: Ancestor) -> Path:
    """Return a directory whose result.json says that it was pruned from `dense`; its weights are its own."""
    tiny_llama(seed=2, intermediate_size=56).save_pretrained(out)
    found = [*earlier, *lineage(open_checkpoint(dense), 1000)]
    said = {"dense_size": {"num_params": 1000, "num_bytes": 4000}}
    (out / "result.json").write_text(json.dumps({**said, "lineage": [asdict(each) for each in found]}))
    return out


def check(pruned: Path, dense: Path, *, other: bool = False) -> tuple[str, ...]:
    return check_dense(open_checkpoint(pruned), open_checkpoint(dense), "--against", other=other)


def test_the_same_files_elsewhere_are_the_same_model(dense, tmp_path):
    before = identity(open_checkpoint(dense))
    moved = Path(shutil.copytree(dense, tmp_path / "moved"))
    config = json.loads((moved / "config.json").read_text())
    config |= {"transformers_version": "9.9", "_name_or_path": "/elsewhere"}
    (moved / "config.json").write_text(json.dumps(config))
    assert identity(open_checkpoint(moved)) == before


def test_another_weight_or_setting_is_another_model(dense):
    before = identity(open_checkpoint(dense))
    config = (dense / "config.json").read_text()
    (dense / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert identity(open_checkpoint(dense)) != before
    (dense / "config.json").write_text(config)
    with (dense / "model.safetensors").open("r+b") as file:
        file.seek(-41, 2)
        file.write(b"\x01")
    assert identity(open_checkpoint(dense)) != before


def test_a_name_is_no_path(dense, tmp_path):
    (found,) = lineage(open_checkpoint(dense), 7)
    assert (found.name, found.hub_id, found.num_params) == ("dense", None, 7)
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "0123abcd"
    shutil.copytree(dense, snapshot)
    (found,) = lineage(open_checkpoint(snapshot), 7)
    assert (found.name, found.hub_id) == ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B")
    (found,) = in_memory("/home/me/models/tiny", 7)
    assert (found.name, found.fingerprint, found.hub_id) == ("tiny", None, None)
    (found,) = in_memory("models/tiny", 7)  # like a hub id, but nothing of the hub's cache
    assert (found.name, found.hub_id) == ("tiny", None)


def test_licence_and_languages_are_those_of_the_card(dense):
    card = CARD.format(license="other", link="https://example.org/licence", language="[en, zh-Hant]")
    (dense / "README.md").write_text(card)
    (found,) = lineage(open_checkpoint(dense), 7)
    assert (found.license, found.license_name) == ("other", "tiny")
    assert (found.license_link, found.languages) == ("https://example.org/licence", ("en", "zh-Hant"))
    (dense / "README.md").write_text(card.replace("https://example.org/licence", "LICENSE"))
    assert lineage(open_checkpoint(dense), 7)[0].license_link is None  # no such file
    (dense / "LICENSE").write_text("free")
    assert lineage(open_checkpoint(dense), 7)[0].license_link == "LICENSE"


@pytest.mark.parametrize(
    "text",
    ["# none", "---\nlicense: [\n---\n", "---\n- a\n---\n", CARD.format(license="'a b'", link="x", language="{a: 1}")],
)
def test_a_card_that_says_nothing_usable(text, dense):
    (dense / "README.md").write_text(text)
    (found,) = lineage(open_checkpoint(dense), 7)
    assert (found.license, found.license_name, found.license_link, found.languages) == (None, None, None, ())


def test_a_card_that_is_a_link_out_is_not_read(dense, tmp_path):
    (tmp_path / "private.md").write_text(CARD.format(license="mit", link="x", language="en"))
    (dense / "README.md").symlink_to(tmp_path / "private.md")
    assert lineage(open_checkpoint(dense), 7)[0].license is None


def test_the_model_that_was_pruned_and_its_ancestors_are_dense(dense, other, tmp_path):
    original = lineage(open_checkpoint(other), 2000)
    pruned = made_from(dense, tmp_path / "pruned", *original)
    assert check(pruned, dense) == check(pruned, other) == ()
    assert [each.name for each in lineage(open_checkpoint(pruned), 500)] == ["other", "dense", "pruned"]


def test_another_model_is_refused_by_both_names_unless_it_is_meant(dense, other, tmp_path):
    pruned = made_from(dense, tmp_path / "pruned")
    prints = [identity(open_checkpoint(each))[:12] for each in (other, dense)]
    said = (
        rf"^--against {other}: .* but fingerprint {prints[0]}; give dense \(fingerprint {prints[1]}\), or --other-dense"
    )
    with pytest.raises(CheckpointError, match=said):
        check(pruned, other)
    (note,) = check(pruned, other, other=True)
    assert note.startswith(f"dense is here other (fingerprint {prints[0]}), and not dense (fingerprint {prints[1]}), ")


def test_swapped_arguments_are_noticed_also_where_another_model_is_meant(dense, other, tmp_path):
    pruned = made_from(dense, tmp_path / "pruned")
    for meant in (False, True):
        with pytest.raises(CheckpointError, match=r"was itself pruned from .* so the two are swapped; give"):
            check(dense, pruned, other=meant)
    with pytest.raises(CheckpointError, match=rf"; give {pruned} as the result, and {dense} with --against\.$"):
        check(dense, pruned)
    with pytest.raises(CheckpointError, match=r"is itself a result of pruning .* and .* is none; swap the two"):
        check(other, pruned)
    assert check(other, pruned, other=True) == check(other, dense) == ()


def test_of_a_result_of_a_model_in_memory_nobody_knows_what_is_dense(other, tmp_path):
    tiny_llama(seed=2, intermediate_size=56).save_pretrained(tmp_path / "pruned")
    said = {
        "dense_size": {"num_params": 7, "num_bytes": 28},
        "lineage": [asdict(each) for each in in_memory("tiny", 7)],
    }
    (tmp_path / "pruned" / "result.json").write_text(json.dumps(said))
    (note,) = check(tmp_path / "pruned", other)
    assert note.startswith("whether other is the model that pruned was pruned from (tiny) is not known: ")


def test_a_result_is_not_its_own_dense_model(dense, tmp_path):
    pruned = made_from(dense, tmp_path / "pruned")
    with pytest.raises(CheckpointError, match="was pruned from, but the result itself; give dense"):
        check(pruned, pruned)
    assert "the result itself" in check(pruned, pruned, other=True)[0]


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, False), ('{"acc": 0.3}', False), ("[1]", False), ('{"dense_size": 1}', True), ("{", True)],
)
def test_a_result_is_one_of_ours(text, found, dense):
    if text is not None:
        (dense / "result.json").write_text(text)
    assert is_result(dense) is found
    if found:
        with pytest.raises(CheckpointError, match=r"result.json: "):
            lineage(open_checkpoint(dense), 7)
