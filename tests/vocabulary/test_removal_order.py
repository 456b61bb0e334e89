"""Which tokens go: against brute force, and against independent computations in plain torch."""

import math
import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from bpe_tokenizer import CORPUS, bpe_tokenizer
from models import tiny_ids, tiny_llama

from secateur.data.blocks import Block
from secateur.errors import RecipeError
from secateur.log import silent
from secateur.methods import tokens as module
from secateur.methods.depth import narrow_kl, narrow_readers
from secateur.methods.tokens import channel_law, expected_counts, nats_with, piece_nats
from secateur.model.bind import bind
from secateur.stream.losses import block_losses
from secateur.stream.walk import Batch, make_batches
from secateur.vocabulary.kept import Trim
from secateur.vocabulary.order import (
    PieceNats,
    Removal,
    TokenCounts,
    count_for_size,
    count_tokens,
    nats_of_trims,
    of_scripts,
    removal_by_counts,
    removal_order,
    sizes_within,
    token_use,
    with_prior,
    with_prior_by_script,
)
from secateur.vocabulary.tokenizer import Vocabulary, read_vocabulary, scripts_of, trimmed_tokenizer


def vocabulary_of(*, needs_parts: bool, seed: int, num_tokens: int = 40, num_padding: int = 3) -> Vocabulary:
    """Return tokens of which the first eight have no parts; later ones are made of two or three before them."""
    draw = random.Random(seed)
    parts = {
        index: tuple(draw.randrange(index) for _ in range(2 if needs_parts else draw.randint(2, 3)))
        for index in range(8, num_tokens)
    }
    texts = {index: "abcdefgh"[index] for index in range(8)}
    for index, those in parts.items():
        texts[index] = "".join(texts[part] for part in those)
    return Vocabulary(num_tokens + num_padding, texts, parts, needs_parts, frozenset(range(8)))


def brute_force(
    vocabulary: Vocabulary, use: list[float], order_by: list[float], fixed: set[int], weights: list[float] | None = None
) -> tuple[list[int], list[float]]:
    """Try every token that may go, each time; respell all tokens from the start."""
    alive, gone, total, more = set(vocabulary.texts), [], 0.0, []
    weights = weights or [1.0] * vocabulary.num_rows
    use, order_by = list(use), list(order_by)

    def spelt(index: int) -> list[int]:
        found: list[int] = []
        for part in vocabulary.parts[index]:
            found += [part] if part in alive else spelt(part)
        return found

    while True:
        needed = (
            {part for index in alive for part in vocabulary.parts.get(index, ())} if vocabulary.needs_parts else set()
        )
        free = [index for index in alive - fixed - needed if index in vocabulary.parts]
        if not free:
            return gone, more
        _, index = min((order_by[index] * (sum(weights[each] for each in spelt(index)) - 1), index) for index in free)
        total += use[index] * (len(spelt(index)) - 1)
        for part in spelt(index):
            use[part] += use[index]
            order_by[part] += order_by[index]
        alive.remove(index)
        gone.append(index)
        more.append(total)


