"""The text of a recovery: shares, whole steps, and held-out text that was held out before."""

from pathlib import Path

import pytest
from models import tiny_llama
from recipes import grouped
from texts import learning_text, split_text
from tiny_tokenizer import tiny_tokenizer

from secateur.data.pool import judging_tokens
from secateur.errors import CalibrationError
from secateur.log import silent
from secateur.recipe import Recipe, RecoverySettings, parse_recipe
from secateur.recovery.text import RecoveryText, recovery_text, shared_out

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def asked(recipe) -> Recipe:
    domains = recipe["calibration"]["domains"]
    shared = {"prose": {**domains["prose"], "share": 3}, "code": domains["code"]}
    return parse_recipe(grouped({**recipe, "calibration": {**recipe["calibration"], "domains": shared}}))


def settings(**changes) -> RecoverySettings:
    return RecoverySettings.model_validate({"num_tokens": 4096, "batch_tokens": 128, **changes})


def drawn(recipe: Recipe, directory: Path = Path("none"), **changes) -> RecoveryText:
    return recovery_text(directory, recipe, settings(**changes), TOKENIZER, tiny_llama(num_layers=1), silent)


def rows(blocks) -> set[tuple[int, ...]]:
    return {tuple(ids.tolist()) for ids in blocks}


def test_the_domains_have_their_shares_and_are_mixed(asked):
    text = drawn(asked)
    assert sum(len(block.ids_T) for block in text.blocks) == 4096
    assert asked.calibration.num_tokens is not None
    amounts = {"num_training_tokens": 4096, "num_judged_tokens": judging_tokens(True), "least_held_out": 8}
    whole = learning_text(asked.calibration, asked.calibration.num_tokens, TOKENIZER, asked.seed, **amounts)
    prose, code = (rows(domain.blocks.ids_NT) for domain in whole.domains)
    is_prose = [tuple(block.ids_T.tolist()) in prose for block in text.blocks]
    assert is_prose.count(True) == 96 and rows(block.ids_T for block in text.blocks) <= prose | code
    assert len(set(is_prose[:16])) == 2, "domains are mixed"


def test_blocks_that_do_not_fill_a_step_are_left_out(asked):
    blocks = drawn(asked, num_tokens=4096 - 32).blocks
    assert sum(len(block.ids_T) for block in blocks) == 4096 - 128


@pytest.mark.parametrize(("num_tokens", "judging"), [(512, 0), (4096, 0), (512, 160)])
def test_what_judged_the_pruning_is_left_alone_and_what_guarded_it_guards(asked, num_tokens, judging, monkeypatch):
    monkeypatch.setattr("secateur.data.pool.JUDGED_TOKENS", judging)
    assert asked.calibration.num_tokens is not None
    facts = (asked.calibration, asked.calibration.num_tokens, TOKENIZER, asked.seed)
    before = split_text(*facts, num_judged_tokens=judging)
    text = drawn(asked, num_tokens=num_tokens, held_out_blocks=8, batch_tokens=32)
    trained = rows(block.ids_T for block in text.blocks)
    for domain in before.learning.text.domains:
        guards, judged = text.held_out[domain.name].ids_NT, rows(before.judged.blocks[domain.name].ids_NT)
        assert len(guards) == 8 and not rows(guards) & trained and not judged & trained
        assert rows(domain.held_out.ids_NT) <= rows(guards) and bool(judging) != bool(judged & rows(guards))


@pytest.mark.parametrize(
    ("asked", "num_ranks", "num_blocks", "tokens", "at_once"),
    [
        ((32, 2), 1, None, 32, 1),  # the default: a block a step
        ((32, 2), 4, None, 128, 1),  # a block for each rank
        ((128, 2), 2, None, 128, 2),
        ((160, 2), 1, None, 160, 1),  # five blocks cannot go two by two
        ((160, 2), 2, None, 192, 1),
        ((4096, 8), 2, 7, 256, 4),  # no more than the text has
        ((80, 2), 1, None, 64, 2),  # whole blocks
    ],
)
def test_ranks_share_out_whole_blocks_of_a_step(asked, num_ranks, num_blocks, tokens, at_once):
    found = shared_out(settings(batch_tokens=asked[0], blocks_per_device=asked[1]), 32, num_ranks, num_blocks)
    assert (found.batch_tokens, found.blocks_per_device) == (tokens, at_once)


def test_a_step_is_at_least_one_block():
    assert [settings(batch_tokens=tokens).blocks_per_step(32) for tokens in (1, 32, 63, 64, 512)] == [1, 1, 1, 2, 16]


def test_too_little_text_names_the_key_that_asked_for_it(asked):
    with pytest.raises(CalibrationError, match=r"lower recover\.num_tokens or calibration\.sequence_length"):
        drawn(asked, num_tokens=10_000_000)
