"""A prune that leaves the vocabulary alone says so if tokens could have gone for almost nothing, and never fails."""

import dataclasses
from typing import Any

import pytest
import torch
from bpe_tokenizer import CORPUS, bpe_tokenizer
from models import opened, tiny_llama
from recipes import grouped
from tiny_tokenizer import tiny_tokenizer
from transformers import BertTokenizer

import secateur
from secateur.data.blocks import Blocks, LearningDomain, LearningText
from secateur.pruning import trim
from secateur.recipe_file import parse_recipe

NUM_ROWS = 832
LEARNT = [
    *CORPUS,
    *(f"{a}{b}{c}" for a in "brstmn" for b in ("ark", "olm", "ingle", "est") for c in ("", "er", "ed")),
] * 3
TOKENIZER = bpe_tokenizer(vocab_size=420, corpus=LEARNT)


def asked(text: str, tokenizer: Any = TOKENIZER, **recipe: Any) -> str | None:
    model = opened(tiny_llama(vocab_size=NUM_ROWS), parse_recipe(grouped(recipe)))
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    blocks = LearningDomain("a", 1.0, Blocks.of(ids), len(ids), Blocks.of(ids[:0]))
    return trim.would_have_paid(dataclasses.replace(model, tokenizer=tokenizer), LearningText((blocks,), 8))


def test_it_names_tokens_share_and_cost():
    note = asked("the ferry leaves at " * 50)
    assert note is not None
    # 423 rows have no token, and of the 409 tokens those that this text lacks go first.
    num_gone = int(note.split()[1])
    assert num_gone % 64 == 0 and num_gone >= 423 // 64 * 64
    share = num_gone * 2 * 48 / sum(each.numel() for each in tiny_llama(vocab_size=NUM_ROWS).parameters())
    assert f"{num_gone} of 832 tokens ({share:.1%} of all parameters)" in note


def test_none_where_it_would_not_pay_or_cannot_be(monkeypatch):
    text = "the ferry leaves at " * 50
    assert asked(text, target="kv_bytes", groups=["kv_heads"]) is None
    assert asked(text, tiny_tokenizer()) is None  # bytes alone, which never go
    words = BertTokenizer(vocab={word: index for index, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "the", "ferry"])})
    assert asked(text, words) is None
    monkeypatch.setattr(trim, "WORTH_SAYING", 0.9)
    assert asked(text) is None


def test_text_that_uses_its_tokens_keeps_them(monkeypatch):
    """With all rows used as much, even the cheapest 64 tokens lengthen the text beyond what is free."""
    monkeypatch.setattr(trim, "ALMOST_FREE", 0.0)
    text = " ".join(LEARNT) + "".join(map(TOKENIZER.decode, range(420)))
    few, many = (asked(each) for each in ("the ferry ", text))
    assert few is not None and many is not None and int(many.split()[1]) == 384 <= int(few.split()[1])


@pytest.mark.parametrize("vocabulary", [None, 768])
def test_a_run_tells_it_once_and_only_without_a_trim(recipe, vocabulary):
    asked = grouped({**recipe, "evaluate": False, "vocabulary": vocabulary})
    result = secateur.prune(tiny_llama(vocab_size=NUM_ROWS), asked, tokenizer=TOKENIZER)
    notes = [each for each in result.summary.warnings if each.startswith("remove.vocabulary: ")]
    assert len(notes) == (vocabulary is None)
