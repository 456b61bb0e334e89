"""What a recipe leaves open is filled from the model's shapes, in numbers worked out here by hand."""

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from models import opened, tiny_gemma3, tiny_llama, tiny_qwen2
from recipes import grouped

from secateur.errors import RecipeError
from secateur.facts import Size
from secateur.methods.budget import plan_of, round_plans
from secateur.model.bind import bind
from secateur.model.group import GroupKey
from secateur.pruning.cost import params_after
from secateur.pruning.group_step import method_of
from secateur.pruning.resolve import Resolved, resolve
from secateur.recipe import Recipe, parse_recipe
from tests.families import tiny_family

UNIT, WIDTH = 3 * 48, 112  # of the tiny models: parameters of a channel, channels of an FFN


def resolved(model: Any = None, **short: Any) -> Resolved:
    """Resolve a recipe in short for a tiny llama of three layers, or for `model`."""
    asked = {"align": 8, "calibration": {"num_tokens": 4096, "sequence_length": 32}, **short}
    asked["calibration"] = {"domains": {"mine": {"files": ["mine.txt"]}}, **asked["calibration"]}
    return resolve(opened(model or tiny_llama(), parse_recipe(grouped(asked))))


def kept(plan: Any) -> dict[GroupKey, int]:
    return dict(plan.num_keep)


@pytest.mark.parametrize(
    ("factory", "asked", "expected"),
    [
        (tiny_llama, {}, 0.5),
        (tiny_llama, {"target_mix": 0.25}, 0.25),
        (tiny_llama, {"target_mix": 0.0}, 0.0),
        (tiny_llama, {"compensate": "none"}, 0.0),
        (tiny_llama, {"compensate": "none", "target_mix": 0.25}, 0.0),
        (tiny_llama, {"compensate": "bias"}, 0.0),
        (tiny_gemma3, {}, 0.0),
        (tiny_gemma3, {"target_mix": 0.0}, 0.0),
    ],
)
def test_half_of_the_drift_is_made_up_for_where_that_is_possible(factory, asked, expected):
    found = resolved(factory(), **asked)
    assert found.target_mix == found.recipe.repair.target_mix == method_of(found.recipe).target_mix == expected


def test_a_family_with_a_norm_behind_its_mlp_cannot_make_up_for_drift():
    with pytest.raises(RecipeError, match=r"target_mix: family gemma3_text normalises .* got 0\.25, set it to 0"):
        resolved(tiny_gemma3(), target_mix=0.25)


def test_the_method_is_the_recipes():
    short = {"score": "wanda", "compensate": "none", "damping": 0.5, "domain_weighting": "tokens"}
    found = method_of(parse_recipe(grouped({**short, "damping_factors": [2.0, 3.0]})))
    assert dataclasses.asdict(found) == {
        **{key: value for key, value in short.items() if key != "domain_weighting"},
        "weighting": "tokens",
        "damping_factors": (2.0, 3.0),
        "target_mix": 0.0,
    }


def wide(width: int, **config: Any) -> Any:
    """Return a llama on the meta device whose FFN is `width` wide and whose attention has 48 channels."""
    with torch.device("meta"):
        return type(tiny_llama())(tiny_llama(intermediate_size=width, **config).config)


@pytest.mark.parametrize(
    ("width", "asked", "num_tokens"),
    [
        (3200, {}, 51_200),
        (3201, {}, 16 * 3201),
        (8192, {}, 131_072),
        (8192, {"groups": ["kv_heads"], "remove": 0.002, "align": 1}, 51_200),
        (8192, {"groups": ["kv_heads"], "depth": 1, "remove": 0.33}, 131_072),  # folded into an FFN's reader
    ],
)
def test_tokens_follow_the_widest_reader_that_is_fitted(width, asked, num_tokens):
    asked = {"remove": 0.2, "calibration": {"sequence_length": 32}, **asked}
    found = resolved(wide(width), **asked)
    assert found.num_tokens == found.recipe.calibration.num_tokens == num_tokens
    assert found.warnings == ()


def test_the_alignment_follows_the_width():
    def align(width: int) -> int:
        return resolved(wide(width), align=None).align

    assert [align(width) for width in (4095, 4224, 4096)] == [64, 128, 256]


