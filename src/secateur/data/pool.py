"""One pool of text per run: every document is read and tokenised once, and belongs to one part.

In: domains and a seed, which decides the order of documents. Out: what judges, what guards, and
what a run learns by (calibration, training, counts of tokens), in this order, so that no document
of one part is in another. Where a domain has too few documents a long one is shared: each part then
has other pieces of it, and a note says so.
"""

import hashlib
import math
from array import array
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from random import Random
from types import MappingProxyType
from typing import NamedTuple

import numpy
import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.data.blocks import (
    Blocks,
    JudgedText,
    LearningDomain,
    LearningText,
    ids_of,
    num_blocks_of,
)
from secateur.data.forms import Note, Notes
from secateur.data.sources import DomainText, documents
from secateur.errors import CalibrationError
from secateur.log import Progress, silent
from secateur.model.stock import Tokenizer

CALIBRATION_BLOCKS_PER_HELD_OUT = 9
# Slightly above the average for English code and prose.
CHARACTERS_PER_TOKEN = 5
# Of a domain, that judge a run where the recipe names no number.
JUDGED_TOKENS = 1024
# Tokens of a domain beyond these hardly move what is counted.
MOST_COUNTED = 1_000_000
# A few bytes of a compressed file may stand for any number of equal documents.
MOST_REPEATS = 10_000


def judging_tokens(evaluate: bool | int) -> int:
    """Return how many tokens of each domain judge a run: so many as `evaluate` says, none if that
    is false.
    """
    return JUDGED_TOKENS if evaluate is True else int(evaluate)


class Allotted(NamedTuple):
    """Whose a domain's documents are: those below `judged` judge, below `held_out` guard, all
    others teach.

    None: as many as it takes.
    """

    judged: int | None = None
    held_out: int | None = None


class _Texts:
    """A domain's documents in the seed's order, each in pieces of about a block; read as far as
    asked for.

    Equal documents are one, and behind so many in a row the text is taken to go on so. A long one
    begins at a random line and wraps.
    """

    def __init__(
        self,
        name: str,
        domain: DomainText,
        tokenizer: Tokenizer,
        seed: int,
        length: int,
        note: Note,
    ) -> None:
        self.name = name
        self._source = documents(name, domain, tokenizer, seed, note)
        self._order = Random(f"{seed}:{name}:lines")
        self.length = length
        self._seen = set[bytes]()
        self.pieces = list[tuple[str, ...]]()
        self.digests = list[bytes]()

    def has(self, number: int) -> bool:
        """Read until document `number`, and return whether there is one."""
        if number < len(self.pieces):
            return True
        for text in islice(self._source, MOST_REPEATS):
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in self._seen:
                self._seen.add(digest)
                self.digests.append(digest)
                self.pieces.append(
                    tuple(_pieces(text, self.length * CHARACTERS_PER_TOKEN, self._order))
                )
                return self.has(number)
        return False


def _pieces(text: str, size: int, order: Random) -> Iterator[str]:
    """Yield the text in pieces of at most `size` characters, which end with a line where one
    does.
    """
    if len(text) > 2 * size:
        start = text.rfind("\n", 0, order.randrange(len(text))) + 1
        text = text[start:] + text[:start]
    position = 0
    while position < len(text):
        limit = position + size
        end = limit if limit >= len(text) else text.rfind("\n", position, limit) + 1 or limit
        yield text[position:end]
        position = end


class _Rest(NamedTuple):
    """A document from a piece on, without the piece's first `offset` tokens."""

    document: int
    piece: int = 0
    offset: int = 0


class _Tokens:
    """A domain's pieces in one tokenizer, each tokenised once. `eos`: its end-of-text token, if it
    has one.
    """

    def __init__(self, texts: _Texts, tokenizer: Tokenizer) -> None:
        eos = tokenizer.eos_token_id
        assert eos is None or isinstance(eos, int)
        self.texts, self.eos = texts, eos
        self._tokenizer = tokenizer
        self._ids: dict[tuple[int, int], array[int]] = {}

    def piece(self, document: int, number: int) -> "array[int] | None":
        """Return the ids of a document's piece; None if it has no such piece."""
        if (document, number) not in self._ids:
            if number >= len(self.texts.pieces[document]):
                return None
            text = self.texts.pieces[document][number]
            self._ids[document, number] = array("i", ids_of(text, self._tokenizer))
        return self._ids[document, number]

    def rest(self, rest: _Rest, most: int) -> Int64[Tensor, " T"]:
        """Return the ids of the rest of a document, `most` of them at most."""
        ids, number = array("i"), rest.piece
        while (
            len(ids) < rest.offset + most
            and (piece := self.piece(rest.document, number)) is not None
        ):
            ids += piece
            number += 1
        return _tensor(ids[rest.offset :][:most])

    def fresh(
        self, first: int, last: int | None, owners: Mapping[bytes, str], late: deque[_Rest]
    ) -> Iterator[_Rest]:
        """Yield the documents from `first` to before `last`; those that another domain owns come
        late.
        """
        number = first
        while (last is None or number < last) and self.texts.has(number):
            if owners.get(self.texts.digests[number], self.texts.name) == self.texts.name:
                yield _Rest(number)
            else:
                late.append(_Rest(number))
            number += 1


