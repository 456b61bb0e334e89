"""Packing documents into blocks, by properties that any order must have; each token says where it comes from."""

import json
import math
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from texts import learning_text
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from secateur.data.blocks import Blocks
from secateur.data.pool import CHARACTERS_PER_TOKEN, MOST_REPEATS, Amounts, Split, TextPool, _pieces, _Texts, _Tokens
from secateur.errors import CalibrationError
from secateur.recipe import Calibration, Domain

LENGTH = 8
TOKENIZER, WITHOUT_EOS = tiny_tokenizer(), tiny_tokenizer()
WITHOUT_EOS.eos_token = None
EOS = TOKENIZER.eos_token_id
CALIBRATION = Calibration(domains={"mine": Domain(installed="code")}, sequence_length=LENGTH)


def documents_in(blocks: Blocks) -> set[int]:
    """Return the numbers of the documents."""
    return set(blocks.document_NT.unique().tolist())


def token(document: int, place: int) -> int:
    return 1000 * (document + 1) + place


def origin(found: int) -> int:
    return found // 1000 - 1


# Documents as lengths of their turns; a document may hold one turn only.
texts = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=6)


def turns_of(documents: list[list[int]]) -> list[list[list[int]]]:
    found = []
    for number, sizes in enumerate(documents):
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        found.append(
            [[token(number, start + at) for at in range(size)] for start, size in zip(starts, sizes, strict=True)]
        )
    return found


class Read(_Texts):
    """Documents as if read."""

    def __init__(self, num_documents: int) -> None:
        self.name, self.length = "mine", LENGTH
        self.digests = [bytes([number]) for number in range(num_documents)]

    def has(self, number: int) -> bool:
        return number < len(self.digests)


class Turns(_Tokens):
    """Documents of given tokens."""

    def __init__(self, documents: list[list[list[int]]], tokenizer: Any) -> None:
        super().__init__(Read(len(documents)), tokenizer)
        self.documents = documents

    def piece(self, document: int, number: int) -> "array[int] | None":
        turns = self.documents[document]
        return array("i", turns[number]) if number < len(turns) else None


def split_of(documents: list[list[int]], amounts: Amounts, tokenizer: Any = TOKENIZER) -> Split:
    """Return the parts of documents, given as lengths of their turns."""
    pool, turns = TextPool(LENGTH, tokenizer, 0), Turns(turns_of(documents), tokenizer)
    pool._texts["mine"], pool._tokens["mine", id(tokenizer)] = turns.texts, turns
    return pool.split(CALIBRATION.domains, amounts)


