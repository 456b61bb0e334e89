"""Distillation and the judge's figures against float64 formulae, the gradient by hand."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_ids, tiny_llama
from reference import (
    FLOAT32_STEP,
    distillation,
    kl_per_token,
    mean_error,
    next_token_nats,
)
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.facts import Verdict
from secateur.model.bind import bind
from secateur.recovery.judge import Judge, objective
from secateur.recovery.loss import distillation_loss

MODEL_TOLERANCE = (3 * 112 + 320) * FLOAT32_STEP  # layers of 112 inputs, 320 words


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99),
    num_positions=st.sampled_from([1, 7, 8, 257, 513]),
    num_words=st.integers(2, 20),
    scale=st.sampled_from([0.0, 1.0, 20.0]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    teacher=st.booleans(),
)
def test_loss_and_gradient_are_those_of_the_formulae(
    seed: int, num_positions: int, num_words: int, scale: float, share: float, teacher: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, dense = (scale * torch.randn(num_positions, num_words, generator=generator) for _ in range(2))
    next_P = torch.randint(num_words, (num_positions,), generator=generator)
    expected, slope = distillation(student, dense if teacher else None, next_P, share)
    ours = student.clone().requires_grad_()
    plain = nn.Identity()  # the head: the logits are given
    loss = distillation_loss(ours, plain, next_P, (dense, plain) if teacher else None, kl_share=share)
    # A log probability is as large as the logits; a position sums over all words.
    step = (num_words + 8) * FLOAT32_STEP
    largest = float(student.abs().max()) + float(dense.abs().max()) + 4
    assert float(loss.detach()) == pytest.approx(expected, rel=step, abs=step * largest)
    (2 * loss).backward()
    assert ours.grad is not None
    size = largest * 2 * 2 / num_positions
    torch.testing.assert_close(ours.grad.double(), 2 * slope, rtol=step, atol=step * size)


def test_verdicts_are_those_of_plain_forwards_in_float64() -> None:
    dense, pruned = tiny_llama(seed=0), tiny_llama(seed=0)
    with torch.no_grad():
        pruned.model.layers[1].mlp.down_proj.weight[:, ::5] = 0
    held_out = {"a": tiny_ids(batch=3, length=80, seed=1), "b": tiny_ids(batch=1, length=80, seed=2)}
    seen: list[tuple[str, int, int]] = []
    judge = Judge(dense, bind(dense), held_out, lambda *step: seen.append(step))
    assert seen == [("judge dense", done, 3) for done in range(4)], "layer by layer"
    found = judge.verdicts(lambda ids_BT: pruned(ids_BT).logits)
    own = judge.dense()
    for domain, blocks in held_out.items():
        pairs = [[plain(model, ids_T) for model in (dense, pruned)] for ids_T in blocks]
        kls = [kl_per_token(*pair) for pair in pairs]
        nats = [
            [next_token_nats(logits, ids_T[1:]) for logits in pair] for pair, ids_T in zip(pairs, blocks, strict=True)
        ]
        verdict = found[domain]
        assert verdict.num_tokens == len(blocks) * 79
        assert verdict.kl == pytest.approx(float(torch.cat(kls).mean()), abs=10 * MODEL_TOLERANCE)
        error = mean_error([float(each.mean()) for each in kls])
        assert verdict.standard_error == (error and pytest.approx(error, abs=10 * MODEL_TOLERANCE))
        for which, each in enumerate((own[domain], verdict)):
            mean = float(torch.cat([pair[which] for pair in nats]).mean())
            assert each.nats_per_token == pytest.approx(mean, rel=MODEL_TOLERANCE)
        same = torch.cat([pair[0].argmax(-1) == pair[1].argmax(-1) for pair in pairs])
        assert verdict.top1_agreement == pytest.approx(float(same.double().mean()), abs=1e-12)
        assert 0 < verdict.top1_agreement < 1 and verdict.kl > 0.01
        assert (own[domain].kl, own[domain].standard_error or 0, own[domain].top1_agreement) == (0, 0, 1)


@torch.no_grad()
def plain(model, ids_T: Tensor) -> Tensor:
    return copy.deepcopy(model).double()(ids_T[None], use_cache=False).logits[0, :-1]


def test_verdicts_of_logits_that_are_no_numbers_name_the_domain() -> None:
    dense = tiny_llama()
    judge = Judge(dense, bind(dense), {"legal": tiny_ids(batch=1, length=9)})
    with pytest.raises(NumericsError, match="domain legal"):
        judge.verdicts(lambda ids_BT: dense(ids_BT).logits.detach() * torch.nan)


def test_a_copied_head_outlives_changes_of_the_dense_model() -> None:
    dense = tiny_llama()
    judge = Judge(dense, bind(dense), {"a": tiny_ids(batch=1, length=9)})
    before = judge.dense()
    judge.own_head()
    with torch.no_grad():
        dense.lm_head.weight.zero_()
    assert judge.dense() == before


def test_what_training_minimises() -> None:
    verdicts = {"a": Verdict(0.5, 0.1, 3.0, 0.9, 10), "b": Verdict(1.5, 0.1, 5.0, 0.8, 1000)}
    assert objective(verdicts, 1.0) == 1.0 and objective(verdicts, 0.0) == 4.0
    assert objective(verdicts, 0.25) == pytest.approx(0.25 * 1 + 0.75 * 4)
