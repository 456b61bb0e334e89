"""A language model inside a larger class: found by the config, pruned in place, and the rest stays, bit for bit."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import saved
from recipes import grouped
from run_cli import run_cli
from safetensors.torch import load_file
from transformers import Llama4Config, Qwen3_5Config

from secateur.model.bind import bind, text_model
from secateur.model.checkpoint import load, meta_model, open_checkpoint
from tests.families import tiny_family


@pytest.mark.parametrize(
    ("name", "task", "loaded_by"),
    [
        ("gemma3_multimodal", "text-generation", "AutoModelForCausalLM"),
        ("qwen2_5_vl", "image-text-to-text", "AutoModelForImageTextToText"),
    ],
)
def test_a_run_on_a_saved_model_leaves_the_rest_untouched(name, task, loaded_by, recipe, tmp_path) -> None:
    model, out = tiny_family(name), tmp_path / "out"
    model.config.get_text_config().vocab_size = 320
    saved(tmp_path / "model", model)
    (tmp_path / "model/preprocessor_config.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(grouped(recipe | {"remove": 0.15, "rounds": 2})))
    outcome = run_cli("prune", tmp_path / "model", out, "--recipe", tmp_path / "recipe.yaml")
    assert (out / "preprocessor_config.json").is_file()
    before, after = (load_file(tmp_path / which / "model.safetensors") for which in ("model", "out"))
    assert set(before) == set(after)
    seeing = [key for key in before if "vis" in key or "projector" in key]
    assert len(seeing) > 10
    assert all(torch.equal(before[key], after[key]) for key in seeing)
    narrower = {key for key in before if before[key].shape != after[key].shape}
    assert len(narrower) == 3 * 3 and all("vis" not in key and ".mlp." in key for key in narrower)
    # Terminal, card and result name the class that reloads it.
    assert outcome.stdout.endswith(f"Load it with {loaded_by}.from_pretrained('{out}').\n")
    result = json.loads((out / "result.json").read_text())
    assert result["loaded_by"] == loaded_by and result["reload_max_abs_difference"] == 0
    card = (out / "README.md").read_text()
    assert f"pipeline_tag: {task}" in card and set(re.findall("AutoModelFor[A-Z][A-Za-z]+", card)) == {loaded_by}
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", str(out))
    found: dict[str, Any] = {}
    exec(code, found)  # what a reader copies
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(found["model"](ids).logits, load(out)(ids).logits)


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA4 = Llama4Config(
    text_config={"num_hidden_layers": 2, "num_local_experts": 2, "vocab_size": 64, "hidden_size": 64},
    vision_config=VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
)


@pytest.mark.parametrize("config", [LLAMA4, Qwen3_5Config()], ids=["llama4", "qwen3_5"])
@pytest.mark.parametrize("what", ["ForConditionalGeneration", "ForCausalLM"])
def test_a_checkpoint_is_what_its_architectures_say(config, what: str, tmp_path: Path) -> None:
    stem = "Llama4" if config.model_type == "llama4" else "Qwen3_5"
    config.architectures = [stem + what]
    config.save_pretrained(tmp_path)
    model = meta_model(open_checkpoint(tmp_path, weights=False).config)
    assert type(model).__name__ == stem + what


def test_what_text_needs_of_a_model_with_towers_is_its_language_model(tmp_path: Path) -> None:
    LLAMA4.architectures = ["Llama4ForConditionalGeneration"]
    model = meta_model(LLAMA4)
    assert type(model).__name__ == "Llama4ForConditionalGeneration"
    assert text_model(model) is model.language_model
    arch = bind(model)
    assert arch.layers == "language_model.model.layers" and "experts" in {group.name for group in arch.groups}
