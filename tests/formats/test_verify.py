"""The reload check and `secateur verify`: what was saved passes, and whatever is damaged, missing or added is found."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from models import logits_of, shards_of, tiny_ids, tiny_llama, written
from recipes import grouped
from run_cli import run_cli
from safetensors.torch import load_file, save_file
from test_store import flip

import secateur
from secateur.errors import CheckpointError
from secateur.files import sha256_of
from secateur.formats import save as proof
from secateur.formats.save import Verification, verify_reload
from secateur.report.records import read_summary
from secateur.result_directory import LATER_FILES, Mismatch, read_digests, write_summary

# What the fresh process says beside the logits.
SAID = {"problem": "", "class": "AutoModelForImageTextToText"}


def test_a_tensor_that_reloading_would_drop_is_refused(tmp_path):
    model = tiny_llama()
    written(tmp_path, model, num_bytes=100_000)
    tensors = {name: tensor for shard in tmp_path.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for shard in tmp_path.glob("*.safetensors*"):
        shard.unlink()
    bias = {"model.layers.0.mlp.down_proj.bias": torch.zeros(48)}
    save_file({**tensors, **bias}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected_keys: \['model.layers.0.mlp.down_proj.bias'\]"):
        verify_reload(tmp_path, tiny_ids(), logits_of(model))


IDS = tiny_ids(batch=2, length=3)


def reloaded_as(monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, problem: str = "") -> None:
    """Let the fresh process say this."""
    monkeypatch.setattr(proof, "_run_child", lambda *_: (logits, {**SAID, "problem": problem}))


def test_the_figures_are_those_of_the_largest_difference(monkeypatch, tmp_path):
    logits = torch.zeros(2, 3, 5)
    reloaded_as(monkeypatch, logits)
    for place, sign in itertools.product(((0, 0, 0), (1, 2, 4)), (1, -1)):
        other = logits.clone()
        other[place] = sign * 0.25
        monkeypatch.setattr(proof, "TOLERANCE", 0.25)
        found = verify_reload(tmp_path, IDS, other)
        assert (found.max_abs_difference, found.loaded_by) == (0.25, "AutoModelForImageTextToText")
        monkeypatch.setattr(proof, "TOLERANCE", 0.249)
        with pytest.raises(CheckpointError, match=r"differ from those in memory by 0\.25, allowed is 0\.249"):
            verify_reload(tmp_path, IDS, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["reloaded", "memory", "both"])
def test_one_logit_that_is_no_number_is_refused(value, where, monkeypatch, tmp_path):
    whole, odd = torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)
    odd[1, 1, 3] = value
    reloaded_as(monkeypatch, whole if where == "memory" else odd)
    with pytest.raises(CheckpointError, match=r"differ from those in memory by (nan|inf), allowed is 1e-06"):
        verify_reload(tmp_path, IDS, whole if where == "reloaded" else odd)


def test_another_shape_and_the_loaders_complaints_are_refused_and_differences_are_of_float32(monkeypatch, tmp_path):
    for logits, problem, said in (
        (torch.zeros(2, 3, 6), "", r"have shape \[2, 3, 6\], not \[2, 3, 5\]"),
        (torch.zeros(2, 3, 5), "missing_keys: ['a']", r"reloads it with problems \(missing_keys: \['a'\]\)"),
    ):
        reloaded_as(monkeypatch, logits, problem)
        with pytest.raises(CheckpointError, match=said):
            verify_reload(tmp_path, IDS, torch.zeros(2, 3, 5))
    # The difference of two numbers in bfloat16 is rounded to one in bfloat16, but not in float32.
    reloaded_as(monkeypatch, torch.full((2, 3, 1), 257.0).to(torch.bfloat16))
    monkeypatch.setattr(proof, "TOLERANCE", 1e3)
    found = verify_reload(tmp_path, IDS, torch.full((2, 3, 1), 1.0 / 3).to(torch.bfloat16))
    assert found.max_abs_difference == 256.0 - float(torch.tensor(1.0 / 3).to(torch.bfloat16))


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
def copies(results, tmp_path) -> dict[str, Path]:
    return {name: Path(shutil.copytree(result, tmp_path / name)) for name, result in results.items()}


@pytest.fixture
def whole(copies) -> Path:
    return copies["whole"]


@pytest.fixture
def sharded(copies) -> Path:
    return copies["sharded"]


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


def test_a_result_json_that_is_none_is_damage(whole, unloaded):
    for raw in (b"", b"{", b"\xff", b"[]", b"{}", b"[" * 100_000):
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


def test_the_reload_finds_what_is_not_finite_and_what_does_not_open(whole):
    tensors = load_file(whole / "model.safetensors")
    for value, said in ((torch.nan, "NaN or infinity"), (3e38, "logits hold NaN or infinity")):
        tensors["lm_head.weight"][:] = value
        save_file(tensors, whole / "model.safetensors", {"format": "pt"})
        sealed_again(whole)
        [wrong] = secateur.verify(whole).mismatches
        assert wrong.what == "reload" and said in wrong.found
    (whole / "model.safetensors").unlink()
    sealed_again(whole)
    outcome = run_cli("verify", whole)
    assert outcome.status == 1 and "needs safetensors weights" in outcome.stdout


def test_later_and_hidden_files_do_not_break_it_but_a_file_that_loading_would_take_is_not_of_it(sharded, unloaded):
    secateur.evaluate(sharded)
    assert (sharded / "evaluation.json").is_file()
    (sharded / ".cache").mkdir()
    # A file manager or a download leaves hidden ones; loading reads none of them.
    for name in ("bench.json", ".notes.json", ".cache/of_a_download.py"):
        (sharded / name).write_text("{}")
    assert secateur.verify(sharded).mismatches == ()
    for name in ("model.safetensors", "evil.py", "custom_generate/generate.py", "pytorch_model.bin"):
        (sharded / name).parent.mkdir(exist_ok=True)
        (sharded / name).write_bytes(b"")
        assert [each.what for each in secateur.verify(sharded).mismatches] == [name]
        (sharded / name).unlink()