@pytest.mark.parametrize("needs_parts", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_trying_every_token_each_time(needs_parts, seed):
    vocabulary = vocabulary_of(needs_parts=needs_parts, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    use_V, other_V = torch.rand(2, vocabulary.num_rows, generator=draw, dtype=torch.float64)
    kept = 25
    found = removal_order(vocabulary, use_V, [kept])
    fixed, left = set(range(8)), [kept]
    while left:
        index = left.pop()
        fixed.add(index)
        left += vocabulary.parts.get(index, ()) if needs_parts else ()
    ids, more = brute_force(vocabulary, use_V.tolist(), use_V.tolist(), fixed)
    padding = [40, 41, 42]
    assert found.ids == padding + ids and kept not in found.ids
    assert found.cost_R.tolist() == pytest.approx([0.0] * 3 + more, rel=1e-12)
    ordered = removal_order(vocabulary, use_V, [kept], order_by_V=other_V)
    others, growth = brute_force(vocabulary, use_V.tolist(), other_V.tolist(), fixed)
    assert ordered.ids == padding + others != found.ids
    assert ordered.cost_R.tolist() == pytest.approx([0.0] * 3 + growth, rel=1e-12)


def test_a_padding_row_that_stays_is_not_among_those_that_go_first():
    vocabulary = vocabulary_of(needs_parts=True, seed=0)
    use_V = torch.rand(vocabulary.num_rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, found = (removal_order(vocabulary, use_V, stay) for stay in ((), [41]))
    assert whole.ids[:3] == [40, 41, 42]
    assert found.ids == [index for index in whole.ids if index != 41]
    assert found.cost_R.tolist() == whole.cost_R.tolist()[1:]  # a padding row costs nothing


@pytest.mark.parametrize("seed", range(3))
def test_a_token_costs_the_weights_of_its_pieces(seed):
    """Growth is counted in tokens, and the cost in what the pieces weigh; the order is that of the cost."""
    vocabulary = vocabulary_of(needs_parts=True, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    use_V = torch.rand(vocabulary.num_rows, generator=draw, dtype=torch.float64)
    weights_V = torch.ones(vocabulary.num_rows, dtype=torch.float64)
    weights_V[:8] = 0.5 + 4 * torch.rand(8, generator=draw, dtype=torch.float64)
    found = removal_order(vocabulary, use_V, weights_V=weights_V)
    ids, _ = brute_force(vocabulary, use_V.tolist(), use_V.tolist(), set(range(8)), weights_V.tolist())
    assert found.ids == [40, 41, 42, *ids] != removal_order(vocabulary, use_V).ids
    text = random.Random(0).choices(range(40), use_V[:40].tolist(), k=4000)
    gone = set(found.ids)

    def weight(index: int) -> float:
        return float(weights_V[index]) if index not in gone else sum(map(weight, vocabulary.parts[index]))

    plain = count_tokens([torch.tensor(text)], vocabulary.num_rows).tokens_V.double() / len(text)
    counted = removal_order(vocabulary, plain, weights_V=weights_V)
    cost = sum(weight(index) for index in text if index in gone) - sum(index in gone for index in text)
    assert float(counted.cost_R[-1]) == pytest.approx(cost / len(text), rel=1e-9)


def test_bytes_of_a_character_weigh_what_it_costs_and_nothing_else_does():
    parts = {4: (0, 1), 5: (0, 1, 2), 6: (3, 3)}
    vocabulary = Vocabulary(7, {}, parts, True, frozenset(), {0: 0xE2, 1: 0x80, 2: 0x99})
    weights_V = PieceNats(token=5.0, character=15.0).weights(vocabulary)
    cost = {index: float(weights_V[list(those)].sum()) - 1 for index, those in parts.items()}
    assert cost == {4: 3.0, 5: 3.0, 6: 1.0}  # 15 nats are three further tokens, of two bytes or of three


def test_the_nats_of_pieces_are_those_at_their_own_places(monkeypatch):
    monkeypatch.setattr(module, "TOKENS_APART", 3)
    monkeypatch.setattr(module, "FEWEST_CHARACTERS", 2)
    model = tiny_llama()
    arch, vocabulary = (
        bind(model),
        Vocabulary(
            320,
            {},
            {50: (10, 11), 51: (12, 13, 14), 60: (1, 2, 3), 61: (4, 5), 70: (8, 9)},
            True,
            frozenset({70}),
            {1: 0xE2, 2: 0x80, 3: 0x99, 4: 0xC3, 5: 0xA9},
        ),
    )
    ids = [60, 50, 7, 70, 51, 60, 50, 6, 61, 50, 61, 7, 60, 51, 50, 60, 30]  # the first is context alone
    blocks = [torch.tensor([[7] * len(ids), ids]), torch.tensor([[9, 50, 9, 9, 51, 9, 50, *[9] * 10]] * 2)]
    found = piece_nats(model, arch, vocabulary, blocks, silent)

    def surprise(text: list[int]) -> list[float]:
        with torch.no_grad():
            log_p = model(torch.tensor([text])).logits[0, :-1].double().log_softmax(-1)
        return [0.0, *(-log_p[n, index].item() for n, index in enumerate(text[1:]))]

    tokens, further, characters = 0.0, 0, []
    for text in (ids, blocks[1][0].tolist()):
        at, new, seen = [], [], {True: 0, False: 0}
        for place, index in enumerate(text):
            pieces = (index,)
            if place and index in (50, 51, 60, 61):
                seen[index >= 60] += 1
                if seen[index >= 60] % (2 if index >= 60 else 3) == 0:
                    pieces = vocabulary.parts[index]
                    at.append((place, len(new), index))
            new += pieces
        before, after = surprise(text), surprise(new)
        for place, start, index in at:
            more = sum(after[start : start + len(vocabulary.parts[index])]) - before[place]
            if index >= 60:
                characters.append(more)
            else:
                tokens, further = tokens + more, further + len(vocabulary.parts[index]) - 1
    assert further >= 3 and len(characters) == 2
    assert found.token == pytest.approx(tokens / further, rel=1e-4)
    assert found.character == pytest.approx(sum(characters) / 2, rel=1e-4)
    monkeypatch.setattr(module, "FEWEST_CHARACTERS", 3)
    few = piece_nats(model, arch, vocabulary, blocks, silent)
    assert few.character == few.token == found.token


def test_a_document_counts_as_the_square_root_of_its_occurrences() -> None:
    found = count_tokens([torch.tensor(ids) for ids in ([1, 1, 1, 1, 0], [1, 3])], 5)
    assert found.tokens_V.tolist() == [1, 5, 0, 1, 0]
    assert found.damped_V.tolist() == [1.0, 3.0, 0.0, 1.0, 0.0]


def test_use_weighs_domains_by_their_shares_or_takes_the_largest():
    zeros_V = torch.zeros(3, dtype=torch.float64)
    counts = {
        "a": TokenCounts(torch.tensor([3, 1, 0]), zeros_V + 1),
        "b": TokenCounts(torch.tensor([0, 10, 30]), zeros_V + 2),
    }
    shares = {"a": 1.0, "b": 3.0, "unread": 5.0}
    assert token_use(counts, shares).tolist() == pytest.approx([0.1875, 0.25, 0.5625])
    assert token_use(counts, shares, minimax=True).tolist() == pytest.approx([0.75, 0.25, 0.75])
    assert token_use(counts, shares, damped=True).tolist() == pytest.approx([0.1] * 3)  # 1/4 / 4 + 3/4 * 2 / 40


def test_the_order_is_of_damped_counts_and_the_growth_of_plain_ones():
    # Token 2 is used five times in one document, token 3 once in each of three; half of either is the mean of both.
    parts = {2: (0, 1), 3: (1, 0)}
    vocabulary = Vocabulary(4, {0: "a", 1: "b", 2: "ab", 3: "ba"}, parts, True, frozenset({0, 1}))
    texts = [[0, 2, 2, 2, 2, 2], [1, 3], [3], [3]]
    found = removal_by_counts(
        vocabulary, {"d": count_tokens(map(torch.tensor, texts), 4)}, {"d": 1.0}, nats=PieceNats()
    )
    assert found.ids == [2, 3]
    assert found.cost_R.tolist() == pytest.approx([(5 + 4) / 2 / 10, (5 + 3) / 10])


def test_the_prior_is_the_mean_of_the_neighbours_among_those_that_may_go(monkeypatch):
    monkeypatch.setattr("secateur.vocabulary.order.NEIGHBOURS", 4)
    use_V, ids = torch.linspace(1, 2, 30, dtype=torch.float64).sin(), sorted(random.Random(1).sample(range(30), 20))
    found = with_prior(use_V, ids, 0.25)
    for place, index in enumerate(ids):
        near = ids[max(0, place - 2) : max(0, place - 2) + 4]
        mean = sum(float(use_V[each]) for each in near) / len(near)
        assert float(found[index]) == pytest.approx(0.75 * float(use_V[index]) + 0.25 * mean, rel=1e-12)
    scripts = {
        index: frozenset(("latin", "thai", "greek")[: index % 3]) for index in ids
    }  # none, latin, latin and thai
    by_script = with_prior_by_script(use_V, scripts, {"latin"})
    thai = [index for index in ids if index % 3 == 2]
    apart = with_prior(with_prior(use_V, thai), [index for index in ids if index not in thai])
    assert torch.equal(by_script, apart) and not torch.equal(by_script, with_prior(use_V, ids))
    others = [index for index in range(30) if index not in ids]
    assert torch.equal(found[others], use_V[others]) and torch.equal(with_prior(use_V, ids, 0.0), use_V)
    assert torch.equal(with_prior(use_V, []), use_V)


def removal_of(ids: list[int], cost_R: torch.Tensor) -> Removal:
    return Removal(ids, cost_R, 310)


REMOVAL = removal_of(list(range(300, 100, -1)), torch.arange(200, dtype=torch.float64) ** 2)


def test_answers_count_what_the_model_is_likely_to_say_where_they_count():
    model = tiny_llama().bfloat16()
    ids_T = tiny_ids(batch=1, length=24)[0]
    is_answer_T = torch.arange(24) >= 10
    block = Block(ids_T, torch.zeros_like(ids_T), is_answer_T)
    counts = expected_counts(model, bind(model), [block], model.config.vocab_size, silent)
    with torch.no_grad():
        probabilities_TV = model(ids_T[None]).logits[0].float().softmax(dim=-1)
    # What stands before an answer's tokens foretells them: those from 9 on, and none behind the last.
    torch.testing.assert_close(counts.tokens_V, probabilities_TV[9:23].double().sum(dim=0), rtol=1e-4, atol=1e-6)
    assert float(counts.tokens_V.sum()) == pytest.approx(14, rel=1e-5) and counts.damped_V is counts.tokens_V


def test_letters_of_the_scripts_that_the_text_is_written_in_stay():
    texts = dict(enumerate(["a", "b", "é", "ж", "鐵", "ab", "a鐵"]))
    vocabulary = Vocabulary(7, texts, {2: (0, 1), 3: (0, 1), 4: (0, 1), 5: (0, 1), 6: (0, 4)}, True, frozenset({0, 1}))
    text = {"d": count_tokens([torch.tensor([0] * 190 + [5] * 6 + [4] * 3 + [3])], 7)}
    assert set(removal_by_counts(vocabulary, text, {"d": 1.0}, nats=PieceNats()).ids) == {3, 5, 6}
    less = {"d": count_tokens([torch.tensor([0] * 199 + [4])], 7)}  # half a percent is no script to write
    assert set(removal_by_counts(vocabulary, less, {"d": 1.0}, nats=PieceNats()).ids) == {3, 4, 5, 6}
    other = {**less, "e": text["d"]}
    assert 4 not in removal_by_counts(vocabulary, other, {"d": 1.0, "e": 1.0}, nats=PieceNats()).ids


def test_sizes_are_multiples_and_leave_what_must_stay():
    assert REMOVAL.kept(3).dense_ids == tuple(index for index in range(310) if index not in (300, 299, 298))
    assert count_for_size(REMOVAL, 128) == 182
    assert count_for_size(REMOVAL, 310) == 0  # the size that a run saves when `auto` takes no token
    assert sizes_within(REMOVAL, 182).tolist() == [0, 54, 118, 182]
    assert sizes_within(REMOVAL, 181).tolist() == [0, 54, 118]
    assert sizes_within(replace(REMOVAL, num_rows=320), 500).tolist() == [0, 64, 128, 192]
    assert sizes_within(REMOVAL, 0).tolist() == [0]  # fewer than the rows beyond a multiple of 64
    for size in (64, 100, 384):
        with pytest.raises(RecipeError, match=r"remove\.vocabulary: .* from 128, .* to 310"):
            count_for_size(REMOVAL, size)
    for size, advice in ((100, " (such as 128) from"), (200, " (such as 192 or 256) from"), (12, " of 64 from")):
        with pytest.raises(RecipeError, match=re.escape(advice)):
            count_for_size(REMOVAL, size)


def test_text_costs_what_was_measured_and_in_between_a_straight_line():
    removal = removal_of(REMOVAL.ids, torch.arange(1, 201, dtype=torch.float64) / 1000)
    counts = torch.tensor([0, 50, 100, 150, 200])
    one = nats_of_trims(removal, counts, {1.0: 3.0})
    assert one.tolist() == pytest.approx([0.0, 0.15, 0.3, 0.45, 0.6])
    measured = nats_of_trims(removal, counts, {0.15: 0.9, 0.1: 0.2})
    assert measured.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.9, 1.6])
    # A trim that seems to cost less than a smaller one costs as much; one that seems to win costs nothing.
    assert nats_of_trims(removal, counts, {0.1: 0.2, 0.15: 0.1}).tolist() == pytest.approx([0.0, 0.1, 0.2, 0.2, 0.2])
    assert nats_of_trims(removal, counts, {0.1: -0.2, 0.15: 0.1}).tolist() == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.2])


