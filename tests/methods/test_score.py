"""Scores against their formulae and, where they claim exactness, against brute force; ties; selection."""

import dataclasses
import itertools

import pytest
import torch
from grams import gram_of

from secateur.errors import NumericsError
from secateur.methods.scores import SCORES, ScoreInputs
from secateur.methods.select import greedy_obs
from secateur.stream.statistics import Statistics, damped_gram, inverse_of, keep_highest, removal_errors

DAMPING = 1e-3
SINGLE = torch.arange(8)[:, None]  # units of one column each


def problem(num_outputs: int = 4, num_inputs: int = 8, num_tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A small reader and correlated, uncentred inputs."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(num_inputs, num_inputs, generator=generator)
    x_TF = torch.randn(num_tokens, num_inputs, generator=generator) @ mix + torch.randn(num_inputs, generator=generator)
    return torch.randn(num_outputs, num_inputs, generator=generator), x_TF


def inputs_of(reader_HF: torch.Tensor, x_TF: torch.Tensor, seed: int = 0) -> ScoreInputs:
    statistics = Statistics.empty(x_TF.shape[1], torch.device("cpu"), gram=True)
    statistics.update(x_TF, x_TF @ reader_HF.T)
    return ScoreInputs(reader_HF, torch.arange(1.0, x_TF.shape[1] + 1), statistics, SINGLE, DAMPING, seed)


def refit_error(reader_HF: torch.Tensor, hessian_FF: torch.Tensor, removed: list[int]) -> float:
    """Smallest tr(D H D') over changes D whose removed columns take the reader's to zero: by direct least squares."""
    weight = reader_HF.double()
    keep = [index for index in range(weight.shape[1]) if index not in removed]
    change = torch.zeros_like(weight)
    change[:, removed] = -weight[:, removed]
    right = change[:, removed] @ hessian_FF[removed][:, keep]
    change[:, keep] = -torch.linalg.solve(hessian_FF[keep][:, keep], right.T).T
    return float(torch.einsum("hf,fg,hg->", change, hessian_FF, change))


def test_obs_score_equals_removing_one_unit_and_refitting() -> None:
    reader_HF, x_TF = problem()
    inputs = inputs_of(reader_HF, x_TF)
    hessian = damped_gram(inputs.statistics.gram, DAMPING)
    brute = torch.tensor([refit_error(reader_HF, hessian, [unit]) for unit in range(8)])
    torch.testing.assert_close(SCORES["obs"].function(inputs).double(), brute.double(), rtol=1e-4, atol=1e-6)


def test_obs_one_by_one_equals_brute_force_removal() -> None:
    reader_HF, x_TF = problem()
    hessian = damped_gram(gram_of(x_TF), DAMPING)
    removed: list[int] = []
    for num_keep in range(7, 2, -1):
        left = [unit for unit in range(8) if unit not in removed]
        removed.append(min(left, key=lambda unit: refit_error(reader_HF, hessian, [*removed, unit])))
        found = greedy_obs(reader_HF, hessian.clone(), SINGLE, num_keep, batch=1)
        assert set(found.keep.tolist()) == set(range(8)) - set(removed)
        assert float(found.error_curve[-1]) == pytest.approx(refit_error(reader_HF, hessian, removed), rel=1e-6)


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_batched_obs_reports_the_true_error_of_its_choice(batch: int) -> None:
    reader_HF, x_TF = problem()
    hessian = damped_gram(gram_of(x_TF), DAMPING)
    found = greedy_obs(reader_HF, hessian.clone(), SINGLE, 3, batch)
    removed = sorted(set(range(8)) - set(found.keep.tolist()))
    assert len(found.keep) == 3
    assert float(found.error_curve[-1]) == pytest.approx(refit_error(reader_HF, hessian, removed), rel=1e-6)
    assert (found.error_curve.diff() >= 0).all()


def test_greedy_obs_beats_the_average_choice_and_nears_the_best() -> None:
    reader_HF, x_TF = problem()
    hessian = damped_gram(gram_of(x_TF), DAMPING)
    errors = sorted(refit_error(reader_HF, hessian, list(gone)) for gone in itertools.combinations(range(8), 3))
    found = float(greedy_obs(reader_HF, hessian.clone(), SINGLE, 5, 1).error_curve[-1])
    assert found <= errors[len(errors) // 10]


def test_formulae() -> None:
    reader_HF, x_TF = problem()
    inputs, x = inputs_of(reader_HF, x_TF), x_TF.double()
    columns = reader_HF.double()
    expected = {
        "magnitude": (columns.square().sum(0) + torch.arange(1, 9)).sqrt(),
        "wanda": columns.abs().sum(0) * x.square().mean(0).sqrt(),
        "flap": x.var(0, correction=0) * columns.square().sum(0),
        "paper": (x.square().mean(0) * columns.square().sum(0)).sqrt(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(SCORES[name].function(inputs).double(), value, rtol=1e-4, atol=1e-5)


def test_random_follows_its_seed_alone() -> None:
    reader_HF, x_TF = problem()
    first, again, other = (SCORES["random"].function(inputs_of(reader_HF, x_TF, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_keep_highest_is_sorted_and_ties_keep_the_lower_index() -> None:
    assert keep_highest(torch.tensor([1.0, 5.0, 5.0, 0.0, 5.0, 9.0]), 3).tolist() == [1, 2, 5]


def test_silent_group_still_has_an_inverse() -> None:
    inverse = inverse_of(damped_gram(gram_of(torch.zeros(4, 4)), DAMPING))
    assert torch.equal(inverse, torch.eye(4, dtype=torch.float64))


def test_a_matrix_that_rounding_made_indefinite_is_refused() -> None:
    x_TF = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for damping in (1e-12, 1e-15):
        with pytest.raises(NumericsError, match=r"obs: a damped Gram matrix has no inverse; raise repair.damping or"):
            inverse_of(damped_gram(gram_of(x_TF), damping))
    assert torch.isfinite(inverse_of(damped_gram(gram_of(x_TF), 1e-3))).all()


def test_keep_all_and_dead_channels() -> None:
    reader_HF, x_TF = problem()
    x_TF[:, 2] = 0
    hessian = damped_gram(gram_of(x_TF), DAMPING)
    assert greedy_obs(reader_HF, hessian.clone(), SINGLE, 8, 4).keep.tolist() == list(range(8))
    assert 2 not in greedy_obs(reader_HF, hessian.clone(), SINGLE, 7, 4).keep.tolist()


@pytest.mark.parametrize("times", [2.0**-20, 2.0**10, 2.0**30])
def test_one_loud_or_quiet_channel_does_not_change_the_choice(times: float) -> None:
    reader_HF, x_TF = problem()
    plain = greedy_obs(reader_HF, damped_gram(gram_of(x_TF), DAMPING), SINGLE, 3, 1)
    reader_HF[:, 5] /= times
    x_TF[:, 5] *= times
    found = greedy_obs(reader_HF, damped_gram(gram_of(x_TF), DAMPING), SINGLE, 3, 1)
    assert found.removed.tolist() == plain.removed.tolist()
    torch.testing.assert_close(found.error_curve, plain.error_curve, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.scores_U, plain.scores_U, rtol=1e-5, atol=0.0)


WIDE = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])  # four units of two columns each


def test_wide_units_score_and_go_as_brute_force_says() -> None:
    reader_HF, x_TF = problem()
    hessian = damped_gram(gram_of(x_TF), DAMPING)
    brute = [refit_error(reader_HF, hessian, columns.tolist()) for columns in WIDE]
    scores = removal_errors(reader_HF, inverse_of(hessian.clone()), WIDE)
    torch.testing.assert_close(scores, torch.tensor(brute, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    removed: list[int] = []
    for num_keep in (3, 2, 1):
        left = [unit for unit in range(4) if unit not in removed]
        removed.append(
            min(left, key=lambda unit: refit_error(reader_HF, hessian, WIDE[[*removed, unit]].flatten().tolist()))
        )
        found = greedy_obs(reader_HF, hessian.clone(), WIDE, num_keep, batch=1)
        assert found.removed.tolist() == removed and set(found.keep.tolist()) == set(range(4)) - set(removed)
        gone = WIDE[removed].flatten().tolist()
        assert float(found.error_curve[-1]) == pytest.approx(refit_error(reader_HF, hessian, gone), rel=1e-5)


def test_other_scores_of_wide_units_sum_over_their_columns() -> None:
    reader_HF, x_TF = problem()
    single = inputs_of(reader_HF, x_TF)
    wide = dataclasses.replace(single, columns_UW=WIDE, writer_squares_U=torch.zeros(4))
    for name in ("wanda", "flap"):
        torch.testing.assert_close(SCORES[name].function(wide), SCORES[name].function(single)[WIDE].sum(dim=1))
    squares = reader_HF.square().sum(dim=0)[WIDE].sum(dim=1)
    torch.testing.assert_close(SCORES["magnitude"].function(wide).square(), squares)
