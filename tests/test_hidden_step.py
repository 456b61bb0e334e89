"""Hidden width in a recipe: planned from the config, cut before layers and widths, counted in `remove`, reloadable."""

import json

import pytest
import torch
from models import tiny_ids, tiny_llama, tiny_qwen2
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

import secateur
from secateur.inspection import inspect
from secateur.recipe import parse_recipe
from secateur.resolve_hidden import planned_shape, resolve_for

TOKENIZER = tiny_tokenizer()
FACTORIES = {"llama": tiny_llama, "qwen2": tiny_qwen2}


def num_params(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("compensate", ["none", "least_squares"])
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_hidden_width_layers_and_widths_together_meet_remove_and_reload(factory, compensate, recipe, tmp_path):
    asked = {**recipe, "hidden_size": 40, "depth": 1, "remove": 0.5, "compensate": compensate}
    result = secateur.prune(factory(), asked, tokenizer=TOKENIZER, out=tmp_path / "out")
    before = num_params(factory())
    assert 1 - num_params(result.model) / before == pytest.approx(0.5, abs=2 * 3 * 40 * 8 / before)
    assert result.summary.remove_reached == 1 - num_params(result.model) / before
    assert (result.summary.hidden_sizes, result.summary.num_layers) == ((48, 40), (3, 2))
    assert result.summary.outcome.share_gone == pytest.approx(result.summary.remove_reached, abs=1e-9)
    kept = json.loads((tmp_path / "out" / "keep.json").read_text())
    assert kept[0]["group"] == "hidden" and len(kept[0]["keep"]) == 40 and kept[1]["group"] == "layers"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.config.hidden_size == 40
    assert torch.equal(reloaded(tiny_ids()).logits, result.model(tiny_ids()).logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "hidden size" in card


def test_hidden_width_alone_is_what_remove_channels_does(recipe):
    share = 1 - num_params(planned_shape(parse_recipe({"hidden_size": 40}), tiny_llama())) / num_params(tiny_llama())
    asked = {**recipe, "hidden_size": 40, "remove": share, "evaluate": False}
    first, second = (secateur.prune(tiny_llama(), asked, tokenizer=TOKENIZER) for _ in range(2))
    assert {len(keep) for keep in first.keeps.values()} == {112}
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_the_plan_is_of_the_narrower_model_and_reads_no_weight(checkpoints):
    resolved = resolve_for(parse_recipe({"hidden_size": 40, "remove": 0.3, "align": 8}), tiny_qwen2())
    assert resolved.prices.total == num_params(tiny_qwen2())
    assert resolved.prices.gone_before == num_params(tiny_qwen2()) - num_params(
        planned_shape(resolved.recipe, tiny_qwen2())
    )
    found = inspect(checkpoints["llama"], parse_recipe({"hidden_size": 40, "remove": 0.3, "align": 8}))
    assert found.hidden_sizes == (48, 40)
    assert found.remove_reached == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 41, "remove": 0.3}, "hidden_size: family llama takes only multiples of .* use 40 or 44"),
        ({"hidden_size": 48}, "hidden_size: must be above 0 and below the model's own 48"),
        ({"hidden_size": 24, "remove": 0.1}, "hidden_size: 24 channels leave out 0.5.* or remove at least 0.5"),
        ({"hidden_size": 40, "groups": ["kv_heads"], "target": "kv_bytes"}, "hidden_size: .* not in target kv_bytes"),
    ],
)
def test_what_cannot_be_is_one_sentence(changes, message, recipe):
    with pytest.raises(secateur.SecateurError, match=message):
        secateur.prune(tiny_llama(), {**recipe, **changes}, tokenizer=TOKENIZER)
