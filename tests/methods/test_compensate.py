"""Compensation: exact identities of least squares, the bias, and the guard."""

import pytest
import torch
from grams import gram_from, gram_of

from secateur.errors import NumericsError
from secateur.methods.compensate import guard, held_out_errors, held_out_sums, least_squares, mean_shift


def problem(num_tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(10, 10, generator=generator)
    return torch.randn(6, 10, generator=generator), torch.randn(num_tokens, 10, generator=generator) @ mix + 0.5


KEEP = torch.tensor([0, 2, 3, 6, 7, 9])


def test_keep_all_changes_nothing_at_all() -> None:
    reader_HF, x_TF = problem()
    assert torch.equal(least_squares(reader_HF, gram_of(x_TF), torch.arange(10), 1e-3).weight_HS, reader_HF)


def test_without_damping_the_residual_is_orthogonal_to_the_kept_inputs() -> None:
    reader_HF, x_TF = problem()
    fit = least_squares(reader_HF, gram_of(x_TF), KEEP, 1e-9)
    residual_TH = x_TF @ reader_HF.T - x_TF[:, KEEP] @ fit.weight_HS.T
    assert float((x_TF[:, KEEP].T @ residual_TH).abs().max()) < 1e-2 * float((x_TF.T @ x_TF).diagonal().max()) * 1e-2


def test_equals_ridge_centred_on_the_old_weights_with_a_ridge_for_each_channel() -> None:
    reader_HF, x_TF = problem()
    damping, x_TF = 0.1, x_TF * torch.logspace(-2, 2, 10)
    fit = least_squares(reader_HF, gram_of(x_TF), KEEP, damping)
    x, target, old = x_TF[:, KEEP].double(), (x_TF @ reader_HF.T).double(), reader_HF[:, KEEP].double()
    root = (damping * x.square().sum(dim=0)).sqrt()
    rows = torch.cat([x, torch.diag(root)])
    expected = torch.linalg.lstsq(rows, torch.cat([target, root[:, None] * old.T])).solution.T
    torch.testing.assert_close(fit.weight_HS.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("times", [2.0**-20, 2.0**8, 2.0**13, 2.0**30])
@pytest.mark.parametrize("channel", [2, 4])  # one that stays, one that goes
def test_one_loud_or_quiet_channel_does_not_change_the_fit(channel: int, times: float) -> None:
    # Louder with smaller weights it is the same reader. Powers of two make rounding the same too.
    reader_HF, x_TF = problem()
    plain = least_squares(reader_HF, gram_of(x_TF), KEEP, 1e-3)
    reader_HF[:, channel] /= times
    x_TF[:, channel] *= times
    fit = least_squares(reader_HF, gram_of(x_TF), KEEP, 1e-3)
    fit.weight_HS[:, KEEP == channel] *= times
    torch.testing.assert_close(fit.weight_HS, plain.weight_HS, rtol=1e-5, atol=1e-6)
    assert fit.condition == pytest.approx(plain.condition, rel=1e-6)


def test_dead_channels_keep_their_weights_and_leave_the_rest_alone() -> None:
    reader_HF, x_TF = problem()
    without = least_squares(reader_HF[:, 1:], gram_of(x_TF[:, 1:]), KEEP[1:] - 1, 1e-3)
    x_TF[:, 0] = 0
    fit = least_squares(reader_HF, gram_of(x_TF), KEEP, 1e-3)
    assert torch.equal(fit.weight_HS[:, 0], reader_HF[:, 0])
    torch.testing.assert_close(fit.weight_HS[:, 1:], without.weight_HS, rtol=1e-5, atol=1e-6)
    silent = least_squares(reader_HF, gram_of(torch.zeros_like(x_TF)), KEEP, 1e-3)
    assert torch.equal(silent.weight_HS, reader_HF[:, KEEP])


def test_a_channel_and_its_louder_copy_share_what_a_third_copy_gave() -> None:
    reader_HF, x_TF = problem()
    x_TF[:, 2], x_TF[:, 3] = x_TF[:, 4], 1024 * x_TF[:, 4]
    keep = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9])
    fit = least_squares(reader_HF, gram_of(x_TF), keep, 1e-4)
    change = fit.weight_HS - reader_HF[:, keep]
    torch.testing.assert_close(change[:, 2], reader_HF[:, 4] / 2, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(1024 * change[:, 3], reader_HF[:, 4] / 2, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0, 100.0])