class _Packing:
    """Blocks of documents one behind another, a piece of each by turns, with an end-of-text token
    in between.

    Nobody has a second turn before everybody has had a first. `late` has what other parts left of
    their documents, and is used when all else has run out.
    """

    def __init__(
        self,
        tokens: _Tokens,
        first: int,
        last: int | None,
        owners: Mapping[bytes, str],
        late: deque[_Rest],
    ) -> None:
        """Begin with what `_Tokens.fresh` yields."""
        self.begun: list[_Rest] = []
        self.begun_late: list[_Rest] = []
        self._tokens, self._late = tokens, late
        self._fresh = tokens.fresh(first, last, owners, late)
        self._length = tokens.texts.length
        self._waiting: deque[_Rest] = deque()
        self._last: int | None = None
        self._ids, self._documents = array("i"), array("i")

    @property
    def num_tokens(self) -> int:
        """Tokens packed so far."""
        return len(self._ids)

    @property
    def num_blocks(self) -> int:
        """Whole blocks packed so far."""
        return self.num_tokens // self._length

    def reaches(self, num_blocks: int) -> bool:
        """Pack on until there are so many blocks, and return whether there are."""
        while self.num_blocks < num_blocks:
            turn = self._turn()
            if turn is None:
                return False
            ids = self._tokens.piece(turn.document, turn.piece)
            if ids is None:
                continue
            if self._tokens.eos is not None and self._ids and turn.document != self._last:
                self._ids.append(self._tokens.eos)
                self._documents.append(self._documents[-1])
            ids = ids[turn.offset :]
            self._ids += ids
            self._documents += array("i", [turn.document]) * len(ids)
            self._last = turn.document
            self._waiting.append(_Rest(turn.document, turn.piece + 1))
        return True

    def _turn(self) -> _Rest | None:
        """Return the document whose turn it is, and where it goes on; None if all have run out."""
        if (turn := next(self._fresh, None)) is not None:
            self.begun.append(turn)
        elif self._waiting:
            turn = self._waiting.popleft()
        elif self._late:
            turn = self._late.popleft()
            self.begun_late.append(turn)
        return turn

    def blocks(self, num_blocks: int) -> Blocks:
        """Return the first blocks: as many, or all that there are."""
        shape = (min(num_blocks, self.num_blocks), self._length)
        parts = (_tensor(numbers[: math.prod(shape)]) for numbers in (self._ids, self._documents))
        return Blocks(*(part.view(shape) for part in parts))

    def rests(self, num_blocks: int) -> deque[_Rest]:
        """Return what is left of the documents behind the first blocks, in the order of their
        turns.
        """
        waiting, surplus = self._waiting.copy(), self.num_tokens - num_blocks * self._length
        if surplus > 0:
            document, piece, _ = waiting.pop()
            ids = self._tokens.piece(document, piece - 1)
            assert ids is not None, "it was packed"
            waiting.append(_Rest(document, piece - 1, len(ids) - surplus))
        return waiting


def _tensor(ids: "array[int]") -> Int64[Tensor, " T"]:
    return torch.from_numpy(numpy.array(ids, dtype=numpy.int64))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """A domain's share of the calibration tokens, and how many blocks each part has."""

    share: float
    judged: int
    held_out: int
    calibration: int
    learning: int


