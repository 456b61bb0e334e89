"""Budgets against brute force on random groups: every choice tried, ties, limits of configs, narrowed groups."""

import itertools
import math
import random
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import pytest
import reference_methods as reference
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.methods.budget import (
    MAX_LEVELS,
    GroupProfile,
    Prices,
    curve_plan,
    default_align,
    least_keep,
    least_loss,
    least_step,
    levels_of,
    nearest_count,
    params_gone,
    plan_of,
    predicted_rise,
    round_down,
    round_plans,
    round_shares,
    uniform_plan,
)
from secateur.model.group import Group, Linears, Rows

AXIS = Linears((Rows("writer.weight", 0, (1,)),), Rows("reader.weight", 1, (1,)))
SHARE = st.floats(0.001, 0.999)


def group_of(layer: int, name: str, num_units: int, params: int = 1, **limits) -> Group:
    return Group(name, "channels" if name == "ffn" else "heads", "unit", AXIS, layer, num_units, params, **limits)


def prices_of(total: int) -> Prices:
    return Prices((), total)


@dataclass(frozen=True)
class Case:
    """Layers with FFN channels in steps of `align`, heads one by one, or both; `demand`: what configs say of heads."""

    num_layers: int
    num_units: dict[str, int]
    per_unit: dict[str, int]
    align: int
    demand: dict
    rest: float

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        return tuple(
            group_of(layer, name, count, self.per_unit[name], **self.demand if name == "heads" else {})
            for layer in range(self.num_layers)
            for name, count in self.num_units.items()
        )

    @cached_property
    def prices(self) -> Prices:
        inside = sum(group.num_units * self.per_unit[group.name] for group in self.groups)
        return prices_of(inside + int(self.rest * inside))

    def step(self, group: Group) -> int:
        return self.align if group.name == "ffn" else 1

    def key(self, group: Group) -> tuple[int, str]:
        return group.layer, group.name


def cases(*, limits: bool = True, max_layers: int = 3) -> st.SearchStrategy[Case]:
    units = {"ffn": st.integers(8, 40), "heads": st.integers(2, 6)}
    demands = [{}, {"at_least": 2}, {"multiple_of": 2}, {"divides": (2, 24)}] if limits else [{}]
    return st.builds(
        Case,
        st.integers(1, max_layers),
        st.sampled_from([("ffn",), ("heads",), ("heads", "ffn")]).flatmap(
            lambda names: st.fixed_dictionaries({name: units[name] for name in names})
        ),
        st.fixed_dictionaries({name: st.integers(1, 60) for name in units}),
        st.integers(1, 8),
        st.sampled_from(demands),
        st.floats(0, 1),
    )


def is_nearest(count: int, width: Fraction, case: Case, group: Group) -> bool:
    """Floats may decide between two counts of the same distance, no more."""
    near = (width + sign * Fraction(1, 10**9) for sign in (-1, 0, 1))
    return count in {reference.nearest(each, case.step(group), group.num_units, group.allows) for each in near}


@given(cases(), SHARE)
@settings(max_examples=80)
def test_uniform_takes_the_nearest_count_of_what_is_still_missing(case: Case, remove: float) -> None:
    prices, groups = case.prices, case.groups
    try:
        plan = uniform_plan(groups, prices, remove, case.align)
    except RecipeError as error:
        assert "out of reach" in str(error) or "nothing would go" in str(error)
        return
    left, missing = list(groups), Fraction(remove) * prices.total
    dearest_first = sorted(
        {g.name for g in groups}, key=lambda n: -max(case.step(g) * g.params_per_unit for g in groups if g.name == n)
    )
    if len(dearest_first) == 2 and len({case.step(g) * g.params_per_unit for g in groups}) == 1:
        dearest_first = sorted(dearest_first)
    for name in dearest_first:
        share = 1 - missing / sum(group.num_units * group.params_per_unit for group in left)
        for group in (group for group in left if group.name == name):
            count = plan.num_keep[case.key(group)]
            assert is_nearest(count, group.num_units * share, case, group), (name, count)
            missing -= (group.num_units - count) * group.params_per_unit
        left = [group for group in left if group.name != name]
    gone = sum((group.num_units - plan.num_keep[case.key(group)]) * group.params_per_unit for group in groups)
    assert (plan.cost_before, plan.cost_after) == (prices.total, prices.total - gone) and gone > 0
    assert plan.removed_share == pytest.approx(gone / prices.total, rel=1e-12)


