"""A language model inside a larger class: it is pruned in place, and what sees images stays as it was, bit for bit."""

import pytest
import torch
from recipes import grouped
from safetensors.torch import load_file

import secateur
from secateur.errors import RecipeError
from secateur.recipe_file import parse_recipe
from tests.families import tiny_family
from tests.models import opened
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize("name", ["gemma3_multimodal", "qwen2_5_vl"])
def test_a_run_on_a_saved_model_leaves_the_rest_untouched(name, recipe, tmp_path) -> None:
    model = tiny_family(name)
    model.config.get_text_config().vocab_size = 320
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").write_text("{}")
    result = secateur.prune(tmp_path / "model", grouped(recipe | {"remove": 0.15, "rounds": 2}), out=tmp_path / "out")
    assert result.summary.reload_max_abs_difference == 0
    assert (tmp_path / "out/preprocessor_config.json").is_file()
    before, after = (load_file(tmp_path / which / "model.safetensors") for which in ("model", "out"))
    assert set(before) == set(after)
    seeing = [key for key in before if "vis" in key or "projector" in key]
    assert len(seeing) > 10
    assert all(torch.equal(before[key], after[key]) for key in seeing)
    narrower = {key for key in before if before[key].shape != after[key].shape}
    assert len(narrower) == 3 * 3 and all("vis" not in key and ".mlp." in key for key in narrower)


def test_layers_of_different_widths_are_refused() -> None:
    model = tiny_family("gemma3_multimodal")
    recipe = parse_recipe(grouped({"remove": 0.1, "budget": "curve"}))
    with pytest.raises(RecipeError, match="language model inside a larger class"):
        opened(model, recipe)
