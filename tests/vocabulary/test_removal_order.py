"""Which tokens go: against brute force, and against independent computations in plain torch."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from secateur.errors import RecipeError
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
from secateur.vocabulary.tokenizer import Vocabulary, scripts_of


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
    monkeypatch.setattr("secateur.vocabulary.order.PRIOR_SHARE", 0.25)
    use_V, ids = torch.linspace(1, 2, 30, dtype=torch.float64).sin(), sorted(random.Random(1).sample(range(30), 20))
    found = with_prior(use_V, ids)
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
    assert torch.equal(found[others], use_V[others])
    assert torch.equal(with_prior(use_V, []), use_V)


def removal_of(ids: list[int], cost_R: torch.Tensor) -> Removal:
    return Removal(ids, cost_R, 310)


REMOVAL = removal_of(list(range(300, 100, -1)), torch.arange(200, dtype=torch.float64) ** 2)


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
