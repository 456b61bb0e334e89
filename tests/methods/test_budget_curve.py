"""The curve budget of twelve layers with domains that have limits; of a few layers brute force says all."""

import itertools
import random
from dataclasses import replace

import pytest

from secateur.methods.budget import Prices
from secateur.methods.curve import GroupProfile, curve_plan, predicted_rise
from secateur.model.group import Axis, Group, Linears

NUM_PARAMS = 10_000_000


def group_of(layer: int, name: str, num_units: int, params_per_unit: int, width: int = 1) -> Group:
    axis = Axis("reader", (width,))
    kind = "channels" if width == 1 else "heads"
    return Group(name, kind, "unit", Linears((axis,), axis), layer, num_units, params_per_unit)


def prices_of() -> Prices:
    return Prices((), NUM_PARAMS)


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


def ends_of(groups, profiles, remove: float) -> dict[str, dict[str, float]]:
    """Return the predicted rises of the plan that serves one domain alone, by that domain."""
    ends = {}
    for name in ("prose", "code"):
        alone = {key: replace(each, slopes={name: each.slopes[name]}) for key, each in profiles.items()}
        ends[name] = predicted_rise(profiles, curve_plan(groups, alone, prices_of(), remove).num_keep)
    return ends


@pytest.mark.parametrize("seed", range(2))
def test_a_limited_domain_keeps_within_its_limit_at_least_cost_to_the_average(seed: int) -> None:
    groups, profiles = random_case(12, seed)
    free = curve_plan(groups, profiles, prices_of(), 0.15)
    ends = ends_of(groups, profiles, 0.15)
    highest = predicted_rise(profiles, free.num_keep)["prose"]
    assert curve_plan(groups, profiles, prices_of(), 0.15, max_rise={"prose": highest}) == free
    limit = (highest + ends["prose"]["prose"]) / 2
    limited = curve_plan(groups, profiles, prices_of(), 0.15, max_rise={"prose": limit})
    assert predicted_rise(profiles, limited.num_keep)["prose"] <= limit < highest
    assert limited.removed_share >= 0.15
    assert weighted_rise(profiles, free) < weighted_rise(profiles, limited) < sum(ends["prose"].values()) / 2
