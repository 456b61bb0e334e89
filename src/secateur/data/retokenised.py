"""The same text in another tokenizer, so that a model and its trimmed one can be asked the same.

In: blocks of token ids. Out: blocks of the other tokenizer's ids, of as many tokens as it takes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from jaxtyping import Int64
from tokenizers import decoders
from torch import Tensor

from secateur.model.checkpoint import Tokenizer
from secateur.model.vocabulary import is_byte_level

HALF = "\N{REPLACEMENT CHARACTER}"
CHARACTERS = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # spaces stay as pieces spell them


def retokenised(
    blocks_NT: Mapping[str, Iterable[Int64[Tensor, " T"]]], source: Tokenizer, target: Tokenizer
) -> dict[str, list[Int64[Tensor, " M"]]]:
    """Return every domain's blocks in tokens of `target`; one tokenizer is a trim of the other.

    A model predicts the same bytes of a block in either: those behind its first token, which is
    context alone (where `target` lacks it, its last part). Special and added tokens are mapped one
    to one, parts of a character at the ends of a text byte by byte; all else is split as `target`
    splits it.
    """
    splitter, added = _Splitter.of(target), source.get_added_vocab().keys()

    def ids_of(pieces: list[str]) -> list[int]:
        runs = groupby(pieces, added.__contains__)
        return [each for is_added, run in runs for each in (splitter.spelt if is_added else splitter.split)(list(run))]

    def block(ids_T: Tensor) -> Tensor:
        pieces = source.convert_ids_to_tokens(ids_T.tolist())
        given, ids = splitter.spelt(pieces[:1]), ids_of(pieces)
        if ids[: len(given)] != given:  # a token of the target spells the end of the first one and more
            ids = given + ids_of(pieces[1:])
        return torch.tensor(ids[len(given) - 1 :])

    return {domain: [block(ids_T) for ids_T in domain_NT] for domain, domain_NT in blocks_NT.items()}


@dataclass(frozen=True, slots=True)
class _Splitter:
    """Makes ids of one tokenizer of pieces of another one, whose text is normalised already."""

    backend: Any
    ids: dict[str, int]
    is_byte_level: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "_Splitter":
        backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009  # fast tokenizers alone can be trimmed
        return cls(backend, tokenizer.get_vocab(), is_byte_level(json.loads(backend.to_str())))

    def spelt(self, pieces: list[str]) -> list[int]:
        """Return the ids of the pieces one by one; a piece that is not there is split."""
        model = self.backend.model
        parts = (
            [self.ids[each]] if each in self.ids else [token.id for token in model.tokenize(each)] for each in pieces
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
            [word for word, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)] if self.is_byte_level else [text]
        )
        found = [token for word in words for token in self.backend.model.tokenize(word)]
        if HALF in text or self._text([token.value for token in found]) != text:
            return self.spelt(pieces)
        return self.spelt(pieces[:start]) + [token.id for token in found] + self.spelt(pieces[end:])

    def _text(self, pieces: list[str]) -> str:
        """Return the normalised text; `HALF` for bytes that are no whole character."""
        decoder = self.backend.decoder if self.is_byte_level else CHARACTERS
        return decoder.decode(pieces)