@dataclass(slots=True)
class _Domain:
    """A domain whose parts are drawn in turn: judged, held out, to learn by.

    `given`: which documents each part has, if that is known. `first`: the first document that no
    part has. `late`: what parts have left of their documents. `allotted`: `first` behind each part.
    `owners`: the domains that have a document in what judges or guards, by its digest.
    """

    tokens: _Tokens
    sizes: _Sizes
    owners: dict[bytes, str]
    given: Allotted
    first: int = 0
    late: deque[_Rest] = field(default_factory=deque[_Rest])
    parts: list[_Packing] = field(default_factory=list[_Packing])
    allotted: list[int] = field(default_factory=list[int])

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.tokens.texts.name

    def pack(self, num_blocks: int, last: int | None = None) -> _Packing:
        """Pack the next part, or the last one, of all documents that are left; see `draw`."""
        packing = _Packing(self.tokens, self.first, last, self.owners, self.late)
        packing.reaches(num_blocks)
        self.parts.append(packing)
        return packing

    def draw(self, num_blocks: int, last: int | None) -> None:
        """Pack a part with others behind it. `last`: the first document of these, if that is
        given.
        """
        packing = self.pack(num_blocks, last)
        begun = [rest.document for rest in packing.begun]
        self.first = max(begun, default=self.first - 1) + 1 if last is None else last
        self.late = deque([*packing.rests(num_blocks), *self.late])
        self.allotted.append(self.first)
        self.owners |= dict.fromkeys(
            (self.tokens.texts.digests[number] for number in begun), self.name
        )

    def all_learning(self, most: int) -> Iterator[tuple[int, Int64[Tensor, " T"]]]:
        """Yield the number and the ids of the last part's documents, each as a whole, up to `most`
        ids.
        """
        fresh = self.tokens.fresh(self.first, None, self.owners, deque())
        for rest in chain(fresh, self.parts[LEARNING].begun_late):
            ids_T = self.tokens.rest(rest, most)
            yield rest.document, ids_T
            most -= len(ids_T)
            if most <= 0:
                return

    @property
    def is_whole(self) -> bool:
        """Whether there is enough of every part; of a given one, what there is."""
        num_judged = self.sizes.judged if self.given.judged is None else 0
        numbers = (num_judged, self.sizes.held_out, self.sizes.calibration)
        return all(part.num_blocks >= num for part, num in zip(self.parts, numbers, strict=True))

    def too_short(self, num_learning: int, what: str, key: str) -> CalibrationError:
        """Return the error for a text that is too short. `what`: the blocks to learn by, in
        words.
        """
        sizes, length = self.sizes, self.tokens.texts.length
        wanted = [num * length for num in (sizes.judged, sizes.held_out, num_learning)]
        num_there = sum(
            min(part.num_tokens, want) for part, want in zip(self.parts, wanted, strict=True)
        )
        judged = f"{sizes.judged} judged, " if sizes.judged else ""
        return CalibrationError(
            f"domain '{self.name}': {num_there:,} tokens of text after packing, but "
            f"{judged}{sizes.held_out} held-out and {num_learning} {what} of {length} tokens need "
            f"{sum(wanted):,}; lower {key} or calibration.sequence_length, lower the domain's "
            "share, or add text."
        )

    def digests(self, part: int) -> set[bytes]:
        """Return the digests of a part's documents."""
        packing = self.parts[part]
        return {
            self.tokens.texts.digests[rest.document]
            for rest in (*packing.begun, *packing.begun_late)
        }


JUDGED, HELD_OUT, LEARNING = range(3)


@dataclass(frozen=True, slots=True)
class Learning:
    """What a run may learn by: its text, and all documents that may teach."""

    text: LearningText
    _domains: Mapping[str, _Domain]

    def documents(self, most: int = MOST_COUNTED) -> dict[str, Iterator[Int64[Tensor, " T"]]]:
        """Return the ids of all documents that may teach, by domain that is read; no more once
        `most` tokens are had.

        Who goes through them may get a CalibrationError, for unreadable text.
        """
        return {
            name: (ids_T for _, ids_T in domain.all_learning(most))
            for name, domain in self._domains.items()
        }

    def digests(self, num_counted: int = 0) -> set[bytes]:
        """Return the digests of the documents that guard or teach, and of those that give the first
        tokens to count.
        """
        digests: set[bytes] = set()
        for domain in self._domains.values():
            digests |= domain.digests(HELD_OUT) | domain.digests(LEARNING)
            counted = domain.all_learning(num_counted) if num_counted else ()
            digests |= {domain.tokens.texts.digests[number] for number, _ in counted}
        return digests