def test_calibration_error_never_rises(damping: float) -> None:
    reader_HF, x_TF = problem()
    fit = least_squares(reader_HF, gram_of(x_TF), KEEP, damping)
    target_TH = x_TF @ reader_HF.T
    before = (target_TH - x_TF[:, KEEP] @ reader_HF[:, KEEP].T).square().sum()
    after = (target_TH - x_TF[:, KEEP] @ fit.weight_HS.T).square().sum()
    assert after <= before * (1 + 1e-6)


def test_a_duplicate_of_a_removed_channel_takes_over_its_weight() -> None:
    reader_HF, x_TF = problem()
    x_TF[:, 3] = x_TF[:, 4]
    fit = least_squares(reader_HF, gram_of(x_TF), torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9]), 1e-8)
    torch.testing.assert_close(fit.weight_HS[:, 3], reader_HF[:, 3] + reader_HF[:, 4], rtol=1e-3, atol=1e-3)


def test_damping_rises_until_the_system_is_solvable_and_is_reported() -> None:
    reader_HF, _ = problem()
    indefinite = torch.eye(10)
    indefinite[0, 2] = indefinite[2, 0] = 1.005
    fit = least_squares(reader_HF, gram_from(indefinite), KEEP, 1e-3)
    assert fit.damping == pytest.approx(1e-2)
    hopeless = torch.eye(10)
    hopeless[0, 2] = hopeless[2, 0] = 50
    with pytest.raises(NumericsError, match="damping 1;"):
        least_squares(reader_HF, gram_from(hopeless), KEEP, 1e-3)


def test_the_condition_is_the_ratio_of_the_squared_pivots() -> None:
    pair_FF = torch.tensor([[1.0, 0.995, 0.0], [0.995, 1.0, 0.0], [0.0, 0.0, 1.0]])
    fit = least_squares(torch.ones(1, 3), gram_from(7 * pair_FF), torch.tensor([0, 1]), 1e-9)
    assert fit.condition == pytest.approx(1 / (1 - 0.995**2), rel=1e-4)


def test_mean_shift_restores_the_mean_output() -> None:
    reader_HF, x_TF = problem()
    shift_H = mean_shift(reader_HF, x_TF.mean(dim=0), KEEP)
    restored = x_TF[:, KEEP] @ reader_HF[:, KEEP].T + shift_H
    torch.testing.assert_close(restored.mean(dim=0), (x_TF @ reader_HF.T).mean(dim=0), rtol=1e-4, atol=1e-4)


def test_guard_takes_the_largest_step_that_hurts_no_domain() -> None:
    lost = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    factors = {"good": 0.9, "overshoot": 3.0, "bad": -0.1}
    errors = held_out_errors({name: held_out_sums(lost, factor * lost, 10.0) for name, factor in factors.items()})
    good, overshoot, bad = errors.values()
    assert guard({"a": good, "b": good}).step == 1.0
    assert guard({"a": good, "b": overshoot}).step == 0.5
    refused = guard({"a": good, "b": bad})
    assert refused.step == 0.0 and refused.error_after == refused.error_before
    found = guard({"a": good})
    assert found.error_after["a"] == pytest.approx(float((0.1 * lost).square().sum()) / 10, rel=1e-4)
    assert found.error_before["a"] == pytest.approx(float(lost.square().sum()) / 10, rel=1e-5)
