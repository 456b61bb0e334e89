"""What a trim of the vocabulary is said to do: tokens counted independently."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from bpe_tokenizer import CORPUS, SAMPLES, bpe_tokenizer
from models import tiny_llama
from texts import documents_of

from secateur.facts import Loss
from secateur.pruning.trimmed import vocabulary_facts
from secateur.report.records import VocabularyFacts
from secateur.stream.losses import predicted_tokens
from secateur.vocabulary.kept import KeptTokens, Trim
from secateur.vocabulary.retokenised import retokenised
from secateur.vocabulary.tokenizer import read_vocabulary, trimmed_tokenizer, with_parts

RULES = " ".join(sign * 32 for sign in "=-+*#~") * 2
LEARNT = [
    *CORPUS,
    *SAMPLES.values(),
    "institutional neurotransmitters understood assertAlmostEqual",
    "Паром море море",
    RULES,
] * 4


@pytest.fixture(scope="module")
def trim() -> Trim:
    """All that may go of every second token is gone."""
    dense = bpe_tokenizer(vocab_size=900, corpus=LEARNT)
    vocabulary = read_vocabulary(dense, tiny_llama(vocab_size=960))
    stay = with_parts(vocabulary, range(0, 900, 2))
    kept = KeptTokens(tuple(index for index in range(960) if index in stay or index > 950), 960)
    return Trim(kept, dense, trimmed_tokenizer(dense, kept))


@pytest.fixture(scope="module")
def facts(trim: Trim) -> VocabularyFacts:
    texts = {"prose": CORPUS[0] * 4, "море": "Паром море " * 9}
    blocks = {name: documents_of(torch.tensor([trim.tokenizer(text)["input_ids"]])) for name, text in texts.items()}
    losses = {"prose": (Loss(3.0, 0.1, 9), Loss(3.25, 0.1, 9))}
    dense = retokenised(blocks, trim.tokenizer, trim.dense_tokenizer)
    before, now = predicted_tokens(dense), predicted_tokens(blocks)
    num_tokens = {name: (sum(before[name].values()), sum(now[name].values())) for name in blocks}
    return vocabulary_facts(dataclasses.replace(trim, foretold=0.2), num_tokens, losses)


def test_tokens_are_counted_in_both_tokenizers(trim, facts):
    assert (facts.num_before, facts.num_after) == (960, len(trim.kept.dense_ids))
    for name, text in (("prose", CORPUS[0] * 4), ("море", "Паром море " * 9)):
        first, *rest = trim.tokenizer.tokenize(text)  # context alone, in both
        behind = text.removeprefix(trim.tokenizer.convert_tokens_to_string([first]))
        assert facts.by_domain[name] == (len(trim.dense_tokenizer.tokenize(behind)), len(rest))
    assert facts.by_domain["prose"][1] > facts.by_domain["prose"][0]
    assert facts.nats == {"prose": (3.0, 3.25)} and facts.foretold == 0.2


def test_a_token_beyond_the_models_rows_is_none(trim):
    found = vocabulary_facts(dataclasses.replace(trim, kept=KeptTokens(tuple(range(899)), 899)), {}, {})
    assert found.num_before == found.num_after == 899 and found.scripts["latin"][0] == found.scripts["latin"][1] > 0


def test_scripts_count_tokens_that_have_their_letters(trim, facts):
    def count(ids: Any, letters: str) -> int:
        return sum(bool(re.search(letters, trim.dense_tokenizer.decode([index]))) for index in ids if index < 900)

    for script, letters in (
        ("cyrillic", "[\u0400-\u04ff]"),
        ("latin", "[a-zA-ZñáäöüéíóúßÄÖÜ]"),
        ("devanagari", "[\u0904-\u0939]"),
    ):
        expected = (count(range(900), letters), count(trim.kept.dense_ids, letters))
        assert facts.scripts[script] == expected and expected[0] > expected[1] > 0, script
