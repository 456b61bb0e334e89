"""The curve budget equals brute force, meets its target, keeps within limits."""

import itertools
import random

import pytest

from secateur.errors import RecipeError
from secateur.methods.budget import Prices, least_keep
from secateur.methods.curve import GroupProfile, curve_plan, least_loss, predicted_rise
from secateur.model.group import Axis, Group, Linears

NUM_PARAMS = 10_000_000


def group_of(layer: int, name: str, num_units: int, params_per_unit: int, width: int = 1) -> Group:
    axis = Axis("reader", (width,))
    kind = "channels" if width == 1 else "heads"
    return Group(layer, name, kind, "unit", num_units, params_per_unit, Linears((axis,), axis))


def prices_of(groups: tuple[Group, ...]) -> Prices:
    return Prices({(g.layer, g.name): g.params_per_unit for g in groups}, (), NUM_PARAMS, "parameters")


def random_case(num_layers: int, seed: int) -> tuple[tuple[Group, ...], dict[tuple[int, str], GroupProfile]]:
    """FFN of 256 channels in steps of 32 and five heads per layer; the middle layers matter least; two domains."""
    choose = random.Random(seed)
    groups, profiles = [], {}
    for layer in range(num_layers):
        middle = min(layer, num_layers - 1 - layer) + 1
        for group, step in ((group_of(layer, "heads", 5, 30_720, 16), 1), (group_of(layer, "ffn", 256, 576), 32)):
            levels = tuple(range(group.num_units, 0, -step))
            gains = [choose.uniform(0.01, 0.05) * number for number in range(len(levels))]
            slopes = {"prose": choose.uniform(1, 4) / middle, "code": choose.uniform(1, 9) / middle}
            profiles[layer, group.name] = GroupProfile(levels, tuple(itertools.accumulate(gains)), slopes)
            groups.append(group)
    return tuple(groups), profiles


def weighted_rise(profiles, plan, weights=(0.5, 0.5)) -> float:
    rise = predicted_rise(profiles, plan.num_keep)
    return weights[0] * rise["prose"] + weights[1] * rise["code"]


@pytest.mark.parametrize("seed", range(20))
def test_knapsack_equals_brute_force(seed: int) -> None:
    choose = random.Random(seed)
    removals = [[0, *(choose.randint(1, 30) for _ in range(choose.randint(0, 3)))] for _ in range(5)]
    losses = [[choose.uniform(0, 1) for _ in options] for options in removals]
    target = choose.randint(0, sum(max(options) for options in removals))
    chosen = least_loss(removals, losses, target)

    def removed(options):
        return sum(column[option] for column, option in zip(removals, options, strict=True))

    def loss(options):
        return sum(column[option] for column, option in zip(losses, options, strict=True))

    possible = itertools.product(*(range(len(options)) for options in removals))
    assert removed(chosen) >= target
    assert loss(chosen) == pytest.approx(min(loss(options) for options in possible if removed(options) >= target))


def test_knapsack_of_large_odd_prices_still_meets_the_target() -> None:
    removals = [[0, 10_000_019 * k, 20_000_003 * k] for k in (1, 2, 3)]  # no common step, so prices are rounded
    losses = [[0.0, 1.0, 3.0]] * 3
    for target in (1, 10_000_019, 30_000_000, 60_000_057, sum(options[-1] for options in removals)):
        chosen = least_loss(removals, losses, target)
        assert sum(options[option] for options, option in zip(removals, chosen, strict=True)) >= target
    assert least_loss(removals, losses, 29_990_000) == [0, 0, 1]


@pytest.mark.parametrize("remove", [0.001, 0.01, 0.05, 0.1, 0.13])
def test_target_is_met_within_one_level(remove: float) -> None:
    groups, profiles = random_case(6, 0)
    plan = curve_plan(groups, profiles, prices_of(groups), remove)
    assert 0 <= plan.removed_share - remove < 30_720 / NUM_PARAMS
    gone = sum((g.num_units - plan.num_keep[g.layer, g.name]) * g.params_per_unit for g in groups)
    assert plan.cost_before - plan.cost_after == gone
    assert all(plan.num_keep[key] in profile.levels for key, profile in profiles.items())


def test_more_asked_is_never_a_lower_predicted_rise_and_plans_repeat() -> None:
    groups, profiles = random_case(6, 1)
    plans = [curve_plan(groups, profiles, prices_of(groups), step / 100) for step in range(1, 16)]
    rises = [weighted_rise(profiles, plan) for plan in plans]
    assert rises == sorted(rises) and rises[0] < rises[-1]
    assert plans == [curve_plan(groups, profiles, prices_of(groups), step / 100) for step in range(1, 16)]


def test_layers_that_matter_less_are_cut_more_and_beat_equal_widths() -> None:
    groups, profiles = random_case(8, 2)
    plan = curve_plan(groups, profiles, prices_of(groups), 0.07)
    kept = [plan.num_keep[layer, "ffn"] / 256 + plan.num_keep[layer, "heads"] / 5 for layer in range(8)]
    assert (kept[0] + kept[-1]) / 2 > (kept[3] + kept[4]) / 2
    equal = {(g.layer, g.name): 3 if g.name == "heads" else 160 for g in groups}
    removed = sum((g.num_units - equal[g.layer, g.name]) * g.params_per_unit for g in groups)
    plan = curve_plan(groups, profiles, prices_of(groups), removed / NUM_PARAMS)
    rise = predicted_rise(profiles, equal)
    assert weighted_rise(profiles, plan) < 0.9 * (rise["prose"] + rise["code"]) / 2


