"""Selection against the reference: greedy OBS unit by unit and in batches, scores of every unit, whole steps."""

import dataclasses

import numpy as np
import pytest
import reference_methods as reference
import torch
from grams import gram_of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_ids, tiny_llama, tiny_qwen2
from random_readers import Reader, readers

from secateur.errors import NumericsError
from secateur.methods.scores import SCORES, ScoreInputs
from secateur.methods.select import Task, greedy_obs, select, unit_scores, units_at_once
from secateur.model.bind import bind
from secateur.model.group import Group, Linears, Rows, cut
from secateur.stream.statistics import Statistics, damped_gram, domain_weight, inverse_of
from secateur.stream.walk import Walk, make_batches
from tests.methods.test_repair import method

# Scores and weights are float32 sums over outputs; damping 1e-3 and pivots in float64 lose little more.
SCORE = 1e-4


def inputs_of(case: Reader) -> tuple[np.ndarray, np.ndarray]:
    """The weight, and the first domain's inputs, in float64."""
    return case.weight_HF.astype(float), case.inputs_TF["a"].astype(float)


def units_of(num_columns: int, width: int) -> list[list[int]]:
    """Unit i owns column i of each of `width` segments."""
    size = num_columns // width
    return [[unit + size * segment for segment in range(width)] for unit in range(size)]


