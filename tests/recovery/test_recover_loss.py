"""The distillation loss: its value and its hand-made gradient against autograd, limits, and what the teacher says."""

import pytest
import torch
from torch import Tensor, nn

from secateur.recovery.judge import SLICE_POSITIONS, distillation_loss, logits_of

NUM_POSITIONS, NUM_WORDS = 2 * SLICE_POSITIONS + 7, 23


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(NUM_POSITIONS, NUM_WORDS, generator=torch.Generator().manual_seed(seed))


def plain_loss(student: Tensor, next_P: Tensor, teacher: Tensor, s: float):
    """The formula as the docstring writes it, by autograd."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    kl_P = (log_p.exp() * (log_p - log_q)).sum(-1)
    entropy_P = nn.functional.cross_entropy(student, next_P, reduction="none")
    return (s * kl_P + (1 - s) * entropy_P).mean()


@pytest.mark.parametrize("share", [1.0, 0.7, 0.0])
def test_value_and_gradient_are_those_of_the_formula(share):
    next_P = torch.arange(NUM_POSITIONS) % NUM_WORDS
    teacher, ours, theirs = logits(0), logits(1).requires_grad_(), logits(1).requires_grad_()
    loss = distillation_loss(ours, next_P, teacher, kl_share=share)
    expected = plain_loss(theirs, next_P, teacher, share)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    student = logits(0).requires_grad_()
    loss = distillation_loss(student, torch.zeros(NUM_POSITIONS, dtype=torch.long), logits(0))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and float(student.grad.abs().max()) == 0


def test_without_a_teacher_it_is_cross_entropy():
    student = logits(1)
    next_P = torch.arange(NUM_POSITIONS) % NUM_WORDS
    loss = distillation_loss(student, next_P, None)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(student, next_P))


class Fixed(nn.Module):
    """A teacher whose logits depend on the token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(logits(4)[:NUM_WORDS])

    def forward(self, input_ids: Tensor, use_cache: bool) -> "Fixed.Output":
        return Fixed.Output(self.table[input_ids])

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits


def test_the_teacher_is_asked_where_a_token_follows():
    ids_BT = torch.randint(NUM_WORDS, (3, 17), generator=torch.Generator().manual_seed(0))
    teacher = Fixed()
    expected = teacher.table[ids_BT[:, :-1].flatten()]
    found = logits_of(teacher, ids_BT)
    assert torch.equal(found, expected) and not found.requires_grad