def test_a_tie_of_dearest_steps_goes_by_name_and_the_last_step_stays_where_it_is_the_nearest() -> None:
    groups = (group_of(0, "ffn", 100), group_of(0, "heads", 10, 10))
    plan = uniform_plan(groups, prices_of(1000), 0.053, 1)
    # 53 of 200: 26.5% of ten heads are 3, and 23 channels make up for the rest.
    assert plan.num_keep == {(0, "heads"): 7, (0, "ffn"): 77}
    even = uniform_plan((group_of(0, "ffn", 100, 10), groups[1]), prices_of(1100), 0.1, 1)
    assert even.num_keep == {(0, "ffn"): 90, (0, "heads"): 9}
    channels, heads, alone = group_of(0, "ffn", 400), group_of(0, "heads", 4, 10), prices_of(400)
    # A tenth of four heads is nearer to none, but one must stay and channels make up for it.
    assert uniform_plan((heads, channels), prices_of(440), 0.9, 1).num_keep == {(0, "heads"): 1, (0, "ffn"): 34}
    assert uniform_plan((channels,), alone, 394 / 400, 8).num_keep == {(0, "ffn"): 8}
    with pytest.raises(RecipeError, match="out of reach"):
        uniform_plan((channels,), alone, 397 / 400, 8)


def test_out_of_reach_and_less_than_half_a_step_say_what_is_possible_and_that_works() -> None:
    smollm = tuple(group_of(layer, "ffn", 1536, 3 * 576) for layer in range(30))
    prices = prices_of(134_515_008)
    with pytest.raises(RecipeError, match=r"134,515,008 .*at most 0\.567 with each"):
        uniform_plan(smollm, prices, 0.9, 64)
    assert set(uniform_plan(smollm, prices, 0.567, 64).num_keep.values()) == {64}
    with pytest.raises(RecipeError, match=r"nothing would go; .*at least 0\.0124"):
        uniform_plan(smollm, prices, 0.001, 64)
    assert uniform_plan(smollm, prices, 0.0124, 64).removed_share > 0


@given(cases(), st.fractions(0, 50))
@settings(max_examples=60)
def test_counts_and_levels_are_those_that_the_config_can_state(case: Case, width: Fraction) -> None:
    least = least_keep(case.groups, case.align)
    for group in case.groups:
        step = case.step(group)
        assert least[case.key(group)] == reference.smallest(group.num_units, step, group.allows)
        count = nearest_count(group, float(width), step)
        assert is_nearest(count, Fraction(float(width)), case, group)
        assert count == group.num_units or (group.allows(count) and count % step == 0)
        levels = [n for n in range(group.num_units - 1, 0, -1) if n % step == 0 and group.allows(n)]
        assert list(levels_of(group, group.num_units, case.align)) == [group.num_units, *levels]


def test_halves_go_to_the_even_multiple_and_never_above_all() -> None:
    group = group_of(0, "ffn", 100)
    assert [nearest_count(group, width, 16) for width in (8, 24, 40, 56, 200, 95, 100)] == [16, 32, 32, 64, 100, 96, 96]
    allowed = group_of(0, "heads", 12, divides=(1, 12))  # 1, 2, 3, 4, 6, 12
    assert [nearest_count(allowed, width, 1) for width in (5, 7, 8, 10, 0)] == [4, 6, 6, 12, 1]


@given(st.integers(1, 3000), st.integers(1, 64))
@example(64 * 64, 64)
def test_levels_are_multiples_of_the_least_stride_that_gives_few_enough(num_units: int, step: int) -> None:
    stride = next(step * k for k in itertools.count(1) if num_units <= MAX_LEVELS * step * k)
    expected = [num_units, *(count for count in range(num_units - 1, 0, -1) if count % stride == 0)]
    assert list(levels_of(group_of(0, "ffn", num_units), num_units, step)) == expected


@settings(max_examples=50)
@given(cases(), st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_rounds_are_on_the_way_and_never_past_the_target(case: Case, shares: list[float], choose) -> None:
    groups = case.groups
    target = {case.key(g): choose.choice(levels_of(g, g.num_units, case.align)) for g in groups}
    plan = plan_of(groups, case.prices, target)
    *rounds, last = round_plans(groups, case.prices, plan, [*shares, 1.0], case.align)
    assert last is plan and len(rounds) == len(shares)
    for share, found in zip(shares, rounds, strict=True):
        for group in groups:
            goal = target[case.key(group)]
            count, width = found.num_keep[case.key(group)], group.num_units - (group.num_units - goal) * Fraction(share)
            assert count >= goal
            assert count == goal or is_nearest(count, width, case, group)
        gone = sum((g.num_units - found.num_keep[case.key(g)]) * g.params_per_unit for g in groups)
        assert found.cost_after == case.prices.total - gone


def test_shares_of_rounds_promises_and_prices_are_rounded_as_meant() -> None:
    assert 114 / 323 * 323 > 114
    assert prices_of(323).to_remove(114 / 323) == 114, "not one more by rounding"
    assert [prices_of(10).to_remove(share) for share in (0.1, 0.11, 0.2, 1.0)] == [1, 2, 2, 10]
    assert round_shares(4) == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=1e-12) and round_shares(1) == [1.0]
    assert [round_down(share) for share in (0.1239, 0.5, 0.9999, -1.0)] == ["0.123", "0.500", "0.999", "0.000"]