def test_domain_weights_decide_whose_rise_is_least() -> None:
    groups, profiles = random_case(6, 3)
    plans = {
        name: curve_plan(
            groups, profiles, prices_of(groups), 0.08, domain_weights={"prose": 1e-9, "code": 1e-9} | {name: 1.0}
        )
        for name in ("prose", "code")
    }
    rises = {name: predicted_rise(profiles, plan.num_keep) for name, plan in plans.items()}
    assert rises["prose"]["prose"] < rises["code"]["prose"] and rises["code"]["code"] < rises["prose"]["code"]


def whole(groups, *layers: int) -> dict:
    """Return the smallest widths under which these layers stay whole."""
    return least_keep(groups, 32, 0.0) | {(g.layer, g.name): g.num_units for g in groups if g.layer in layers}


def test_smallest_widths_are_kept() -> None:
    groups, profiles = random_case(6, 4)
    least = {(layer, "ffn"): 128 for layer in range(6)} | {
        (layer, name): width for layer in (0, 5) for name, width in (("ffn", 256), ("heads", 5))
    }
    plan = curve_plan(groups, profiles, prices_of(groups), 0.07, min_keep=least)
    assert all(plan.num_keep[layer, name] == width for layer in (0, 5) for name, width in (("ffn", 256), ("heads", 5)))
    assert min(plan.num_keep[layer, "ffn"] for layer in range(6)) >= 128


def test_out_of_reach_says_the_largest_possible_and_that_works() -> None:
    groups, profiles = random_case(6, 5)
    with pytest.raises(RecipeError, match=r"at most 0\.100 with each at its smallest width") as caught:
        curve_plan(groups, profiles, prices_of(groups), 0.5, min_keep=whole(groups, 0, 1))
    assert "10,000,000" in str(caught.value)
    assert curve_plan(groups, profiles, prices_of(groups), 0.1, min_keep=whole(groups, 0, 1)).removed_share >= 0.1


def ends_of(groups, profiles, remove: float) -> dict[str, dict[str, float]]:
    """Return the predicted rises of the plan that serves one domain alone, by that domain."""
    others = {"prose": 0.0, "code": 0.0}
    plans = {
        name: curve_plan(groups, profiles, prices_of(groups), remove, domain_weights=others | {name: 1.0})
        for name in others
    }
    return {name: predicted_rise(profiles, plan.num_keep) for name, plan in plans.items()}


@pytest.mark.parametrize("seed", range(3))
def test_a_limited_domain_keeps_within_its_limit_at_least_cost_to_the_average(seed: int) -> None:
    groups, profiles = random_case(12, seed)
    free = curve_plan(groups, profiles, prices_of(groups), 0.15)
    ends = ends_of(groups, profiles, 0.15)
    highest = predicted_rise(profiles, free.num_keep)["prose"]
    assert curve_plan(groups, profiles, prices_of(groups), 0.15, max_rise={"prose": highest}) == free
    limit = (highest + ends["prose"]["prose"]) / 2
    limited = curve_plan(groups, profiles, prices_of(groups), 0.15, max_rise={"prose": limit})
    assert predicted_rise(profiles, limited.num_keep)["prose"] <= limit < highest
    assert limited.removed_share >= 0.15
    assert weighted_rise(profiles, free) < weighted_rise(profiles, limited) < sum(ends["prose"].values()) / 2


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_two_limited_domains_keep_within_their_limits(seed: int, share: float) -> None:
    groups, profiles = random_case(12, seed)
    # What some weights reach can be kept within, though equal weights do not.
    weights = {"prose": share, "code": 1 - share}
    reached = predicted_rise(
        profiles, curve_plan(groups, profiles, prices_of(groups), 0.15, domain_weights=weights).num_keep
    )
    limits = {name: 1.005 * rise for name, rise in reached.items()}
    free = predicted_rise(profiles, curve_plan(groups, profiles, prices_of(groups), 0.15).num_keep)
    assert any(free[name] > limits[name] for name in limits)
    plan = curve_plan(groups, profiles, prices_of(groups), 0.15, max_rise=limits)
    assert all(rise <= limits[name] for name, rise in predicted_rise(profiles, plan.num_keep).items())


def test_a_limit_out_of_reach_says_the_largest_possible_and_that_works() -> None:
    groups, profiles = random_case(6, 8)
    limits = {"code": 0.05}
    with pytest.raises(RecipeError, match=r"\(code 0\.05 nats per token\); at most 0\.\d\d\d keeps") as caught:
        curve_plan(groups, profiles, prices_of(groups), 0.08, max_rise=limits)
    possible = float(str(caught.value).partition("at most ")[2][:5])
    plan = curve_plan(groups, profiles, prices_of(groups), possible, max_rise=limits)
    assert predicted_rise(profiles, plan.num_keep)["code"] <= 0.05
    with pytest.raises(RecipeError):
        curve_plan(groups, profiles, prices_of(groups), possible + 0.001, max_rise=limits)
