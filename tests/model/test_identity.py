"""Which model it is: fingerprints, hub ids, licences; which model a result was pruned from, and what is refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from damage import edit_json
from models import saved, tiny_llama
from shown import assert_shown

from secateur.errors import CheckpointError
from secateur.facts import Ancestor
from secateur.model.checkpoint import open_checkpoint
from secateur.model.identity import check_dense, identity, in_memory, is_result, lineage

CARD = "---\nlicense: {license}\nlicense_name: tiny\nlicense_link: {link}\nlanguage: {language}\n---\n# A model\n"


@pytest.fixture
def dense(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "dense"))


def made_from(dense: Path, out: Path, *earlier: Ancestor) -> Path:
    """Return a directory whose result.json says that it was pruned from `dense`; its weights are its own."""
    tiny_llama(seed=2, intermediate_size=56).save_pretrained(out)
    found = [*earlier, *lineage(open_checkpoint(dense), 1000)]
    said = {"dense_size": {"num_params": 1000, "num_bytes": 4000}}
    (out / "result.json").write_text(json.dumps({**said, "lineage": [asdict(each) for each in found]}))
    return out


def check(pruned: Path, dense: Path, *, other: bool = False) -> tuple[str, ...]:
    return check_dense(open_checkpoint(pruned), open_checkpoint(dense), "--against", other=other)


def test_the_same_files_elsewhere_are_the_same_model_and_another_weight_or_setting_is_another(dense, tmp_path):
    before, config = identity(open_checkpoint(dense)), (dense / "config.json").read_text()
    moved = Path(shutil.copytree(dense, tmp_path / "moved"))
    edit_json(moved / "config.json", transformers_version="9.9", _name_or_path="/elsewhere")
    assert identity(open_checkpoint(moved)) == before
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


def of_card(dense: Path) -> list[object]:
    (found,) = lineage(open_checkpoint(dense), 7)
    return [found.license, found.license_name, found.license_link, found.languages]


def test_licence_and_languages_are_those_of_the_card(dense, tmp_path):
    link = "https://example.org/licence"
    card = CARD.format(license="other", link=link, language="[en, zh-Hant]")
    (dense / "README.md").write_text(card)
    assert of_card(dense) == ["other", "tiny", link, ("en", "zh-Hant")]
    (dense / "README.md").write_text(card.replace(link, "LICENSE"))
    assert of_card(dense)[2] is None, "no such file"
    (dense / "LICENSE").write_text("free")
    assert of_card(dense)[2] == "LICENSE"
    odd = CARD.format(license="'a b'", link="x", language="{a: 1}")
    for text in ("# none", "---\nlicense: [\n---\n", "---\n- a\n---\n", odd):
        (dense / "README.md").write_text(text)
        assert of_card(dense) == [None, None, None, ()]
    (dense / "README.md").rename(tmp_path / "private.md").write_text(card)
    (dense / "README.md").symlink_to(tmp_path / "private.md")
    assert of_card(dense)[0] is None, "a link out is not read"


def test_what_is_said_of_models_that_are_not_the_dense_one_and_the_pruned_ones_ancestors_are_dense(dense, tmp_path):
    other = saved(tmp_path / "other", tiny_llama(seed=1))
    grandchild = made_from(dense, tmp_path / "grandchild", *lineage(open_checkpoint(other), 2000))
    assert check(grandchild, dense) == check(grandchild, other) == check(other, dense) == ()
    assert [each.name for each in lineage(open_checkpoint(grandchild), 500)] == ["other", "dense", "grandchild"]
    pruned = made_from(dense, tmp_path / "pruned")
    from_memory = made_from(dense, tmp_path / "of memory")
    lines = [asdict(each) for each in in_memory("tiny", 7)]
    (from_memory / "result.json").write_text(json.dumps({"dense_size": {"num_params": 7}, "lineage": lines}))
    said = dict[str, str]()
    for first, second in ((pruned, other), (dense, pruned), (other, pruned), (pruned, pruned), (from_memory, other)):
        for meant in (False, True):
            about = f"{first.name} against {second.name}{', as is meant' * meant}"
            try:
                said[about] = f"notes: {check(first, second, other=meant)}"
            except CheckpointError as error:
                said[about] = f"refused: {error}"
    text = "\n".join(f"{about}\n    {sentence}" for about, sentence in said.items()).replace(str(tmp_path), "PLACE")
    for name, model in (("OTHER", other), ("DENSE", dense), ("PRUNED", pruned)):
        text = text.replace(identity(open_checkpoint(model))[:12], f"FINGERPRINT OF {name}")
    assert_shown("model/not-dense", text)


def test_a_result_is_one_of_ours(dense):
    for text, found in (
        (None, False),
        ('{"acc": 0.3}', False),
        ("[1]", False),
        ('{"dense_size": 1}', True),
        ("{", True),
    ):
        if text is not None:
            (dense / "result.json").write_text(text)
        assert is_result(dense) is found
        if found:
            with pytest.raises(CheckpointError, match=r"result.json: "):
                lineage(open_checkpoint(dense), 7)