@pytest.mark.parametrize("width", [1, 2])
@given(case=readers(multiple_of=2, max_channels=8), damping=st.sampled_from([1e-3, 0.1]), data=st.data())
@settings(max_examples=40)
def test_greedy_obs_takes_the_least_errors_of_the_reference(width: int, case: Reader, damping: float, data) -> None:
    weight_HF, x_TF = inputs_of(case)
    units = units_of(x_TF.shape[1], width)
    num_keep, batch = (data.draw(st.integers(low, len(units))) for low in (0, 1))
    gram_FF = x_TF.T @ x_TF
    hessian_FF = gram_FF + np.diag(reference.ridge(gram_FF, damping))
    product_FF = damped_gram(gram_of(torch.from_numpy(case.inputs_TF["a"])), damping)
    found = greedy_obs(torch.from_numpy(case.weight_HF), product_FF, torch.tensor(units), num_keep, batch)
    whole = reference.removal_error(weight_HF, hessian_FF, range(weight_HF.shape[1]))
    slack = SCORE * whole
    removed = found.removed.tolist()
    assert sorted([*removed, *found.keep.tolist()]) == list(range(len(units)))
    assert found.keep.tolist() == sorted(found.keep.tolist()) and len(found.keep) == num_keep
    assert len(found.error_curve) == -(-(len(units) - num_keep) // batch)
    for number, start in enumerate(range(0, len(removed), batch)):
        # Rounding may decide between equals, so what was chosen is compared with the best, not the numbers.
        errors = reference.greedy_errors(weight_HF, hessian_FF, units, removed[:start])
        mine = removed[start : start + batch]
        others = [error for unit, error in errors.items() if unit not in mine]
        assert mine == sorted(mine) and len(mine) == min(batch, len(units) - num_keep - start)
        assert max(errors[unit] for unit in mine) <= min(others, default=np.inf) + slack
        gone = [column for unit in removed[: start + batch] for column in units[unit]]
        expected = reference.removal_error(weight_HF, hessian_FF, gone)
        assert float(found.error_curve[number]) == pytest.approx(expected, rel=SCORE, abs=slack)


def test_of_equals_the_lower_number_goes() -> None:
    x_TF = torch.eye(6)
    for batch in (1, 4):
        found = greedy_obs(torch.ones(2, 6), damped_gram(gram_of(x_TF), 1e-3), torch.arange(6)[:, None], 2, batch)
        assert found.removed.tolist() == [0, 1, 2, 3]


@given(readers(multiple_of=2, max_channels=8), st.sampled_from(["energy", "tokens"]), st.sampled_from([1, 2]))
@settings(max_examples=40)
def test_scores_are_their_formulae_over_weighted_domains(case: Reader, weighting: str, width: int) -> None:
    weight_HF = case.weight_HF.astype(float)
    num_inputs, reader = weight_HF.shape[1], torch.from_numpy(case.weight_HF)
    energy = {n: float(((x.astype(float) @ weight_HF.T) ** 2).sum()) for n, x in case.inputs_TF.items()}
    factors = {n: reference.domain_factor(weighting, case.shares[n], energy[n]) for n in energy}
    x_TF, one_T1 = reference.pooled(
        {n: (x.astype(float), np.ones((len(x), 1))) for n, x in case.inputs_TF.items()}, factors
    )
    mass = float((one_T1**2).sum()) or 1.0  # no domain counts if all are silent: every mean is 0
    statistics = Statistics.empty(num_inputs, torch.device("cpu"), gram=True, dtype=torch.float32)
    for name, x in case.inputs_TF.items():
        own = Statistics.empty(num_inputs, torch.device("cpu"), gram=True)
        own.update(torch.from_numpy(x), torch.from_numpy(x) @ reader.T)
        statistics.merge(own, domain_weight(weighting, case.shares[name], float(own.energy)))
    units, writers_U = units_of(num_inputs, width), np.arange(1.0, num_inputs // width + 1)
    columns_UW = torch.tensor(units)
    inputs = ScoreInputs(reader, torch.from_numpy(writers_U).float(), statistics, columns_UW, 1e-3, 0)
    for name in ("magnitude", "wanda", "paper"):
        expected = reference.unit_scores(name, weight_HF, x_TF, mass, units, writers_U)
        np.testing.assert_allclose(SCORES[name].function(inputs).numpy(), expected, rtol=SCORE, err_msg=name)
    mean_F, square_F = (x_TF * one_T1).sum(axis=0) / mass, (x_TF**2).sum(axis=0) / mass
    flap = reference.flap_scores(weight_HF, mean_F, square_F, units)
    # A variance is a difference of float32 sums.
    scale = SCORE * max(reference.flap_scores(weight_HF, 0 * mean_F, square_F, units))
    np.testing.assert_allclose(SCORES["flap"].function(inputs).numpy(), flap, atol=scale, rtol=0)
    gram_FF = x_TF.T @ x_TF
    hessian_FF = gram_FF + np.diag(reference.ridge(gram_FF, 1e-3))
    errors = [reference.removal_error(weight_HF, hessian_FF, columns) for columns in units]
    whole = reference.removal_error(weight_HF, hessian_FF, range(num_inputs))
    np.testing.assert_allclose(SCORES["obs"].function(inputs).numpy(), errors, atol=SCORE * whole, rtol=SCORE)


def test_a_48th_of_the_columns_goes_at_once_but_at_least_32_and_a_wider_unit_alone() -> None:
    at_once = {(112, 1): 32, (112, 5): 6, (1536, 1): 32, (18944, 1): 394, (18944, 128): 3, (112, 48): 1}
    assert {sizes: units_at_once(*sizes) for sizes in at_once} == at_once


def heads_of(model) -> Group:
    """Layer 0's KV groups with their two query heads: three writers, wide units."""
    rows = {"q_proj": 24, "k_proj": 12, "v_proj": 12}
    writers = tuple(Rows(f"self_attn.{name}.weight", 0, (count,)) for name, count in rows.items())
    return Group("kv_heads", "heads", "head", Linears(writers, Rows("self_attn.o_proj.weight", 1, (24,))), 0, 2, 1)


@torch.no_grad()
def test_a_groups_scores_count_the_rows_of_every_writer() -> None:
    model = tiny_qwen2(num_layers=1)
    layer, group, arch = model.model.layers[0], heads_of(model), bind(model)

    def scores(of: Group, size: int) -> torch.Tensor:
        return unit_scores(layer, of, Statistics.empty(size, torch.device("cpu"), gram=False), "magnitude", 1e-3, 0)

    found, attention = scores(group, 48), layer.self_attn
    for unit in range(2):
        parts = [attention.q_proj.weight[24 * unit : 24 * unit + 24], attention.o_proj.weight[:, 24 * unit :][:, :24]]
        parts += [each.weight[12 * unit : 12 * unit + 12] for each in (attention.k_proj, attention.v_proj)]
        assert float(found[unit]) == pytest.approx(sum(float(part.square().sum()) for part in parts) ** 0.5, rel=1e-5)
    (ffn,), mlp = (each for each in arch.groups if each.name == "ffn"), layer.mlp
    squares = sum(each.weight.square().sum(1) for each in (mlp.gate_proj, mlp.up_proj))
    squares += mlp.down_proj.weight.square().sum(0)
    torch.testing.assert_close(scores(ffn, 112), squares.sqrt())
    # In a later round the layer has less units than the group began with.
    cut(layer, ffn, torch.arange(40))
    torch.testing.assert_close(scores(ffn, 40), squares.sqrt()[:40])


def task_of(num_keep: int, seed: int = 0, **changes) -> tuple[Task, Statistics]:
    """Layer 0's FFN of a small model, and statistics of inputs that know of each other."""
    model = tiny_llama(num_layers=1)
    arch = bind(model)
    (group,) = arch.select(("ffn",))
    walk = Walk(model, arch, make_batches("a", tiny_ids(), held_out=False))
    statistics = Statistics.empty(112, torch.device("cpu"), gram=True)
    generator = torch.Generator().manual_seed(1)
    x_TF = torch.randn(150, 112, generator=generator) @ torch.randn(112, 112, generator=generator)
    statistics.update(x_TF, x_TF[:, :48])
    return Task(walk, group, num_keep, method(**{"compensate": "none"} | changes), {"a": 1.0}, seed), statistics


@torch.no_grad()
def test_obs_is_greedy_in_batches_and_by_the_methods_ridge() -> None:
    task, statistics = task_of(60, damping=1.0)
    weight_HF = task.walk.layers[0].mlp.down_proj.weight
    expected, one_by_one = (
        greedy_obs(weight_HF, damped_gram(statistics.gram, 1.0), torch.arange(112)[:, None], 60, batch).keep
        for batch in (32, 1)
    )
    found = select(task, statistics)
    assert torch.equal(found, expected) and not torch.equal(found, one_by_one)
    assert not torch.equal(found, select(*task_of(60)))


@torch.no_grad()
def test_a_batch_of_wide_units_has_no_more_columns() -> None:
    task, statistics = task_of(0)
    units = units_of(48, 6)
    segments = Linears((), Rows("self_attn.o_proj.weight", 1, (1,) * 6))
    heads = Group("kv_heads", "heads", "head", segments, 0, 8, 1)
    generator = torch.Generator().manual_seed(2)
    x_TF = torch.randn(60, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    statistics = Statistics.empty(48, torch.device("cpu"), gram=True)
    statistics.update(x_TF, x_TF)
    weight_HF = task.walk.layers[0].self_attn.o_proj.weight
    for num_keep in (2, 3, 4):
        found = select(dataclasses.replace(task, group=heads, num_keep=num_keep), statistics)
        expected = greedy_obs(weight_HF, damped_gram(statistics.gram, 1e-3), torch.tensor(units), num_keep, 5)
        assert torch.equal(found, expected.keep)
    at_once = greedy_obs(weight_HF, damped_gram(statistics.gram, 1e-3), torch.tensor(units), 2, 8)
    assert not torch.equal(at_once.keep, select(dataclasses.replace(task, group=heads, num_keep=2), statistics))


@torch.no_grad()
def test_each_seed_draws_its_own_units_and_where_none_goes_no_score_is_needed() -> None:
    first, again, other = (select(*task_of(60, seed=seed, score="random")) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert select(*task_of(112)).tolist() == list(range(112))
    for score in ("obs", "wanda"):
        assert len(select(*task_of(111, score=score))) == 111


def test_a_matrix_that_rounding_made_indefinite_is_refused() -> None:
    x_TF = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for damping in (1e-12, 1e-15):
        with pytest.raises(NumericsError, match=r"obs: a damped Gram matrix has no inverse; raise repair.damping or"):
            inverse_of(damped_gram(gram_of(x_TF), damping))
    assert torch.isfinite(inverse_of(damped_gram(gram_of(x_TF), 1e-3))).all()
