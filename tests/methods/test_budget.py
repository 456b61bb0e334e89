"""Budgets meet the target, respect alignment, and say what is possible when it is not."""

import itertools

import pytest

from secateur.errors import RecipeError
from secateur.methods.budget import Prices, default_align, round_plans, round_shares, uniform_plan
from secateur.model.group import Axis, Group, Linears


def groups_of(num_layers: int, num_units: int, params_per_unit: int) -> tuple[Group, ...]:
    axis = Axis("mlp.down_proj", (1,))
    return tuple(
        Group(layer, "ffn", "channels", "channel", num_units, params_per_unit, Linears((axis,), axis))
        for layer in range(num_layers)
    )


def prices_of(groups: tuple[Group, ...], num_params: int) -> Prices:
    per_unit = {(group.layer, group.name): group.params_per_unit for group in groups}
    return Prices(per_unit, (), num_params, "parameters")


SMOLLM = groups_of(30, 1536, 3 * 576)
SMOLLM_PARAMS = 134_515_008
SMOLLM_PRICES = prices_of(SMOLLM, SMOLLM_PARAMS)


@pytest.mark.parametrize("remove", [0.03, 0.1, 0.2, 0.3, 0.45, 0.55])
@pytest.mark.parametrize("align", [1, 8, 64, 128])
def test_target_is_met_within_half_an_aligned_unit_per_layer(remove: float, align: int) -> None:
    plan = uniform_plan(SMOLLM, SMOLLM_PRICES, remove, align)
    assert all(width % align == 0 for width in plan.num_keep.values())
    slack = align / 2 * 1728 * 30 / SMOLLM_PARAMS
    assert abs(plan.removed_share - remove) <= slack + 1e-9
    gone = sum(1536 - width for width in plan.num_keep.values()) * 1728
    assert plan.cost_before - plan.cost_after == gone


def test_more_asked_is_never_less_removed() -> None:
    reached = [uniform_plan(SMOLLM, SMOLLM_PRICES, step / 100, 64).removed_share for step in range(2, 56)]
    assert all(left <= right for left, right in itertools.pairwise(reached))


def test_out_of_reach_says_the_largest_possible_and_that_works() -> None:
    with pytest.raises(RecipeError, match=r"at most 0\.567 with 64 channels") as caught:
        uniform_plan(SMOLLM, SMOLLM_PRICES, 0.9, 64)
    assert "134,515,008" in str(caught.value)
    assert set(uniform_plan(SMOLLM, SMOLLM_PRICES, 0.567, 64).num_keep.values()) == {64}


def test_less_than_half_a_unit_says_the_smallest_possible_and_that_works() -> None:
    with pytest.raises(RecipeError, match=r"at least 0\.0124") as caught:
        uniform_plan(SMOLLM, SMOLLM_PRICES, 0.001, 64)
    assert "nothing would go" in str(caught.value)
    assert uniform_plan(SMOLLM, SMOLLM_PRICES, 0.0124, 64).removed_share > 0


def test_rounds_step_down_to_the_target() -> None:
    plan = uniform_plan(SMOLLM, SMOLLM_PRICES, 0.3, 64)
    plans = round_plans(SMOLLM, SMOLLM_PRICES, plan, round_shares(3), 64)
    widths = [each.num_keep[0, "ffn"] for each in plans]
    assert widths == [1280, 1024, 768] and plans[-1] is plan
    assert [each.cost_after for each in plans] == sorted((e.cost_after for e in plans), reverse=True)


def test_default_alignment_follows_the_narrowest_group() -> None:
    assert default_align(SMOLLM, 0.9) == 64
    assert default_align(groups_of(2, 4096, 10), 0.4) == 128


def test_a_width_that_is_no_multiple_is_cut_to_one() -> None:
    groups = groups_of(2, 100, 10)
    plan = uniform_plan(groups, prices_of(groups, 4000), 0.2, 16)
    assert set(plan.num_keep.values()) == {64}