class Split(NamedTuple):
    """The parts of a text. `allotted`: whose the documents are, by domain that is read. `notes`:
    what was left out.
    """

    learning: Learning
    judged: JudgedText
    allotted: dict[str, Allotted]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """How much text each part has.

    A domain gets max(1, round(share x num_tokens / length)) calibration blocks, as many training
    blocks by `num_training_tokens`, a ninth of the calibration blocks, rounded up, but not fewer
    than `least_held_out`, as held-out ones, and `num_judged_tokens` in whole blocks to judge by.
    """

    num_tokens: int
    num_training_tokens: int = 0
    num_judged_tokens: int = 0
    least_held_out: int = 0

    def of(self, share: float, length: int, *, fresh: bool = False) -> _Sizes:
        """Return a domain's blocks of `length` tokens. `fresh`: a training has none of the
        calibration's.
        """
        num_blocks = num_blocks_of(share, self.num_tokens, length)
        held_out = max(self.least_held_out, math.ceil(num_blocks / CALIBRATION_BLOCKS_PER_HELD_OUT))
        judged = math.ceil(self.num_judged_tokens / length)
        training = (
            num_blocks_of(share, self.num_training_tokens, length)
            if self.num_training_tokens
            else 0
        )
        learning = num_blocks + training if fresh else max(num_blocks, training)
        return _Sizes(share, judged, held_out, num_blocks, learning)


class TextPool:
    """The documents of a run, each read once, and tokenised once by each tokenizer."""

    def __init__(
        self, length: int, tokenizer: Tokenizer, seed: int, progress: Progress = silent
    ) -> None:
        """`length`: of a block, in tokens. `tokenizer`: its chat template makes text of chats."""
        self.length, self._tokenizer, self._seed = length, tokenizer, seed
        self._progress, self._notes = progress, Notes()
        self._texts: dict[str, _Texts] = {}
        self._tokens: dict[tuple[str, int], _Tokens] = {}

    def split(
        self,
        text: Mapping[str, DomainText],
        amounts: Amounts,
        tokenizer: Tokenizer | None = None,
        *,
        allotted: Mapping[str, Allotted] = MappingProxyType({}),
        must_judge: bool = False,
        only: Collection[str] | None = None,
        key: str = "calibration.num_tokens",
    ) -> Split:
        """Share out the documents: first those that judge, then those that guard, then those to
        learn by.

        Where a text is too short for all of these, what guards judges too, and a note says so; with
        `must_judge` that is an error. `tokenizer`: by default that of the pool. `allotted`: of a
        split by another tokenizer, whose parts are then of the same documents. `only`: the domains
        to read, of all that share out the tokens. `key`: what asked for the tokens to learn by, to
        be named where a text is too short for them.

        Raises CalibrationError for text that is unreadable or too short.
        """
        tokenizer = tokenizer or self._tokenizer
        total = sum(domain.share for domain in text.values())
        wanted = {name: domain for name, domain in text.items() if only is None or name in only}
        sizes = {
            name: amounts.of(domain.share / total, self.length, fresh=domain.answers)
            for name, domain in wanted.items()
        }
        read = {
            name: self._read(name, domain, tokenizer)
            for name, domain in wanted.items()
            if not domain.answers
        }
        while True:
            domains = self._drawn(read, sizes, allotted)
            if (
                short := next((domain for domain in domains.values() if not domain.is_whole), None)
            ) is None:
                break
            if must_judge or not short.sizes.judged:
                raise short.too_short(
                    short.sizes.calibration, "calibration blocks", "calibration.num_tokens"
                )
            sizes[short.name] = replace(short.sizes, judged=0)
        for domain in domains.values():
            if not domain.parts[LEARNING].reaches(domain.sizes.learning):
                raise domain.too_short(domain.sizes.learning, "training blocks", key)
        parts = tuple(
            _learning(name, size, domains.get(name), self.length) for name, size in sizes.items()
        )
        notes = (*self.notes, *_shared(domains, HELD_OUT, (LEARNING,), GUARD_SHARES))
        learning = LearningText(parts, self.length, notes)
        allotted = {name: Allotted(*domain.allotted) for name, domain in domains.items()}
        judged = _judged(parts, domains, math.ceil(amounts.num_judged_tokens / self.length))
        return Split(Learning(learning, domains), judged, allotted, self.notes)

    def draw(
        self, domains: Mapping[str, DomainText], num_blocks: int, used: Set[bytes] = frozenset()
    ) -> dict[str, Blocks]:
        """Return the first blocks of each domain, of `used` documents only if there are no others.

        Raises CalibrationError for text that is too short.
        """
        drawn: dict[str, Blocks] = {}
        for name, domain in domains.items():
            tokens = self._read(name, domain, self._tokenizer)
            packing = _Packing(tokens, 0, None, dict.fromkeys(used, ""), deque())
            if not packing.reaches(num_blocks):
                raise CalibrationError(
                    f"domain '{name}': {packing.num_tokens:,} tokens of text after packing, but "
                    f"{num_blocks} blocks of {self.length} tokens need "
                    f"{num_blocks * self.length:,}; ask for fewer or shorter blocks, or add text."
                )
            drawn[name] = packing.blocks(num_blocks)
        return drawn

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what was left out of the text that was read."""
        return self._notes.sentences()

    def _read(self, name: str, domain: DomainText, tokenizer: Tokenizer) -> _Tokens:
        """Return a domain's text in tokens; whoever asks first reads it, for all tokenizers."""
        if name not in self._texts:
            note = self._notes.of(name)
            self._texts[name] = _Texts(name, domain, self._tokenizer, self._seed, self.length, note)
        return self._tokens.setdefault((name, id(tokenizer)), _Tokens(self._texts[name], tokenizer))

    def _drawn(
        self,
        read: Mapping[str, _Tokens],
        sizes: Mapping[str, _Sizes],
        allotted: Mapping[str, Allotted],
    ) -> dict[str, _Domain]:
        """Return the domains with their parts packed: those that judge of all, then those that
        guard, then the rest.
        """
        owners, domains = dict[bytes, str](), dict[str, _Domain]()
        for name, tokens in read.items():
            domains[name] = _Domain(tokens, sizes[name], owners, allotted.get(name, Allotted()))
        for domain in domains.values():
            domain.draw(domain.sizes.judged, domain.given.judged)
        for domain in domains.values():
            domain.draw(domain.sizes.held_out, domain.given.held_out)
        num_done = 0
        num_all = sum(sizes[name].held_out + sizes[name].calibration for name in domains)
        self._progress("calibration", num_done, num_all)
        for domain in domains.values():
            domain.pack(domain.sizes.calibration)
            num_done += domain.sizes.held_out + domain.sizes.calibration
            self._progress("calibration", num_done, num_all)
        return domains


