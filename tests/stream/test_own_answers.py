"""A model on the dense model's own answers: nothing lost by itself, losses as a plain forward gives them."""

import math

import pytest
import torch
from models import tiny_llama
from reference import ratio_error
from tiny_tokenizer import tiny_tokenizer
from torch.nn.functional import cross_entropy

from secateur.data.answers import Conversation, Speaker
from secateur.log import silent
from secateur.model.bind import bind
from secateur.store import Store
from secateur.stream import judge as judging
from secateur.stream.judge import AnswerSheet, Judge, ToJudge, ask, judge

PROMPTS = ("Why is the sky blue?", "Two and two?", "A poem, please.")


def speaker(seed: int, *, dtype: torch.dtype = torch.float32) -> Speaker:
    model = tiny_llama(seed=seed).to(dtype)
    return Speaker(model=model, arch=bind(model), tokenizer=tiny_tokenizer(), seed="0", length=64)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(judging, "ANSWER_TOKENS", 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_model_loses_nothing_on_its_own_answers(short, dtype):
    dense = speaker(0, dtype=dtype)
    found = judge(dense, ask(dense, PROMPTS, silent), dense.tokenizer)
    assert found.nats_lost == 0 and found.standard_error == 0
    assert found.ended[0] == found.ended[1] and found.repeated[0] == found.repeated[1]
    assert found.num_prompts == 3 and found.num_tokens <= 27
    if dtype == torch.float32:
        assert found.same_first == 1


def test_nats_are_those_of_a_forward_pass_and_the_error_is_over_prompts(short):
    dense, other = speaker(0), speaker(1)
    sheet = ask(dense, PROMPTS, silent)
    found = judge(other, sheet, other.tokenizer)

    lost, tokens, same = [], [], 0
    for conversation in sheet.conversations:
        ids_T, start = conversation.ids_T, conversation.num_prompt
        nats = []
        for model in (dense.model, other.model):
            with torch.no_grad():
                logits_AV = model(ids_T[None]).logits[0, start - 1 : -1].float()
            nats.append(float(cross_entropy(logits_AV, ids_T[start:], reduction="sum")))
        same += int((logits_AV[:, :257].argmax(-1) == ids_T[start:]).sum())
        lost.append(nats[1] - nats[0])
        tokens.append(len(ids_T) - start)
    assert found.nats_lost == pytest.approx(sum(lost) / sum(tokens), rel=1e-4)
    assert found.standard_error == pytest.approx(ratio_error(lost, tokens), rel=1e-3)
    assert found.same_first == pytest.approx(same / sum(tokens))


def test_prompts_do_not_count(short):
    dense, other = speaker(0), speaker(1)
    sheet = ask(dense, PROMPTS, silent)
    # Only the first token of an answer is told apart from what the prompt ends with.
    shorter = tuple(ids[: number + 1] for ids, number in zip(sheet.ids, sheet.num_prompt, strict=True))
    found = judge(other, AnswerSheet(PROMPTS, shorter, sheet.num_prompt, (0.0,) * 3), other.tokenizer)
    assert found.num_tokens == 3
    assert 0 < found.nats < 3 * math.log(300)


def test_a_judge_asks_both_models_a_share_of_the_prompts(short):
    dense, other = speaker(0), speaker(1)
    judged = Judge({}, dense.tokenizer, dense.model.config, Store(), share=0.01)
    before = judged.dense(ToJudge.of(dense.model, "dense", 64), asks=True)
    after = judged.pruned(ToJudge.of(other.model, "pruned", 64))
    assert len(before.other.document_nats) == len(after.other.document_nats) == 2 and before.answers is None
    [shown] = after.answers.shown
    assert after.answers.num_prompts == 1 and shown.dense != shown.pruned


def test_ends_and_repetitions_are_counted():
    def of(answer: list[int]) -> Conversation:
        return Conversation(ids_T=torch.tensor([7, 7, *answer]), num_prompt=2)

    assert judging._ended([of([1] * 3), of([1] * judging.ANSWER_TOKENS)]) == 0.5
    # Runs of four of 1 2 3 4 1 2 3 4: five, of which the last was there before.
    assert judging._repeated([of([1, 2, 3, 4, 1, 2, 3, 4])]) == pytest.approx(1 / 5)
    assert judging._repeated([of([1, 2, 3])]) == 0
