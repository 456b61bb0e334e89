"""Bytes of tokens: those of a text add up to its length in UTF-8, for every kind of tokenizer and any cut."""

import random
import unicodedata

import pytest
import torch
from bpe_tokenizer import SPACE, sentencepiece_tokenizer
from transformers import BertTokenizer

from secateur.vocabulary.tokenizer import HALF, num_bytes
from tests.vocabulary.test_tokenizer import MADE, made, random_texts

# What the tokenizers without an alphabet for everything know, single spaces between words.
KNOWN = ["the ferry leaves at", "they said; it's 3.5 hours, isn't it?", "naïve", "海面很平静。"]
LOSES_TEXT = ("unigram-unknown", "class-t5")


def texts_of(kind: str) -> list[str]:
    """Return texts that the tokenizer reads without a loss."""
    tokenizer, vocabulary = made(kind)
    if kind in LOSES_TEXT:
        return KNOWN
    read = [*KNOWN, "a  b\n\n\tc", "🚀🚀 héhé \u200d", *random_texts(vocabulary, 300)]
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # The sign for a space, spelt out in text, reads as a space; that for a part of a character counts as one byte.
    read = [text for text in read if not any(name in text for name in [*names, SPACE, HALF])]
    # Some put a space before a text that has none, so that both texts are the same to them; some compose characters.
    return [text for text in read if text.strip() == text and unicodedata.normalize("NFC", text) == text]


@pytest.mark.parametrize("kind", MADE)
def test_the_tokens_of_a_text_add_up_to_its_bytes_but_for_a_cut_character(kind):
    tokenizer, _ = made(kind)
    choose, cut_within = random.Random(0), 0
    for text in texts_of(kind):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        block_T = torch.tensor([tokenizer.eos_token_id, *ids, tokenizer.eos_token_id])
        # Some decoders leave the space that the tokenizer put before the text.
        size = len(text.encode()) + tokenizer.decode(ids).startswith(" ")
        assert num_bytes(tokenizer, [block_T]) == size, text
        cut = choose.randrange(1, len(block_T))
        in_parts = num_bytes(tokenizer, [block_T[:cut], block_T[cut - 1 :]])
        # A character of four bytes may be cut before its last.
        assert abs(in_parts - size) <= 4 * ("\ufffd" in tokenizer.decode(block_T[:cut])), text
        cut_within += in_parts != size
    assert cut_within < 0.5 * len(texts_of(kind))


def test_a_space_behind_a_word_is_text():
    tokenizer = sentencepiece_tokenizer("llama", 420)
    ids = tokenizer(" and", add_special_tokens=False)["input_ids"]
    inside = torch.tensor([ids[-1], *tokenizer("and", add_special_tokens=False)["input_ids"]])
    assert num_bytes(tokenizer, [inside]) == len(" and")


def test_words_of_wordpiece_are_decoded():
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "ferry", "##ing", "é"]
    tokenizer = BertTokenizer(
        vocab={name: index for index, name in enumerate(names)}, do_lower_case=False, strip_accents=False
    )
    ids = tokenizer("the ferrying é", add_special_tokens=False)["input_ids"]
    assert num_bytes(tokenizer, [torch.tensor([1, *ids])]) == len("the ferrying é".encode())
