"""Blocks of token ids, the two kinds of text of a run (what it learns by, what judges it), and
counts of both.

In: ids with the document of each. Out: plain data, which ranks send each other. Whatever learns
takes a `LearningText`, which has no way to the text that judges; that is a `JudgedText`.

Letters: N blocks of a domain, T tokens of a block.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from secateur.errors import RecipeError
from secateur.model.stock import Tokenizer


class Block(NamedTuple):
    """One block: see `Blocks`."""

    ids_T: Int64[Tensor, " T"]
    document_T: Int64[Tensor, " T"]
    counted_T: Bool[Tensor, " T"] | None = None

    @property
    def mask_T(self) -> Bool[Tensor, " T"]:
        """Which tokens count."""
        return (
            torch.ones_like(self.ids_T, dtype=torch.bool)
            if self.counted_T is None
            else self.counted_T
        )

    def counted(self, values_P: Shaped[Tensor, "P ..."]) -> Shaped[Tensor, "K ..."]:
        """Return the values that count, of those of predicted tokens, which are all but the
        first.
        """
        return (
            values_P if self.counted_T is None else values_P[self.counted_T[1:].to(values_P.device)]
        )


@dataclass(frozen=True, slots=True)
class Blocks:
    """A domain's blocks of token ids. Answers are on the meta device until they are written.

    `document_NT`: the number of the document, within its domain, that a token is of; an end-of-text
    token is of the document that it ends. `counted_NT`: tokens that count in statistics and losses;
    others give context alone. None: all count.
    """

    ids_NT: Int64[Tensor, "N T"]
    document_NT: Int64[Tensor, "N T"]
    counted_NT: Bool[Tensor, "N T"] | None = None

    @property
    def is_meta(self) -> bool:
        """Whether the text is not written yet."""
        return self.ids_NT.is_meta

    @property
    def num_tokens(self) -> int:
        """All tokens, counted or not."""
        return self.ids_NT.numel()

    def __len__(self) -> int:
        return len(self.ids_NT)

    def __iter__(self) -> Iterator[Block]:
        counted = [None] * len(self) if self.counted_NT is None else self.counted_NT
        return map(Block, self.ids_NT, self.document_NT, counted)

    def __getitem__(self, part: slice) -> "Blocks":
        counted_NT = None if self.counted_NT is None else self.counted_NT[part]
        return Blocks(self.ids_NT[part], self.document_NT[part], counted_NT)


# Blocks of one domain.
Text = Blocks | Sequence[Block]


@dataclass(frozen=True, slots=True)
class LearningDomain:
    """One domain's text to learn by. `share`: of the calibration tokens; shares sum to 1.

    `blocks`: the first `num_calibration` are for calibration; a training begins at the first, too,
    and may go on behind them. Of answers it has others: the same twice are worse.
    `held_out`: what guards the run, from other documents.
    """

    name: str
    share: float
    blocks: Blocks
    num_calibration: int
    held_out: Blocks

    @property
    def calibration(self) -> Blocks:
        """The blocks that units are measured on."""
        return self.blocks[: self.num_calibration]

    @property
    def first_to_train(self) -> int:
        """The number of the block that a training begins at."""
        return 0 if self.blocks.counted_NT is None else self.num_calibration

    def training(self, num_blocks: int) -> Blocks:
        """Return the first blocks of a training, as many as there are."""
        return self.blocks[self.first_to_train :][:num_blocks]


def num_blocks_of(share: float, num_tokens: int, length: int) -> int:
    """Return how many blocks a share of the tokens is; at least one."""
    return max(1, round(share * num_tokens / length))


@dataclass(frozen=True, slots=True)
class LearningText:
    """All that a run may learn by: calibration, training and guard. What judges it is not in here.

    `notes`: sentences for people on what was left out or shared.
    """

    domains: tuple[LearningDomain, ...]
    sequence_length: int
    notes: tuple[str, ...] = ()

    @property
    def content_hash(self) -> str:
        """The hash of all blocks, see `text_hash`."""
        return text_hash(
            (domain.name, domain.share, part)
            for domain in self.domains
            for part in (domain.blocks, domain.held_out)
        )

    @property
    def measured_hash(self) -> str:
        """The hash of the text that units are measured on and that guards; answers follow from the
        model.
        """
        text = [domain for domain in self.domains if domain.blocks.counted_NT is None]
        return text_hash(
            (domain.name, domain.share, part)
            for domain in text
            for part in (domain.calibration, domain.held_out)
        )

    @property
    def held_out(self) -> dict[str, Blocks]:
        """Each domain's blocks that guard the run."""
        return {domain.name: domain.held_out for domain in self.domains}

    def training(self, num_tokens: int) -> dict[str, Blocks]:
        """Return each domain's first blocks of a training, by its share of `num_tokens`."""
        length = self.sequence_length
        return {
            domain.name: domain.training(num_blocks_of(domain.share, num_tokens, length))
            for domain in self.domains
        }


