"""Pieces of documents, read and tokenised once, by any tokenizer; `test_drawn_shown` has the blocks of each part."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from secateur.data.blocks import Blocks
from secateur.data.pool import CHARACTERS_PER_TOKEN, MOST_REPEATS, Amounts, TextPool, _pieces, _Texts
from secateur.recipe import Calibration, Domain

LENGTH = 8
TOKENIZER = tiny_tokenizer()


def documents_in(blocks: Blocks) -> set[int]:
    """Return the numbers of the documents."""
    return set(blocks.document_NT.unique().tolist())


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


@pytest.mark.parametrize("size", [6, 600])
def test_counting_stops_at_the_most(tmp_path: Path, size: int) -> None:
    domains = Calibration(domains={"a": put(tmp_path / "a.jsonl", size=size)}, sequence_length=LENGTH).domains
    learning = TextPool(LENGTH, TOKENIZER, 0).split(domains, Amounts(num_tokens=20 * LENGTH)).learning
    (documents,) = learning.documents(most=420).values()
    assert sum(map(len, documents)) == 420  # a character is a token


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
