"""Layers of different widths: what is saved, what loads it, and that equal widths give the plain checkpoint."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import edit_json
from models import logits_of as logits
from models import tiny_gemma3, tiny_ids, tiny_llama, tiny_qwen2, tiny_qwen3, written
from shown import assert_sentences, refusal
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from warm import WarmProcesses

import secateur
from secateur.errors import CheckpointError
from secateur.formats.save import verify_reload
from secateur.model.bind import Arch, bind, decoder_layers
from secateur.model.checkpoint import (
    check_in_memory,
    check_weights,
    load_model,
    load_tokenizer,
    meta_model,
    open_checkpoint,
    restore_buffers,
)
from secateur.model.group import cut
from secateur.model.per_layer import commonest, record_widths
from secateur.model.stock import quiet_transformers
from tests.families import tiny_family

FFN_WIDTHS = 112, 72, 40, 72
HEADS = (6, 2), (6, 1), (4, 2), (3, 3)  # query heads, key-value heads; all divide the hidden size, as llama wants
HEAD_DIM = 8
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": tiny_llama,
    "llama-tied": lambda **sizes: tiny_llama(tied=True, **sizes),
    "qwen2": tiny_qwen2,
    "qwen3": lambda **sizes: tiny_qwen3(**sizes | {"head_dim": HEAD_DIM}),
    "gemma3": lambda **sizes: tiny_gemma3(**sizes | {"head_dim": HEAD_DIM}),
}
SIZES = {"num_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3}


def uneven(family: str, *, heads: bool = True) -> PreTrainedModel:
    """Return a tiny model cut to FFN_WIDTHS and, if `heads`, to HEADS, with a config that says so."""
    model = FAMILIES[family](**SIZES)
    arch = bind(model)
    if heads:
        for layer, counts in zip(decoder_layers(model, arch), HEADS, strict=True):
            keep_heads(layer, *counts)
    return with_ffns(model, arch, FFN_WIDTHS)


def with_ffns(model: Any, arch: Arch, widths: Iterable[int]) -> PreTrainedModel:
    """Cut the FFNs to so many channels, and say so in the config."""
    for layer, group, width in zip(decoder_layers(model, arch), arch.select(("ffn",)), widths, strict=True):
        cut(layer, group, torch.arange(width))
    record_widths(model, arch)
    return model


@torch.no_grad()
def keep_heads(layer: Any, num_heads: int, num_key_value_heads: int) -> None:
    """Keep the first heads of one layer, by hand."""
    attention = layer.self_attn
    for name, count in {"q_proj": num_heads, "k_proj": num_key_value_heads, "v_proj": num_key_value_heads}.items():
        module, rows = getattr(attention, name), count * HEAD_DIM
        module.weight, module.out_features = nn.Parameter(module.weight[:rows].clone()), rows
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias[:rows].clone())
    columns = num_heads * HEAD_DIM
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :columns].clone())
    attention.o_proj.in_features = columns


def save(model: PreTrainedModel, directory: Path, num_bytes: int = 60_000) -> Path:
    return written(directory, model, num_bytes=num_bytes)


def file_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Path]]:
    """Models and the directories that they were saved in."""
    models = {family: uneven(family) for family in FAMILIES}
    models["ffn"] = uneven("llama", heads=False)
    place = tmp_path_factory.mktemp("per_layer")
    return {name: (model, save(model, place / name)) for name, model in models.items()}


CHILD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
ids, names, *directories = sys.argv[1:]
said = {}
for directory in directories:
    for trust in (False, True):
        try:
            model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust)
            said[f"{directory} {trust}"] = model(torch.tensor(json.loads(ids)), use_cache=False).logits.tolist()
        except Exception as error:
            said[f"{directory} {trust}"] = str(error)
print(json.dumps(said), file=open(names, "w"))
"""


