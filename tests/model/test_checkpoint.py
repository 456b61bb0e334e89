"""Reading checkpoints: what loads equals what was saved, and every defect is one sentence before weights are read."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import huggingface_hub.constants
import pytest
import torch
from bpe_tokenizer import bpe_tokenizer
from damage import edit_json
from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from models import saved, tiny_ids, tiny_llama, tiny_qwen2
from safetensors.torch import load_file, save_file
from shown import assert_shown
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

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return saved(tmp_path / "model", tiny_llama())


def edit_config(directory: Path, changes: dict[str, object]) -> None:
    edit_json(directory / CONFIG, **changes)


def edit_tensor(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors.pop(name, None)
    save_file(tensors if tensor is None else {**tensors, name: tensor}, directory / WEIGHTS, {"format": "pt"})


def check_headers(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    check_weights(checkpoint, meta_model(checkpoint.config))


@pytest.mark.parametrize(("build", "tied", "max_shard_size"), [(tiny_llama, False, "100KB"), (tiny_qwen2, True, "5GB")])
def test_loads_what_was_saved(build, tied, max_shard_size, tmp_path, capfd):
    model = build(tied=tied)
    directory = saved(tmp_path / "model", model, max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(str(directory))
    check_weights(checkpoint, meta_model(checkpoint.config))
    loaded = load_model(checkpoint)
    assert torch.equal(loaded(tiny_ids()).logits, model(tiny_ids()).logits)
    assert not loaded.training and loaded.config._name_or_path == ""
    assert str(directory) not in Path("/proc/self/maps").read_text(), "weights do not stay mapped from the file"
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert load_tokenizer(checkpoint).chat_template == tiny_tokenizer().chat_template
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("is_said", [True, False])
def test_keeps_the_stored_dtype_and_the_generation_config(is_said, tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    model.generation_config.max_length = 77
    directory = saved(tmp_path / "model", model)
    if not is_said:
        edit_config(directory, {"dtype": None})
    checkpoint = open_checkpoint(directory)
    loaded = load_model(checkpoint)
    assert meta_model(checkpoint.config).dtype == loaded.dtype == torch.bfloat16
    assert loaded.generation_config.max_length == 77


@pytest.mark.parametrize("change", [Path.unlink, lambda file: os.truncate(file, 5000)])
def test_weights_that_change_while_they_are_read(change, directory):
    stored = next(iter(stored_tensors(directory).values()))
    change(stored.file)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read again \(.*\); is something writing"):
        read_tensor(stored)


def test_a_hub_id_is_found_in_the_cache_offline_is_said_and_a_directory_beats_it(directory, tmp_path, monkeypatch):
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
    monkeypatch.chdir(tmp_path)
    shutil.copytree(directory, "owner/name")
    assert open_checkpoint("owner/name").directory == Path("owner/name")


def write_layout(directory: Path, places: list[tuple[Any, Any]], shape: Any = None) -> None:
    """Write a file of float32 vectors a, b, ... that lie at these places of its data."""
    vectors = {
        name: {"dtype": "F32", "shape": shape or [int(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in zip("abc", places, strict=False)
    }
    header, num_bytes = json.dumps(vectors).encode(), int(max(end for _, end in places))
    put(directory, WEIGHTS, len(header).to_bytes(8, "little") + header + bytes(num_bytes))


def test_a_tensor_of_no_bytes_shares_none(directory):
    write_layout(directory, [(0, 16), (16, 32), (16, 16)])
    assert {name: tuple(read_tensor(each).shape) for name, each in stored_tensors(directory).items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(directory / WEIGHTS).items()
    }


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


def test_tokens_beyond_the_embedding_may_only_be_added_ones_that_no_text_needs():
    """Gemma 3 has such a token for images; a chat template that writes one would look for a row that is not there."""
    tokenizer = tiny_tokenizer()
    with pytest.raises(CheckpointError, match="256 rows, so token"):
        check_rows(tokenizer, 256, "here")
    check_rows(tokenizer, 257, "here")
    tokenizer.add_tokens(["<far>"])
    check_rows(tokenizer, 257, "here")
    for template, changes in (("<far>{{ messages }}", {}), ("{{ messages }}", {"eos_token": "<far>"})):
        for name, value in {"chat_template": template, **changes}.items():
            setattr(tokenizer, name, value)
        with pytest.raises(CheckpointError, match=r"here: its tokenizer has 258 tokens, .* 257 rows, so token '<far>'"):
            check_rows(tokenizer, 257, "here")


def test_heads_that_transformers_leaves_aside_are_told_by_name_and_size(tmp_path: Path) -> None:
    """As Qwen3.5's checkpoints have them: the result would be without them, and nobody told."""
    model = tiny_family("qwen3_5")
    directory = saved(tmp_path / "model", model)
    checkpoint = open_checkpoint(directory)
    assert notes_on(checkpoint, meta_model(checkpoint.config)) == ()
    edit_tensor(directory, "mtp.fc.weight", torch.ones(48, 96))
    edit_tensor(directory, "mtp.norm.weight", torch.ones(48))
    checkpoint = open_checkpoint(directory)
    (note,) = notes_on(checkpoint, meta_model(checkpoint.config))
    assert note.startswith("2 tensors of 4,656 parameters (mtp.fc.weight to mtp.norm.weight) are no part of the model")
    check_weights(checkpoint, meta_model(checkpoint.config))


