"""Types that have a language model and a whole one with towers: a checkpoint is what its architectures say."""

from pathlib import Path

import pytest
from transformers import Llama4Config, Qwen3_5Config

from secateur.model.bind import bind, text_model
from secateur.model.checkpoint import meta_model, open_checkpoint

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
