"""What GGUF files say of well-known checkpoints, key by key, and the types of their tensors."""

import json
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
from bpe_tokenizer import bpe_tokenizer, sentencepiece_tokenizer
from shown import assert_shown
from tokenizers import processors
from transformers import CONFIG_MAPPING

from secateur.errors import ArchError
from secateur.formats.gguf import _begun
from secateur.formats.gguf_tensors import TOLD, Shape, chosen_type, gguf_family_of, stays_as_it_is
from secateur.formats.gguf_tokenizer import PRE_TOKENIZERS, add_tokenizer

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