def profiles_of(case: Case, seed: int) -> dict:
    """A few levels per group; losses are whole numbers or multiples of 0.37, so that many choices tie."""
    choose, profiles = random.Random(seed), {}
    for group in case.groups:
        every = levels_of(group, group.num_units, case.align)
        levels = (every[0], *sorted(choose.sample(every[1:], min(3, len(every) - 1)), reverse=True))
        errors = itertools.accumulate(choose.randint(0, 3) * (0.37 if seed % 2 else 1.0) for _ in levels[1:])
        slopes = {"prose": float(choose.randint(0, 3)), "code": float(choose.randint(1, 4))}
        profiles[case.key(group)] = GroupProfile(levels, (0.0, *errors), slopes)
    return profiles


class Brute:
    """The same groups, every choice of levels tried."""

    def __init__(self, case: Case, profiles: dict) -> None:
        self.profiles = [profiles[case.key(group)] for group in case.groups]
        self.weights = {"prose": 0.5, "code": 0.5}
        self.levels = [profile.levels for profile in self.profiles]
        self.prices, self.keys = [group.params_per_unit for group in case.groups], [case.key(g) for g in case.groups]

    def losses(self, weights: dict[str, float]) -> list[list[float]]:
        return [[sum(weights[d] * p.slopes[d] for d in weights) * e for e in p.errors] for p in self.profiles]

    def rise(self, options: tuple[int, ...]) -> dict[str, float]:
        chosen = list(zip(self.profiles, options, strict=True))
        return {name: sum(p.slopes[name] * p.errors[o] for p, o in chosen) for name in self.weights}

    def best(self, target: int, accept=lambda _: True):
        return reference.curve(self.levels, self.losses(self.weights), self.prices, target, accept)

    def largest(self) -> int:
        return sum((levels[0] - levels[-1]) * price for levels, price in zip(self.levels, self.prices, strict=True))

    def counts(self, options: tuple[int, ...]) -> dict:
        return {key: levels[o] for key, levels, o in zip(self.keys, self.levels, options, strict=True)}


@given(cases(max_layers=2), st.integers(0, 999), SHARE, st.booleans())
@settings(max_examples=80)
def test_curve_has_the_least_loss_of_all_choices(case: Case, seed: int, remove: float, scaled: bool) -> None:
    profiles = profiles_of(case, seed)
    brute = Brute(case, profiles)
    if scaled:  # exactly what some choice removes, up to all that can go
        remove = brute.largest() * round(remove * 4) / 4 / case.prices.total
    target = next(cost for cost in itertools.count() if cost / case.prices.total >= remove)
    if target > brute.largest():
        with pytest.raises(RecipeError, match=f"at most {round_down(brute.largest() / case.prices.total)} with each"):
            curve_plan(case.groups, profiles, case.prices, remove, {})
        return
    plan = curve_plan(case.groups, profiles, case.prices, remove, {})
    loss, choices = brute.best(target)
    assert plan.num_keep in [brute.counts(options) for options in choices], loss
    assert plan.cost_before - plan.cost_after >= target


@given(
    cases(max_layers=2), st.integers(0, 999), SHARE, st.floats(0, 1.2), st.sampled_from([("code",), ("prose", "code")])
)
@settings(max_examples=40)
def test_a_limited_curve_keeps_its_limits_and_is_no_better_than_brute_force(
    case: Case, seed: int, remove: float, tight: float, names: tuple[str, ...]
) -> None:
    profiles = profiles_of(case, seed)
    brute = Brute(case, profiles)
    remove = remove * brute.largest() / case.prices.total
    assume(remove > 0)
    target = next(cost for cost in itertools.count() if cost / case.prices.total >= remove)
    _, free = brute.best(target)
    limits = {name: tight * max(brute.rise(options)[name] for options in free) + 1e-3 for name in names}

    def within(options: tuple[int, ...]) -> bool:
        return all(brute.rise(options)[name] <= limit for name, limit in limits.items())

    possible, _ = brute.best(target, within)
    try:
        plan = curve_plan(case.groups, profiles, case.prices, remove, limits)
    except RecipeError:
        assert "prose" in limits or possible == math.inf  # one domain alone: the search is exact
        return
    rise = predicted_rise(profiles, plan.num_keep)
    assert all(rise[name] <= limit for name, limit in limits.items())
    assert plan.cost_before - plan.cost_after >= target
    loss = sum(rise[name] / 2 for name in rise)
    assert loss >= possible - 1e-9
    if all(within(options) for options in free):
        assert loss == pytest.approx(possible, abs=1e-9)


