"""Text of other sources: whole, in blocks of one document, and in no domain that a run has by default."""

import re
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

import secateur
from secateur.data import sources
from secateur.data.blocks import other_text
from secateur.data.sources import installed_documents, shipped
from secateur.errors import CalibrationError
from secateur.plugins import GENERAL_TEXT

KINDS = yaml.safe_load((Path(secateur.__file__).parent / "data" / "other_text.yaml").read_text(encoding="utf-8"))
DOCUMENTS = [text for kind in KINDS.values() for text in kind]


def test_there_are_documents_of_several_kinds():
    assert len(KINDS) >= 15 and len(DOCUMENTS) >= 20 and sorted(shipped("other_text.yaml")) == sorted(DOCUMENTS)
    assert shipped("other_text.yaml")[1] == KINDS[list(KINDS)[1]][0], "kinds by turns"
    assert len(set(DOCUMENTS)) == len(DOCUMENTS)
    assert all(160 <= len(text.split()) <= 220 for text in DOCUMENTS)


@pytest.mark.parametrize("begins", [False, True])
def test_blocks_are_of_one_document_and_hold_all_of_it(begins):
    tokenizer, config = tiny_tokenizer(begins=begins), tiny_llama().config
    assert (tokenizer("a")["input_ids"][0] == tokenizer.eos_token_id) == begins
    blocks = other_text(DOCUMENTS[:3], tokenizer, config)
    assert all(2 <= len(block.ids_T) <= config.max_position_embeddings for block in blocks)
    for number, text in enumerate(DOCUMENTS[:3]):
        own = [block for block in blocks if set(block.document_T.tolist()) == {number}]
        assert tokenizer.decode(torch.cat([block.ids_T for block in own])) == text


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@pytest.mark.parametrize("kind", [*GENERAL_TEXT, "code"])
def test_no_text_of_the_defaults_holds_it(kind):
    try:
        documents = list(installed_documents(kind, Random(0)))
    except CalibrationError:
        pytest.skip(f"the package with {kind} is not installed")
    wanted = {tuple(words[at : at + 8]) for words in map(words_of, DOCUMENTS) for at in range(len(words) - 7)}
    begun, words = {passage[:2] for passage in wanted}, words_of("\n".join(documents))
    found = (tuple(words[at : at + 8]) for at, pair in enumerate(pairwise(words)) if pair in begun)
    shared = wanted.intersection(found)
    assert not shared, shared


@pytest.mark.parametrize("kind", ["code", "mathematics", "science"])
def test_no_domain_reads_this_package(kind):
    read = [str(document.args[0]) for document in sources._KINDS[kind][0]()]
    assert not [path for path in read if "secateur" in Path(path).parts]