def parts_of(documents: list[list[int]], sizes: tuple[int, int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the held-out and the calibration tokens."""
    amounts = Amounts(num_tokens=sizes[0] * LENGTH, least_held_out=sizes[1])
    [domain] = split_of(documents, amounts, tokenizer).learning.text.domains
    for part, size in ((domain.calibration, sizes[0]), (domain.held_out, sizes[1])):
        assert part.ids_NT.shape == part.document_NT.shape == (size, LENGTH) and part.ids_NT.dtype == torch.int64
        check_documents(part)
    return domain.held_out.ids_NT.flatten().tolist(), domain.calibration.ids_NT.flatten().tolist()


def check_documents(part: Blocks) -> None:
    """Every token says which document it is of; an end token, that of the one before it."""
    ids, numbers = part.ids_NT.flatten().tolist(), part.document_NT.flatten().tolist()
    for place, (found, number) in enumerate(zip(ids, numbers, strict=True)):
        assert number == (numbers[place - 1] if found == EOS else origin(found))


@settings(max_examples=60)
@given(documents=texts, num_blocks=st.integers(1, 3), num_judged=st.integers(1, 3))
def test_no_document_is_in_two_parts_unless_a_note_says_so(
    documents: list[list[int]], num_blocks: int, num_judged: int
) -> None:
    amounts = Amounts(num_tokens=num_blocks * LENGTH, num_judged_tokens=num_judged * LENGTH)
    try:
        split = split_of(documents, amounts)
    except CalibrationError:
        return
    [domain], judged = split.learning.text.domains, split.judged.blocks["mine"]
    guards, taught = documents_in(domain.held_out), documents_in(domain.blocks)
    counted = {each for ids_T in split.learning.documents()["mine"] for each in ids_T.tolist()}
    taught |= {origin(each) for each in counted}
    parts = [domain.held_out, domain.blocks]
    if judged is domain.held_out:
        assert "too short for a part that only judges" in split.judged.notes[0]
    else:
        check_documents(judged)
        parts.append(judged)
        assert split.judged.notes or not documents_in(judged) & (guards | taught)
    assert split.learning.text.notes or not guards & taught
    words = [each for part in parts for each in part.ids_NT.flatten().tolist() if each != EOS]
    assert len(set(words)) == len(words), "no token is in two parts"
    held = {each for part in (judged, domain.held_out) for each in part.ids_NT.flatten().tolist()} - {EOS}
    assert not held & set(counted), "nor is it counted"


def test_a_shared_document_is_said() -> None:
    [note] = split_of([[8, 8], [8, 8]], Amounts(num_tokens=2 * LENGTH, least_held_out=2)).learning.text.notes
    assert "have parts of 2 documents in common" in note
    [note] = split_of([[8, 8, 8]], Amounts(num_tokens=LENGTH, num_judged_tokens=LENGTH)).judged.notes
    assert note.startswith("domain 'mine': what judges the run and what guards it or what it learns by have parts of 1")


def test_a_rest_that_did_not_fit_is_the_documents_next_turn() -> None:
    # Document 0 has three tokens left, which come when the others have run out.
    held_out, calibration = parts_of([[11], [4], [1]], (1, 1), WITHOUT_EOS)
    assert held_out == [token(0, place) for place in range(8)]
    assert calibration == [token(1, 0), token(1, 1), token(1, 2), token(1, 3), token(2, 0)] + [
        token(0, place) for place in (8, 9, 10)
    ]


def test_too_little_text_says_what_there_is_and_what_it_needs() -> None:
    # Held out: 8; then 4 of the second, an end token, the one left of the first.
    with pytest.raises(
        CalibrationError, match=r"'mine': 14 tokens of text .* 1 held-out and 2 calibration .* need 24;"
    ):
        split_of([[9], [4]], Amounts(num_tokens=2 * LENGTH, num_judged_tokens=3 * LENGTH))
    pool, turns = TextPool(LENGTH, TOKENIZER, 0), Turns(turns_of([[9], [4]]), TOKENIZER)
    pool._texts["mine"], pool._tokens["mine", id(TOKENIZER)] = turns.texts, turns
    with pytest.raises(CalibrationError, match=r"'mine': 14 tokens .* but 3 blocks of 8 tokens need 24; ask for fewer"):
        pool.draw(CALIBRATION.domains, 3)


# Pieces of a document


class Plain(PreTrainedTokenizerFast):
    """A tokenizer of one token a character, which notes how it was asked."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:  # type: ignore[override]
        ASKED.append((text, options))
        return {"input_ids": [ord(each) for each in text]}


ASKED: list[tuple[str, dict[str, Any]]] = []
PLAIN = tiny_tokenizer()
PLAIN.__class__ = Plain


class Pairs(PreTrainedTokenizerFast):
    """A tokenizer that takes twice as many tokens."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:  # type: ignore[override]
        return {"input_ids": [each for each in TOKENIZER(text, **options)["input_ids"] for _ in range(2)]}


PAIRS = tiny_tokenizer()
PAIRS.__class__ = Pairs


def tokens_of(text: str, length: int, seed: int) -> Iterator[list[int]]:
    return (PLAIN(piece)["input_ids"] for piece in _pieces(text, CHARACTERS_PER_TOKEN * length, Random(seed)))


lines = st.lists(st.integers(0, 70), min_size=1, max_size=30)


@settings(max_examples=150)
@given(sizes=lines, length=st.integers(1, 6), seed=st.integers(0, 20))
@example(sizes=[2, 2], length=1, seed=0)  # as long as a piece
@example(sizes=[3, 4], length=1, seed=0)  # of one to two pieces
def test_pieces_of_a_document_are_the_document_from_some_line_on(sizes: list[int], length: int, seed: int) -> None:
    text = "\n".join(chr(ord("a") + number % 26) * size for number, size in enumerate(sizes))
    pieces = ["".join(map(chr, ids)) for ids in tokens_of(text, length, seed)]
    found, most = "".join(pieces), CHARACTERS_PER_TOKEN * length
    assert all(0 < len(piece) <= most for piece in pieces)
    starts = [0, *(at + 1 for at, each in enumerate(text) if each == "\n")]
    if len(text) <= 2 * most:
        assert found == text
    else:
        assert found in {text[start:] + text[:start] for start in starts}
    for place, piece in enumerate(pieces[:-1]):
        # At the end of the last line that fits, or in a line longer than a piece.
        assert len("".join(pieces[place:])) > most
        rest = "".join(pieces[place:])[:most]
        assert piece == (rest[: rest.rindex("\n") + 1] if "\n" in rest else rest)


def test_documents_are_read_and_tokenised_once_and_equal_ones_are_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": 20 * each}) for each in "abacbA"))
    calibration = Calibration(domains={"a": Domain(files=(str(tmp_path / "a.jsonl"),))}, sequence_length=LENGTH)
    pool = TextPool(LENGTH, PLAIN, 0)
    ASKED.clear()
    for _ in range(2):
        learning = pool.split(calibration.domains, Amounts(num_tokens=LENGTH)).learning
        num_tokens = sum(map(len, learning.documents()["a"]))
    assert [text[0] for text, _ in ASKED] == [*dict.fromkeys(text[0] for text, _ in ASKED)] and len(ASKED) == 4
    assert all(options == {"add_special_tokens": False, "verbose": False} for _, options in ASKED)
    assert num_tokens == 3 * 20, "the fourth guards"


# The whole set


def put(path: Path, num_lines: int = 4000, size: int = 24) -> Domain:
    """Documents of `size` lines, each line with a number of its own."""
    documents = [[f"{path.stem} {at:05d}" for at in range(start, start + size)] for start in range(0, num_lines, size)]
    path.write_text("\n".join('{"text": "' + "\\n".join(each) + '"}' for each in documents))
    return Domain(files=(str(path),))


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    return put(tmp_path_factory.mktemp("text") / "a.jsonl")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Domain]:
    place = tmp_path_factory.mktemp("several")
    return [put(place / f"{number}.jsonl") for number in range(4)]


@settings(max_examples=25)
@given(
    shares=st.lists(st.sampled_from([0.01, 0.3, 1.0, 7.0]), min_size=1, max_size=4),
    num_tokens=st.integers(1, 120).map(lambda blocks: LENGTH * blocks + 3),
)
def test_blocks_follow_the_shares(several: list[Domain], shares: list[float], num_tokens: int) -> None:
    domains = {f"d{number}": several[number].model_copy(update={"share": share}) for number, share in enumerate(shares)}
    found = learning_text(Calibration(domains=domains, sequence_length=LENGTH), num_tokens, TOKENIZER)
    assert found.sequence_length == LENGTH
    for (name, asked), blocks in zip(domains.items(), found.domains, strict=True):
        share = asked.share / sum(shares)
        own = max(1, round(share * num_tokens / LENGTH))
        assert (blocks.name, blocks.share) == (name, pytest.approx(share))
        assert (len(blocks.calibration), len(blocks.held_out)) == (own, math.ceil(own / 9))


def test_a_split_by_another_tokenizer_has_the_same_documents_in_every_part(domain: Domain) -> None:
    calibration = Calibration(domains={"a": domain}, sequence_length=LENGTH)
    pool, amounts = TextPool(LENGTH, TOKENIZER, 0), Amounts(num_tokens=90 * LENGTH, num_judged_tokens=20 * LENGTH)
    first = pool.split(calibration.domains, amounts)
    longer = pool.split(calibration.domains, amounts, PAIRS, allotted=first.allotted)
    assert longer.allotted == first.allotted
    bounds = (0, *first.allotted["a"], 10**6)
    for split in (first, longer):
        [own] = split.learning.text.domains
        for part, (start, end) in zip(
            (split.judged.blocks["a"], own.held_out, own.blocks), pairwise(bounds), strict=True
        ):
            assert all(start <= number < end for number in documents_in(part))
    # By itself it would take fewer documents to judge by, and teach by what judges here.
    assert pool.split(calibration.domains, amounts, PAIRS).allotted["a"].judged < first.allotted["a"].judged


def test_a_file_that_says_the_same_again_and_again_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes, compressed, may stand for any number of equal rows."""
    read = list[int]()

    def source(*_: Any) -> Iterator[str]:
        for number in range(10**9):
            read.append(number)
            yield "the same" if number > 2 else f"row {number}"

    monkeypatch.setattr("secateur.data.pool.documents", source)
    texts = _Texts("mine", Domain(installed="code"), TOKENIZER, 0, LENGTH, lambda *_: None)
    assert [texts.has(number) for number in (0, 1, 2, 3, 4)] == [True, True, True, True, False]
    assert len(read) == 4 + MOST_REPEATS and len(texts.pieces) == len(texts.digests) == 4