@pytest.fixture(scope="module")
def fresh(saved, warm: WarmProcesses, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Any]:
    """Return what plain transformers says in a process of its own, by name and trust: logits, or an error's text."""
    place = tmp_path_factory.mktemp("fresh")
    command = [sys.executable, "-P", "-c", CHILD, json.dumps(tiny_ids().tolist()), str(place / "said")]
    command += [str(directory) for _, directory in saved.values()]
    done = warm.run(command, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    said = json.loads((place / "said").read_text())
    return lambda name, trust: said[f"{saved[name][1]} {trust}"]


@pytest.mark.parametrize("name", [*FAMILIES, "ffn"])
def test_load_and_plain_transformers_with_trust_give_the_model_in_memory(name, saved, fresh):
    model, directory = saved[name]
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    assert torch.equal(torch.tensor(fresh(name, True)), logits(model))
    assert "is a per-layer attribute and may vary across layers" in fresh(name, False)
    loaded: Any = secateur.load(directory)
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    assert {name: weight.shape for name, weight in loaded.state_dict().items()} == shapes
    checkpoint = open_checkpoint(directory)
    check_weights(checkpoint, meta_model(checkpoint.config))
    assert load_tokenizer(checkpoint).decode([72, 73]) == tiny_tokenizer().decode([72, 73])


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_saving_again_writes_the_same_bytes(family, tmp_path):
    # One shard: transformers deals a loaded model's tensors out to shards in another order, of any model.
    first = save(uneven(family), tmp_path / "first", 10**9)
    assert file_bytes(save(uneven(family), tmp_path / "again", 10**9)) == file_bytes(first)
    assert file_bytes(save(secateur.load(first), tmp_path / "reloaded", 10**9)) == file_bytes(first)
    assert {"modeling_per_layer.py", "model.safetensors"} < file_bytes(first).keys()


def test_the_config_is_in_the_form_of_transformers(saved):
    config = config_of(saved["llama"][1])
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (72, 6, 2)
    assert config["per_layer_config"] == {
        "0": {"intermediate_size": 112},
        "1": {"num_key_value_heads": 1},
        "2": {"intermediate_size": 40, "num_attention_heads": 4},
        "3": {"num_attention_heads": 3, "num_key_value_heads": 3},
    }
    assert config["architectures"] == ["PerLayerLlamaForCausalLM"]
    parts = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    assert config["auto_map"] == {auto: f"modeling_per_layer.PerLayerLlama{part}" for auto, part in parts.items()}
    assert config["model_type"] == "llama" and config["head_dim"] == HEAD_DIM


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_the_decoder_alone_loads_too(family, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, directory = saved[family]
    with quiet_transformers():  # vLLM's Transformers backend builds it this way
        decoder: Any = AutoModel.from_pretrained(directory, trust_remote_code=True)
    with torch.inference_mode():
        states, expected = (each(tiny_ids(), use_cache=False).last_hidden_state for each in (decoder, model.base_model))
    assert torch.equal(states, expected)


def test_a_model_whose_class_is_no_for_causal_lm_is_opened_again(tmp_path):
    """GPT-2's is called GPT2LMHeadModel, and has its maps the other way round."""
    model = tiny_family("gpt2")
    with_ffns(model, bind(model), (40, 48, 56))
    again = secateur.load(save(model, tmp_path / "out"))
    assert config_of(tmp_path / "out")["architectures"] == ["PerLayerGPT2LMHeadModel"]
    assert torch.equal(logits(again), logits(model))


def test_head_dim_is_pinned_where_the_family_would_derive_it_from_the_heads(saved, tmp_path):
    assert config_of(saved["qwen2"][1])["head_dim"] == HEAD_DIM
    assert "head_dim" not in config_of(save(uneven("qwen2", heads=False), tmp_path / "ffn"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_generation_with_a_cache_equals_generation_without(family, saved):
    model: Any = secateur.load(saved[family][1])
    ids = tiny_ids(length=6)
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    without = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, use_cache=True, **options), without)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **options), without)
    keys = [layer.keys.shape[1] for layer in model(ids, use_cache=True).past_key_values.layers]
    assert keys == [num_key_value_heads for _, num_key_value_heads in HEADS]


