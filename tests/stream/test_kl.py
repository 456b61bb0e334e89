"""KL: nothing between a model and itself, streamed equals direct, the worst tokens show, not finite is an error."""

import pytest
import torch
from models import tiny_ids, tiny_llama, tiny_qwen2
from torch.nn.functional import log_softmax

from secateur.errors import NumericsError
from secateur.model.bind import bind
from secateur.stream.losses import KL_POSITIONS, compare_tokens, final_states, summarise


def divergences(dense, pruned, ids_1T):
    dense_arch, pruned_arch = bind(dense), bind(pruned)
    states = (final_states(dense, dense_arch, ids_1T), final_states(pruned, pruned_arch, ids_1T))
    heads = (dense.get_submodule(dense_arch.head), pruned.get_submodule(pruned_arch.head))
    return compare_tokens(states[0], heads[0], states[1], heads[1])


def test_a_model_does_not_differ_from_itself():
    model, ids_1T = tiny_qwen2(), tiny_ids(batch=1, length=40)
    found = summarise("mine", ids_1T, *([part] for part in divergences(model, model, ids_1T)))
    assert (found.mean, found.p95, found.standard_error, found.top1_agreement) == (0, 0, None, 1)
    assert found.num_tokens == 39


def test_streamed_equals_direct():
    # More positions than one slice, and no multiple of it; another width, as a pruned model may have.
    dense, pruned = tiny_llama(seed=0), tiny_llama(seed=1, tied=True)
    ids_1T = tiny_ids(batch=1, length=KL_POSITIONS + 30)
    with torch.inference_mode():
        log_p, log_q = (log_softmax(model(ids_1T).logits[0, :-1].double(), -1) for model in (dense, pruned))
    direct_P = (log_p.exp() * (log_p - log_q)).sum(-1)
    divergence_P, agreement_P = divergences(dense, pruned, ids_1T)
    torch.testing.assert_close(divergence_P.double(), direct_P, rtol=1e-4, atol=1e-5)
    assert agreement_P.tolist() == (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
    assert 0 < agreement_P.double().mean() < 1 or not agreement_P.any()


def test_kl_is_not_symmetric_and_of_the_dense_model():
    dense, pruned, ids_1T = tiny_llama(seed=0), tiny_llama(seed=1), tiny_ids(batch=1, length=20)
    assert not torch.allclose(divergences(dense, pruned, ids_1T)[0], divergences(pruned, dense, ids_1T)[0], rtol=0.01)


def test_figures_by_hand():
    blocks, agree = [torch.arange(50.0), torch.arange(50.0, 100.0)], torch.arange(50) % 4 > 0
    found = summarise("mine", torch.zeros(2, 51, dtype=torch.int64), blocks, [agree, agree])
    assert found.mean == pytest.approx(49.5) and found.p95 == pytest.approx(94.05)
    assert found.standard_error == pytest.approx(25)  # of the block means 24.5 and 74.5
    assert found.top1_agreement == 0.74 and found.num_tokens == 100


def test_a_divergence_that_is_no_number_names_the_domain():
    with pytest.raises(NumericsError, match="domain legal"):
        ids_NT, kl = torch.zeros(1, 3, dtype=torch.int64), [torch.tensor([1.0, float("nan")])]
        summarise("legal", ids_NT, kl, [torch.tensor([True, True])])
