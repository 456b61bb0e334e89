"""Bytes of tokens: those of a text add up to its length in UTF-8, for every kind of tokenizer and any cut."""

import random
import unicodedata

import pytest
import torch
from bpe_tokenizer import SPACE, sentencepiece_tokenizer
from transformers import BertTokenizer

from secateur.vocabulary.tokenizer import num_bytes
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
    # The sign for a space, spelt out in text, reads as a space.
    read = [text for text in read if not any(name in text for name in [*names, SPACE])]
    # Some put a space before a text that has none, so that both texts are the same to them; some compose characters.
    return [text for text in read if text.strip() == text and unicodedata.normalize("NFC", text) == text]


@pytest.mark.parametrize("kind", MADE)
def test_the_tokens_of_a_text_add_up_to_its_bytes_wherever_it_is_cut(kind):
    tokenizer, _ = made(kind)
    choose, cut_within = random.Random(0), 0
    for text in texts_of(kind):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        block_T = torch.tensor([tokenizer.eos_token_id, *ids, tokenizer.eos_token_id])
        assert num_bytes(tokenizer, [block_T]) == len(text.encode()), text
        cut = choose.randrange(1, len(block_T))
        assert num_bytes(tokenizer, [block_T[:cut], block_T[cut - 1 :]]) == len(text.encode()), text
        cut_within += "\ufffd" in tokenizer.decode(block_T[:cut])
    assert cut_within or kind in LOSES_TEXT  # a decode of the parts would have counted more


def test_only_a_space_that_the_tokenizer_put_before_the_text_is_left_out():
    tokenizer = sentencepiece_tokenizer("llama", 420)
    ids = tokenizer(" and", add_special_tokens=False)["input_ids"]
    inside = torch.tensor([ids[-1], *tokenizer("and", add_special_tokens=False)["input_ids"]])
    assert num_bytes(tokenizer, [inside]) == len(" and")  # behind a word its space is text
    first = torch.tensor([tokenizer.bos_token_id, *tokenizer("and", add_special_tokens=False)["input_ids"]])
    assert num_bytes(tokenizer, [first, first]) == 2 * len("and")


def test_words_of_wordpiece_are_decoded():
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "ferry", "##ing", "é"]
    tokenizer = BertTokenizer(
        vocab={name: index for index, name in enumerate(names)}, do_lower_case=False, strip_accents=False
    )
    ids = tokenizer("the ferrying é", add_special_tokens=False)["input_ids"]
    assert num_bytes(tokenizer, [torch.tensor([1, *ids])]) == len("the ferrying é".encode())
