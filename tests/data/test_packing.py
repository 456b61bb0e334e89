"""Packing documents into blocks, by properties that any order must have; each token says where it comes from."""

import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from secateur.data.calibration import (
    CHARACTERS_PER_TOKEN,
    CalibrationSet,
    DomainBlocks,
    _once,
    _parts,
    _turns,
    build_calibration,
    content_hash,
    rotated,
)
from secateur.errors import CalibrationError
from secateur.recipe import Calibration, Domain

LENGTH = 8
EOS = 0
TOKENIZER = tiny_tokenizer()


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


def parts_of(documents: list[list[int]], sizes: tuple[int, int], eos: int | None) -> tuple[list[int], list[int]]:
    """Return the held-out and the calibration tokens."""

    def pieces() -> Iterator[Iterator[list[int]]]:
        return (iter(turns) for turns in turns_of(documents))

    calibration_NT, held_out_NT, judged_NT = _parts(pieces, "mine", (*sizes, 0), LENGTH, eos, 1)
    assert judged_NT is None
    assert calibration_NT.shape == (sizes[0], LENGTH) and held_out_NT.shape == (sizes[1], LENGTH)
    assert calibration_NT.dtype == held_out_NT.dtype == torch.int64
    return held_out_NT.flatten().tolist(), calibration_NT.flatten().tolist()


@settings(max_examples=200)
@given(documents=texts, num_blocks=st.integers(1, 6), num_held_out=st.integers(1, 2), eos=st.sampled_from([None, EOS]))
def test_packed_tokens(documents: list[list[int]], num_blocks: int, num_held_out: int, eos: int | None) -> None:
    total = sum(map(sum, documents))
    wanted = (num_blocks + num_held_out) * LENGTH
    try:
        held_out, calibration = parts_of(documents, (num_blocks, num_held_out), eos)
    except CalibrationError:
        # An end token counts as a token; without any the sum says it all.
        assert total < wanted
        return
    assert eos == EOS or total >= wanted
    for part in (held_out, calibration):
        check_separators(part, eos)
    words = [each for each in held_out + calibration if each != EOS]
    for number, sizes in enumerate(documents):
        # Its tokens in order, from its first on, none twice, and none left out in between.
        mine = [each for each in words if origin(each) == number]
        assert mine == [token(number, place) for place in range(len(mine))] and len(mine) <= sum(sizes)
    check_turns(documents, held_out)
    used = {origin(each) for each in held_out if each != EOS}
    others = sum(sum(sizes) for number, sizes in enumerate(documents) if number not in used)
    fresh = [each for each in calibration if each != EOS and origin(each) not in used]
    late = [each for each in calibration if each != EOS and origin(each) in used]
    # Only when all the rest is used up, and behind it. A last end token may be another document's.
    if late and held_out[-1] != EOS:
        assert len(fresh) == others
        assert not fresh or calibration.index(late[0]) > calibration.index(fresh[-1])


def check_separators(part: list[int], eos: int | None) -> None:
    """Between two documents stands one end token, and nowhere else."""
    assert (EOS in part) <= (eos == EOS) and part[0] != EOS
    for before, after in pairwise(part):
        assert not before == after == EOS
        if eos == EOS and EOS not in (before, after):
            assert origin(before) == origin(after)
    for place in (at for at, each in enumerate(part[:-1]) if each == EOS):
        assert origin(part[place - 1]) != origin(part[place + 1])


def check_turns(documents: list[list[int]], held_out: list[int]) -> None:
    """Documents take turns: nobody's second before everybody's first."""
    words = [each for each in held_out if each != EOS]
    second = [at for at, each in enumerate(words) if each % 1000 >= documents[origin(each)][0]]
    first = [at for at, each in enumerate(words) if each % 1000 == 0]
    if second:
        assert len(first) == len(documents) and max(first) < min(second)


def test_second_turns_come_in_the_order_of_the_first() -> None:
    held_out, calibration = parts_of([[2, 3], [1, 2], [1, 6], [9]], (1, 1), None)
    first, second, third = ([token(number, place) for place in range(8)] for number in range(3))
    assert held_out == first[:2] + second[:1] + third[:1] + [token(3, place) for place in range(4)]
    # What is left of the first three, and of the last one's turn that did not fit.
    assert calibration == first[2:5] + second[1:3] + third[1:4]