def test_bfloat16_reloads_exactly(tmp_path):
    first = save(uneven("qwen2").to(torch.bfloat16), tmp_path / "first")
    model = secateur.load(first)  # loaded, for .to(bfloat16) also rounds the rotary frequencies
    assert model.dtype == torch.bfloat16 and restore_buffers(model) == ()
    assert verify_reload(save(model, tmp_path / "out"), tiny_ids(), logits(model)).max_abs_difference == 0
    assert secateur.load(first, dtype=torch.float32).dtype == torch.float32


def test_attention_implementation_reaches_every_layer(saved):
    model: Any = secateur.load(saved["llama"][1], attn_implementation="eager")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
    model.set_attn_implementation("sdpa")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"sdpa"}


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_equal_widths_change_nothing(family, tmp_path):
    plain, recorded = FAMILIES[family](**SIZES), FAMILIES[family](**SIZES)
    record_widths(recorded, bind(recorded))
    before, after = file_bytes(save(plain, tmp_path / "before")), file_bytes(save(recorded, tmp_path / "after"))
    assert before == after
    assert "per_layer_config" not in json.loads(after["config.json"])
    assert type(recorded) is type(plain)


def test_a_model_evened_out_again_is_a_plain_one(tmp_path):
    model: Any = secateur.load(save(uneven("llama", heads=False), tmp_path / "uneven"))
    with_ffns(model, bind(FAMILIES["llama"](**SIZES)), [40] * 4)
    directory = save(model, tmp_path / "even")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not {"per_layer_config", "auto_map"} & config_of(directory).keys()
    with quiet_transformers():
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory)), logits(model))


def test_the_commonest_width_is_the_base_and_the_larger_of_equally_common_ones():
    assert commonest([{"a": 1}, {"a": 2}, {"a": 1}]) == {"a": 1}
    assert commonest([{"a": 1}, {"a": 2}]) == {"a": 2}
    widths = [{"ffn": 8, "heads": 2}, {"ffn": 8, "heads": 1}, {"ffn": 4}, {"ffn": 2, "heads": 1}]
    assert commonest(widths) == {"ffn": 8, "heads": 1}


def test_code_in_the_directory_is_never_run_by_secateur(tmp_path):
    model = uneven("llama")
    directory = save(model, tmp_path / "out")
    (directory / "modeling_per_layer.py").write_text("raise SystemExit('ran')\n")
    assert torch.equal(logits(secateur.load(directory)), logits(model))
    assert torch.equal(logits(load_model(open_checkpoint(directory))), logits(model))
    with pytest.raises(CheckpointError, match="never runs a checkpoint's own code"):
        secateur.load(directory, trust_remote_code=True)


def test_a_config_that_does_not_fit_is_one_sentence(tmp_path):
    directory, said = save(uneven("llama"), tmp_path / "out"), dict[str, str]()
    said["an option that nobody knows"] = refusal(secateur.load, directory, no_such_option=1)
    per_layer = config_of(directory)["per_layer_config"]
    for layer in ({"intermediate_size": 80}, {"num_key_value_heads": 0}, {"intermediate_size": "many"}):
        edit_json(directory / "config.json", per_layer_config=per_layer | {"0": layer})
        said[str(layer)] = refusal(secateur.load, directory)
    assert_sentences("model/per-layer", said, tmp_path)


def test_a_model_that_runs_the_carried_file_is_refused_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = save(uneven("llama"), tmp_path / "out", 10**9)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        model.save_pretrained(tmp_path / "again")
    again, first = file_bytes(tmp_path / "again"), file_bytes(directory)
    configs = [json.loads(each.pop("config.json")) for each in (again, first)]
    assert again == {name: first[name] for name in again}
    assert configs[0] == {key: value for key, value in configs[1].items() if key != "rope_theta"}  # of older programs
    with pytest.raises(CheckpointError, match=r"load it with secateur\.load"):
        check_in_memory(model, tiny_tokenizer())
