"""The calibration set: blocks of token ids per domain, some held out, with a content hash.

Text comes from files, data sets and installed packages; what the dense model writes itself is in
`data.sampled`.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from random import Random
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from secateur.data.forms import Note, Notes, unheard
from secateur.data.sources import DomainText, documents
from secateur.errors import CalibrationError
from secateur.log import Progress, silent
from secateur.model.checkpoint import Tokenizer

CALIBRATION_BLOCKS_PER_HELD_OUT = 9
# Slightly above the average for English code and prose.
CHARACTERS_PER_TOKEN = 5
# Of a domain, that judge a run: by 1,024 tokens of code a model lost 1.07 nats, by 9 kB 0.36.
JUDGED_TOKENS = 4096

# The token ids of one document, piece by piece.
_Turns = Iterator[list[int]]


@runtime_checkable
class CalibrationText(Protocol):
    """The text asked for. `rotate`: each round gets its own blocks."""

    sequence_length: int | None
    rotate: bool

    @property
    def domains(self) -> Mapping[str, DomainText]:
        """Every domain's text, by name."""
        ...


@dataclass(frozen=True, slots=True)
class DomainBlocks:
    """One domain's token blocks. `share`: of the calibration tokens; shares sum to 1.

    `judged_NT`: held out even of what guards the run, to judge it in the end; None without.
    The blocks of a sampled domain are on the meta device until they are sampled.
    """

    name: str
    share: float
    calibration_NT: Int64[Tensor, "N T"]
    held_out_NT: Int64[Tensor, "M T"]
    judged_NT: Int64[Tensor, "K T"] | None = None


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """All domains' blocks. `content_hash`: see the function of that name.

    `num_rounds`: over how many rounds the calibration blocks rotate; 1 without rotation. `notes`:
    sentences on what was left out of the text.
    """

    domains: tuple[DomainBlocks, ...]
    sequence_length: int
    content_hash: str
    num_rounds: int = 1
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Calibration tokens, without the held-out ones."""
        return sum(domain.calibration_NT.numel() for domain in self.domains)

    @property
    def num_held_out_tokens(self) -> int:
        """Held-out tokens of all domains."""
        return sum(domain.held_out_NT.numel() for domain in self.domains)

    @property
    def judged(self) -> dict[str, Int64[Tensor, "K T"]]:
        """Each domain's blocks that judge a run: those that nothing else looks at, else the held-out ones."""
        return {each.name: each.held_out_NT if each.judged_NT is None else each.judged_NT for each in self.domains}


def judging_tokens(evaluate: bool) -> int:
    """Return how many tokens of each domain judge a run, none unless it is to `evaluate`."""
    return JUDGED_TOKENS if evaluate else 0


