"""Foreign files that nest, repeat or ask without end: one sentence, before anything is built from them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from damage import edit_json
from shown import assert_sentences, refusal
from tiny_tokenizer import tiny_tokenizer

from secateur.data.forms import chat_text
from secateur.errors import MAX_SENTENCE, CalibrationError, CheckpointError, RecipeError
from secateur.files import MAX_NESTING, json_of, yaml_of
from secateur.model.checkpoint import load_model, load_tokenizer, open_checkpoint
from secateur.model.config import directory_config
from secateur.pruning.like import KEEP_FILE, read_keeps
from secateur.recipe import as_recipe
from secateur.report.records import Summary

CHAT = [{"role": "user", "content": "hi"}]
DEEP = {"lists": "[" * 100_000, "objects": '{"a": ' * 100_000, "closed": "[" * 200 + "]" * 200}


def nested(levels: int, text: str = "[]") -> str:
    return "[" * (levels - 1) + text + "]" * (levels - 1)


YAML = "[" * 100_000, "\n".join(" " * n + "a:" for n in range(2000)), "- " * 5000 + "a"


@pytest.mark.parametrize("read", [json_of, lambda text: json_of(text.encode()), yaml_of])
def test_levels_are_counted_and_no_depth_exhausts_the_stack(read):
    assert read(nested(MAX_NESTING)) == json.loads(nested(MAX_NESTING))
    deep = YAML if read is yaml_of else DEEP.values()
    for text in (nested(MAX_NESTING + 1), nested(MAX_NESTING, '{"a": []}'), *deep):
        with pytest.raises(ValueError, match="it nests more than 100 levels"):
            read(text)
    for text in DEEP.values():
        with pytest.raises(CheckpointError, match="where: "):
            Summary.from_json(text, "where")


TAGS = ["!!timestamp x", "!!bool maybe", "!!int abc", "!!int ''", "0x_", "2001-99-99", "9" * 5000, "[", "*b", "\x00"]


def test_an_alias_and_a_value_that_is_none_are_refused_before_anything_is_built(tmp_path):
    for text in ("a: &a [x, y]\nb: [*a, *a]", "a: &a [1, *a]", "a: &a {x: 1}\nb: {<<: *a}"):
        with pytest.raises(ValueError, match=r"it has an alias, \*name; write the value out"):
            yaml_of(text)
    for value in TAGS:
        (tmp_path / "recipe.yaml").write_text(f"seed: {value}\n")
        with pytest.raises(RecipeError, match=r"recipe.yaml: cannot be read \(.*\); give a YAML file in UTF-8.$"):
            as_recipe(tmp_path / "recipe.yaml")


def test_a_sentence_is_one_line_of_bounded_length():
    error = RecipeError("recipe a\nb: seed: must be " + "x" * 10**6 + ", got 1.")
    assert len(str(error)) == MAX_SENTENCE + 3 and "\n" not in str(error)
    assert str(error).startswith("recipe a b: seed") and str(error).endswith("x, got 1.")
    assert str(RecipeError("x" * MAX_SENTENCE)) == "x" * MAX_SENTENCE


@pytest.fixture
def model(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the llama checkpoint whose files a test replaces."""
    for file in checkpoints["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def headed(header: bytes) -> bytes:
    """Return the bytes of a safetensors file with this header."""
    return len(header).to_bytes(8, "little") + header + b"0000"


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAPS = ({}, [], {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "9" * 5000}})
KEEPS = ("7", '[{"group": "layers", "keep": ["a"]}]', '[{"keep": []}]')
ENDLESS = b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}'
# Of all files that a model's directory may have: what is in it.
FILES: dict[str, tuple[str | bytes, ...]] = {
    "config.json": (DEEP["objects"],),
    "tokenizer.json": (DEEP["objects"],),
    "tokenizer_config.json": (DEEP["objects"],),
    "special_tokens_map.json": (DEEP["objects"],),
    "added_tokens.json": (DEEP["objects"],),
    INDEX: (*DEEP.values(), "{", *map(json.dumps, MAPS)),
    WEIGHTS: (headed(b"[" * 100_000), headed(ENDLESS)),
    "generation_config.json": (DEEP["lists"], "{", "[]", '{"pad_token_id": {"a": 0}}'),
    KEEP_FILE: (DEEP["lists"], *KEEPS),
}


def test_damaged_files_of_a_model(model):
    def read() -> None:
        checkpoint = open_checkpoint(model)
        load_tokenizer(checkpoint)
        load_model(checkpoint)
        read_keeps(model, 3)

    said, weights = dict[str, str](), (model / WEIGHTS).read_bytes()
    for name, contents in FILES.items():
        whole = (model / name).read_bytes() if (model / name).exists() else None
        (model / WEIGHTS).unlink() if name == INDEX else (model / WEIGHTS).write_bytes(weights)
        for content in contents:
            (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            said[f"{name}, {len(content)} bytes: {content[:60]!r}"] = refusal(read)
        (model / name).unlink() if whole is None else (model / name).write_bytes(whole)
    # A sentence that is too long is cut in its middle, where depends on the place.
    said = {about: re.sub(r"9{9}[9.]*", "9...9", sentence) for about, sentence in said.items()}
    assert_sentences("limits/files", said, model)
    (model / KEEP_FILE).write_text("{}")
    assert read_keeps(model, 3) == ((0, 1, 2), {}), "all stayed"
    # A setting that only its use reads.
    edit_json(model / "tokenizer_config.json", model_max_length=[9])
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(open_checkpoint(model))


SIZES: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**7},
    {"num_hidden_layers": -3},
    {"n_layer": 0},
    {"num_hidden_layers": 1e300},
    {"num_hidden_layers": float("nan")},
    {"num_local_experts": 10**7},
    {"hidden_size": 10**9},
    {"intermediate_size": 10**30},
    {"num_key_value_heads": 10**12},
    {"vocab_size": 2**60},
    {"text_config": {"layers": [{"n_layer": 10**7}]}},
]


def test_sizes_that_nothing_can_be_built_from(model):
    config, said = json.loads((model / "config.json").read_text()), dict[str, str]()
    for changes in SIZES:
        (model / "config.json").write_text(json.dumps({**config, **changes}))
        said[str(changes)] = refusal(directory_config, model)
    assert_sentences("limits/sizes", said, model)


TEMPLATES = {
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages[0][1e999] }}": "name 'inf' is not defined",
    "{{ [].pop() }}": "not safely callable|immutable|SecurityError|pop",
    "{{ messages[0].x.y }}": "has no attribute 'x'",
}


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_hostile_chat_templates(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(CalibrationError, match="row 1: the tokenizer's chat template refuses it") as raised:
        chat_text(CHAT, tokenizer, "row 1")
    assert any(part in str(raised.value) for part in TEMPLATES[template].split("|")), str(raised.value)