def test_a_rest_that_did_not_fit_is_the_documents_next_turn() -> None:
    # Document 0 has three tokens left, which come when the others have run out.
    held_out, calibration = parts_of([[11], [4], [1]], (1, 1), None)
    assert held_out == [token(0, place) for place in range(8)]
    assert calibration == [token(1, 0), token(1, 1), token(1, 2), token(1, 3), token(2, 0)] + [
        token(0, place) for place in (8, 9, 10)
    ]


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_little_text_says_what_there_is_and_what_it_needs(rounds: int) -> None:
    with pytest.raises(CalibrationError) as caught:
        turns = turns_of([[9], [4]])
        _parts(lambda: (iter(each) for each in turns), "mine", (2, 1, 3), LENGTH, EOS, rounds)
    said = str(caught.value)
    # Held out: 8; then 4 of the second, an end token, the one left of the first.
    assert said.startswith(
        "domain 'mine': 14 tokens of text after packing, but 2 calibration and 1 held-out blocks of 8"
    )
    assert ("(2 rounds of fresh ones, as calibration.rotate asks) need 24;" in said) == (rounds == 2)
    assert "need 24;" in said


# Pieces of a document


class Plain(PreTrainedTokenizerFast):
    """A tokenizer of one token a character, which notes how it was asked."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:  # type: ignore[override]
        ASKED.append(options)
        return {"input_ids": [ord(each) for each in text]}


ASKED: list[dict[str, Any]] = []
PLAIN = tiny_tokenizer()
PLAIN.__class__ = Plain


lines = st.lists(st.integers(0, 70), min_size=1, max_size=30)


@settings(max_examples=150)
@given(sizes=lines, length=st.integers(1, 6), seed=st.integers(0, 20))
@example(sizes=[2, 2], length=1, seed=0)  # as long as a piece
@example(sizes=[3, 4], length=1, seed=0)  # of one to two pieces
def test_pieces_of_a_document_are_the_document_from_some_line_on(sizes: list[int], length: int, seed: int) -> None:
    text = "\n".join(chr(ord("a") + number % 26) * size for number, size in enumerate(sizes))
    ASKED.clear()
    pieces = ["".join(map(chr, ids)) for ids in _turns(text, PLAIN, length, Random(seed))]
    found, most = "".join(pieces), CHARACTERS_PER_TOKEN * length
    assert all(options == {"add_special_tokens": False, "verbose": False} for options in ASKED)
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


def test_long_documents_start_at_lines_that_the_seed_decides() -> None:
    text = "".join(f"{number:03d}\n" for number in range(100))

    def start(seed: int) -> str:
        return "".join(map(chr, next(_turns(text, PLAIN, 2, Random(seed)))))[:4]

    found = [start(seed) for seed in range(40)]
    assert found == [start(seed) for seed in range(40)] and len(set(found)) > 20
    assert all(each.endswith("\n") and each[:3].isdigit() for each in found)


def test_equal_documents_are_one() -> None:
    assert list(_once(iter(["a", "b", "a", "c", "b", "A", "a "]))) == ["a", "b", "c", "A", "a "]


# The whole set


def put(path: Path, num_lines: int = 4000, size: int = 24) -> Domain:
    """Documents of `size` lines, each line with a number of its own."""
    documents = [[f"{path.stem} {at:05d}" for at in range(start, start + size)] for start in range(0, num_lines, size)]
    path.write_text("\n".join('{"text": "' + "\\n".join(each) + '"}' for each in documents))
    return Domain(files=(str(path),))


def build(num_tokens: int, seed: int = 0, *, rotate: bool = True, rounds: int = 1, more: int = 0, **domains: Domain):
    calibration = Calibration(domains=domains, sequence_length=LENGTH, rotate=rotate)
    return build_calibration(calibration, num_tokens, TOKENIZER, seed, num_rounds=rounds, more_held_out=more)


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    return put(tmp_path_factory.mktemp("text") / "a.jsonl")


@settings(max_examples=25)
@given(
    shares=st.lists(st.sampled_from([0.01, 0.3, 1.0, 7.0]), min_size=1, max_size=4),
    num_tokens=st.integers(1, 120).map(lambda blocks: LENGTH * blocks + 3),
    rounds=st.sampled_from([1, 3]),
    rotate=st.booleans(),
    more=st.sampled_from([0, 2]),
)
def test_blocks_follow_the_shares(
    domain: Domain, shares: list[float], num_tokens: int, rounds: int, rotate: bool, more: int
) -> None:
    domains = {f"d{number}": domain.model_copy(update={"share": share}) for number, share in enumerate(shares)}
    found = build(num_tokens, rotate=rotate, rounds=rounds, more=more, **domains)
    assert found.num_rounds == (rounds if rotate else 1) and found.sequence_length == LENGTH
    for (name, asked), blocks in zip(domains.items(), found.domains, strict=True):
        share = asked.share / sum(shares)
        own = max(1, round(share * num_tokens / LENGTH))
        assert (blocks.name, blocks.share) == (name, pytest.approx(share))
        assert len(blocks.calibration_NT) == own * found.num_rounds
        assert len(blocks.held_out_NT) == more + math.ceil(own / 9)


def rows(blocks: torch.Tensor) -> list[str]:
    return [TOKENIZER.decode(ids_T) for ids_T in blocks]


def test_more_held_out_blocks_come_first_so_that_all_runs_share_them(domain: Domain) -> None:
    small, large = (build(num_blocks * LENGTH, more=3, a=domain).domains[0] for num_blocks in (9, 90))
    assert len(small.held_out_NT) == 4 and len(large.held_out_NT) == 13
    assert torch.equal(small.held_out_NT, large.held_out_NT[:4])


def test_what_judges_comes_before_all_and_gives_way_in_short_texts(domain: Domain) -> None:
    calibration = Calibration(domains={"a": domain}, sequence_length=LENGTH)

    def built(num_judged_tokens: int) -> DomainBlocks:
        options = {"more_held_out": 1, "num_judged_tokens": num_judged_tokens}
        return build_calibration(calibration, 9 * LENGTH, TOKENIZER, 0, **options).domains[0]

    found, all_first = built(3 * LENGTH - 1), build(9 * LENGTH, more=4, a=domain).domains[0]
    assert found.judged_NT is not None and len(found.held_out_NT) == 2 and len(found.calibration_NT) == 9
    assert torch.equal(torch.cat([found.judged_NT, found.held_out_NT]), all_first.held_out_NT)
    assert torch.equal(found.calibration_NT, all_first.calibration_NT)
    short, without = built(10**6), build(9 * LENGTH, more=1, a=domain).domains[0]
    assert short.judged_NT is None and torch.equal(short.held_out_NT, without.held_out_NT)
    assert content_hash([found]) != content_hash([dataclasses.replace(found, judged_NT=found.judged_NT.flip(0))])


@pytest.mark.parametrize("size", [4, 24])  # too short to begin at a random line, and long enough
def test_domains_and_seeds_have_orders_of_their_own(tmp_path: Path, size: int) -> None:
    domain = put(tmp_path / "a.jsonl", size=size)

    def first(seed: int, name: str) -> list[str]:
        return rows(build(30 * LENGTH, seed, **{name: domain}).domains[0].calibration_NT)

    assert first(0, "a") == first(0, "a")
    assert first(0, "a") != first(1, "a") and first(0, "a") != first(0, "b")
    # What stands beside a domain does not matter to it.
    both = build(60 * LENGTH, 0, b=domain, a=domain)
    assert rows(both.domains[1].calibration_NT) == first(0, "a")


def test_the_line_that_a_long_text_begins_at_depends_on_seed_and_domain(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text('["' + "\\n".join(f"{number:05d}" for number in range(3000)) + '"]')
    domain = Domain(files=(str(path),))
    found = [
        rows(build(9 * LENGTH, seed, **{name: domain}).domains[0].held_out_NT)[0]
        for seed, name in ((0, "a"), (1, "a"), (0, "b"))
    ]
    assert len(set(found)) == 3


def test_rounds_have_blocks_of_their_own_in_the_order_of_the_text(domain: Domain) -> None:
    found = build(10 * LENGTH, rounds=3, a=domain, b=domain)
    whole = {each.name: each for each in found.domains}
    for number in range(3):
        part = rotated(found, number)
        assert part.num_rounds == 1 and part.num_tokens == found.num_tokens // 3
        for each in part.domains:
            own = whole[each.name].calibration_NT[5 * number : 5 * (number + 1)]
            assert torch.equal(each.calibration_NT, own)
            assert torch.equal(each.held_out_NT, whole[each.name].held_out_NT)


def test_numbers_of_tokens_count_every_domain(domain: Domain) -> None:
    found: CalibrationSet = build(36 * LENGTH, a=domain, b=domain.model_copy(update={"share": 3.0}))
    assert found.num_tokens == 36 * LENGTH and found.num_held_out_tokens == (1 + 3) * LENGTH


def test_progress_counts_the_blocks_of_all_rounds(domain: Domain) -> None:
    seen: list[tuple[str, int, int]] = []
    calibration = Calibration(domains={"a": domain, "b": domain}, sequence_length=LENGTH, rotate=True)
    build_calibration(calibration, 20 * LENGTH, TOKENIZER, 0, lambda *step: seen.append(step), num_rounds=3)
    assert seen == [("calibration", done, 2 * (3 * 10 + 2)) for done in (0, 32, 64)]