def build_calibration(
    calibration: CalibrationText,
    num_tokens: int,
    tokenizer: Tokenizer,
    seed: int,
    progress: Progress = silent,
    *,
    more_held_out: int = 0,
    num_judged_tokens: int = 0,
    num_rounds: int = 1,
    key: str = "calibration.num_tokens",
) -> CalibrationSet:
    """Read, tokenise and pack every domain.

    A domain gets max(1, round(share x num_tokens / sequence_length)) blocks, and a ninth as many
    held-out blocks, rounded up. `more_held_out` blocks per domain precede those, so that runs of
    different sizes are judged on the same text. Before these come blocks of `num_judged_tokens`,
    where a domain's text has so many and is not sampled. With rotation, each of `num_rounds` rounds gets as
    many blocks; held-out blocks stay the same. Equal documents within a domain are used once. `key`:
    what asked for `num_tokens`, to be named where a text is too short.

    Raises CalibrationError for text that is unreadable or too short.
    """
    assert calibration.sequence_length is not None, "resolve fills it in"
    length = calibration.sequence_length
    total_share = sum(domain.share for domain in calibration.domains.values())
    shares = {name: domain.share / total_share for name, domain in calibration.domains.items()}
    num_blocks = {name: max(1, round(share * num_tokens / length)) for name, share in shares.items()}
    per_held_out = CALIBRATION_BLOCKS_PER_HELD_OUT
    num_held_out = {name: more_held_out + math.ceil(count / per_held_out) for name, count in num_blocks.items()}
    num_rounds = num_rounds if calibration.rotate else 1
    num_total = num_rounds * sum(num_blocks.values()) + sum(num_held_out.values())
    eos = tokenizer.eos_token_id
    assert eos is None or isinstance(eos, int)
    blocks, num_done = [], 0
    notes = Notes()
    progress("calibration", 0, num_total)
    for name, domain in calibration.domains.items():
        sizes = (num_rounds * num_blocks[name], num_held_out[name])
        if domain.sampled:
            calibration_NT, held_out_NT = (
                torch.empty(size, length, dtype=torch.int64, device="meta") for size in sizes
            )
            parts = calibration_NT, held_out_NT, None
        else:
            pieces = partial(_pieces, name, domain, tokenizer, seed, length, notes.of(name))
            parts = _parts(pieces, name, (*sizes, -(-num_judged_tokens // length)), length, eos, num_rounds, key)
        blocks.append(DomainBlocks(name, shares[name], *parts))
        num_done += sum(sizes)
        progress("calibration", num_done, num_total)
    return CalibrationSet(tuple(blocks), length, content_hash(blocks), num_rounds, notes.sentences())


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """How often a text has each token.

    `damped_V`: each document counts as the square root of how often it has the token.
    """

    tokens_V: Int64[Tensor, " V"]
    damped_V: Float64[Tensor, " V"]


def count_tokens(documents: Iterable[Tensor], num_rows: int) -> TokenCounts:
    """Return the counts of the ids in the documents, a tensor each. V: `num_rows`, of the embedding."""
    tokens_V, damped_V = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.float64)
    for ids_T in documents:
        ids_U, counts_U = ids_T.unique(return_counts=True)
        tokens_V[ids_U] += counts_U
        damped_V[ids_U] += counts_U.double().sqrt()
    return TokenCounts(tokens_V, damped_V)


# Tokens of a domain beyond these hardly move what is counted.
MOST_COUNTED = 1_000_000


def token_counts(
    calibration: CalibrationText,
    num_tokens: int,
    tokenizer: Tokenizer,
    seed: int,
    num_rows: int,
    progress: Progress = silent,
    *,
    most: int = MOST_COUNTED,
) -> dict[str, TokenCounts]:
    """Return how often each domain's text has each token, without the text that is held out.

    No more of a domain's text is read once `most` tokens are counted. Sampled domains, whose text is
    not written yet, are left out. Raises CalibrationError for unreadable text, or if no domain is
    left.
    """
    assert calibration.sequence_length is not None, "resolve fills it in"
    length, found = calibration.sequence_length, dict[str, TokenCounts]()
    total_share = sum(domain.share for domain in calibration.domains.values())
    read = {name: domain for name, domain in calibration.domains.items() if not domain.sampled}
    for done, (name, domain) in enumerate(read.items()):
        progress("count tokens", done, len(read))
        num_blocks = max(1, round(domain.share / total_share * num_tokens / length))
        num_held_out = math.ceil(num_blocks / CALIBRATION_BLOCKS_PER_HELD_OUT)
        pieces = _pieces(name, domain, tokenizer, seed, length)
        _, used = _pack(pieces, deque(), num_held_out * length, None)
        counts = count_tokens(_up_to(most, chain(used, pieces)), num_rows)
        if not counts.tokens_V.any():
            raise CalibrationError(f"domain '{name}': no text is left to count tokens of; add text.")
        found[name] = counts
    if not found:
        raise CalibrationError(
            "remove.vocabulary: every domain is sampled from the model, so there is no text to count tokens of; add a "
            "domain of files or installed text."
        )
    progress("count tokens", len(read), len(read))
    return found


def _up_to(most: int, documents: Iterable[_Turns]) -> Iterator[Int64[Tensor, " T"]]:
    """Yield each document's ids until about `most` are read."""
    for pieces in documents:
        ids: list[int] = []
        for piece in pieces:
            ids += piece
            if len(ids) >= most:
                break
        yield torch.tensor(ids, dtype=torch.int64)
        most -= len(ids)
        if most <= 0:
            return


def rotated(calibration: CalibrationSet, round_index: int) -> CalibrationSet:
    """Return what round `round_index` (from 0) measures on: its own blocks, if the set rotates.

    With N blocks per round it has blocks [round_index * N, (round_index + 1) * N) of each domain.
    """
    if calibration.num_rounds == 1:
        return calibration
    parts = ((domain, domain.calibration_NT.chunk(calibration.num_rounds)) for domain in calibration.domains)
    domains = tuple(replace(domain, calibration_NT=rounds[round_index]) for domain, rounds in parts)
    return replace(calibration, domains=domains, num_rounds=1)


def _pieces(
    name: str, domain: DomainText, tokenizer: Tokenizer, seed: int, length: int, note: Note = unheard
) -> Iterator[_Turns]:
    """Yield the domain's documents, each as the ids of its pieces."""
    order = Random(f"{seed}:{name}:lines")
    for text in _once(documents(name, domain, tokenizer, seed, note)):
        yield _turns(text, tokenizer, length, order)


def _once(texts: Iterator[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def _turns(text: str, tokenizer: Tokenizer, length: int, order: Random) -> _Turns:
    """Yield ids in pieces of about `length` tokens; long texts start at a random line and wrap."""
    size = length * CHARACTERS_PER_TOKEN
    if len(text) > 2 * size:
        start = text.rfind("\n", 0, order.randrange(len(text))) + 1
        text = text[start:] + text[:start]
    position = 0
    while position < len(text):
        limit = position + size
        end = limit if limit >= len(text) else text.rfind("\n", position, limit) + 1 or limit
        # verbose=False: no warning that the text exceeds the model's context.
        yield tokenizer(text[position:end], add_special_tokens=False, verbose=False)["input_ids"]
        position = end


def _parts(
    pieces: Callable[[], Iterator[_Turns]],
    name: str,
    sizes: tuple[int, int, int],
    length: int,
    eos: int | None,
    num_rounds: int,
    key: str = "calibration.num_tokens",
) -> tuple[Int64[Tensor, "N T"], Int64[Tensor, "M T"], Int64[Tensor, "K T"] | None]:
    """Return a domain's calibration and held-out blocks, and those that judge if the text has enough."""
    num_blocks, num_held_out, num_judged = sizes
    documents = pieces()
    held_out, used = _pack(documents, deque(), (num_judged + num_held_out) * length, eos)
    ids, _ = _pack(documents, used, num_blocks * length, eos)
    if len(ids) == num_blocks * length:
        held_NT = torch.tensor(held_out).view(-1, length)
        judged_NT = held_NT[:num_judged] if num_judged else None
        return torch.tensor(ids).view(num_blocks, length), held_NT[num_judged:], judged_NT
    if num_judged:
        return _parts(pieces, name, (num_blocks, num_held_out, 0), length, eos, num_rounds, key)
    rounds = f" ({num_rounds} rounds of fresh ones, as calibration.rotate asks)" if num_rounds > 1 else ""
    raise CalibrationError(
        f"domain '{name}': {len(held_out) + len(ids):,} tokens of text after packing, but {num_blocks} calibration "
        f"and {num_held_out} held-out blocks of {length} tokens{rounds} need {(num_blocks + num_held_out) * length:,}; "
        f"lower {key} or calibration.sequence_length, lower the domain's share, or add text."
    )


def _pack(
    documents: Iterator[_Turns], late: deque[_Turns], num_tokens: int, eos: int | None
) -> tuple[list[int], deque[_Turns]]:
    """Return the documents' first `num_tokens` ids in turn, and the rest of the documents used.

    `late` documents come after all others. Returns fewer ids if they run out too.
    """
    packed: list[int] = []
    waiting: deque[_Turns] = deque()
    last: _Turns | None = None
    while len(packed) < num_tokens:
        document = next(documents, None)
        if document is None and not (waiting or late):
            break
        document = document or (waiting or late).popleft()
        ids = next(document, None)
        if ids is None:
            continue
        if eos is not None and packed and document is not last:
            packed.append(eos)
        packed += ids
        last = document
        surplus = packed[num_tokens:]
        waiting.append(chain([surplus], document) if surplus else document)
    return packed[:num_tokens], waiting


def content_hash(blocks: Iterable[DomainBlocks]) -> str:
    """Return the SHA-256 over names, shares, shapes and ids, in order; meta blocks have no ids."""
    digest = hashlib.sha256()
    for domain in blocks:
        judged = () if domain.judged_NT is None else (domain.judged_NT,)
        parts = (domain.calibration_NT, domain.held_out_NT, *judged)
        digest.update(json.dumps([domain.name, domain.share, *(list(part.shape) for part in parts)]).encode())
        for part in parts if not domain.calibration_NT.is_meta else ():
            digest.update(part.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
