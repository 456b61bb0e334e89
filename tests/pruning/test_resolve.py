"""What a recipe leaves open is filled from the model's shapes, in numbers worked out here by hand."""

import math
import re
from typing import Any

import pytest
import torch
from models import opened, tiny_llama
from recipes import grouped

from secateur.errors import RecipeError
from secateur.facts import Size
from secateur.model.group import GroupKey
from secateur.pruning.resolve import Resolved, resolve
from secateur.recipe import parse_recipe

UNIT, WIDTH = 3 * 48, 112  # of the tiny models: parameters of a channel, channels of an FFN


def resolved(model: Any = None, **short: Any) -> Resolved:
    """Resolve a recipe in short for a tiny llama of three layers, or for `model`."""
    asked = {"align": 8, "calibration": {"num_tokens": 4096, "sequence_length": 32}, **short}
    asked["calibration"] = {"domains": {"mine": {"files": ["mine.txt"]}}, **asked["calibration"]}
    return resolve(opened(model or tiny_llama(), parse_recipe(grouped(asked))))


def kept(plan: Any) -> dict[GroupKey, int]:
    return dict(plan.num_keep)


def wide(width: int, **config: Any) -> Any:
    """Return a llama on the meta device whose FFN is `width` wide and whose attention has 48 channels."""
    with torch.device("meta"):
        return type(tiny_llama())(tiny_llama(intermediate_size=width, **config).config)


def test_layers_that_take_the_share_alone_leave_the_widths_whole():
    model = tiny_llama(num_layers=6)
    per_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    share = 2 * per_layer / Size.of(model).num_params
    found = resolved(model, remove=share, depth=2, rounds=2, budget="curve")
    assert found.removals == (0.0,) and set(kept(found.plans[0]).values()) == {WIDTH}
    assert found.recipe.choose.rounds == 1
    # One step of the least kind more or less is the widths' to give.
    step = 4 * 8 * UNIT / Size.of(model).num_params
    assert resolved(model, remove=share + 0.4 * step, depth=2).removals == (0.0,)
    assert resolved(model, remove=share + 0.6 * step, depth=2).removals[0] > 0
    assert resolved(model, remove=share - 0.4 * step, depth=2).removals == (0.0,)
    with pytest.raises(
        RecipeError, match=r"remove\.depth: 2 layers .* use depth 1 at most, or remove at least"
    ) as caught:
        resolved(model, remove=share - 0.6 * step, depth=2)
    assert f"at least {math.ceil(1e4 * share) / 1e4:.4f}." in str(caught.value)


def test_the_least_share_that_is_named_can_be_where_heads_are_coarse():
    """Of four KV heads three cannot stay, so the least step is two."""
    model = wide(112, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(RecipeError, match=r"nothing would go; .*or name a group of smaller units\.") as caught:
        resolved(model, remove=0.01, groups=["kv_heads"])
    named = re.search(r"at least (0\.\d+)", str(caught.value))
    assert named is not None
    found = resolved(model, remove=float(named[1]), groups=["kv_heads"])
    assert set(kept(found.plans[0]).values()) == {2}


@pytest.mark.parametrize("budget", ["uniform", "curve"])
def test_the_largest_share_that_is_named_can_be_with_the_layers_that_then_go(budget):
    """More to remove lets more layers go by default: each share has its own limit, and theirs is named."""
    asked = {"align": 16, "budget": budget, "calibration": {"sequence_length": 32}}
    model = wide(1536, num_layers=30)
    with pytest.raises(RecipeError, match=r"out of reach") as caught:
        resolved(model, remove=0.998, **asked)
    named = re.search(r"at most (0\.\d+) with", str(caught.value))
    assert named is not None
    largest = float(named[1])
    found = resolved(model, remove=largest, **asked)
    assert 0 < found.depth < 29 and abs(found.largest - largest) < 0.002
    with pytest.raises(RecipeError, match=r"out of reach"):
        resolved(model, remove=largest + 0.01, **asked)


def test_text_without_general_prose_is_noted():
    def notes(domains: dict[str, Any]) -> list[str]:
        calibration = {"num_tokens": 4096, "sequence_length": 32, "domains": domains}
        return [each for each in resolved(calibration=calibration).warnings if "general prose" in each]

    [note] = notes({"code": {"installed": "code"}, "talk": {"installed": "dialogue"}, "self": {"answers": True}})
    assert note.startswith("calibration.domains: no general prose that people wrote, so text unlike these domains")
    for prose in ({"installed": "web"}, {"installed": "multilingual"}, {"files": ["mine.txt"]}, {"dataset": "a/b"}):
        assert not notes({"code": {"installed": "code"}, "other": prose})


def test_a_damping_that_few_tokens_raise_is_not_raised_again():
    found = resolved(calibration={"num_tokens": 320, "sequence_length": 32})
    assert found.recipe.repair.damping == pytest.approx(1e-3 * 10 * WIDTH / 320)
    assert resolve(opened(tiny_llama(), found.recipe)).recipe == found.recipe
