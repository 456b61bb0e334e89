"""Writing checkpoints: complete or nothing, the same bytes each time, and only what may be replaced is replaced."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from models import tiny_ids, tiny_llama, tiny_qwen2, written
from old_results import old_result
from safetensors.torch import load_file
from shown import refusal
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.errors import CheckpointError
from secateur.files import check_free_space, parse_size
from secateur.formats.save import has_own
from secateur.log import Tell, mute
from secateur.result_directory import staging
from secateur.vocabulary.kept import KeptTokens, keep_tokens, kept_tokens_of
from secateur.vocabulary.tokenizer import trimmed_tokenizer


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("build", "tied", "num_bytes"), [(tiny_llama, False, 10**9), (tiny_qwen2, True, 100_000)])
def test_stock_reload_is_exact_and_bytes_repeat(build, tied, num_bytes, tmp_path, capfd):
    first, second = (written(tmp_path / name, build(tied=tied), num_bytes=num_bytes) for name in ("first", "second"))
    assert capfd.readouterr() == ("", "")
    assert contents(first) == contents(second)
    assert str(tmp_path).encode() not in b"".join(contents(first).values())
    weights = [load_file(file) for file in sorted(first.glob("*.safetensors"))]
    assert (len(weights) > 1) == (num_bytes == 100_000)
    names = [name for shard in weights for name in shard]
    assert len(names) == len(set(names)) and ("lm_head.weight" in names) == (not tied)
    assert all(file.stat().st_mode == (first / "config.json").stat().st_mode for file in first.iterdir())
    reloaded = AutoModelForCausalLM.from_pretrained(first)
    assert torch.equal(reloaded(tiny_ids()).logits, build(tied=tied)(tiny_ids()).logits)
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == tied
    # The tokenizer has a class that transformers 4 knows.
    assert json.loads((first / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    found, ours = AutoTokenizer.from_pretrained(first), tiny_tokenizer()
    if build is tiny_llama:  # qwen2 has a tokenizer of its own
        assert type(found) is type(ours) and found("a small text")["input_ids"] == ours("a small text")["input_ids"]
    assert found.chat_template == ours.chat_template


def test_generation_config_that_saving_would_refuse_is_kept(tmp_path):
    model = tiny_llama()
    model.generation_config.temperature = 0.7  # without do_sample: loadable, but save_pretrained raises
    said = json.loads((written(tmp_path / "out", model) / "generation_config.json").read_text())
    assert said["temperature"] == 0.7
    assert model.generation_config.temperature == 0.7
    (tmp_path / "out" / "generation_config.json").write_text('{"top_p": 0.5, "ours": 1}')
    carried = written(tmp_path / "again", model, carry_from=tmp_path / "out")
    assert (carried / "generation_config.json").read_text() == '{"top_p": 0.5, "ours": 1}'


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize("scaling", [{}, LLAMA3])
def test_programs_that_do_not_know_rope_parameters_find_the_base(scaling, tmp_path):
    model = tiny_llama()
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0, **scaling}
    model = type(model)(model.config)
    out = written(tmp_path / "out", model)
    said = json.loads((out / "config.json").read_text())
    assert said["rope_theta"] == 500_000.0 and said.get("rope_scaling", {}) == scaling
    assert list(said) == sorted(said)
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert reloaded.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(reloaded(tiny_ids()).logits, model.eval()(tiny_ids()).logits)
    assert contents(written(tmp_path / "again", reloaded)) == contents(out)


def test_side_files_are_carried_and_new_files_not_overwritten(tmp_path):
    source = written(tmp_path / "source", tiny_llama())
    config = (source / "config.json").read_bytes()
    (source / "additional_chat_templates").mkdir()
    carried = ["tokenizer.model", "LICENSE.txt", "additional_chat_templates/tool.jinja"]
    for name in (*carried, "tokenizer.json", "notes.txt"):
        (source / name).write_text("old")
    out = written(tmp_path / "out", tiny_llama(), carry_from=source)
    assert all((out / name).read_text() == "old" for name in carried)
    assert (out / "tokenizer.json").read_text() != "old"
    assert not (out / "notes.txt").exists()
    assert (out / "config.json").read_bytes() == config
    (source / "config.json").unlink()
    no_model = written(tmp_path / "again", tiny_llama(), carry_from=source)
    assert not (no_model / "LICENSE.txt").exists(), "which may be of something else"


def test_size_and_free_space(tmp_path):
    assert parse_size("remove.to", "5GB") == 5_000_000_000
    assert parse_size("remove.to", "1.5 kb") == 1500
    for size in ("5", "GB", "0GB", "-1GB", "five GB", "", "infGB", "nanGB"):
        assert re.search(f"remove.to: must be .*got '{size}'", refusal(parse_size, "remove.to", size))
    check_free_space(tmp_path, 1)
    assert "the run needs 1000000000.00 GB, the disk has" in refusal(check_free_space, tmp_path, 10**18)


def test_out_appears_or_is_replaced_only_when_the_block_ends(tmp_path):
    old, out = old_result(tmp_path / "old"), tmp_path / "deep" / "er" / "out"
    with staging(out, overwrite=False) as directory, staging(old, overwrite=True) as other:
        assert directory.parent == out.parent and not out.exists()
        assert (old / "config.json").read_text() == "old"
        (directory / "config.json").write_text("new")
        (other / "config.json").write_text("newer")
    assert contents(tmp_path) == {"deep/er/out/config.json": b"new", "old/config.json": b"newer"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, FileNotFoundError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_after_an_exception(error, overwrite, tmp_path):
    out = tmp_path / "deep" / "out"
    if overwrite:
        old_result(out)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error), staging(out, overwrite=overwrite) as directory:
        (directory / "config.json").write_text("half")
        raise error  # as it is: a missing file in the block is no error of the disk
    assert sorted(tmp_path.rglob("*")) == before
    assert not overwrite or (out / "config.json").read_text() == "old"


def refused(out: Path, match: str, *, overwrite: bool = False, tell: Tell = mute) -> None:
    with pytest.raises(CheckpointError, match=match), staging(out, overwrite=overwrite, tell=tell):
        pytest.fail("the block ran")


def test_an_old_result_comes_back_where_the_new_process_has_the_number_of_the_killed_one(tmp_path):
    aside, out, said = old_result(tmp_path / f".out.replaced-{os.getpid()}"), tmp_path / "out", list[str]()
    refused(out, "already exists", tell=said.append)
    assert (out / "config.json").read_text() == "old" and not aside.exists()
    back = f"OUT {out}: a run was killed while it replaced this directory, so the old result is back there."
    assert said == [back]


def test_what_others_do_meanwhile_leaves_what_was_there(tmp_path):
    old, out = old_result(tmp_path / "old"), tmp_path / "out"
    with pytest.raises(FileNotFoundError), staging(old, overwrite=True) as directory:
        os.rename(directory, tmp_path / "stolen")
    assert (old / "config.json").read_text() == "old"
    with pytest.raises(CheckpointError, match="already exists"), staging(out, overwrite=False):
        out.mkdir()
        (out / "config.json").write_text("theirs")
    assert contents(out) == {"config.json": b"theirs"}


def test_out_that_is_never_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    refused(tmp_path / "empty", "already exists.*--overwrite")
    refused(tmp_path / "file", "is a file", overwrite=True)
    refused(tmp_path / "file" / "out", "file is not a directory")
    refused(tmp_path / "home", "is no result of secateur .* would delete .*: diary.txt;", overwrite=True)
    refused(tmp_path / "link", "is a symbolic link", overwrite=True)
    refused(tmp_path / "dangling", "is a symbolic link")
    refused(Path("/"), "is a mount point", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_without_some_tokens_has_no_file_of_the_old_ids(tmp_path):
    old = {"generation_config.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "tekken.json"}
    old |= {"tiktoken.model", "a.tiktoken", "added_tokens.json", "special_tokens_map.json", "vocab.txt"}
    source = written(tmp_path / "source", tiny_llama())
    for name in (*old, "LICENSE", "preprocessor_config.json"):
        (source / name).write_text('{"eos_token_id": 300}')
    dense, model = written(tmp_path / "dense", tiny_llama(), carry_from=source), tiny_llama()
    assert old < contents(dense).keys()
    kept = KeptTokens((0, 1, *range(2, 257, 2)), 320)
    model.generation_config.suppress_tokens = [256]
    keep_tokens(model, kept)
    out = written(tmp_path / "out", model, trimmed_tokenizer(tiny_tokenizer(), kept), carry_from=source, kept=kept)
    files = contents(out)
    assert files.keys() & old == {"generation_config.json"}
    assert files["LICENSE"] == files["preprocessor_config.json"]
    said = json.loads(files["generation_config.json"])
    assert said["suppress_tokens"] == [len(kept.dense_ids) - 1] and said["eos_token_id"] == 2
    assert kept_tokens_of(out) == kept


def test_a_file_that_is_a_link_to_somewhere_else_is_not_a_directorys_own(tmp_path):
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere.json"
    place.mkdir()
    for file in (elsewhere, place / "own.json"):
        file.write_text("{}")
    (place / "link.json").symlink_to(elsewhere)
    (place / "inside.json").symlink_to(place / "own.json")
    names = ("own.json", "inside.json", "link.json", "missing.json")
    assert [has_own(place, name) for name in names] == [True, True, False, False]
