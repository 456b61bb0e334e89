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
    with pytest.raises(ValueError, match="it nests more than 100 levels"):
        read(nested(MAX_NESTING + 1))
    with pytest.raises(ValueError, match="it nests more than 100 levels"):
        read(nested(MAX_NESTING, '{"a": []}'))


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_no_depth_of_json_exhausts_the_stack(text):
    for given in (text, text.encode()):
        with pytest.raises(ValueError, match="it nests more than 100 levels"):
            json_of(given)


def test_no_depth_of_yaml_exhausts_the_stack():
    for text in ("[" * 100_000, "\n".join(" " * n + "a:" for n in range(2000)), "- " * 5000 + "a"):
        with pytest.raises(ValueError, match="it nests more than 100 levels"):
            yaml_of(text)


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


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_deep_files_of_a_model(name, model):
    (model / name).write_text(DEEP["objects"])
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read as JSON \(it nests more than 100 levels\)"):
        load_tokenizer(open_checkpoint(model))


@pytest.mark.parametrize("text", [*DEEP.values(), "{", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_shards(text, model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json: has no weight_map from tensor names to shard files; copy"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_deep_files_of_a_tokenizer(name, model):
    (model / name).write_text(DEEP["objects"])
    with pytest.raises(CheckpointError, match=r"nests more than 100 levels|its tokenizer cannot be loaded"):
        load_tokenizer(open_checkpoint(model))


def test_a_deep_header(model):
    (model / "model.safetensors").write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(CheckpointError, match="is truncated, damaged or not safetensors"):
        open_checkpoint(model)


def test_a_header_and_an_index_with_what_no_disk_has(model):
    header = b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}'
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    with pytest.raises(CheckpointError, match="is truncated, damaged or not safetensors"):
        open_checkpoint(model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "9" * 5000}}))
    with pytest.raises(CheckpointError, match=r"shard 9+.* named in model.safetensors.index.json is missing"):
        open_checkpoint(model)


@pytest.mark.parametrize("text", [DEEP["lists"], "{", '{"pad_token_id": {"a": 0}}', "[]"])
def test_a_damaged_generation_config(text, model):
    (model / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config.json: "):
        load_model(open_checkpoint(model))


def test_a_tokenizer_with_a_setting_that_only_its_use_reads(model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": [9]}))
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(open_checkpoint(model))


def test_a_deep_result():
    for text in DEEP.values():
        with pytest.raises(CheckpointError, match="where: "):
            Summary.from_json(text, "where")


@pytest.mark.parametrize("text", [DEEP["lists"], "{}", "7", '[{"group": "layers", "keep": ["a"]}]', '[{"keep": []}]'])
def test_a_damaged_list_of_layers(text, model):
    (model / KEEP_FILE).write_text(text)
    if text == "{}":
        assert read_keeps(model, 3) == ((0, 1, 2), {}), "names no layers, so all stayed"
        return
    with pytest.raises(CheckpointError, match=r"keep.json: does not name units"):
        read_keeps(model, 3)


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
