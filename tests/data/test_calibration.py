"""The calibration set: the same for the same seed, counted by documents, of the default domains."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
from texts import documents_of, learning_text, split_text
from tiny_tokenizer import tiny_tokenizer

from secateur.data.blocks import LearningText, ngram_overlap
from secateur.recipe import Calibration, Domain

LENGTH = 32
TOKENIZER = tiny_tokenizer()


def letters(path: Path, num_documents: int, num_characters: int) -> Domain:
    """Each document repeats one character, so that a token tells which document it comes from."""
    rows = [json.dumps({"text": chr(ord("0") + number) * num_characters}) for number in range(num_documents)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return Domain(files=(str(path),))


def build(num_tokens: int, seed: int = 0, **domains: Domain) -> LearningText:
    return learning_text(Calibration(domains=domains, sequence_length=LENGTH), num_tokens, TOKENIZER, seed)


def test_the_hash_covers_every_token_name_and_share(tmp_path: Path) -> None:
    found = build(20 * LENGTH, a=letters(tmp_path / "a.jsonl", 40, 50))
    [domain] = found.domains
    other_calibration, other_held_out = domain.blocks.ids_NT.clone(), domain.held_out.ids_NT.clone()
    other_calibration[-1, -1] += 1
    other_held_out[0, 0] += 1
    shorter = domain.blocks.ids_NT.view(-1, LENGTH // 2)
    changed = [
        dataclasses.replace(domain, blocks=documents_of(other_calibration)),
        dataclasses.replace(domain, held_out=documents_of(other_held_out)),
        dataclasses.replace(domain, name="b"),
        dataclasses.replace(domain, share=0.5),
        dataclasses.replace(domain, blocks=documents_of(shorter)),
    ]
    hashes = {dataclasses.replace(found, domains=(each,)).content_hash for each in changed}
    assert len(hashes) == 5 and found.content_hash not in hashes
    assert dataclasses.replace(found, domains=(domain,)).content_hash == found.content_hash


@pytest.mark.parametrize("num_characters", [50, 5000])
def test_counting_stops_at_the_most(tmp_path: Path, num_characters: int) -> None:
    calibration = Calibration(domains={"a": letters(tmp_path / "a.jsonl", 40, num_characters)}, sequence_length=LENGTH)
    (documents,) = split_text(calibration, 20 * LENGTH, TOKENIZER).learning.documents(most=420).values()
    assert sum(map(len, documents)) == 420  # a character is a token


def test_a_short_model_context_gives_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    domain = letters(tmp_path / "a.jsonl", 40, 500)
    learning_text(Calibration(domains={"a": domain}, sequence_length=LENGTH), 20 * LENGTH, tokenizer, 0)
    assert not caplog.records


def test_the_default_domains_work_out_of_the_box_and_their_held_out_text_is_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("secateur.data.blocks.NGRAM_TOKENS", 60)
    count = len(Calibration().domains)
    found = learning_text(Calibration(sequence_length=256), count * 9 * 256, TOKENIZER, 0)
    assert [len(domain.calibration) for domain in found.domains] == [9] * count
    assert found.num_held_out_tokens == count * 256
    measured_on = {domain.name: domain.calibration.ids_NT for domain in found.domains}
    overlap = ngram_overlap(measured_on, {domain.name: domain.held_out.ids_NT for domain in found.domains})
    assert max(share or 0.0 for share in overlap.values()) < 0.1
