"""Losses and divergences against float64 formulae: by block, by domain, with scaled heads, on degenerate logits."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from families import tiny_family
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_ids, tiny_llama
from reference import FLOAT32_STEP, kl_per_token, ratio_error
from texts import blocks_of, documents_of
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateur.data.blocks import Blocks
from secateur.errors import NumericsError
from secateur.model.bind import bind
from secateur.report.records import Change, Quality, change, mean_change
from secateur.stream import losses as product
from secateur.stream.judge import digest_of
from secateur.stream.losses import (
    block_losses,
    compare_tokens,
    domain_losses,
    final_states,
    loss_of,
    predicted_tokens,
    token_divergences,
)
from secateur.vocabulary.tokenizer import num_bytes as text_bytes

MODEL = tiny_llama()
# Behind each logit lie three layers of 112 inputs; a softmax sums 320 words.
TOLERANCE = (3 * 112 + 320) * FLOAT32_STEP


def logits64(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Return a plain forward in float64."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(ids_BT, use_cache=False).logits


def test_the_head_is_a_part_of_the_progress_as_large_as_its_weights():
    model, blocks = tiny_llama(vocab_size=6000), {"a": documents_of(tiny_ids(batch=3, length=20))}
    arch, seen = bind(model), []
    domain_losses(model, arch, blocks, lambda stage, done, total: seen.append((stage, done, total)))
    in_layer, in_head = arch.params_per_layer[0], model.lm_head.weight.numel()
    of_head = round(in_head / in_layer)
    assert of_head > 3  # each block moves it
    done = [*range(arch.num_layers + 1), *(arch.num_layers + of_head * number // 3 for number in (1, 2, 3))]
    assert seen == [("evaluate", each, arch.num_layers + of_head) for each in done]


def reference_nats(model: nn.Module, ids_NT: Tensor) -> Tensor:
    """Return the nats of every token but the first of each block, (N, T - 1)."""
    return cross_entropy(logits64(model, ids_NT)[:, :-1].transpose(1, 2), ids_NT[:, 1:], reduction="none")


# One family plain, one whose logits are capped, one whose logits are scaled.
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "falcon-new"])
def test_losses_are_those_of_a_plain_forward_in_float64(family: str) -> None:
    model = tiny_family(family)
    blocks = {"a": tiny_ids(batch=3, length=20, seed=1), "b": tiny_ids(batch=1, length=20, seed=2)}
    found = domain_losses(model, bind(model), {domain: documents_of(ids_NT) for domain, ids_NT in blocks.items()})
    assert list(found) == ["a", "b"]
    for domain, ids_NT in blocks.items():
        nats = reference_nats(model, ids_NT)
        means = nats.mean(1).tolist()
        assert found[domain].num_tokens == len(ids_NT) * 19
        assert found[domain].nats_per_token == pytest.approx(sum(means) / len(means), rel=TOLERANCE)
        error = ratio_error(means, [1] * len(means))
        assert found[domain].standard_error == (error and pytest.approx(error, abs=2 * TOLERANCE * max(means)))
        for ids_T, each in zip(ids_NT, nats, strict=True):
            alone = block_losses(model, bind(model), ids_T[None])
            torch.testing.assert_close(alone.double(), each, rtol=TOLERANCE, atol=TOLERANCE * float(each.max()))


@pytest.mark.parametrize("at_once", [1, 40, 1 << 15])
def test_how_many_blocks_pass_together_changes_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    blocks = {domain: documents_of(tiny_ids(batch=size, length=20, seed=size)) for domain, size in (("a", 3), ("b", 2))}
    expected = domain_losses(model, bind(model), blocks)
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(product, "TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(product, "HEAD_POSITIONS", 7)
    found = domain_losses(model, bind(model), blocks, lambda *step: seen.append(step), "judge")
    for domain, loss in expected.items():
        assert found[domain].nats_per_token == pytest.approx(loss.nats_per_token, rel=TOLERANCE)
        assert found[domain].standard_error == pytest.approx(loss.standard_error, rel=1e-3)
    num_steps = {1: 5, 40: 3, 1 << 15: 1}[at_once] * (3 + 1)  # three layers, and a head that counts as one
    assert seen == [("judge", done, num_steps) for done in range(num_steps + 1)]


def test_a_loss_that_is_no_number_names_the_domain() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    blocks = {"prose": documents_of(tiny_ids(batch=2, length=20))}
    with pytest.raises(NumericsError, match="the loss is inf"):
        loss_of([{0: (math.inf, 2)}], "judge, domain prose")
    with pytest.raises(NumericsError, match=r"^judge, domain prose: the loss is nan.*\.$"):
        domain_losses(model, bind(model), blocks, stage="judge")


def test_losses_of_blocks_of_other_lengths_per_token_of_another_tokenizer() -> None:
    model = tiny_llama()
    lengths, counts = {"a": [20, 9, 14], "b": [31]}, {"a": {0: 15, 1: 8, 2: 16}, "b": {0: 7}}
    ids_T = tiny_ids(batch=1, length=120)[0]
    blocks = {domain: [ids_T[size : 2 * size] for size in sizes] for domain, sizes in lengths.items()}
    text = {domain: blocks_of(ids) for domain, ids in blocks.items()}
    found = domain_losses(model, bind(model), text, num_tokens=counts)
    for domain, own in counts.items():
        nats = [float(reference_nats(model, each[None]).sum()) for each in blocks[domain]]
        tokens = list(own.values())
        error = ratio_error(nats, tokens)
        assert found[domain].num_tokens == sum(tokens)
        assert found[domain].nats_per_token == pytest.approx(sum(nats) / sum(tokens), rel=TOLERANCE)
        assert found[domain].standard_error == (error and pytest.approx(error, rel=1e-3, abs=TOLERANCE))
    assert domain_losses(model, bind(model), text)["a"].num_tokens == 19 + 8 + 13
    without = loss_of([{0: (1.5, 2), 1: (0.5, 1)}], "x", {0: 4})  # a document that has none of its tokens
    assert (without.nats_per_token, without.num_tokens, without.document_tokens) == (0.5, 4, (4, 0))


def test_blocks_of_one_document_say_nothing_of_others() -> None:
    model, ids_NT = tiny_llama(), tiny_ids(batch=4, length=20)
    one = Blocks(ids_NT, torch.zeros_like(ids_NT))
    found = domain_losses(model, bind(model), {"one": one, "four": documents_of(ids_NT)})
    assert found["one"].standard_error is None and found["four"].standard_error is not None
    assert found["one"].nats_per_token == pytest.approx(found["four"].nats_per_token, rel=1e-12)
    assert change(found["one"], found["one"]).text() == "+0.000"
    assert mean_change([Change(0.1, 0.2), Change(0.3, None)]).text() == "+0.200"
    assert (Change(0.1, 0.2).text(), Change(-0.1, 1e-5).text()) == ("+0.100 ± 0.200", "-0.100")


@settings(max_examples=8)
@given(seed=st.integers(0, 99))
def test_a_loss_is_of_the_documents_that_its_tokens_are_of_and_of_those_that_count(seed: int) -> None:
    generator, model = torch.Generator().manual_seed(seed), MODEL
    ids_NT = torch.randint(3, 250, (3, 12), generator=generator)
    document_NT = torch.randint(0, 4, (36,), generator=generator).sort().values.view(3, 12)
    counted_NT = torch.rand(3, 12, generator=generator) < 0.7
    counted_NT[:, -1] = True
    found = domain_losses(model, bind(model), {"mine": Blocks(ids_NT, document_NT, counted_NT)})["mine"]
    nats, tokens = dict[int, float](), dict[int, int]()
    parts = reference_nats(model, ids_NT), document_NT[:, 1:], counted_NT[:, 1:]
    for value, number, counts in zip(*(part.flatten().tolist() for part in parts), strict=True):
        if counts:
            nats[number], tokens[number] = nats.get(number, 0.0) + value, tokens.get(number, 0) + 1
    order = sorted(nats)
    assert found.document_nats == pytest.approx([nats[number] for number in order], rel=TOLERANCE)
    assert list(found.document_tokens) == [tokens[number] for number in order]
    assert found.nats_per_token == pytest.approx(sum(nats.values()) / sum(tokens.values()), rel=TOLERANCE)
    counts = predicted_tokens({"a": Blocks(ids_NT, document_NT, counted_NT)})
    assert counts == {"a": {number: tokens[number] for number in order}}


def test_bits_per_byte_over_several_blocks() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    texts = "one token for each byte.", "schöne Wörter, 2 mal a", "the end of text follows."
    ids_NT = torch.tensor([tokenizer(text)["input_ids"][:24] for text in texts])
    ids_NT[2, 5] = tokenizer.eos_token_id  # predicted, but no byte of text
    losses = domain_losses(model, bind(model), {"mine": documents_of(ids_NT)}, stage="evaluate")
    found = Quality.on(text_bytes(tokenizer, list(ids_NT)), losses["mine"])
    nats, num_bytes = reference_nats(model, ids_NT), 3 * 23 - 1
    means, nats_per_token = nats.mean(1).tolist(), float(nats.mean())
    assert (found.num_tokens, found.num_bytes) == (3 * 23, num_bytes)
    assert found.bits_per_byte == pytest.approx(float(nats.sum()) / math.log(2) / num_bytes, rel=TOLERANCE)
    assert found.document_nats == pytest.approx(nats.sum(1).tolist(), rel=TOLERANCE)
    assert found.nats_per_token == pytest.approx(nats_per_token, rel=TOLERANCE)
    assert found.perplexity == pytest.approx(math.exp(nats_per_token), rel=10 * TOLERANCE)
    assert found.standard_error == pytest.approx(ratio_error(means, [1] * 3), abs=2 * TOLERANCE * max(means))


def degenerate_logits(seed: int, positions: int, words: int, scale: float, kind: str) -> tuple[Tensor, Tensor]:
    """Return a dense and a pruned model's logits: equal words, one word sure, or far from zero."""
    generator = torch.Generator().manual_seed(seed)
    dense, pruned = (scale * torch.randn(positions, words, generator=generator) for _ in range(2))
    if kind == "sure":
        dense[:, 0] += 80
    return (dense + 1000, pruned - 500) if kind == "shifted" else (dense, pruned)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 999),
    positions=st.integers(1, 20),
    words=st.integers(2, 30),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    kind=st.sampled_from(["", "sure", "shifted"]),
)
def test_divergences_are_those_of_the_formula(seed: int, positions: int, words: int, scale: float, kind: str) -> None:
    dense, pruned = degenerate_logits(seed, positions, words, scale, kind)
    next_P = torch.arange(len(dense)) % dense.shape[1]
    found, reverse, agree, nats = compare_tokens(dense, nn.Identity(), pruned, next_P)
    expected = kl_per_token(dense, pruned)
    # log p rounds to a step of its own size, and p sums to one.
    size = dense.abs().amax() + pruned.abs().amax() + 10
    assert bool(((found.double() - expected).abs() <= 8 * FLOAT32_STEP * size).all())
    assert torch.equal(found, token_divergences(dense, nn.Identity(), pruned, nn.Identity()))
    assert torch.equal(reverse, token_divergences(pruned, nn.Identity(), dense, nn.Identity()))
    assert torch.equal(nats, cross_entropy(pruned.float(), next_P, reduction="none"))
    best = [int(row.argmax()) for row in dense], [int(row.argmax()) for row in pruned]
    assert agree.tolist() == [a == b for a, b in zip(*best, strict=True)]


