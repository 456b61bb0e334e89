"""Foreign files that nest, repeat or ask without end: one sentence, before anything is built from them."""

import json
from pathlib import Path
from typing import Any

import pytest
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


@pytest.mark.parametrize("read", [json_of, yaml_of])
def test_levels_are_counted(read):
    assert read(nested(MAX_NESTING)) == json.loads(nested(MAX_NESTING))
    for text in (nested(MAX_NESTING + 1), nested(MAX_NESTING, '{"a": []}')):
        with pytest.raises(ValueError, match="it nests more than 100 levels"):
            read(text)


YAML = "[" * 100_000, "\n".join(" " * n + "a:" for n in range(2000)), "- " * 5000 + "a"


@pytest.mark.parametrize("read", [json_of, lambda text: json_of(text.encode()), yaml_of])
def test_no_depth_exhausts_the_stack(read):
    for text in YAML if read is yaml_of else DEEP.values():
        with pytest.raises(ValueError, match="it nests more than 100 levels"):
            read(text)


@pytest.mark.parametrize("text", ["a: &a [x, y]\nb: [*a, *a]", "a: &a [1, *a]", "a: &a {x: 1}\nb: {<<: *a}"])
def test_an_alias_is_refused_before_anything_is_built(text):
    with pytest.raises(ValueError, match=r"it has an alias, \*name; write the value out"):
        yaml_of(text)


TAGS = ["!!timestamp x", "!!bool maybe", "!!int abc", "!!int ''", "0x_", "2001-99-99", "9" * 5000, "[", "*b", "\x00"]


@pytest.mark.parametrize("value", TAGS, ids=range(len(TAGS)))
def test_a_recipe_with_a_value_that_is_none(value, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"seed: {value}\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml: cannot be read \(.*\); give a YAML file in UTF-8.$"):
        as_recipe(file)


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


DAMAGED = "is truncated, damaged or not safetensors"
NO_MAP = "index.json: has no weight_map from tensor names to shard files; copy"
NO_UNITS = "keep.json: does not name units"
WEIGHTS, INDEX, KEEPS = "model.safetensors", "model.safetensors.index.json", KEEP_FILE
# Of all files that a model's directory may have: what is in it, and what is said.
FILES: list[tuple[str, str | bytes, str]] = [
    ("config.json", DEEP["objects"], r"config.json: cannot be read as JSON \(it nests more than 100 levels\)"),
    ("tokenizer.json", DEEP["objects"], r"tokenizer.json: cannot be read as JSON \(it nests more than 100 levels\)"),
    ("tokenizer_config.json", DEEP["objects"], "nests more than 100 levels|its tokenizer cannot be loaded"),
    ("special_tokens_map.json", DEEP["objects"], "nests more than 100 levels|its tokenizer cannot be loaded"),
    ("added_tokens.json", DEEP["objects"], "nests more than 100 levels|its tokenizer cannot be loaded"),
    *((INDEX, text, NO_MAP) for text in (*DEEP.values(), "{", "{}", "[]", '{"weight_map": {}}')),
    (INDEX, '{"weight_map": {"a": 1}}', NO_MAP),
    (
        INDEX,
        json.dumps({"weight_map": {"a": "9" * 5000}}),
        r"shard 9+.* named in model.safetensors.index.json is missing",
    ),
    (WEIGHTS, headed(b"[" * 100_000), DAMAGED),
    (WEIGHTS, headed(b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}'), DAMAGED),
    *(("generation_config.json", text, "generation_config.json: ") for text in (DEEP["lists"], "{", "[]")),
    ("generation_config.json", '{"pad_token_id": {"a": 0}}', "generation_config.json: "),
    *(
        (KEEPS, text, NO_UNITS)
        for text in (DEEP["lists"], "7", '[{"group": "layers", "keep": ["a"]}]', '[{"keep": []}]')
    ),
]


@pytest.mark.parametrize(
    ("name", "content", "said"), FILES, ids=[f"{number} {row[0]}" for number, row in enumerate(FILES)]
)
def test_damaged_files_of_a_model(name, content, said, model):
    if name == INDEX:
        (model / WEIGHTS).unlink()
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=said):
        checkpoint = open_checkpoint(model)
        load_tokenizer(checkpoint)
        load_model(checkpoint)
        read_keeps(model, 3)


def test_a_list_of_layers_that_names_none(model):
    (model / KEEP_FILE).write_text("{}")
    assert read_keeps(model, 3) == ((0, 1, 2), {}), "all stayed"


def test_a_tokenizer_with_a_setting_that_only_its_use_reads(model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": [9]}))
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(open_checkpoint(model))


def test_a_deep_result():
    for text in DEEP.values():
        with pytest.raises(CheckpointError, match="where: "):
            Summary.from_json(text, "where")


SIZES: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**7}, "num_hidden_layers is 1e+07, more than 2,000"),
    ({"num_hidden_layers": -3}, "num_hidden_layers is -3, less than 1"),
    ({"n_layer": 0}, "n_layer is 0, less than 1"),
    ({"num_hidden_layers": 1e300}, "num_hidden_layers is 1e+300, more than 2,000"),
    ({"num_hidden_layers": float("nan")}, "num_hidden_layers is nan, more than 2,000"),
    ({"num_local_experts": 10**7}, "num_local_experts is 1e+07, more than 2,000"),
    ({"hidden_size": 10**9}, "hidden_size is 1e+09, more than 16,777,216"),
    ({"intermediate_size": 10**30}, "intermediate_size is 1e+30, more than 16,777,216"),
    ({"num_key_value_heads": 10**12}, "num_key_value_heads is 1e+12, more than 16,777,216"),
    ({"vocab_size": 2**60}, "vocab_size is 1.15292e+18, more than 16,777,216"),
    ({"text_config": {"layers": [{"n_layer": 10**7}]}}, "n_layer is 1e+07, more than 2,000"),
]


@pytest.mark.parametrize(("changes", "said"), SIZES, ids=[said.split()[0] for _, said in SIZES])
def test_sizes_that_nothing_can_be_built_from(changes, said, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError) as raised:
        directory_config(model)
    assert f"config.json: {said}; copy the model's own file there." in str(raised.value)


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