def put(directory: Path, name: str, content: str | bytes) -> None:
    (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(directory: Path, name: str) -> None:
    (directory / name).unlink()


def cut_to(directory: Path, num_bytes: int) -> None:
    put(directory, WEIGHTS, (directory / WEIGHTS).read_bytes()[:num_bytes])


def have_one_tensor(directory: Path, dtype: torch.dtype) -> None:
    save_file({"a.weight": torch.zeros(4).to(dtype)}, directory / WEIGHTS)


def put_number(directory: Path, value: str) -> None:
    """Put it into one weight."""
    weight = load_file(directory / WEIGHTS)["model.layers.1.mlp.up_proj.weight"]
    weight[3, 4] = float(value)
    edit_tensor(directory, "model.layers.1.mlp.up_proj.weight", weight)


def deal_out(directory: Path, damage: Callable[..., None], *arguments: str) -> None:
    """Save it in shards, and damage these."""
    remove(directory, WEIGHTS)
    damage(saved(directory, tiny_llama(), max_shard_size="100KB"), *arguments)


def save_config(directory: Path, config: Any) -> None:
    config.save_pretrained(directory)


DAMAGES: dict[str, tuple[Any, ...]] = {
    "no config": (remove, CONFIG),
    "half of a config": (put, CONFIG, "{"),
    "a config that is a list": (put, CONFIG, "[]"),
    "a config of no type": (put, CONFIG, "{}"),
    "a type that is nearly known": (edit_config, {"model_type": "llamma"}),
    "a type with code of its own": (edit_config, {"model_type": "ours", "auto_map": {"AutoConfig": "x.Y"}}),
    "a size that is a word": (edit_config, {"hidden_size": "wide"}),
    "padding beyond the vocabulary": (edit_config, {"pad_token_id": 320, "vocab_size": 320}),
    "a size far below zero": (edit_config, {"intermediate_size": -(10**30)}),
    "an activation that nobody knows": (edit_config, {"hidden_act": "no-such"}),
    "an encoder and a decoder": (
        lambda place, config: config.save_pretrained(place),
        T5Config(architectures=["T5ForConditionalGeneration"]),
    ),
    "a type of encoders and decoders": (save_config, T5Config()),
    "no weights": (remove, WEIGHTS),
    "a shard that is missing": (deal_out, remove, "model-00002-of-00005.safetensors"),
    "a shard elsewhere": (deal_out, put, f"{WEIGHTS}.index.json", '{"weight_map": {"a": "../other.safetensors"}}'),
    **{f"weights cut to {size} bytes": (cut_to, size) for size in (0, 7, 100, -1)},
    "a header that is no JSON": (put, WEIGHTS, (4).to_bytes(8, "little") + b"{{{{"),
    "complex numbers": (have_one_tensor, torch.complex64),
    "float8 of no method": (have_one_tensor, torch.float8_e4m3fn),
    "two tensors in one place": (write_layout, [(0, 16), (0, 16)]),
    "tensors that overlap": (write_layout, [(0, 16), (12, 32)]),
    "a tensor within another": (write_layout, [(0, 32), (8, 16), (32, 48)]),
    "a gap before the first": (write_layout, [(4, 16)]),
    "a gap between two": (write_layout, [(24, 32), (0, 16)]),
    "places that are no integers": (write_layout, [(0.0, 16.0)]),
    "a place before the file": (write_layout, [(-4, 16)]),
    "an end before its begin": (write_layout, [(0, 16), (32, 16)]),
    "a shape of words": (write_layout, [(0, 16)], ["4"]),
    "a weight of another shape": (edit_tensor, "model.norm.weight", torch.zeros(5)),
    "a weight too few": (edit_tensor, "model.norm.weight", None),
    "a weight too many": (edit_tensor, "model.layers.0.mlp.down_proj.bias", torch.zeros(48)),
    **{f"a weight that is {value}": (put_number, value) for value in ("nan", "inf", "-inf")},
    "half of a tokenizer": (put, "tokenizer.json", "{"),
    "a tokenizer of the future": (put, "tokenizer.json", '{"model": {"type": "of the future"}}'),
    "no tokenizer": (remove, "tokenizer.json"),
}


def told(read: Callable[[Path | str], object], place: Path | str) -> list[str]:
    """Return the sentence that refuses it, without the reason that another library gives."""
    try:
        read(place)
    except (ArchError, CheckpointError) as error:
        assert "\n" not in str(error)
        sentence = re.sub(r"(safetensors|unknown kind|from it|use it|loaded) \(.*\)", r"\1 (...)", str(error))
        return [f"    {type(error).__name__}: {sentence}"]
    return []


def test_every_defect_is_one_sentence_of_the_headers_and_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines, place = list[str](), Path("model")
    for name, (damage, *arguments) in DAMAGES.items():
        damage(saved(place, tiny_llama()), *arguments)
        of_headers = told(check_headers, place)
        of_loading = told(lambda place: load_model(open_checkpoint(place)), place)
        of_tokenizer = told(lambda place: load_tokenizer(open_checkpoint(place)), place)
        assert of_headers == of_loading or "NaN" in of_loading[0]
        lines += [name, *dict.fromkeys([*of_loading, *of_tokenizer])]
        shutil.rmtree(place)
    assert_shown("model/defects", "\n".join(lines))


ANSWER: Any = SimpleNamespace(headers={}, status_code=403, request=None)
OF_THE_HUB = [GatedRepoError("no", response=ANSWER), RepositoryNotFoundError("no", response=ANSWER)]
OF_THE_HUB += [LocalEntryNotFoundError("no"), HTTPError("cut off"), OSError("cut off")]
NAMES = "models model-d model/config.json smolm2-135m SmolLM2-135M no/such/folder/smollm2-135 nothing-like-it".split()
NAMES += ["/nowhere/at/all", "missing.gguf", "bad id/x", "SMOLLM2-135M", "MODEL-D"]


def test_a_name_that_leads_nowhere_says_what_may_be_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(Path("model"), tiny_llama())
    for end in "abc":
        Path(f"model-{end}").mkdir()
    lines = [line for name in NAMES for line in told(open_checkpoint, name)]
    for package in ("no-such-package", "pytest"):  # the second one holds no model
        monkeypatch.setitem(INSTALLED_MODELS, "smollm2-135m", package)
        lines += told(open_checkpoint, "smollm2-135m")
    for error in OF_THE_HUB:
        monkeypatch.setattr("secateur.model.config.snapshot_download", Mock(side_effect=error))
        lines += told(open_checkpoint, "owner/name")
    assert_shown("model/names", "\n".join(lines))


def test_a_gguf_file_that_is_cut_off_or_asks_for_too_much(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, lines = write_gguf(Path()), list[str]()
    content = path.read_bytes()
    for share in (0.0, 0.001, 0.02, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        lines += told(open_checkpoint, path)
    for num_layers, num_types in ((10**7, 3), (3, 2**40)):
        path.unlink()
        writer = pytest.importorskip("gguf").GGUFWriter(path, "llama")
        writer.add_block_count(num_layers)
        writer.add_token_types([1, 2, 3])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        begin, key, rest = path.read_bytes().partition(b"tokenizer.ggml.token_type")
        path.write_bytes(begin + key + rest[:8] + num_types.to_bytes(8, "little") + rest[16:])
        lines += told(open_checkpoint, path)
    assert_shown("model/gguf", "\n".join(lines))
