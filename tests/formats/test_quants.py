"""k-quants: sizes that are told beforehand are those of the files that llama.cpp writes; what cannot be is said."""

import ctypes
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bpe_tokenizer import bpe_tokenizer
from models import tiny_llama, tiny_qwen2, written
from transformers import FalconConfig, FalconForCausalLM, MixtralConfig, MixtralForCausalLM

from secateur.errors import CheckpointError
from secateur.formats.gguf import export, gguf_bytes
from secateur.formats.gguf_tensors import QUANTISED, TOLD, TYPES, fitting_type, gguf_family, planned_tensors
from secateur.formats.save import have_llama_cpp
from secateur.model.checkpoint import meta_model, open_checkpoint

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "vocab_size": 512}
MIXTURE = {**SIZES, "intermediate_size": 256, "num_key_value_heads": 2, "num_hidden_layers": 3}
MIXTURE |= {"max_position_embeddings": 2048}
FALCON = {"hidden_size": 256, "num_attention_heads": 8, "num_kv_heads": 8, "num_hidden_layers": 17, "vocab_size": 512}
MODELS = {
    "shared keys": lambda: tiny_llama(num_layers=9, num_key_value_heads=2, **SIZES),
    "tied": lambda: tiny_qwen2(tied=True, num_layers=17, num_key_value_heads=4, **SIZES),
    # Rows of 576, as SmolLM2 has, and of 320: no multiple of 256.
    "narrow": lambda: tiny_llama(tied=True, num_layers=2, **SIZES | {"hidden_size": 576, "intermediate_size": 320}),
    "odd rows": lambda: tiny_llama(num_layers=2, **SIZES | {"intermediate_size": 272}),
    "eight experts": lambda: MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=8)),
    "four experts": lambda: MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=4)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**FALCON, bias=False)),
}
needs_llama_cpp = pytest.mark.skipif(not have_llama_cpp(), reason="needs llama-cpp-python")


def saved(name: str, place: Path) -> Path:
    torch.manual_seed(0)
    return written(place, MODELS[name]().eval(), bpe_tokenizer())


def planned_bytes(source: Path, type_name: str) -> int:
    checkpoint = open_checkpoint(source)
    return gguf_bytes(meta_model(checkpoint.config), type_name, checkpoint.reference)


@pytest.mark.parametrize("type_name", TYPES)
def test_sizes_are_told_to_the_byte(type_name: str, tmp_path: Path) -> None:
    source = saved("tied", tmp_path / "source")
    done = export(source, tmp_path / "model.gguf", type_name=type_name, check=False)
    # Before the tensors are the tokenizer and other words.
    assert planned_bytes(source, type_name) == done.num_bytes - gguf.GGUFReader(tmp_path / "model.gguf").data_offset


def test_types_that_llama_cpp_cannot_write_here(tmp_path: Path, monkeypatch: Any) -> None:
    assert [fitting_type("q4_k", row) for row in (512, 576, 520)] == ["q4_k", "q5_0", "f16"], "rows that no block fits"
    source = saved("narrow", tmp_path / "source")
    monkeypatch.setattr("secateur.formats.save.have_llama_cpp", lambda: False)
    with pytest.raises(CheckpointError, match=r"export --type q4_k_m needs llama-cpp-python; run: pip install"):
        export(source, tmp_path / "model.gguf", type_name="q4_k_m")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def told_by_llama_cpp(whole: Path, type_name: str) -> dict[str, str]:
    """Return the tensors' types from a dry run of the quantiser, which computes nothing."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    said: list[str] = []
    listener = llama_cpp.llama_log_callback(lambda level, text, _: said.append(text.decode()))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run, params.nthread = int(gguf.LlamaFileType[f"MOSTLY_{type_name.upper()}"]), True, 1
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
    planned = {each.gguf_name: each.type_name for each in planned_tensors(model, family, TOLD)}
    assert told_by_llama_cpp(whole, TOLD) == planned


@needs_llama_cpp
@pytest.mark.parametrize("name", ["narrow", "four experts", "odd rows"])
def test_llama_cpp_writes_as_many_bytes_as_were_told(name: str, tmp_path: Path) -> None:
    source, file = saved(name, tmp_path / "source"), tmp_path / "model.gguf"
    done = export(source, file, type_name=TOLD, check=False)
    assert planned_bytes(source, TOLD) == done.num_bytes - gguf.GGUFReader(file).data_offset
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source"]


@needs_llama_cpp
def test_what_llama_cpp_refuses_leaves_no_file(tmp_path: Path, monkeypatch: Any) -> None:
    source = saved("tied", tmp_path / "source")
    monkeypatch.setattr("secateur.formats.gguf.QUANTISED", (*QUANTISED, "iq2_xs"))
    with pytest.raises(CheckpointError, match=r"source: llama\.cpp cannot write it as iq2_xs \(.*requires an imatrix"):
        export(source, tmp_path / "model.gguf", type_name="iq2_xs", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
