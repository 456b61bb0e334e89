"""The calibration set: the same for the same seed, held-out text apart from calibration text, shares respected."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from texts import learning_text, split_text
from tiny_tokenizer import tiny_tokenizer

from secateur.data.blocks import Blocks, LearningText
from secateur.data.counts import count_tokens
from secateur.data.overlap import ngram_overlap
from secateur.errors import CalibrationError
from secateur.recipe import Calibration, Domain

LENGTH = 32
TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def letters(path: Path, num_documents: int, num_characters: int) -> Domain:
    """Each document repeats one character, so that a token tells which document it comes from."""
    rows = [json.dumps({"text": chr(ord("0") + number) * num_characters}) for number in range(num_documents)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return Domain(files=(str(path),))


def build(num_tokens: int, seed: int = 0, **domains: Domain) -> LearningText:
    return learning_text(Calibration(domains=domains, sequence_length=LENGTH), num_tokens, TOKENIZER, seed)


def parts(found: LearningText) -> tuple[list[int], list[int]]:
    [domain] = found.domains
    return domain.held_out.ids_NT.flatten().tolist(), domain.calibration.ids_NT.flatten().tolist()


def test_same_seed_same_hash_other_seed_other_hash(tmp_path: Path) -> None:
    domain = letters(tmp_path / "a.jsonl", 40, 50)
    hashes = [build(20 * LENGTH, seed, a=domain).content_hash for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_hash_covers_every_token_name_and_share(tmp_path: Path) -> None:
    found = build(20 * LENGTH, a=letters(tmp_path / "a.jsonl", 40, 50))
    [domain] = found.domains
    other_calibration, other_held_out = domain.blocks.ids_NT.clone(), domain.held_out.ids_NT.clone()
    other_calibration[-1, -1] += 1
    other_held_out[0, 0] += 1
    shorter = domain.blocks.ids_NT.view(-1, LENGTH // 2)
    changed = [
        dataclasses.replace(domain, blocks=Blocks.of(other_calibration)),
        dataclasses.replace(domain, held_out=Blocks.of(other_held_out)),
        dataclasses.replace(domain, name="b"),
        dataclasses.replace(domain, share=0.5),
        dataclasses.replace(domain, blocks=Blocks.of(shorter)),
    ]
    hashes = {dataclasses.replace(found, domains=(each,)).content_hash for each in changed}
    assert len(hashes) == 5 and found.content_hash not in hashes
    assert dataclasses.replace(found, domains=(domain,)).content_hash == found.content_hash


def test_held_out_and_calibration_share_no_document(tmp_path: Path) -> None:
    domain = letters(tmp_path / "a.jsonl", 40, 50)
    for seed in range(5):
        held_out, calibration = parts(build(20 * LENGTH, seed, a=domain))
        assert len(held_out) == 3 * LENGTH and len(calibration) == 20 * LENGTH
        assert set(held_out) & set(calibration) == {EOS}


def test_documents_are_packed_whole_with_the_end_token_between(tmp_path: Path) -> None:
    _, calibration = parts(build(10 * LENGTH, a=letters(tmp_path / "a.jsonl", 40, 50)))
    runs = "".join("|" if token == EOS else "x" for token in calibration).split("|")
    assert [len(run) for run in runs[:-1]] == [50] * (len(runs) - 1) and len(runs) == 7


def test_blocks_follow_the_shares(tmp_path: Path) -> None:
    domains = {}
    for name, share in {"a": 3.0, "b": 1.0, "c": 0.001}.items():
        domains[name] = letters(tmp_path / f"{name}.jsonl", 40, 100).model_copy(update={"share": share})
    found = build(40 * LENGTH, **domains)
    assert [domain.name for domain in found.domains] == ["a", "b", "c"]
    assert [len(domain.calibration.ids_NT) for domain in found.domains] == [30, 10, 1]
    assert [len(domain.held_out.ids_NT) for domain in found.domains] == [4, 2, 1]
    assert sum(domain.share for domain in found.domains) == pytest.approx(1)
    assert found.num_tokens == 41 * LENGTH and found.num_held_out_tokens == 7 * LENGTH
    assert found.domains[0].calibration.ids_NT.dtype == torch.int64 and found.sequence_length == LENGTH


def test_a_single_document_is_split_without_overlap(tmp_path: Path) -> None:
    text = "".join(f"{number:07d} " for number in range(200))
    path = tmp_path / "a.txt"
    path.write_text(text)
    held_out, calibration = parts(build(45 * LENGTH, a=Domain(files=(str(path),))))
    assert TOKENIZER.decode(held_out) + TOKENIZER.decode(calibration) == text


def test_the_rest_of_the_held_out_document_is_used_only_when_all_else_ran_out(tmp_path: Path) -> None:
    domain = letters(tmp_path / "a.jsonl", 3, 10 * LENGTH)
    held_out, calibration = parts(build(18 * LENGTH, a=domain))
    assert not set(held_out) & set(calibration)
    held_out, calibration = parts(build(27 * LENGTH, a=domain))
    # Two other documents in two turns each, an end-of-text token after every turn.
    assert calibration.index(held_out[0]) == 20 * LENGTH + 4


def test_a_document_counts_as_the_square_root_of_its_occurrences() -> None:
    found = count_tokens([torch.tensor(ids) for ids in ([1, 1, 1, 1, 0], [1, 3])], 5)
    assert found.tokens_V.tolist() == [1, 5, 0, 1, 0]
    assert found.damped_V.tolist() == [1.0, 3.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("num_characters", [50, 5000])
def test_counting_stops_at_the_most(tmp_path: Path, num_characters: int) -> None:
    calibration = Calibration(domains={"a": letters(tmp_path / "a.jsonl", 40, num_characters)}, sequence_length=LENGTH)
    (counts,) = split_text(calibration, 20 * LENGTH, TOKENIZER).learning.counts(len(TOKENIZER), most=420).values()
    assert int(counts.tokens_V.sum()) == 420  # a character is a token


def test_equal_documents_are_used_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"text": "x" * 40}) + "\n") * 100)
    with pytest.raises(CalibrationError, match=": 40 tokens of text"):
        build(20 * LENGTH, a=Domain(files=(str(path),)))


def test_long_documents_are_tokenised_in_pieces_that_lose_nothing(tmp_path: Path) -> None:
    for name, text in {"lines": "some line of text\n" * 8000, "none": "y" * 144000}.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([text]))
        held_out, calibration = parts(build(4050 * LENGTH, a=Domain(files=(str(path),))))
        assert TOKENIZER.decode(held_out + calibration) == text


def test_a_short_model_context_gives_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    domain = letters(tmp_path / "a.jsonl", 40, 500)
    learning_text(Calibration(domains={"a": domain}, sequence_length=LENGTH), 20 * LENGTH, tokenizer, 0)
    assert not caplog.records


def test_a_tokenizer_without_end_token_packs_without_separator(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    domain = letters(tmp_path / "a.jsonl", 40, 50)
    found = learning_text(Calibration(domains={"a": domain}, sequence_length=LENGTH), 20 * LENGTH, tokenizer, 0)
    assert EOS not in found.domains[0].calibration.ids_NT


@pytest.mark.parametrize(("num_documents", "num_characters", "num_there"), [(1, 20, "20"), (30, 50, "1,529")])
def test_too_little_text_says_how_much_there_is(
    tmp_path: Path, num_documents: int, num_characters: int, num_there: str
) -> None:
    domain = letters(tmp_path / "a.jsonl", num_documents, num_characters)
    with pytest.raises(CalibrationError) as caught:
        build(90 * LENGTH, small=domain)
    message = str(caught.value)
    assert f"domain 'small': {num_there} tokens of text" in message
    assert "10 held-out and 90 calibration blocks of 32 tokens need 3,200;" in message
    assert "lower calibration.num_tokens" in message and "\n" not in message


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    domains = {name: letters(tmp_path / f"{name}.jsonl", 40, 100) for name in "ab"}
    seen: list[tuple[str, int, int]] = []
    calibration = Calibration(domains=domains, sequence_length=LENGTH)
    learning_text(calibration, 18 * LENGTH, TOKENIZER, 0, lambda *step: seen.append(step))
    assert seen == [("calibration", 0, 20), ("calibration", 10, 20), ("calibration", 20, 20)]


def test_the_default_domains_work_out_of_the_box() -> None:
    count = len(Calibration().domains)
    found = learning_text(Calibration(sequence_length=LENGTH), count * 9 * LENGTH, TOKENIZER, 0)
    assert [len(domain.calibration.ids_NT) for domain in found.domains] == [9] * count
    assert found.num_held_out_tokens == count * LENGTH


def test_held_out_text_of_the_default_domains_is_new() -> None:
    found = learning_text(Calibration(sequence_length=256), 5 * 18 * 256, TOKENIZER, 0)
    measured_on = {domain.name: domain.calibration.ids_NT for domain in found.domains}
    overlap = ngram_overlap(measured_on, {domain.name: domain.held_out.ids_NT for domain in found.domains}, 60)
    assert max(share or 0.0 for share in overlap.values()) < 0.1


def test_documents_take_turns(tmp_path: Path) -> None:
    domain = letters(tmp_path / "a.jsonl", 12, 40 * LENGTH)
    _, calibration = parts(build(9 * LENGTH, a=domain))
    assert len(set(calibration) - {TOKENIZER.eos_token_id}) > 1


def rotating(num_tokens: int, num_rounds: int, **domains: Domain) -> LearningText:
    calibration = Calibration(domains=domains, sequence_length=LENGTH)
    return learning_text(calibration, num_tokens, TOKENIZER, 0, num_rounds=num_rounds)


def test_every_round_has_blocks_of_its_own_and_the_same_held_out_ones(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{number:04d} " * 20}) for number in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    domains = {"a": Domain(files=(str(tmp_path / "a.jsonl"),)), "b": letters(tmp_path / "b.jsonl", 40, 300)}
    found, once = rotating(40 * LENGTH, 3, **domains), rotating(40 * LENGTH, 1, **domains)
    assert found.num_rounds == 3 and found.num_tokens == 3 * once.num_tokens == 120 * LENGTH
    rounds = [found.of_round(number) for number in range(3)]
    for index, domain in enumerate(found.domains):
        parts = [each.domains[index] for each in rounds]
        assert [len(part.calibration.ids_NT) for part in parts] == [20] * 3
        assert torch.equal(torch.cat([part.calibration.ids_NT for part in parts]), domain.calibration.ids_NT)
        assert torch.equal(parts[0].calibration.ids_NT, once.domains[index].calibration.ids_NT)
        for part in parts:
            assert torch.equal(part.held_out.ids_NT, once.domains[index].held_out.ids_NT)
    assert len(found.domains[0].calibration.ids_NT.unique(dim=0)) == 60


def test_without_rotation_every_round_has_all_blocks(tmp_path: Path) -> None:
    found = rotating(20 * LENGTH, 1, a=letters(tmp_path / "a.jsonl", 40, 50))
    assert found.num_tokens == 20 * LENGTH and found.of_round(2) is found


def test_too_little_text_for_all_rounds_says_so(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        rotating(30 * LENGTH, 3, small=letters(tmp_path / "a.jsonl", 30, 50))
    assert "domain 'small': 1,529 tokens of text" in str(caught.value)
    assert "4 held-out and 90 calibration blocks (3 rounds of fresh ones, as" in str(caught.value)
