"""The judge's verdicts against plain float64 sums over whole logits, and what follows from them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import logits_of, tiny_llama
from reference import kl_per_token, ratio_error
from texts import blocks_of, documents_of
from torch.nn.functional import cross_entropy

from secateur.errors import NumericsError
from secateur.facts import Verdict, mean_kl, mean_nats
from secateur.model.bind import bind
from secateur.recovery.judge import Judge, moved_away, objective, verdict_of
from tests.families import tiny_family

TEXT = {
    name: torch.randint(3, 300, (blocks, 70), generator=torch.Generator().manual_seed(blocks))
    for name, blocks in (("one", 1), ("three", 3))
}
BLOCKS = {name: documents_of(ids_NT) for name, ids_NT in TEXT.items()}


def by_hand(dense: Any, model: Any, ids_BT: torch.Tensor) -> dict[str, float]:
    """Return KL, its error over blocks, nats and agreement in float64 from whole logits."""
    ours, theirs = (logits_of(each, ids_BT)[:, :-1].double() for each in (dense, model))
    kl_BP, reverse = kl_per_token(ours, theirs), float(kl_per_token(theirs, ours).mean())
    nats = cross_entropy(theirs.flatten(0, 1), ids_BT[:, 1:].flatten())
    error = ratio_error(kl_BP.mean(1).tolist(), [1] * len(kl_BP))
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    found = {"kl": float(kl_BP.mean()), "error": error, "nats": float(nats), "agreement": float(agreement)}
    return found | {"reverse": reverse}


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
def test_verdicts_are_sums_over_whole_logits(name):
    """Families that scale or cap their logits too: the judge holds the dense model's last states alone."""
    dense, model = tiny_family(name), tiny_family(name, seed=1)
    judge = Judge(dense, bind(dense), BLOCKS)
    found = judge.verdicts(lambda ids_BT: logits_of(model, ids_BT))
    for domain, ids_BT in TEXT.items():
        expected, verdict = by_hand(dense, model, ids_BT), found[domain]
        # Logits are float32 either way, whose errors the softmax's sums of 320 terms carry.
        assert verdict.kl == pytest.approx(expected["kl"], rel=1e-4)
        assert verdict.reverse_kl == pytest.approx(expected["reverse"], rel=1e-4)
        error = expected["error"]
        assert verdict.standard_error == (error if error is None else pytest.approx(error, rel=1e-3, abs=1e-9))
        assert verdict.nats_per_token == pytest.approx(expected["nats"], rel=1e-5)
        assert verdict.top1_agreement == expected["agreement"]
        assert verdict.num_tokens == ids_BT[:, 1:].numel()


def test_the_judge_stands_without_the_dense_model():
    dense, model, seen = tiny_llama(), tiny_llama(seed=1), list[tuple[str, int, int]]()
    judge = Judge(dense, bind(dense), BLOCKS, lambda *where: seen.append(where))
    assert seen == [("judge dense", done, 3) for done in range(4)], "layers are counted"
    before = judge.verdicts(lambda ids_BT: logits_of(model, ids_BT))
    judge.own_head()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert judge.verdicts(lambda ids_BT: logits_of(model, ids_BT)) == before


def verdicts(**kl: float) -> dict[str, Verdict]:
    return {name: Verdict(value, 0.0, 10 * value, 1.0, 1, 2 * value) for name, value in kl.items()}


def test_domains_count_equally_and_the_objective_mixes_both():
    found = verdicts(a=0.1, b=0.5)
    assert mean_kl(found) == pytest.approx(0.3) and mean_nats(found) == pytest.approx(3.0)
    assert [objective(found, share, (), found) for share in (1.0, 0.0)] == pytest.approx([0.3, 3.0])
    assert objective(found, 0.75, (), found) == pytest.approx(0.75 * 0.3 + 0.25 * 3.0)


def test_answers_are_judged_in_both_directions_and_no_move_away_from_them_passes():
    before = verdicts(text=0.3, answers=0.4)
    assert before["answers"].both_ways == pytest.approx(0.6)
    assert objective(before, 0.5, {"answers"}, before) == pytest.approx((0.5 * 0.3 + 0.5 * 3.0 + 0.6) / 2)
    assert objective(before, 0.0, {"answers"}, before) == pytest.approx(3.5)  # no KL asked for: nats of both
    vaguer = {**before, "answers": replace(before["answers"], kl=0.35, reverse_kl=0.9)}
    surer = {**before, "answers": replace(before["answers"], kl=0.9, reverse_kl=0.6)}
    nearly = {**before, "answers": replace(before["answers"], kl=0.41, reverse_kl=0.81)}
    assert [moved_away(before, each, {"answers"}) for each in (vaguer, surer, nearly)] == [["answers"], ["answers"], []]
    assert objective(vaguer, 0.5, {"answers"}, before) == math.inf > objective(nearly, 0.5, {"answers"}, before)


def test_rounding_leaves_no_divergence_below_zero():
    below, nats = torch.full((2,), -1e-9), torch.ones(2)
    found = verdict_of("mine", blocks_of(torch.zeros(1, 3, dtype=torch.int64)), [(below, below, nats, nats)])
    assert (found.kl, found.reverse_kl, found.standard_error) == (0.0, 0.0, None)


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_figures_of_a_domain_are_those_of_the_formulae(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.rand(size, generator=generator) for size in sizes]
    agree = [torch.rand(size, generator=generator) < 0.6 for size in sizes]
    ids = [torch.zeros(size + 1, dtype=torch.int64) for size in sizes]
    found = verdict_of("mine", blocks_of(ids), [(kl, 2 * kl, same, kl) for kl, same in zip(blocks, agree, strict=True)])
    values = [float(value) for block in blocks for value in block]
    assert found.kl == pytest.approx(sum(values) / len(values), rel=1e-12)
    error = ratio_error([sum(block.tolist()) for block in blocks], sizes)
    assert found.standard_error == (error if error is None else pytest.approx(error, rel=1e-9, abs=1e-12))
    hits = [bool(value) for block in agree for value in block]
    assert found.top1_agreement == pytest.approx(sum(hits) / len(hits), rel=1e-12)
    assert found.num_tokens == sum(sizes)
    assert (found.reverse_kl, found.nats_per_token) == pytest.approx((2 * found.kl, found.kl), rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(NumericsError, match=r"^KL, domain legal: a divergence is not finite.*\.$"):
        verdict_of("legal", blocks_of(torch.zeros(1, 3, dtype=torch.int64)), [(torch.tensor([1.0, value]),) * 4])