def test_prices_count_what_goes_and_what_layers_leave() -> None:
    groups = (group_of(0, "ffn", 10, 3), group_of(1, "ffn", 10, 5), group_of(0, "heads", 4, 7))
    prices = Prices((100, 50, 30), 500)
    assert params_gone(groups, {(0, "ffn"): 4, (1, "ffn"): 12, (0, "heads"): 3}) == 6 * 3 + 7  # no group grows
    assert prices.taken((0, 2)) == 50 and prices.taken(()) == 180
    assert prices.with_only((0, 2)).total_text == "450 parameters that the layers left"
    assert prices.with_only((0, 1, 2)) == prices and Prices((), 12345).total_text == "12,345 parameters"
    fewer = replace(prices, tokens=20).with_only((0, 2))
    assert (fewer.total, fewer.tokens, fewer.what) == (430, 0, " that the layers and tokens left")
    assert params_gone(groups, {(0, "ffn"): 1, (1, "ffn"): 1, (0, "heads"): 1}) == 27 + 45 + 21
    # The smallest step: eight channels of layer 0 cost 24, a head 7; of all layers at once 64 and 7.
    assert least_step(groups, 8, alike=False) == 7 and least_step(groups, 1, alike=False) == 3
    assert least_step(groups[:2], 8, alike=True) == 8 * 3 + 8 * 5


def test_widths_fill_the_blocks_of_k_quants_where_eight_of_them_stay() -> None:
    """256 if all dense widths are multiples and the narrowest keeps 2048; else as without blocks."""
    cases = [(4096, 0.5, 256), (4096, 0.49, 128), (2560, 0.8, 256), (2560, 0.79, 64), (2304, 0.9, 256)]
    cases += [(1536, 0.9, 64), (4095, 0.9, 64), (4224, 0.9, 128), (2048, 1.0, 256)]
    for num_units, keep_share, expected in cases:
        groups = (group_of(0, "ffn", num_units), group_of(1, "ffn", 8192), group_of(0, "heads", 9))
        assert default_align(groups, keep_share) == expected, (num_units, keep_share)
    assert default_align((group_of(0, "heads", 8192),), 0.9) == 64  # heads have no alignment


def test_least_loss_counts_in_coarser_steps_where_it_must_and_takes_the_first_of_equals() -> None:
    # Coprime removals of 50,001 in all: the table counts in twos, down, and the target still is met.
    removals, losses = [[0, 25_000], [0, 25_001]], [[0.0, 1.0], [0.0, 2.0]]
    assert least_loss(removals, losses, 0) == [0, 0]
    assert least_loss(removals, losses, 25_000) == [1, 0]
    assert least_loss(removals, losses, 25_001) == least_loss(removals, losses, 25_002) == [1, 1]
    # A common factor of all removals keeps the table small and exact.
    assert least_loss([[0, 7 * 1_000_003], [0, 7 * 1_000_003]], losses, 7 * 1_000_003) == [1, 0]
    assert least_loss([[0, 5, 5]], [[0.0, 1.0, 1.0]], 5) == [1]
    assert least_loss([[0, 5], [0, 5]], [[0.0, 1.0], [0.0, 1.0]], 5) == [1, 0]


@pytest.mark.parametrize("seed", range(2))
def test_a_limited_domain_keeps_within_its_limit_at_least_cost_to_the_average(seed: int) -> None:
    case = Case(12, {"ffn": 256, "heads": 5}, {"ffn": 576, "heads": 30_720}, 32, {}, 1.0)
    profiles = profiles_of(case, seed)
    alone = {key: replace(each, slopes={"prose": each.slopes["prose"]}) for key, each in profiles.items()}
    free, careful = (curve_plan(case.groups, each, case.prices, 0.15, {}) for each in (profiles, alone))
    least, most = (predicted_rise(profiles, plan.num_keep) for plan in (free, careful))
    assert curve_plan(case.groups, profiles, case.prices, 0.15, {"prose": least["prose"]}) == free
    limit = (least["prose"] + most["prose"]) / 2
    limited = curve_plan(case.groups, profiles, case.prices, 0.15, {"prose": limit})
    rise = predicted_rise(profiles, limited.num_keep)
    assert rise["prose"] <= limit < least["prose"] and limited.removed_share >= 0.15
    assert sum(least.values()) < sum(rise.values()) < sum(most.values())