def test_damping_rises_by_the_tokens_that_are_missing_and_resolving_again_changes_nothing():
    few = {"num_tokens": 448, "sequence_length": 32}  # 1,120 are wanted: 10 for each of 112 channels
    found = resolved(calibration=few)
    assert found.damping == found.recipe.repair.damping == pytest.approx(0.0025, rel=1e-12)
    (warning,) = found.warnings
    assert "448 tokens are few for least squares over 112 channels (want 1,120)" in warning
    assert "damping rises from 0.001 to 0.0025" in warning
    again = resolve(opened(tiny_llama(), found.recipe))
    assert again.recipe == found.recipe and again.plans == found.plans and again.warnings == ()
    for asked in ({"damping": 0.01}, {"compensate": "none"}, {"calibration": {**few, "num_tokens": 1120}}):
        left = resolved(**{"calibration": few, **asked})
        assert left.damping == asked.get("damping", 0.001) and left.warnings == ()
    enough = {**few, "num_tokens": 1120}
    assert resolved(calibration=enough, damping=1e-4).damping == 1e-4
    # 0.0015 is more than the default and still less than what is missing asks for.
    assert resolved(calibration=few, damping=0.0015).damping == pytest.approx(0.0025, rel=1e-12)


def test_too_deep_a_cut_is_warned_of_kind_by_kind():
    def warned(units: float) -> tuple[str, ...]:
        return resolved(align=1, remove=units * 3 * WIDTH * UNIT / Size.of(tiny_llama()).num_params, depth=0).warnings

    assert warned(78 / 112) == ()  # 30.4% stay
    (warning,) = warned(79 / 112)  # 29.5% stay
    assert warning.startswith("71% of all ffn units go, more than they can give")


@pytest.mark.parametrize(("remove", "depth"), [(0.2, 0), (0.4, 2), (0.5, 1)])
def test_layers_and_widths_together_give_the_share(remove, depth):
    model = tiny_llama(num_layers=6)
    found, before = resolved(model, remove=remove, depth=depth), Size.of(model).num_params
    per_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert found.layers == tuple(range(6 - depth))
    (left,) = set(kept(found.plans[-1]).values())
    wanted = (remove * before - depth * per_layer) / ((6 - depth) * UNIT)
    assert left == 8 * round((WIDTH - wanted) / 8)
    gone = depth * per_layer + (6 - depth) * (WIDTH - left) * UNIT
    assert params_after(found) == before - gone
    assert found.prices_left.total == before - depth * per_layer


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


def test_groups_are_numbered_as_the_shorter_model_numbers_its_layers():
    found = resolved(tiny_llama(num_layers=6), removed_layers=[1, -2], protected_layers=[2], remove=0.45)
    assert found.layers == (0, 2, 3, 5) and found.depth == 2
    # The dense layer 2 is layer 1 of those left, and stays whole.
    assert [group.layer for group in found.groups] == [0, 2, 3]


def test_the_last_layers_that_are_not_protected_stand_for_those_not_chosen_yet():
    found = resolved(tiny_llama(num_layers=6), depth=2, remove=0.45, protected_layers=[-1])
    assert found.layers == (0, 1, 2, 5)
    with pytest.raises(RecipeError, match=r"one that is not in protected_layers must stay, so ask for 0 to 4"):
        resolved(tiny_llama(num_layers=6), depth=5, remove=0.45, protected_layers=[-1])


def test_rounds_share_the_removal():
    found = resolved(remove=0.3, rounds=3)
    assert found.removals == pytest.approx((0.1, 0.2, 0.3), rel=1e-12) and found.removals[-1] == 0.3
    widths = [set(kept(plan).values()) for plan in found.plans]
    wanted = [WIDTH - share * found.prices.total / (3 * UNIT) for share in (0.1, 0.2, 0.3)]
    assert [abs(width - count) <= 4 + 8 for (width,), count in zip(widths, wanted, strict=True)] == [True] * 3
    assert sorted((width for (width,) in widths), reverse=True) == [width for (width,) in widths]


def test_no_round_is_below_the_target_and_the_last_is_the_target():
    """Rounding to the nearest step must not let an early round take more than the last one."""
    found = resolved(remove=0.3, rounds=12)
    for earlier, later in zip(found.plans, found.plans[1:], strict=False):
        assert all(kept(earlier)[key] >= count for key, count in kept(later).items())
    # Widths that no multiple of 64 reaches: half way to 64 of 112 rounds to 64, three quarters would too.
    coarse = resolved(remove=0.15, rounds=2, align=64)
    assert set(kept(coarse.plans[-1]).values()) == {64}
    assert all(count >= 64 for plan in coarse.plans for count in kept(plan).values())


def test_min_keep_is_rounded_up_in_what_is_possible():
    """0.51 of 112 channels are 58, so 64 with align 8, and a third of each FFN's channels can go at most."""
    total = Size.of(tiny_llama()).num_params
    largest = 3 * (WIDTH - 64) * UNIT / total
    resolved(budget="curve", min_keep=0.51, remove=largest - 1e-6)
    with pytest.raises(RecipeError, match=r"out of reach") as caught:
        resolved(budget="curve", min_keep=0.51, remove=largest + 1e-6)
    assert f"at most {math.floor(1000 * largest) / 1000:.3f} " in str(caught.value)


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