@dataclass(frozen=True, slots=True)
class JudgedText:
    """What judges a run in the end, by domain, from documents that it did not learn by.

    `notes`: the domains of which that does not hold, for want of text, and why.
    """

    blocks: Mapping[str, Blocks]
    notes: tuple[str, ...] = ()

    @property
    def content_hash(self) -> str:
        """The hash of all blocks, see `text_hash`."""
        return text_hash((name, 1.0, blocks) for name, blocks in self.blocks.items())


def text_hash(parts: Iterable[tuple[str, float, Blocks]]) -> str:
    """Return the SHA-256 over names, shares, shapes, ids and masks, in order; meta blocks have no
    ids.
    """
    digest = hashlib.sha256()
    for name, share, blocks in parts:
        digest.update(json.dumps([name, share, list(blocks.ids_NT.shape)]).encode())
        if not blocks.is_meta:
            digest.update(blocks.ids_NT.numpy().astype("<i8").tobytes())
        if blocks.counted_NT is not None:
            digest.update(blocks.counted_NT.numpy().tobytes())
    return digest.hexdigest()


# Tokens in an n-gram of `ngram_overlap`.
NGRAM_TOKENS = 13


def ngram_overlap(
    calibration_NT: dict[str, Tensor], evaluation_NT: dict[str, Tensor]
) -> dict[str, float | None]:
    """Return, per evaluation domain, the share of its n-grams that occur in any calibration block.

    Repeats count. None if no evaluation block has `NGRAM_TOKENS` tokens.
    """
    wanted = {ngram for blocks in evaluation_NT.values() for ngram in _ngrams(blocks)}
    seen = {
        ngram for blocks in calibration_NT.values() for ngram in _ngrams(blocks) if ngram in wanted
    }
    is_seen = {
        domain: [ngram in seen for ngram in _ngrams(blocks)]
        for domain, blocks in evaluation_NT.items()
    }
    return {domain: sum(hits) / len(hits) if hits else None for domain, hits in is_seen.items()}


def _ngrams(blocks_NT: Int64[Tensor, "N T"]) -> Iterator[bytes]:
    size = 4 * NGRAM_TOKENS
    for ids_T in blocks_NT.cpu().numpy().astype("<i4"):
        data = ids_T.tobytes()
        for start in range(0, len(data) - size + 1, 4):
            yield data[start : start + size]


# Short blocks hold more documents and answers of as many tokens; 128 win no more.
CALIBRATION_BLOCK = 256
JUDGED_BLOCK = 512


def block_length(
    asked: int | None,
    config: Any,
    key: str = "calibration.sequence_length",
    default: int = CALIBRATION_BLOCK,
) -> int:
    """Return the tokens of a block, `default` of them if the model has as many positions. Raises
    RecipeError, naming `key`, if the model has fewer than `asked`.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = asked or min(default, longest or default)
    if longest is not None and length > longest:
        raise RecipeError(
            f"{key}: {length} is longer than the model's {longest} positions; give at most "
            f"{longest}."
        )
    return length


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a text alone; of one that is longer than the model's context without a
    warning.
    """
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def other_text(documents: Sequence[str], tokenizer: Tokenizer, config: Any) -> list[Block]:
    """Return blocks of one document each. `config`: of a model, which may read no more tokens of
    one.
    """
    length = block_length(None, config, default=JUDGED_BLOCK)
    blocks: list[Block] = []
    for number, text in enumerate(documents):
        ids_T = torch.tensor(ids_of(text, tokenizer))
        # The first token of a block is context alone.
        blocks += [
            Block(part, torch.full_like(part, number))
            for part in ids_T.split(length)
            if len(part) > 1
        ]
    return blocks
