"""The text of a recovery: shares, stages apart, whole steps, and held-out text that was held out before."""

import pytest
import torch
from models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

from secateur.calibration import build_calibration
from secateur.errors import RecipeError
from secateur.recipe import Recipe, parse_recipe
from secateur.recover_cost import predict_flops
from secateur.recover_recipe import RecoverySettings
from secateur.recover_stages import mixed_batches
from secateur.recover_text import RecoveryText, recovery_text, training_tokens

TOKENIZER, LENGTH = tiny_tokenizer(), 32


@pytest.fixture
def asked(recipe) -> Recipe:
    domains = recipe["calibration"]["domains"]
    shared = {"prose": {**domains["prose"], "share": 3}, "code": domains["code"]}
    return parse_recipe({**recipe, "calibration": {**recipe["calibration"], "domains": shared}})


def settings(**changes) -> RecoverySettings:
    small = {"stages": ["blocks", "logits"], "blocks": {"batch_tokens": 64}, "logits": {"batch_tokens": 128}}
    return RecoverySettings.model_validate({"num_tokens": 4096, "blocks_share": 0.25, **small, **changes})


def drawn(recipe: Recipe, **changes) -> RecoveryText:
    return recovery_text(recipe, settings(**changes), TOKENIZER, tiny_llama(num_layers=1))


def rows(blocks) -> set[tuple[int, ...]]:
    return {tuple(ids.tolist()) for ids in blocks}


def test_each_stage_has_its_tokens_in_the_domains_shares_and_no_block_is_in_both(asked):
    text = drawn(asked)
    assert training_tokens(text, settings()) == {"blocks": 1024, "logits": 3072}
    for part, most in ((text.blocks, 32), (text.logits, 96)):
        counts = [sum(name == domain for name, _ in part) for domain in ("prose", "code")]
        assert counts == [most * 3 // 4, most // 4]
    assert len({name for name, _ in text.logits[:16]}) == 2, "domains are mixed"
    first, second = rows(ids for _, ids in text.blocks), rows(ids for _, ids in text.logits)
    assert not first & second and len(first) == 32


@pytest.mark.parametrize("num_tokens", [512, 4096])
def test_text_that_judged_the_pruning_is_held_out_again_and_never_trained_on(asked, num_tokens):
    assert asked.calibration.num_tokens is not None
    before = build_calibration(asked.calibration, asked.calibration.num_tokens, TOKENIZER, asked.seed)
    text = drawn(
        asked, num_tokens=num_tokens, held_out_blocks=8, logits={"batch_tokens": 32}, blocks={"batch_tokens": 32}
    )
    trained = rows(ids for _, ids in (*text.blocks, *text.logits))
    for domain in before.domains:
        judged = rows(domain.held_out_NT)
        assert judged <= rows(text.held_out_NT[domain.name]) and not judged & trained
        assert len(text.held_out_NT[domain.name]) == 8


def test_one_stage_alone_has_all_tokens_and_epochs_count(asked):
    alone = drawn(asked, stages=["logits"])
    assert alone.blocks == () and training_tokens(alone, settings(stages=["logits"])) == {"logits": 4096}
    twice = drawn(asked, stages=["blocks"], blocks={"batch_tokens": 64, "epochs": 2})
    assert sum(len(ids) for _, ids in twice.blocks) == 2048


def test_too_few_tokens_for_a_step_is_an_error(asked):
    with pytest.raises(RecipeError, match=r"recover\.num_tokens: 256 leave less than one step of 64 blocks"):
        drawn(asked, num_tokens=256, blocks={"batch_tokens": 2048})


def test_batches_of_the_block_stage_hold_one_domain_each_and_every_block_once(asked):
    text = drawn(asked)
    batches = mixed_batches(text, 3)
    assert all(1 <= len(batch.ids_BT) <= 3 and not batch.held_out for batch in batches)
    assert rows(torch.cat([batch.ids_BT for batch in batches])) == rows(ids for _, ids in text.blocks)
    for batch in batches:
        assert rows(batch.ids_BT) <= rows(ids for name, ids in text.blocks if name == batch.domain)


def test_operations_by_hand():
    model = tiny_llama(num_layers=2)
    linears = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    layers = 2 * linears + 4 * (2 * 4 * 12) * (LENGTH + 1) / 2  # two layers of four heads of 12 channels
    whole = layers + 2 * model.lm_head.weight.numel()
    both = {"blocks": 100, "logits": 200}
    flops = predict_flops(model, model, settings(), both, 10, LENGTH)
    assert flops["blocks"] == pytest.approx((100 * 2 * layers, 100 * 4 * layers))
    assert flops["logits"] == pytest.approx((200 * whole, 200 * (2 * whole + layers)))
    assert flops["judge"] == pytest.approx((10 * whole, 10 * 7 * whole))
    full = predict_flops(model, model, settings(logits={"train": "full"}), both, 10, LENGTH)
    assert full["logits"] == pytest.approx((200 * whole, 200 * 3 * whole))
    alone = settings(stages=["logits"], logits={"train": "lora", "kl_share": 0.0, "gradient_checkpointing": True})
    assert predict_flops(model, model, alone, {"logits": 200}, 10, LENGTH)["logits"] == pytest.approx((0, 600 * whole))
