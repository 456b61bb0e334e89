"""The 13-gram check: shares that are known, none across blocks or for short ones, equal to a slow count."""

import pytest
import torch
from models import tiny_ids

from secateur.data import blocks as product
from secateur.data.blocks import ngram_overlap

BLOCKS = tiny_ids(batch=3, length=40, seed=1)


def test_a_passage_counts_by_its_ngrams_whatever_domain_it_is_from():
    other = tiny_ids(batch=3, length=40, seed=2)
    fourteen, twelve = other[:1].clone(), other[:1].clone()
    fourteen[0, 20:34] = BLOCKS[2, 5:19]  # two 13-grams of 28
    twelve[0, 20:32] = BLOCKS[2, 5:17]
    over_the_end_of_a_block = torch.cat([BLOCKS[0, -7:], BLOCKS[1, :7]])[None]
    held_out = {"same": BLOCKS[:1], "other": other, "14": fourteen, "12": twelve, "end": over_the_end_of_a_block}
    found = ngram_overlap({"a": tiny_ids(batch=1, length=40, seed=3), "b": BLOCKS}, held_out)
    assert found == {"same": 1.0, "other": 0.0, "14": pytest.approx(2 / 28), "12": 0.0, "end": 0.0}
    assert ngram_overlap({"a": BLOCKS[:, :12]}, {"short": BLOCKS[:, :12]}) == {"short": None}
    small = BLOCKS % 64  # tokens are compared whole
    assert ngram_overlap({"a": small}, {"byte": small + 256, "word": small + 2**16}) == {"byte": 0.0, "word": 0.0}


def test_every_position_counts_as_a_slow_count_says(monkeypatch: pytest.MonkeyPatch):
    size = product.NGRAM_TOKENS - 5
    monkeypatch.setattr(product, "NGRAM_TOKENS", size)
    calibration, held_out = (
        tiny_ids(batch=6, length=60, vocab_size=2),
        tiny_ids(batch=2, length=60, seed=9, vocab_size=2),
    )

    def grams(blocks: torch.Tensor) -> list[tuple[int, ...]]:
        return [tuple(row[at : at + size].tolist()) for row in blocks for at in range(60 - size + 1)]

    seen = grams(calibration)
    expected = sum(gram in seen for gram in grams(held_out)) / len(grams(held_out))
    assert 0 < expected < 1
    assert ngram_overlap({"a": calibration}, {"a": held_out}) == {"a": expected}
