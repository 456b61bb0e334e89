"""The same text in another tokenizer, so that a model and its trimmed one can be asked the same.

In: blocks of token ids, or conversations. Out: those of the other tokenizer's ids, of as many
tokens as it takes.
"""

from collections.abc import Mapping
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, cast

import torch
from tokenizers import decoders

from secateur.data.answers import Conversation, Told
from secateur.data.blocks import Block, Text
from secateur.model.stock import Tokenizer
from secateur.vocabulary.tokenizer import decoder_steps

HALF = "\N{REPLACEMENT CHARACTER}"
CHARACTERS = decoders.Sequence(
    [decoders.ByteFallback(), decoders.Fuse()]
)  # spaces stay as pieces spell them


def retokenised(
    text: Mapping[str, Text], source: Tokenizer, target: Tokenizer
) -> dict[str, list[Block]]:
    """Return every domain's blocks in tokens of `target`; one tokenizer is a trim of the other.

    A model predicts the same bytes of a block in either: those behind its first token, which is
    context alone (where `target` lacks it, its last part). Special and added tokens are mapped one
    to one, parts of a character at the ends of a text byte by byte; all else is split as `target`
    splits it, by itself for every document, and for what counts and what does not.
    """
    splitter, reader = _Splitter(target), cast(Any, source)  # a fast tokenizer, as trims are of
    added = set(reader.get_added_vocab())

    def ids_of(pieces: list[str]) -> list[int]:
        ids: list[int] = []
        for is_added, run in groupby(pieces, lambda piece: piece in added):
            ids += (splitter.spelt if is_added else splitter.split)(list(run))
        return ids

    def by_mark(pieces: list[str], marks: list[Mark]) -> list[tuple[int, Mark]]:
        runs = groupby(zip(pieces, marks, strict=True), key=itemgetter(1))
        return [
            (index, mark) for mark, run in runs for index in ids_of([piece for piece, _ in run])
        ]

    def retold(block: Block) -> Block:
        pieces = reader.convert_ids_to_tokens(block.ids_T.tolist())
        marks = list(zip(block.document_T.tolist(), block.mask_T.tolist(), strict=True))
        first, ids = (
            [(index, marks[0]) for index in splitter.spelt(pieces[:1])],
            by_mark(pieces, marks),
        )
        if (
            ids[: len(first)] != first
        ):  # a token of the target spells the end of the first one and more
            ids = first + by_mark(pieces[1:], marks[1:])
        ids = ids[len(first) - 1 :]
        counted_T = None if block.counted_T is None else torch.tensor([mark[1] for _, mark in ids])
        return Block(
            torch.tensor([index for index, _ in ids]),
            torch.tensor([mark[0] for _, mark in ids]),
            counted_T,
        )

    return {domain: [retold(block) for block in blocks] for domain, blocks in text.items()}


def in_tokens_of(source: Tokenizer, target: Tokenizer) -> Told:
    """Return what tells a conversation in tokens of `target`, prompt and answer each by itself."""

    def told(conversation: Conversation) -> Conversation:
        ids_T = conversation.ids_T
        asked = Block(ids_T, torch.zeros_like(ids_T), conversation.is_answer_T)
        [block] = retokenised({"": [asked]}, source, target)[""]
        assert block.counted_T is not None, "it had a mask"
        return Conversation(block.ids_T, int((~block.counted_T).sum()))

    return told


# A token's document, and whether it counts.
Mark = tuple[int, bool]


class _Splitter:
    """Makes ids of one tokenizer of pieces of another one, whose text is normalised already."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend: Any = tokenizer.backend_tokenizer
        self.ids, self.is_byte_level = (
            tokenizer.get_vocab(),
            "ByteLevel" in decoder_steps(tokenizer),
        )

    def spelt(self, pieces: list[str]) -> list[int]:
        """Return the ids of the pieces one by one; a piece that is not there is split."""
        model = self.backend.model
        parts = (
            [self.ids[piece]]
            if piece in self.ids
            else [token.id for token in model.tokenize(piece)]
            for piece in pieces
        )
        return list(chain.from_iterable(parts))

    def split(self, pieces: list[str]) -> list[int]:
        """Return the ids of the text that the pieces are, as one text."""
        start, end = 0, len(pieces)
        while self._text(pieces[start:end]).startswith(HALF):
            start += 1
        while self._text(pieces[start:end]).endswith(HALF):
            end -= 1
        text = self._text(pieces[start:end])
        # Words of SentencePiece begin with the sign for a space, which no piece has inside.
        words = (
            [word for word, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)]
            if self.is_byte_level
            else [text]
        )
        tokens = [token for word in words for token in self.backend.model.tokenize(word)]
        if HALF in text or self._text([token.value for token in tokens]) != text:
            return self.spelt(pieces)
        return (
            self.spelt(pieces[:start]) + [token.id for token in tokens] + self.spelt(pieces[end:])
        )

    def _text(self, pieces: list[str]) -> str:
        """Return the normalised text; `HALF` for bytes that are no whole character."""
        decoder = self.backend.decoder if self.is_byte_level else CHARACTERS
        return decoder.decode(pieces)