def test_nats_are_over_the_kept_tokens_alone():
    model = tiny_llama()
    kept_K = torch.tensor(sorted(random.Random(0).sample(range(320), 200)))
    ids_T = kept_K[torch.randint(200, (25,), generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        log_p = model(ids_T[None]).logits[0, :-1][:, kept_K].double().log_softmax(-1)
    expected = -sum(float(log_p[n, (kept_K == ids_T[n + 1]).nonzero()[0, 0]]) for n in range(24))
    assert float(block_losses(model, bind(model), ids_T[None], kept_K).sum()) == pytest.approx(expected, rel=1e-6)


def test_nats_with_a_trim_are_per_dense_token_and_the_mean_by_share():
    dense_tokenizer = bpe_tokenizer(vocab_size=310)
    num_rows = len(dense_tokenizer)
    model = tiny_llama(vocab_size=num_rows)
    vocabulary = read_vocabulary(dense_tokenizer, model)
    use_V = torch.rand(num_rows, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    removal = removal_order(vocabulary, use_V)
    kept = removal.kept(len(removal.ids) // 2)
    trim = Trim(kept, dense_tokenizer, trimmed_tokenizer(dense_tokenizer, kept))
    ids = torch.tensor(dense_tokenizer("".join(CORPUS))["input_ids"])
    text, told = {"prose": ids[:180].view(6, 30), "code": ids[180:240].view(2, 30)}, []
    shares = {"prose": 0.75, "code": 0.25}
    before, after = (
        nats_with(model, bind(model), text, shares, each, lambda *step: told.append(step)) for each in (None, trim)
    )
    expected, further, kept_K = {None: 0.0, trim: 0.0}, 0, torch.tensor(kept.dense_ids)
    for name, blocks in (("prose", text["prose"][:4]), ("code", text["code"])):
        for ids_T in blocks:
            # What the first token spells is context alone.
            first, rest = (trim.tokenizer(dense_tokenizer.decode(part))["input_ids"] for part in (ids_T[:1], ids_T[1:]))
            new_T = torch.tensor([*first[-1:], *rest])
            with torch.no_grad():
                dense = model(ids_T[None]).logits[0, :-1].double().log_softmax(-1)
                cut = model(kept_K[new_T][None]).logits[0, :-1][:, kept_K].double().log_softmax(-1)
            weight = shares[name] / (29 * len(blocks))
            expected[None] -= weight * float(dense.gather(1, ids_T[1:, None]).sum())
            expected[trim] -= weight * float(cut.gather(1, new_T[1:, None]).sum())
            further += len(new_T) - len(ids_T)
    assert further > 20 and after - before > 0.1
    assert (before, after) == pytest.approx((expected[None], expected[trim]), rel=1e-5)
    assert told[-1][1:] == (2, 2)


@pytest.fixture(scope="module")
def narrow() -> dict[str, Any]:
    model = tiny_llama()
    arch = bind(model)
    batches = make_batches("d", tiny_ids(batch=60, length=32), held_out=False, batch_tokens=64)
    return {"model": model, "arch": arch, "batches": batches}


def test_narrow_kl_is_that_of_the_model_with_these_readers(narrow):
    model, arch, batches = narrow["model"], narrow["arch"], narrow["batches"][:3]
    (readers,) = narrow_readers(model, arch, narrow["batches"], [dict.fromkeys(range(3), 0.5)], 1e-3)
    dense, sums, count = [], 0.0, 0
    with torch.no_grad():
        dense = [model(batch.ids_BT).logits[:, :-1].double().log_softmax(-1) for batch in batches]
        own = [layer.mlp.down_proj.weight for layer in model.model.layers]
        for layer, reader in zip(model.model.layers, readers.values(), strict=True):
            layer.mlp.down_proj.weight = torch.nn.Parameter(reader)
        for batch, log_p in zip(batches, dense, strict=True):
            log_q = model(batch.ids_BT).logits[:, :-1].double().log_softmax(-1)
            sums += float((log_p.exp() * (log_p - log_q)).sum())
            count += log_p.shape[0] * log_p.shape[1]
        for layer, weight in zip(model.model.layers, own, strict=True):
            layer.mlp.down_proj.weight = weight
    seen: list[tuple[str, int, int]] = []
    found = narrow_kl(model, arch, batches, [{}, readers, {}], {"d": 0.5}, lambda *step: seen.append(step))
    assert found == [0, pytest.approx(sums / count, rel=1e-5), 0]
    assert seen == [("judge narrow layers", done, 3) for done in range(4)]
    # Domains count by their shares, whatever number of blocks each has.
    alone = [narrow_kl(model, arch, batches[part], [readers], {"d": 1.0})[0] for part in (slice(1), slice(1, 3))]
    two = [replace(batch, domain=name) for batch, name in zip(batches, "abb", strict=True)]
    both = narrow_kl(model, arch, two, [readers], {"a": 0.6, "b": 0.2, "absent": 0.2})
    assert alone[0] != alone[1] and both == [pytest.approx(0.75 * alone[0] + 0.25 * alone[1], rel=1e-6)]


def test_channels_that_cost_nothing_have_a_law_too(narrow, monkeypatch):
    monkeypatch.setattr(module, "narrow_kl", lambda *_: [0.0, -1e-12])
    law = channel_law(narrow["model"], narrow["arch"], narrow["batches"], {"d": 1.0}, 0.6, 1e-3, silent)
    assert law(torch.tensor([0.3, 0.6])).tolist() == pytest.approx([1e-9, 1e-9])


def test_the_law_goes_through_both_measured_points(narrow):
    model, arch, batches = narrow["model"], narrow["arch"], narrow["batches"]
    law = channel_law(model, arch, batches, {"d": 1.0}, 0.6, 1e-3, silent)
    # Batches have two blocks: the first block judges, the next ones are fitted to.
    num_fit = math.ceil(4 * 112 / 32)
    blocks_N = [block for batch in batches for block in batch.ids_BT.split(1)]
    judged, *fitted = [Batch("d", False, ids_BT) for ids_BT in blocks_N[: 1 + num_fit]]
    shares = [dict.fromkeys(range(3), 1 - share) for share in (0.6, 0.3)]
    both = narrow_readers(model, arch, fitted, shares, 1e-3)
    for share, kl in zip((0.6, 0.3), narrow_kl(model, arch, [judged], both, {"d": 1.0}), strict=True):
        assert float(law(torch.tensor(share))) == pytest.approx(kl / module.NARROW_OVERSTATES, rel=1e-4)
    assert float(law(torch.tensor(0.0))) == 0 and float(law(torch.tensor(-0.1))) == 0
    exponent = math.log2(float(law(torch.tensor(0.6))) / float(law(torch.tensor(0.3))))
    assert float(law(torch.tensor(0.9))) == pytest.approx(float(law(torch.tensor(0.6))) * 1.5**exponent, rel=1e-4)


def test_scripts_are_those_of_letters():
    assert scripts_of("naïve Паром 海 ひ 한 1+2 µ ʰ 🚀 \ufffd") == {"latin", "cyrillic", "cjk", "hiragana", "hangul"}
    assert scripts_of("12 :)") == set()
    vocabulary = Vocabulary(3, {0: "abc", 1: "Паром", 2: "7"}, {}, True, frozenset())
    assert of_scripts(vocabulary, ["cyrillic"]) == {1} and of_scripts(vocabulary, []) == set()
    with pytest.raises(
        RecipeError, match=r"no token of the model has a letter of greek; its scripts are cyrillic, latin"
    ):
        of_scripts(vocabulary, ["greek"])
    assert Counter(map(len, (scripts_of("µ"), scripts_of("μ")))) == Counter({0: 1, 1: 1})