def test_min_keep_is_checked_against_the_plan():
    plan = kept(resolved(remove=0.2).plans[-1])
    (width,) = set(plan.values())
    assert kept(resolved(remove=0.2, min_keep=width / WIDTH).plans[-1]) == plan
    with pytest.raises(RecipeError, match=r"out of reach.* lower min_keep"):
        resolved(remove=0.2, min_keep=width / WIDTH + 1e-6)


@pytest.mark.parametrize(
    ("factory", "asked", "message"),
    [
        (tiny_qwen2, {"compensate": "bias"}, "repair.compensate: family qwen2 cannot store a bias in its readers"),
        (tiny_llama, {"calibration": {"sequence_length": 257}}, "257 is longer than the model's 256 positions"),
        (tiny_llama, {"max_shard_size": "many"}, "output.max_shard_size"),
        (lambda: tiny_family("gemma3_multimodal"), {"budget": "curve"}, "choose.budget: curve with protected_layers"),
        (lambda: tiny_family("gemma3_multimodal"), {"protected_layers": [0]}, "choose.budget: uniform with protected"),
        (
            lambda: tiny_family("mixtral"),
            {"groups": ["experts"], "budget": "curve"},
            "remove.groups: experts and their",
        ),
        (
            lambda: tiny_family("mixtral"),
            {"groups": ["experts"], "domain_weighting": "minimax"},
            "choose.domain_weighting: minimax looks at one reader's cut",
        ),
        (tiny_llama, {"score": "reap"}, "choose.score: reap is of whole experts, groups has ffn too"),
    ],
)
def test_what_the_model_cannot_do_is_said_before_a_weight_is_read(factory, asked, message):
    with pytest.raises(RecipeError, match=message):
        resolved(factory(), **asked)


def test_nothing_of_the_recipe_is_lost():
    short = {"seed": 7, "score": "flap", "groups": ["ffn", "kv_heads"], "max_shard_size": "2GB", "min_keep": 0.125}
    found = resolved(**short).recipe
    again = parse_recipe(found.model_dump(mode="json", exclude_none=True))
    assert again == found
    assert (found.seed, found.choose.score, found.remove.groups) == (7, "flap", ("ffn", "kv_heads"))
    assert found.output.max_shard_size == "2GB" and found.remove.min_keep == 0.125
    filled = Recipe().filled(remove={"align": 64}, choose={"rounds": 2})
    assert filled.remove.align == 64 and filled.choose.rounds == 2 and filled.remove.share == 0.2
    assert filled.repair == Recipe().repair and Recipe().remove.align is None


def test_a_group_that_is_not_in_the_family_is_named():
    with pytest.raises(Exception, match=r"no group 'fnn'; .* did you mean 'ffn'"):
        bind(tiny_llama()).select(("fnn",))


def test_a_curve_has_64_levels_at_most_and_the_least_is_one_of_them():
    """1,024 channels in steps of 8 are 128 steps, so that levels are multiples of 16; 520 is none."""
    model = wide(1024)
    largest = 3 * (1024 - 528) * UNIT / Size.of(model).num_params
    asked = {"budget": "curve", "min_keep": 520 / 1024, "calibration": {"num_tokens": 10240, "sequence_length": 32}}
    resolved(model, remove=largest - 1e-6, **asked)
    with pytest.raises(RecipeError, match=r"out of reach"):
        resolved(model, remove=largest + 1e-6, **asked)


def test_blocks_longer_than_the_model_are_refused_when_it_is_opened():
    with pytest.raises(RecipeError, match="257 is longer than the model's 256 positions"):
        opened(tiny_llama(), parse_recipe({"calibration": {"sequence_length": 257}}))


def test_a_group_that_stays_whole_is_whole_in_every_round():
    """90 channels lie nearer to one step of 64 than to two."""
    found = resolved(tiny_llama(intermediate_size=90), align=8, remove=0.1)
    whole = plan_of(found.groups, found.prices, {(layer, "ffn"): 90 for layer in range(3)})
    plans = round_plans(found.groups, found.prices, whole, [0.5, 1.0], 64)
    assert [set(kept(plan).values()) for plan in plans] == [{90}, {90}]


def test_text_without_general_prose_is_noted():
    def notes(domains: dict[str, Any]) -> list[str]:
        calibration = {"num_tokens": 4096, "sequence_length": 32, "domains": domains}
        return [each for each in resolved(calibration=calibration).warnings if "general prose" in each]

    [note] = notes({"code": {"installed": "code"}, "talk": {"installed": "dialogue"}, "self": {"answers": True}})
    assert note.startswith("calibration.domains: no general prose that people wrote, so text unlike these domains")
    for prose in ({"installed": "web"}, {"installed": "multilingual"}, {"files": ["mine.txt"]}, {"dataset": "a/b"}):
        assert not notes({"code": {"installed": "code"}, "other": prose})
