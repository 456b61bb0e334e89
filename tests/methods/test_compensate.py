"""Compensation: exact identities of least squares, the bias, and the guard."""

import pytest
import torch
from grams import gram_from, gram_of

from secateur.errors import NumericsError
from secateur.methods.compensate import least_squares


def problem(num_tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(10, 10, generator=generator)
    return torch.randn(6, 10, generator=generator), torch.randn(num_tokens, 10, generator=generator) @ mix + 0.5


KEEP = torch.tensor([0, 2, 3, 6, 7, 9])


def test_keep_all_changes_nothing_at_all() -> None:
    reader_HF, x_TF = problem()
    assert torch.equal(least_squares(reader_HF, gram_of(x_TF), torch.arange(10), 1e-3), reader_HF)


def test_dead_channels_keep_their_weights_and_leave_the_rest_alone() -> None:
    reader_HF, x_TF = problem()
    without = least_squares(reader_HF[:, 1:], gram_of(x_TF[:, 1:]), KEEP[1:] - 1, 1e-3)
    x_TF[:, 0] = 0
    fit = least_squares(reader_HF, gram_of(x_TF), KEEP, 1e-3)
    assert torch.equal(fit[:, 0], reader_HF[:, 0])
    torch.testing.assert_close(fit[:, 1:], without, rtol=1e-5, atol=1e-6)
    silent = least_squares(reader_HF, gram_of(torch.zeros_like(x_TF)), KEEP, 1e-3)
    assert torch.equal(silent, reader_HF[:, KEEP])


def test_an_indefinite_system_is_refused_and_more_damping_makes_it_solvable() -> None:
    reader_HF, _ = problem()
    indefinite = torch.eye(10)
    indefinite[0, 2] = indefinite[2, 0] = 1.005
    least_squares(reader_HF, gram_from(indefinite), KEEP, 1e-2)
    with pytest.raises(NumericsError, match=r"^repair\.damping: least squares has no solution with 0\.001; raise it"):
        least_squares(reader_HF, gram_from(indefinite), KEEP, 1e-3)
