"""How many bytes of text tokens stand for, whole characters or not.

In: a tokenizer and blocks of its ids. Out: a number of bytes, of the text as the tokenizer reads it,
so after its normalisation.
"""

import json
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import Any

from torch import Tensor

from secateur.model.stock import Tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how pieces of SentencePiece spell a space
# Steps of decoders that read pieces one by one.
_BY_PIECE = ("ByteLevel", "ByteFallback", "Metaspace", "Replace")


def byte_piece(byte: int) -> str:
    """Return SentencePiece's name of a byte."""
    return f"<0x{byte:02X}>"


def num_bytes(tokenizer: Tokenizer, blocks_NT: Iterable[Tensor]) -> int:
    """Return how many bytes of text the tokens after the first of each block stand for.

    A byte token is one byte, a symbol of byte-level BPE one, any other piece its UTF-8 with spaces
    for their marks; a special token is none. So the tokens of a text add up to the length of its
    UTF-8, and so do those of blocks that cut it within a character. A space that the tokenizer puts
    before every text does not count behind a special token, where a text begins.

    Tokenizers that spell words in another way, as WordPiece does, never cut a character: their text
    is decoded.
    """
    reader: Any = tokenizer
    if not (steps := decoder_steps(reader)):
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return sum(len(str(reader.decode(ids_T[1:], **options)).encode()) for ids_T in blocks_NT)
    added = reader.added_tokens_decoder
    special = {*reader.all_special_ids, *(index for index, token in added.items() if token.special)}
    before_text = reader.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0][0]

    @cache
    def piece(index: int) -> str:
        return str(reader.convert_ids_to_tokens(index))

    @cache
    def length(index: int) -> int:
        if index in special:
            return 0
        if "ByteLevel" in steps:
            return len(piece(index).encode() if index in added else piece(index))
        is_byte = "ByteFallback" in steps and piece(index).startswith("<0x") and len(piece(index)) == len("<0x00>")
        return 1 if is_byte else len(piece(index).replace(SPACE, " ").encode())

    total = 0
    for ids_T in blocks_NT:
        for last, index in pairwise(ids_T.tolist()):
            total += length(index)
            if before_text != "a" and last in special and piece(index).startswith(before_text):
                total -= 1
    return total


def decoder_steps(reader: Any) -> set[str]:
    """Return the kinds of steps of a decoder that reads pieces one by one; none if it does not."""
    backend = getattr(reader, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    if any(getattr(backend.model, key, None) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    kinds = {step["type"] for step in decoder.get("decoders", [decoder])}
    return kinds if kinds.intersection(_BY_PIECE) else set()
