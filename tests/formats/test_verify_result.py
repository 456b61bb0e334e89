"""`secateur verify`: whatever of a finished result is damaged, missing or added is found, and a whole one passes."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from models import shards_of
from recipes import grouped
from run_cli import run_cli
from safetensors.torch import load_file, save_file
from test_store import flip

import secateur
from secateur.files import sha256_of
from secateur.formats.save import Verification
from secateur.report.records import read_summary
from secateur.result_directory import LATER_FILES, Mismatch, read_digests, write_summary


@pytest.fixture(scope="module")
def results(checkpoints, recipe, tmp_path_factory) -> dict[str, Path]:
    """A whole result, and one in shards of tied weights."""
    place, found = tmp_path_factory.mktemp("verify"), {}
    with pytest.MonkeyPatch.context() as patched:  # what is reloaded below
        patched.setattr("secateur.formats.save.verify_reload", lambda *_: Verification(0.0))
        for name, source, num_bytes in (("whole", "llama", 10**9), ("sharded", "qwen2-tied", 60_000)):
            found[name] = place / name
            with shards_of(num_bytes):
                result = secateur.prune(checkpoints[source], grouped({**recipe, "evaluate": False}), out=found[name])
            assert result.summary == read_summary(found[name])
    return found


@pytest.fixture
def whole(results, tmp_path) -> Path:
    return Path(shutil.copytree(results["whole"], tmp_path / "whole"))


@pytest.fixture
def sharded(results, tmp_path) -> Path:
    return Path(shutil.copytree(results["sharded"], tmp_path / "sharded"))


@pytest.fixture
def unloaded(monkeypatch) -> None:
    """Files alone; the reload takes a process of its own."""
    monkeypatch.setattr("secateur.formats.save.prove_reload", lambda *_: Verification(0.0))


def files_of(directory: Path) -> list[str]:
    return sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_a_whole_result_passes_and_is_reloaded(name, results):
    outcome = run_cli("verify", results[name])
    assert outcome.status == 0, outcome.stderr
    files = [each for each in files_of(results[name]) if each not in LATER_FILES]
    assert f"{len(files)} files match" in outcome.stdout
    assert "stock transformers in a fresh process: largest logit difference 0" in outcome.stdout
    assert [len(line) <= 80 for line in outcome.stdout.splitlines()] == [True] * 2


def test_a_flipped_bit_in_any_file_is_found(sharded, unloaded):
    names = files_of(sharded)
    assert sum(name.endswith(".safetensors") for name in names) > 4 and "model.safetensors.index.json" in names
    for name in names:
        intact = (sharded / name).read_bytes()
        for place in (0, len(intact) // 2, len(intact) - 1):
            flip(sharded / name, place, bit=len(intact) % 8)
            found = secateur.verify(sharded)
            assert [each.what for each in found.mismatches] == ([] if name in LATER_FILES else [name])
            assert name in LATER_FILES or found.max_abs_difference is None, "nothing is loaded then"
            (sharded / name).write_bytes(intact)
    assert secateur.verify(sharded).mismatches == ()


def test_every_bit_of_result_json_is_sealed(results, unloaded, tmp_path):
    (tmp_path / "result.json").write_bytes((results["whole"] / "result.json").read_bytes())
    size = (tmp_path / "result.json").stat().st_size
    for place in range(0, size, 23):
        flip(tmp_path / "result.json", place, bit=place % 8)
        assert read_digests(tmp_path) is None, place
        flip(tmp_path / "result.json", place, bit=place % 8)
    assert read_digests(tmp_path) is not None


def test_what_is_damaged_is_told_in_one_line_with_status_1(sharded, unloaded):
    shard = next(name for name in files_of(sharded) if name.endswith(".safetensors") and "/" not in name)
    before = sha256_of(sharded / shard)
    flip(sharded / shard, 1000)
    (sharded / "keep.json").unlink()
    (sharded / "adapter_config.json").write_text("{}")
    (sharded / "notes.md").write_text("mine")
    (sharded / ".cache").mkdir()
    (sharded / ".cache" / "x.json").write_text("{}")
    outcome = run_cli("verify", sharded)
    assert outcome.status == 1, outcome.stderr
    shown = [line for line in outcome.stdout.splitlines() if ": expected " in line]
    assert shown[-1] == "adapter_config.json: expected no such file, found a file that is not of the result."
    assert f"{shard}: expected sha256 {before}, found sha256 {sha256_of(sharded / shard)}." in shown
    assert any(line.startswith("keep.json: expected sha256 ") and "found no such file." in line for line in shown)
    assert len(shown) == 3
    told = json.loads(run_cli("verify", sharded, "--json").stdout)
    assert [each["what"] for each in told["mismatches"]] == [line.split(":")[0] for line in shown]


@pytest.mark.parametrize("name", ["model.safetensors", "evil.py", "custom_generate/generate.py", "pytorch_model.bin"])
def test_a_file_that_loading_would_take_is_not_of_the_result(sharded, name, unloaded):
    (sharded / name).parent.mkdir(exist_ok=True)
    (sharded / name).write_bytes(b"")
    assert [each.what for each in secateur.verify(sharded).mismatches] == [name]


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[]", b"{}", b"[" * 100_000])
def test_a_result_json_that_is_none_is_damage(whole, raw, unloaded):
    (whole / "result.json").write_bytes(raw)
    [wrong] = secateur.verify(whole).mismatches
    assert wrong == Mismatch("result.json", "the bytes that were written", "others, so no digest can be trusted")
    assert run_cli("verify", whole).status == 1


def test_mistakes_are_one_sentence_with_status_2(checkpoints, tmp_path):
    for place, said in (
        (tmp_path / "nowhere", "has no result.json, so it is no result; give a directory that secateur prune has"),
        (checkpoints["llama"], "has no result.json, so it is no result"),
        (checkpoints["llama"] / "model.safetensors", "has no result.json, so it is no result"),
    ):
        outcome = run_cli("verify", place)
        assert (outcome.status, outcome.stdout) == (2, "") and outcome.stderr.count("\n") == 1
        assert f"{place}: {said}" in outcome.stderr


def sealed_again(directory: Path) -> None:
    """Write the digests anew, as who changes a result on purpose can."""
    write_summary(directory, dataclasses.replace(read_summary(directory), files={}))


def test_the_reload_finds_tied_weights_that_are_stored_twice_and_differ(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for file in (*shards, sharded / "model.safetensors.index.json"):
        file.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, sharded / "model.safetensors", {"format": "pt"})
    sealed_again(sharded)
    [wrong] = secateur.verify(sharded).mismatches
    assert wrong.what == "reload" and "untied: ['lm_head.weight']" in wrong.found


@pytest.mark.parametrize(("value", "said"), [(torch.nan, "NaN or infinity"), (3e38, "logits hold NaN or infinity")])
def test_the_reload_finds_what_is_not_finite(whole, value, said):
    tensors = load_file(whole / "model.safetensors")
    tensors["lm_head.weight"][:] = value
    save_file(tensors, whole / "model.safetensors", {"format": "pt"})
    sealed_again(whole)
    [wrong] = secateur.verify(whole).mismatches
    assert wrong.what == "reload" and said in wrong.found


def test_a_result_that_does_not_open_is_a_mismatch_too(whole):
    (whole / "model.safetensors").unlink()
    sealed_again(whole)
    outcome = run_cli("verify", whole)
    assert outcome.status == 1 and "needs safetensors weights" in outcome.stdout


def test_what_comes_later_does_not_break_it(whole, unloaded):
    secateur.evaluate(whole)
    (whole / "bench.json").write_text("{}")
    assert (whole / "evaluation.json").is_file() and secateur.verify(whole).mismatches == ()


def test_hidden_files_are_not_of_the_result(whole, unloaded):
    """A file manager or a download leaves such; loading reads none of them."""
    (whole / ".cache").mkdir()
    for name in (".notes.json", ".cache/of_a_download.py"):
        (whole / name).write_text("{}")
    assert secateur.verify(whole).mismatches == ()
