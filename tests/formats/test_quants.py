"""k-quants and what GGUF files say: sizes told beforehand are those of the files that llama.cpp writes, key by key."""

import ctypes
import json
import re
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from bpe_tokenizer import bpe_tokenizer, sentencepiece_tokenizer
from models import tiny_llama, tiny_qwen2, written
from shown import assert_shown
from tokenizers import processors
from transformers import CONFIG_MAPPING, FalconConfig, FalconForCausalLM, MixtralConfig, MixtralForCausalLM

from secateur.errors import ArchError, CheckpointError
from secateur.formats.gguf import _begun, export, gguf_bytes
from secateur.formats.gguf_tensors import (
    QUANTISED,
    TOLD,
    TYPES,
    Shape,
    chosen_type,
    fitting_type,
    gguf_family,
    gguf_family_of,
    planned_tensors,
    stays_as_it_is,
)
from secateur.formats.gguf_tokenizer import PRE_TOKENIZERS, add_tokenizer
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


CONFIGS = sorted((Path(__file__).parent.parent / "model" / "public_configs").glob("*.json"))
TOKENIZER = bpe_tokenizer()
TENSORS = ["attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_up", "ffn_down", "ffn_down_exps"]
SHAPES = {
    "a head each": Shape("llama", 32, 1, 1, is_tied=False),
    "three queries a key": Shape("llama", 18, 1, 3, is_tied=True),
    "four queries a key": Shape("qwen2", 28, 1, 4, is_tied=True),
    "eight experts": Shape("llama", 32, 8, 4, is_tied=False),
    "more experts": Shape("qwen3moe", 48, 128, 8, is_tied=False),
    "70B": Shape("llama", 80, 1, 8, is_tied=False),
    "80 layers of another": Shape("gemma3", 80, 1, 8, is_tied=True),
    "falcon": Shape("falcon", 32, 1, 71, is_tied=True),
}


def keys_of(file: Path) -> list[str]:
    """Return the keys that a file of this model has, without its tokenizer's."""
    sizes = dict(json.loads(file.read_text())["config"])
    config: Any = CONFIG_MAPPING[sizes.pop("model_type")](**sizes)
    try:
        gguf_family_of(config, file.stem)
        with closing(_begun(config, TOKENIZER, file.stem, "q4_k_m")) as writer:
            found = [(key, value.value) for part in writer.kv_data for key, value in part.items()]
    except ArchError as error:
        return [f"    refused: {error}"]
    return [f"    {key}: {value}" for key, value in found if not key.startswith(("tokenizer", "general"))]


def test_what_a_file_says_of_a_model() -> None:
    lines = [line for file in CONFIGS for line in (file.stem, *keys_of(file))]
    assert_shown("gguf/keys", "\n".join(lines))


def types_of(model: Shape) -> str:
    """Return the types of tensors that differ from most, over ranges of layers."""
    found = []
    for tensor in TENSORS:
        kinds = [chosen_type(f"blk.{layer}.{tensor}.weight", model) for layer in range(model.num_layers)]
        runs = [(kind, len(list(layers))) for kind, layers in groupby(kinds)]
        if set(kinds) != {"q4_k"}:
            found.append(f"{tensor} " + " ".join(f"{kind}x{count}" for kind, count in runs))
    words = {chosen_type(f"{name}.weight", model) for name in ("output", "token_embd")}
    return "; ".join([*found, f"words {sorted(words)}"])


def test_which_types_llama_cpp_gives_to_which_tensors() -> None:
    lines = [f"{name}, {TOLD}: {types_of(model)}" for name, model in SHAPES.items()]
    assert_shown("gguf/types", "\n".join(lines))


def test_what_the_quantiser_leaves_alone() -> None:
    names = ["blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight", "position_embd.weight", "blk.0.attn_q.bias"]
    assert all(stays_as_it_is(name, (64, 64)) for name in names)
    assert stays_as_it_is("blk.0.ffn_up.weight", (64,)) and not stays_as_it_is("blk.0.ffn_up.weight", (64, 64))


class Writer:
    """Notes what a `gguf.GGUFWriter` is told of a tokenizer."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.said.__setitem__(name.removeprefix("add_"), value)


def tokenizers() -> dict[str, Any]:
    """Return one of each splitting rule, one that starts text with a token, and one with a token for images."""
    found = {rule: bpe_tokenizer(rule) for rule in PRE_TOKENIZERS.values()}
    found["starts text"] = starts = bpe_tokenizer("llama-bpe")
    start = [("<|start|>", starts.bos_token_id)]
    starts.backend_tokenizer.post_processor = processors.TemplateProcessing("<|start|> $A", None, start)
    found |= {rule: sentencepiece_tokenizer(rule) for rule in ("mistral", "llama", "gemma")}
    found["of images"] = sentencepiece_tokenizer("gemma")
    found["of images"].add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    return found


def test_what_a_file_says_of_a_tokenizer() -> None:
    """Rows beyond the tokenizer are unused; a token for images has none."""
    lines = []
    for name, tokenizer in tokenizers().items():
        writer: Any = Writer()
        add_tokenizer(writer, tokenizer, len(tokenizer) + (-1 if name == "of images" else 3), "here")
        said = writer.said
        tokens, kinds = said.pop("token_list"), [gguf.TokenType(kind).name for kind in said.pop("token_types")]
        runs, at = [], 0
        for kind, those in groupby(kinds):
            num = len(list(those))
            runs.append(f"{kind} {tokens[at]!r} x {num}")
            at += num
        if "token_scores" in said:
            scores = dict(zip(tokens, said.pop("token_scores"), strict=True))
            best = sorted(scores, key=lambda token: (-scores[token], token))[:6]
            said["scores"] = {token: scores[token] for token in (*best, "e")}
        if "token_merges" in said:
            merges = said.pop("token_merges")
            said["merges"] = [len(merges), *merges[:3], merges[-1]]
        lines += [name, f"    tokens: {', '.join(runs)}", *(f"    {key}: {value!r}" for key, value in said.items())]
    assert_shown("gguf/tokenizers", "\n".join(lines))
