"""k-quants: sizes that are told beforehand are those of the files that llama.cpp writes; what cannot be is said."""

import ctypes
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bpe_tokenizer import bpe_tokenizer
from models import tiny_llama, tiny_qwen2
from run_cli import run_cli
from transformers import FalconConfig, FalconForCausalLM, MixtralConfig, MixtralForCausalLM

from secateur.errors import CheckpointError, RecipeError
from secateur.formats.gguf import export, gguf_bytes, metadata_bytes
from secateur.formats.gguf_tensors import TYPES, gguf_tensors, planned_tensors
from secateur.formats.gguf_types import QUANTISED, Shape, chosen_type, fitting_type
from secateur.formats.save import have_llama_cpp, save_checkpoint
from secateur.formats.serving import gguf_family
from secateur.model.checkpoint import load_tokenizer, meta_model, open_checkpoint
from tests.formats.test_llama_cpp import PRUNED

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "vocab_size": 512}
MIXTURE = {
    **SIZES,
    "intermediate_size": 256,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 2048,
}
MODELS = {
    "shared keys": lambda: tiny_llama(num_layers=9, num_key_value_heads=2, **SIZES),
    "tied": lambda: tiny_qwen2(tied=True, num_layers=17, num_key_value_heads=4, **SIZES),
    # Rows of 576, as SmolLM2 has, and of 320: no multiple of 256.
    "narrow": lambda: tiny_llama(tied=True, num_layers=2, **SIZES | {"hidden_size": 576, "intermediate_size": 320}),
    "odd rows": lambda: tiny_llama(num_layers=2, **SIZES | {"intermediate_size": 272}),
    "eight experts": lambda: MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=8)),
    "four experts": lambda: MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=4)),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(
            hidden_size=256, num_attention_heads=8, num_hidden_layers=17, vocab_size=512, bias=False, num_kv_heads=8
        )
    ),
}
needs_llama_cpp = pytest.mark.skipif(not have_llama_cpp(), reason="needs llama-cpp-python")


