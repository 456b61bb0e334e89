"""Text that the dense model writes: its own distribution, the same for the same seed, a domain like any other."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from models import tiny_llama
from recipes import grouped
from texts import split_text
from tiny_tokenizer import tiny_tokenizer

import secateur
from secateur.data.blocks import JudgedText, LearningText
from secateur.data.pool import Split
from secateur.data.sampled import BATCH_BLOCKS, sample_blocks, with_sampled
from secateur.errors import CalibrationError, NumericsError
from secateur.evaluation.text import recipe_blocks
from secateur.log import silent
from secateur.model.kept_tokens import KeptTokens, keep_tokens
from secateur.recipe import Calibration, Domain

TOKENIZER = tiny_tokenizer()
LENGTH = 16


def unsampled(path: Path, num_judged_tokens: int = 0) -> Split:
    path.write_text("".join(f"line {number}\n" for number in range(500)))
    domains = {"self": Domain(sampled=True, share=2.0), "lines": Domain(files=(str(path),))}
    calibration = Calibration(domains=domains, sequence_length=LENGTH)
    return split_text(calibration, 27 * LENGTH, TOKENIZER, num_judged_tokens=num_judged_tokens)


def written(split: Split, model: Any, seed: int = 0, **options: Any) -> tuple[LearningText, JudgedText]:
    return with_sampled(split.learning.text, split.judged, model, TOKENIZER, seed, **options)


def test_the_seed_decides_and_only_known_tokens_are_drawn() -> None:
    model = tiny_llama()
    first, again, other = (sample_blocks(model, TOKENIZER, BATCH_BLOCKS + 3, LENGTH, seed) for seed in (0, 0, 1))
    assert first.shape == (BATCH_BLOCKS + 3, LENGTH) and first.dtype == torch.int64
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(TOKENIZER) < model.config.vocab_size and int(first.max()) < len(TOKENIZER)
    assert len(first.unique(dim=0)) == len(first) and not first.is_inference()


def test_a_model_with_more_tokens_draws_what_it_would_without_them() -> None:
    dense, cut = tiny_llama(), tiny_llama()
    dense_ids = torch.tensor([index for index in range(320) if index % 7 != 5])
    keep_tokens(cut, KeptTokens(tuple(dense_ids.tolist()), 320))
    drawn = sample_blocks(dense, TOKENIZER, 3, LENGTH, 0, dense_ids=dense_ids)
    assert torch.equal(drawn, sample_blocks(cut, TOKENIZER, 3, LENGTH, 0)) and len(drawn.unique()) > 9


def test_the_first_token_has_the_models_distribution() -> None:
    model = tiny_llama()
    with torch.no_grad():
        logits = model(torch.tensor([[TOKENIZER.eos_token_id]])).logits[0, -1, : len(TOKENIZER)]
    drawn = sample_blocks(model, TOKENIZER, 4000, 1, 0).flatten()
    shares = torch.bincount(drawn, minlength=len(TOKENIZER)) / len(drawn)
    likely = logits.softmax(dim=-1)
    assert likely.max() > 3 / len(TOKENIZER)
    assert 0.5 * (shares - likely).abs().sum() < 0.12  # total variation; 257 equal shares of 4000 would be 0.3 away
    uniform = torch.full_like(likely, 1 / len(TOKENIZER))
    assert 0.5 * (shares - uniform).abs().sum() > 0.2


def test_every_token_follows_from_all_those_before() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 1e4  # so certain that sampling is taking the likeliest
    [block] = sample_blocks(model, TOKENIZER, 1, LENGTH, 0)
    context = torch.cat([torch.tensor([TOKENIZER.eos_token_id]), block])
    with torch.no_grad():
        logits = model(context[None, :-1], use_cache=False).logits[0, :, : len(TOKENIZER)]
    assert torch.equal(logits.argmax(dim=-1), block)


def test_a_model_without_finite_logits_is_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(NumericsError, match="gives no finite logits"):
        sample_blocks(model, TOKENIZER, 1, LENGTH, 0)


def test_a_tokenizer_without_a_token_to_begin_with_is_refused() -> None:
    bare = tiny_tokenizer()
    bare.eos_token = None
    with pytest.raises(CalibrationError, match="no begin-of-text and no end-of-text token"):
        sample_blocks(tiny_llama(), bare, 1, LENGTH, 0)


def test_a_sampled_domain_has_a_size_first_and_ids_later(tmp_path: Path) -> None:
    before = unsampled(tmp_path / "a.txt")
    seen: list[tuple[str, int, int]] = []
    model = tiny_llama().train()
    after, judged = written(before, model, progress=lambda *step: seen.append(step))
    own, lines = after.domains
    plain, *others = before.learning.text.domains
    assert plain.calibration.is_meta and plain.held_out.is_meta
    assert judged.blocks["self"] is own.held_out, "what guards judges, too, if nothing else is to"
    assert own.calibration.ids_NT.shape == (18, LENGTH) and own.held_out.ids_NT.shape == (2, LENGTH)
    assert own.share == pytest.approx(2 / 3) and [lines] == others
    assert after.content_hash == written(before, model)[0].content_hash != before.learning.text.content_hash
    assert after.content_hash != written(before, model, 1)[0].content_hash
    assert own.blocks.documents == set(range(2, 20)), "a block is a document"
    assert seen[0] == ("sample self", 0, 20 * LENGTH) and seen[-1] == ("sample self", 20 * LENGTH, 20 * LENGTH)
    assert model.training


def test_blocks_that_judge_are_sampled_first_and_then_those_that_guard(tmp_path: Path) -> None:
    model = tiny_llama()
    after, judged = written(unsampled(tmp_path / "a.txt", num_judged_tokens=3 * LENGTH), model, 3)
    own_seed = Random("3:self").getrandbits(63)
    ids_NT = sample_blocks(model, TOKENIZER, 23, LENGTH, own_seed)
    parts = (judged.blocks["self"], after.domains[0].held_out, after.domains[0].calibration)
    assert [len(part) for part in parts] == [3, 2, 18]
    assert torch.equal(torch.cat([part.ids_NT for part in parts]), ids_NT)


def test_sampled_domains_differ() -> None:
    domains = {name: Domain(sampled=True) for name in ("a", "b")}
    both = split_text(Calibration(domains=domains, sequence_length=LENGTH), 4 * LENGTH, TOKENIZER)
    first, second = written(both, tiny_llama())[0].domains
    assert not torch.equal(first.held_out.ids_NT, second.held_out.ids_NT)


def test_sampling_starts_behind_the_token_that_begins_a_text() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight *= 1e4  # so certain that sampling is taking the likeliest
    starts = {"eos": tokenizer.eos_token_id}
    behind_end = sample_blocks(model, tokenizer, 1, LENGTH, 0)
    tokenizer.bos_token = "A"
    starts["bos"] = tokenizer.bos_token_id
    behind_start = sample_blocks(model, tokenizer, 1, LENGTH, 0)
    for start, block in ((starts["eos"], behind_end), (starts["bos"], behind_start)):
        with torch.no_grad():
            [likeliest] = model(torch.tensor([[start]])).logits[:, -1, : len(tokenizer)].argmax(-1).tolist()
        assert int(block[0, 0]) == likeliest
    assert behind_end[0, 0] != behind_start[0, 0]


def test_a_model_in_training_samples_as_in_evaluation() -> None:
    model = tiny_llama(attention_dropout=0.9)
    assert torch.equal(
        sample_blocks(model.train(), TOKENIZER, 2, LENGTH, 0), sample_blocks(model.eval(), TOKENIZER, 2, LENGTH, 0)
    )


def test_every_batch_of_blocks_begins_anew() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    assert len(sample_blocks(model, TOKENIZER, 2 * BATCH_BLOCKS, 4, 0).unique(dim=0)) == 1


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    tmp_path = tmp_path_factory.mktemp("run")
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(900)))
    domains = {"self": {"sampled": True}, "lines": {"files": str(tmp_path / "a.txt")}}
    recipe = {
        "align": 8,
        "calibration": {"num_tokens": 1152, "sequence_length": 32, "domains": domains},
    }
    out = tmp_path / "out"
    return secateur.prune(tiny_llama(), grouped(recipe), tokenizer=TOKENIZER, out=out), out


def test_a_run_measures_and_evaluates_on_sampled_text(pruned: tuple[Any, Path]) -> None:
    result, out = pruned
    facts = result.summary.calibration
    assert facts.num_tokens == {"self": 576, "lines": 576} and facts.num_held_out_tokens["self"] == 64
    assert list(result.summary.pruned_losses) == ["self", "lines"]
    # The text that the model writes is what it finds likely.
    assert result.summary.dense_losses["self"].nats_per_token < result.summary.dense_losses["lines"].nats_per_token
    assert "sampled from the dense model" in (out / "report.html").read_text()


def test_evaluation_leaves_sampled_text_out_and_says_so(pruned: tuple[Any, Path]) -> None:
    blocks, notes = recipe_blocks(pruned[1], TOKENIZER, silent)
    assert list(blocks) == ["lines"] and len(notes) == 1 and "left out (self)" in notes[0]
