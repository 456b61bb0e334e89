"""An importance matrix: each domain's own second moments, and weights that llama.cpp rounds by them."""

import ctypes
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bpe_tokenizer import bpe_tokenizer
from models import tiny_llama
from run_cli import run_cli
from texts import learning_text
from transformers import AutoModelForCausalLM

from secateur.errors import CalibrationError, RecipeError
from secateur.formats.gguf import export
from secateur.formats.gguf_families import gguf_family
from secateur.formats.gguf_tensors import TOLD, planned_tensors
from secateur.formats.importance import NUM_TOKENS, importance_of
from secateur.formats.save import save_checkpoint
from secateur.log import silent
from secateur.model.checkpoint import load_tokenizer, meta_model, open_checkpoint
from secateur.recipe import load_recipe, parse_recipe
from tests.formats.test_quants import SIZES, needs_llama_cpp, saved, told_by_llama_cpp

LENGTH = 64


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """A model whose channels differ in loudness, with the recipe of a run on two domains."""
    place = tmp_path_factory.mktemp("importance")
    torch.manual_seed(0)
    model = tiny_llama(num_layers=2, **SIZES).eval()
    for name, weight in model.named_parameters():
        if "layernorm" in name:
            torch.nn.init.trunc_normal_(weight, 1.0, 2.0)
    save_checkpoint(model, bpe_tokenizer(), place / "model", max_shard_size="5GB", carry_from=None)
    domains = {}
    for name, words in (("prose", "the river runs past a mill "), ("code", "for x in range(10): print(x)\n")):
        texts = [json.dumps({"text": f"{number} {words * 60}"}) for number in range(400)]
        (place / f"{name}.jsonl").write_text("\n".join(texts))
        domains[name] = {"files": [str(place / f"{name}.jsonl")]}
    recipe = {"calibration": {"domains": domains, "sequence_length": LENGTH}}
    (place / "model" / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return place / "model"


def test_every_domain_has_the_same_say(result: Path) -> None:
    checkpoint = open_checkpoint(result)
    steps = list[tuple[str, int, int]]()
    found = importance_of(checkpoint, lambda *step: steps.append(step))
    counted = [(done, total) for stage, done, total in steps if stage == "importance"]
    assert counted[0][0] == counted[1][0] - counted[0][0] and counted[-1] == (NUM_TOKENS // LENGTH,) * 2
    recipe = parse_recipe(load_recipe(result / "recipe.yaml"))
    text = learning_text(recipe.calibration, NUM_TOKENS, load_tokenizer(checkpoint), 0)
    model: Any = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float64)
    expected: dict[str, Any] = {}
    for domain in text.domains:
        states = model.model(domain.calibration.ids_NT, output_hidden_states=True).hidden_states
        for number, layer in enumerate(model.model.layers):
            normed = layer.input_layernorm(states[number])
            middle = states[number] + layer.self_attn(normed, *attention_arguments(model, normed))[0]
            into = layer.post_attention_layernorm(middle)
            hidden = torch.nn.functional.silu(layer.mlp.gate_proj(into)) * layer.mlp.up_proj(into)
            for name, inputs in {"attn_q": normed, "attn_v": normed, "ffn_up": into, "ffn_down": hidden}.items():
                moments = (inputs**2).mean((0, 1)).detach()
                key = f"blk.{number}.{name}.weight"
                expected[key] = expected.get(key, 0) + moments / moments.mean() / 2
    assert len(found) == 2 * 7 and all(each.dtype == np.float32 for each in found.values())
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values.numpy(), rtol=2e-5, atol=1e-7, err_msg=key)


def attention_arguments(model: Any, normed: Any) -> tuple[Any, Any]:
    """Return rotary embeddings and a causal mask for a layer's attention."""
    length = normed.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=normed.dtype).triu(1)[None, None]
    return model.model.rotary_emb(normed, torch.arange(length)[None]), mask


def test_what_cannot_be_is_said(result: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"export importance: is for q6_k, .*, got q8_0; choose one of these or leave"
    ):
        export(result, tmp_path / "model.gguf", type_name="q8_0", importance=True)
    alone = saved("tied", tmp_path / "alone")
    (alone / "recipe.yaml").write_text("calibration: {domains: {self: {answers: true}}}")
    with pytest.raises(CalibrationError, match="export importance: the model's recipe has no text but what"):
        importance_of(open_checkpoint(alone), silent)
    assert [path.name for path in tmp_path.iterdir()] == ["alone"]


def loss(file: Path, whole: Path, weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Return sum_c importance_c (w_c - q_c)^2 of every tensor that has an importance."""
    values = [
        {each.name: gguf.dequantize(each.data, each.tensor_type) for each in gguf.GGUFReader(path).tensors}
        for path in (file, whole)
    ]
    return {
        name: float((columns * (values[0][name] - values[1][name]) ** 2).sum()) for name, columns in weights.items()
    }


@needs_llama_cpp
def test_llama_cpp_rounds_loud_columns_more_exactly(result: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.gguf" for name in ("whole", "plain", "weighed")}
    export(result, files["whole"], type_name="f32", check=False)
    plain = export(result, files["plain"], type_name="q2_k", check=False)
    outcome = run_cli("export", result, files["weighed"], "--type", "q2_k", "--importance", "--no-check")
    assert outcome.status == 0 and files["weighed"].stat().st_size == plain.num_bytes
    weights = importance_of(open_checkpoint(result), silent)
    before, after = (loss(files[name], files["whole"], weights) for name in ("plain", "weighed"))
    assert all(after[name] < 0.9 * before[name] for name in weights), {
        name: after[name] / before[name] for name in weights
    }


@needs_llama_cpp
@pytest.mark.parametrize("name", ["shared keys", "eight experts", "falcon"])
def test_types_with_an_importance_matrix_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    checkpoint = open_checkpoint(saved(name, tmp_path / "source"))
    model, family, whole = meta_model(checkpoint.config), gguf_family(checkpoint), tmp_path / "whole.gguf"
    export(tmp_path / "source", whole, check=False)
    entry, one = llama_cpp.llama_model_imatrix_data, (ctypes.c_float * 1)(1.0)
    matrix = (entry * 2)(entry(b"none", one, 1))
    planned = {each.gguf_name: each.type_name for each in planned_tensors(model, family, TOLD)}
    assert told_by_llama_cpp(whole, TOLD, matrix) == planned