def _learning(name: str, sizes: _Sizes, domain: _Domain | None, length: int) -> LearningDomain:
    """Return what is learnt by; without a domain that is read, on the meta device."""

    def blocks(part: int, num_blocks: int) -> Blocks:
        if domain is not None:
            return domain.parts[part].blocks(num_blocks)
        ids_NT = torch.empty(num_blocks, length, dtype=torch.int64, device="meta")
        return Blocks(ids_NT, ids_NT)

    learning, held_out = blocks(LEARNING, sizes.learning), blocks(HELD_OUT, sizes.held_out)
    return LearningDomain(name, sizes.share, learning, sizes.calibration, held_out)


GUARD_SHARES = "guards the run and what it learns by"
JUDGE_SHARES = "judges the run and what guards it or what it learns by"


def _judged(
    text: tuple[LearningDomain, ...], domains: Mapping[str, _Domain], num_blocks: int
) -> JudgedText:
    """Return what judges: a part of its own; of answers, and of a domain that is too short, what
    guards.
    """
    judged, notes = {domain.name: domain.held_out for domain in text}, list[str]()
    for name, domain in domains.items() if num_blocks else ():
        own = domain.parts[JUDGED].blocks(num_blocks)
        if len(own):
            judged[name] = own
        else:
            notes.append(f"domain '{name}': {TOO_SHORT_TO_JUDGE}")
    return JudgedText(
        judged, (*notes, *_shared(domains, JUDGED, (HELD_OUT, LEARNING), JUDGE_SHARES))
    )


TOO_SHORT_TO_JUDGE = (
    "too short for a part that only judges, so what guards the run judges it, too; add text."
)


def _shared(
    domains: Mapping[str, _Domain], part: int, others: tuple[int, ...], which: str
) -> Iterator[str]:
    """Yield a sentence for each domain whose part has documents that other parts have too."""
    theirs = set[bytes]().union(
        *(domain.digests(other) for domain in domains.values() for other in others)
    )
    for name, domain in domains.items():
        if num_shared := len(domain.digests(part) & theirs):
            many = "s" if num_shared > 1 else ""
            yield (
                f"domain '{name}': what {which} have parts of {num_shared} document{many} in "
                "common, since the text has so few; add text."
            )
