"""The distillation loss: its value and its hand-made gradient against autograd, limits, and what the teacher keeps."""

import pytest
import torch
from torch import Tensor, nn

from secateur.recover_loss import SLICE_POSITIONS, Targets, distillation_loss, targets_of
from secateur.recover_teacher import TeacherCache, cache_bytes

NUM_POSITIONS, NUM_WORDS = 2 * SLICE_POSITIONS + 7, 23


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(NUM_POSITIONS, NUM_WORDS, generator=torch.Generator().manual_seed(seed))


def plain_loss(student: Tensor, next_P: Tensor, teacher: Tensor, weight_P: Tensor, t: float, s: float, k: int | None):
    """The formula as the docstring writes it, by autograd."""
    log_p, log_q = (teacher / t).log_softmax(-1), (student / t).log_softmax(-1)
    if k is not None:
        words = log_p.topk(k).indices
        parts = []
        for log in (log_p, log_q):
            kept = log.gather(1, words)
            parts.append(torch.cat([kept, torch.log1p(-kept.exp().sum(-1, keepdim=True))], dim=1))
        log_p, log_q = parts
    kl_P = (log_p.exp() * (log_p - log_q)).sum(-1)
    entropy_P = nn.functional.cross_entropy(student, next_P, reduction="none")
    return (weight_P * (s * t**2 * kl_P + (1 - s) * entropy_P)).mean()


@pytest.mark.parametrize("num_words", [None, 5])
@pytest.mark.parametrize(("temperature", "share"), [(1.0, 1.0), (2.0, 0.7), (1.0, 0.0)])
def test_value_and_gradient_are_those_of_the_formula(temperature, share, num_words):
    next_P = torch.arange(NUM_POSITIONS) % NUM_WORDS
    weight_P = torch.linspace(0.5, 2.0, NUM_POSITIONS)
    teacher, ours, theirs = logits(0), logits(1).requires_grad_(), logits(1).requires_grad_()
    targets = targets_of(teacher, temperature=temperature, num_words=num_words)
    loss = distillation_loss(ours, next_P, targets, weight_P, temperature=temperature, kl_share=share)
    expected = plain_loss(theirs, next_P, teacher, weight_P, temperature, share, num_words)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    student = logits(0).requires_grad_()
    next_P, weight_P = torch.zeros(NUM_POSITIONS, dtype=torch.long), torch.ones(NUM_POSITIONS)
    loss = distillation_loss(student, next_P, targets_of(logits(0)), weight_P)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and float(student.grad.abs().max()) == 0


def test_without_a_teacher_it_is_cross_entropy():
    student = logits(1)
    next_P = torch.arange(NUM_POSITIONS) % NUM_WORDS
    loss = distillation_loss(student, next_P, None, torch.ones(NUM_POSITIONS))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(student, next_P))


def test_all_words_as_top_words_are_all_words():
    next_P, weight_P = torch.zeros(NUM_POSITIONS, dtype=torch.long), torch.ones(NUM_POSITIONS)
    all_words = targets_of(logits(0), num_words=NUM_WORDS - 1)
    losses = [distillation_loss(logits(1), next_P, targets, weight_P) for targets in (targets_of(logits(0)), all_words)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


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


def test_the_cache_gives_what_the_teacher_said_and_has_the_size_foretold(tmp_path):
    blocks = [torch.randint(NUM_WORDS, (17,), generator=torch.Generator().manual_seed(i)) for i in range(70)]
    teacher, cache = Fixed(), TeacherCache(tmp_path / "cache", len(blocks))
    assert not cache.is_complete
    cache.fill(teacher, blocks, 1.0, 4)
    assert cache.is_complete
    for number in (0, 63, 64, 69):
        expected = targets_of(teacher.table[blocks[number][:-1]], num_words=4)
        found: Targets = cache.targets(number)
        assert expected.words_PK is not None and torch.equal(found.words_PK, expected.words_PK.int())
        torch.testing.assert_close(found.log_p, expected.log_p, rtol=0, atol=1e-2)
    size = sum(file.stat().st_size for file in cache.directory.iterdir())
    assert 0 <= size - cache_bytes(len(blocks), 17, 4) < 1000


def test_a_complete_shard_of_the_cache_is_not_computed_again(tmp_path):
    blocks = [torch.zeros(9, dtype=torch.long)]
    TeacherCache(tmp_path, 1).fill(Fixed(), blocks, 1.0, 4)
    before = (tmp_path / "blocks-0.safetensors").read_bytes()
    other = Fixed()
    nn.init.zeros_(other.table)
    TeacherCache(tmp_path, 1).fill(other, blocks, 1.0, 4)
    assert (tmp_path / "blocks-0.safetensors").read_bytes() == before