def test_slices_of_positions_and_rows_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned = degenerate_logits(5, 50, 9, 2.0, "")
    heads = nn.Linear(9, 11), nn.Linear(9, 11)
    with torch.no_grad():
        expected = kl_per_token(heads[0](dense), heads[1](pruned))
    monkeypatch.setattr(product, "KL_POSITIONS", 7)
    monkeypatch.setattr(product, "CACHED_ROWS", 3)
    found = token_divergences(dense, heads[0], pruned, heads[1])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=40 * FLOAT32_STEP)
    assert not bool(token_divergences(dense, heads[0], dense, heads[0]).any())
    with torch.no_grad():
        logits_PV = torch.cat([heads[1](part) for part in pruned.split(7)])
    assert torch.equal(compare_tokens(dense, heads[0], logits_PV, torch.zeros(50, dtype=torch.int64))[0], found)


def test_the_heads_input_is_where_a_token_follows() -> None:
    model, ids_1T = tiny_llama(), tiny_ids(batch=1, length=9)
    states_PD = final_states(model, bind(model), ids_1T)
    assert states_PD.shape == (8, 48)
    with torch.no_grad():
        logits_PV = model.lm_head(states_PD).double()
    expected = logits64(model, ids_1T)[0, :-1]
    assert float((logits_PV - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
    assert not product._position_losses(model, bind(model), states_PD, ids_1T[0]).requires_grad


def test_a_digest_is_of_ids_documents_and_masks() -> None:
    ids_NT = tiny_ids(batch=3, length=5)
    plain, mask_NT = documents_of(ids_NT), torch.ones(3, 5, dtype=torch.bool)
    others = [replace(plain, document_NT=ids_NT), replace(plain, counted_NT=mask_NT), plain[:2]]
    assert len({digest_of(each) for each in (plain, documents_of(ids_NT + 1), *others)}) == 5
    assert digest_of(plain) == digest_of(documents_of(ids_NT.clone()))
