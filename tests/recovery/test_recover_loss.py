"""The distillation loss: its value and its hand-made gradient against autograd, limits, and what the teacher says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.model.bind import bind
from secateur.recovery.loss import (
    CACHED_POSITIONS,
    HEAD_POSITIONS,
    distillation_loss,
    loss_in_forward,
    teacher_in_forward,
)
from tests.families import FAMILIES, row, tiny_family
from tests.models import tiny_ids

NUM_POSITIONS, WIDTH, NUM_WORDS = HEAD_POSITIONS + 2 * CACHED_POSITIONS + 7, 11, 23
NEXT = torch.arange(NUM_POSITIONS) % NUM_WORDS


def states(seed: int) -> Tensor:
    return 3 * torch.randn(NUM_POSITIONS, WIDTH, generator=torch.Generator().manual_seed(seed))


def linear(seed: int, *, is_trained: bool = True, bias: bool = False) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, NUM_WORDS, bias=bias).requires_grad_(is_trained)


def plain_loss(logits: Tensor, next_P: Tensor, teacher: Tensor, s: float):
    """The formula as the docstring writes it, by autograd."""
    log_p, log_q = teacher.log_softmax(-1), logits.log_softmax(-1)
    kl_P = (log_p.exp() * (log_p - log_q)).sum(-1)
    entropy_P = nn.functional.cross_entropy(logits, next_P, reduction="none")
    return (s * kl_P + (1 - s) * entropy_P).mean()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.0, None])
def test_value_and_gradients_are_those_of_the_formula(share, trained, bias):
    """Only weights that are trained get a gradient."""
    dense, dense_head = states(0), linear(0, is_trained=False)
    ours, theirs = states(1).requires_grad_(), states(1).requires_grad_()
    head, same = linear(1, bias=bias), linear(1, bias=bias)
    for each in (head, same):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name in trained)
    teacher = None if share is None else (dense, dense_head)  # without a teacher its share says nothing
    loss = distillation_loss(ours, head, NEXT, teacher, kl_share=0.7 if share is None else share)
    expected = plain_loss(same(theirs), NEXT, dense_head(dense), share or 0.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    for found, wanted in zip(head.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-6)


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    student, head = states(0).requires_grad_(), linear(0)
    loss = distillation_loss(student, head, NEXT, (states(0), linear(0)))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and float(student.grad.abs().max()) == 0
    assert head.weight.grad is not None and float(head.weight.grad.abs().max()) == 0


def test_logits_are_never_there_for_more_positions_than_a_slice_has():
    sizes: list[int] = []

    class Watched(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            sizes.append(len(input))
            return super().forward(input)

    head, dense_head = Watched(WIDTH, NUM_WORDS), Watched(WIDTH, NUM_WORDS)
    distillation_loss(states(0).requires_grad_(), head, NEXT, (states(1), dense_head), kl_share=0.5).backward()
    assert sizes == 2 * [HEAD_POSITIONS] + 2 * [NUM_POSITIONS - HEAD_POSITIONS]


@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize("name", [row(name) for name in FAMILIES])
def test_a_model_inside_returns_the_loss_of_its_logits(name, in_shards):
    """Also where the family scales or caps what the head gives, and where head and embedding are one."""
    ids_BT = tiny_ids(length=9)
    dense, model, same = tiny_family(name, seed=1), tiny_family(name), tiny_family(name)
    dense.requires_grad_(False)
    arch, *_ = (bind(each) for each in (dense, model, same))  # binding replaces modules of some
    expected = plain_loss(logits(same, ids_BT), ids_BT[:, 1:].flatten(), logits(dense, ids_BT), 0.5)
    hidden_size = dense.get_output_embeddings().in_features
    inside = loss_in_forward(model, arch, 0.5, in_shards=in_shards)
    with inside, teacher_in_forward(dense, arch, in_shards=in_shards):
        teacher = dense(ids_BT)
        assert teacher[0].shape[-1] == (dense.get_output_embeddings().out_features if in_shards else hidden_size)
        loss = model(ids_BT, learns=True, teacher=teacher)
        assert torch.equal(logits(model, ids_BT), logits(same, ids_BT)), "without `learns` it answers as ever"
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for (key, found), wanted in zip(model.named_parameters(), same.parameters(), strict=True):
        if found.grad is None or wanted.grad is None:
            assert found.grad is wanted.grad, key
        else:
            assert torch.allclose(found.grad, wanted.grad, rtol=1e-3, atol=1e-6), key


def logits(model: Any, ids_BT: Tensor) -> Tensor:
    return model(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