def saved(name: str, place: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(MODELS[name]().eval(), bpe_tokenizer(), place, max_shard_size="5GB", carry_from=None)
    return place


def planned_bytes(source: Path, type_name: str) -> int:
    checkpoint = open_checkpoint(source)
    metadata = metadata_bytes(checkpoint.config, load_tokenizer(checkpoint), checkpoint.reference)
    return gguf_bytes(meta_model(checkpoint.config), type_name, metadata, checkpoint.reference)


@pytest.mark.parametrize(("prune", "name"), PRUNED)
def test_a_config_alone_tells_the_tensors_of_the_file(prune: Any, name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(prune(name, tmp_path / "source"))
    family = gguf_family(checkpoint)
    written, planned = (
        [(each.gguf_name, each.shape, each.type_name) for each in found]
        for found in (
            gguf_tensors(checkpoint, family, "f16"),
            planned_tensors(meta_model(checkpoint.config), family, "f16"),
        )
    )
    assert sorted(planned) == sorted(written)


@pytest.mark.parametrize("type_name", TYPES)
def test_sizes_are_told_to_the_byte(type_name: str, tmp_path: Path) -> None:
    source = saved("tied", tmp_path / "source")
    done = export(source, tmp_path / "model.gguf", type_name=type_name, check=False)
    assert planned_bytes(source, type_name) == done.num_bytes


def test_the_rule_of_mixtures_of_types() -> None:
    """As llama-quant.cpp says, for a Llama of 32 layers with eight query heads per KV head."""
    model = Shape("llama", 32, 1, 8, is_tied=False)
    down = {layer: chosen_type(f"blk.{layer}.ffn_down.weight", model, "q4_k_m") for layer in range(32)}
    assert [layer for layer, kind in down.items() if kind == "q6_k"] == [
        0,
        1,
        2,
        3,
        6,
        9,
        12,
        15,
        18,
        21,
        24,
        27,
        *range(28, 32),
    ]
    assert {*down.values()} == {"q4_k", "q6_k"}
    assert (
        chosen_type("output.weight", model, "q2_k") == "q6_k"
        and chosen_type("token_embd.weight", model, "q2_k") == "q2_k"
    )
    assert (
        chosen_type("blk.1.attn_v.weight", model, "q2_k") == "q4_k"
        and chosen_type("blk.1.attn_q.weight", model, "q2_k") == "q2_k"
    )
    large = Shape("llama", 80, 1, 8, is_tied=False)
    assert chosen_type("blk.11.attn_v.weight", large, "q4_k_m") == "q5_k"
    blocks = {"q4_k": 256, "q5_0": 32, "q8_0": 32}
    assert [fitting_type("q4_k", row, blocks.__getitem__) for row in (512, 576, 520)] == ["q4_k", "q5_0", "f16"]


MHA = Shape("llama", 32, 1, 1, is_tied=False)
GQA = Shape("llama", 32, 1, 8, is_tied=False)
FALCON = Shape("falcon", 32, 1, 1, is_tied=False)
FOUR, EIGHT = (Shape("llama", 32, num_experts, 4, is_tied=False) for num_experts in (4, 8))


@pytest.mark.parametrize(
    ("model", "tensor", "file_type", "expected"),
    [
        (GQA, "attn_v", "q2_k", "q4_k"),
        (MHA, "attn_v", "q2_k", "q3_k"),
        (GQA, "attn_v", "q3_k_m", "q5_k"),
        (GQA, "attn_v", "q6_k", "q6_k"),
        (EIGHT, "attn_v", "q4_k_m", "q8_0"),
        (EIGHT, "attn_output", "q4_k_m", "q5_k"),
        (FOUR, "attn_output", "q4_k_m", "q4_k"),
        (FOUR, "attn_output", "q3_k_m", "q4_k"),
        (FALCON, "attn_output", "q3_k_m", "q3_k"),
        (GQA, "ffn_down", "q2_k", "q3_k"),
        (GQA, "ffn_down", "q3_k_m", "q5_k"),
        (FALCON, "ffn_down", "q3_k_m", "q5_k"),
        (GQA, "ffn_down", "q4_k_m", "q6_k"),
    ],
)
def test_types_of_single_tensors(model: Shape, tensor: str, file_type: str, expected: str) -> None:
    """Of the second layer, as llama-quant.cpp says."""
    assert chosen_type(f"blk.1.{tensor}.weight", model, file_type) == expected


def test_types_that_llama_cpp_does_not_know_or_cannot_write_here(tmp_path: Path, monkeypatch: Any) -> None:
    source = saved("narrow", tmp_path / "source")
    with pytest.raises(RecipeError, match=r"unknown type 'iq2_xs'; allowed: f32, f16, bf16, q8_0, q6_k, .* q2_k; "):
        export(source, tmp_path / "model.gguf", type_name="iq2_xs")
    monkeypatch.setattr("secateur.formats.save.have_llama_cpp", lambda: False)
    with pytest.raises(CheckpointError, match=r"export --type q4_k_m needs llama-cpp-python; run: pip install"):
        export(source, tmp_path / "model.gguf", type_name="q4_k_m")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def told_by_llama_cpp(whole: Path, type_name: str, importance: Any = None) -> dict[str, str]:
    """Return the tensors' types from a dry run of the quantiser, which computes nothing."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    said: list[str] = []
    listener = llama_cpp.llama_log_callback(lambda level, text, _: said.append(text.decode()))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run, params.nthread = int(gguf.LlamaFileType[f"MOSTLY_{type_name.upper()}"]), True, 1
    params.imatrix = importance
    llama_cpp.llama_log_set(listener, ctypes.c_void_p(0))
    assert llama_cpp.llama_model_quantize(bytes(whole), b"unused", ctypes.byref(params)) == 0, said
    llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))
    found = re.findall(
        r"^\[.*?\] (\S+) +- \[.*?\], type = +(\w+), size .*?(?:\((\w+)\))?$", "".join(said), re.MULTILINE
    )
    return {name: (new or old).lower() for name, old, new in found}


@needs_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(name, tmp_path / "source"))
    model, family, whole = meta_model(checkpoint.config), gguf_family(checkpoint), tmp_path / "whole.gguf"
    export(tmp_path / "source", whole, check=False)
    for type_name in QUANTISED:
        planned = {each.gguf_name: each.type_name for each in planned_tensors(model, family, type_name)}
        assert told_by_llama_cpp(whole, type_name) == planned, type_name


@needs_llama_cpp
@pytest.mark.parametrize(
    ("name", "type_name"), [("narrow", "q4_k_m"), ("four experts", "q2_k"), ("odd rows", "q5_k_m")]
)
def test_llama_cpp_writes_as_many_bytes_as_were_told(name: str, type_name: str, tmp_path: Path) -> None:
    source, file = saved(name, tmp_path / "source"), tmp_path / "model.gguf"
    done = export(source, file, type_name=type_name, check=False)
    assert planned_bytes(source, type_name) == done.num_bytes == file.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source"]


@needs_llama_cpp
def test_the_command_tells_types_and_what_is_wider(tmp_path: Path) -> None:
    source, file = saved("narrow", tmp_path / "source"), tmp_path / "model.gguf"
    outcome = run_cli("export", source, file, "--type", "q4_k_m", "--quiet")
    assert outcome.status == 0, outcome.stderr
    done = export(source, tmp_path / "again.gguf", type_name="q4_k_m", check=False)
    assert file.read_bytes() == (tmp_path / "again.gguf").read_bytes()
    tensors = gguf.GGUFReader(file).tensors
    vectors = sum(int(each.n_elements) for each in tensors if len(each.shape) == 1)
    assert sum(done.num_params.values()) == sum(int(each.n_elements) for each in tensors)
    assert done.wider_share == pytest.approx(1 - vectors / sum(done.num_params.values()))
    told = re.search(r"Parameters by type: (.*); ([\d.]+)% in a wider type", outcome.stdout)
    assert told and float(told[2]) == pytest.approx(100 * done.wider_share, abs=0.05) and "q5_0" in told[1]
    assert "Checked: perplexity" in outcome.stdout and sorted(each.name for each in tmp_path.iterdir()) == [
        "again.gguf",
        "model.gguf",
        "source",
    ]
    fitting = export(saved("shared keys", tmp_path / "wide"), tmp_path / "wide.gguf", type_name="q4_k_m", check=False)
    assert fitting.wider_share == 0


@needs_llama_cpp
def test_what_llama_cpp_refuses_leaves_no_file(tmp_path: Path, monkeypatch: Any) -> None:
    source = saved("tied", tmp_path / "source")
    monkeypatch.setattr("secateur.formats.gguf.QUANTISED", {**QUANTISED, "iq2_xs": "iq2_xs"})
    with pytest.raises(CheckpointError, match=r"source: llama\.cpp cannot write it as iq2_xs \(.*requires an imatrix"):
        export(source, tmp_path / "model.gguf", type_name="iq2_xs", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
