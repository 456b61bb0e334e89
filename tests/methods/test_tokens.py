"""What tokens are worth to the dense model: against independent computations in plain torch."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from bpe_tokenizer import CORPUS, bpe_tokenizer
from models import logits_of, tiny_ids, tiny_llama
from reference import kl_per_token
from texts import documents_of

from secateur.data.blocks import Block
from secateur.log import silent
from secateur.methods import tokens as module
from secateur.methods.depth import narrow_kl, narrow_readers
from secateur.methods.tokens import channel_law, expected_counts, nats_with, piece_nats
from secateur.model.bind import bind
from secateur.stream.walk import Batch, make_batches
from secateur.vocabulary.kept import Trim
from secateur.vocabulary.order import removal_order
from secateur.vocabulary.tokenizer import Vocabulary, read_vocabulary, trimmed_tokenizer


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
    own = [*map(documents_of, blocks)]
    found = piece_nats(model, arch, vocabulary, own, silent)

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
    few = piece_nats(model, arch, vocabulary, own, silent)
    assert few.character == few.token == found.token


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
    own = {name: documents_of(ids_NT) for name, ids_NT in text.items()}
    before, after = (
        nats_with(model, bind(model), own, shares, each, lambda *step: told.append(step)) for each in (None, trim)
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
    cut = copy.deepcopy(model)
    for layer, reader in zip(cut.model.layers, readers.values(), strict=True):
        layer.mlp.down_proj.weight.data = reader
    pairs = [(logits_of(model, batch.ids_BT), logits_of(cut, batch.ids_BT)) for batch in batches]
    kl = float(torch.cat([kl_per_token(*pair)[:, :-1].flatten() for pair in pairs]).mean())
    seen: list[tuple[str, int, int]] = []
    found = narrow_kl(model, arch, batches, [{}, readers, {}], {"d": 0.5}, lambda *step: seen.append(step))
    assert found == [0, pytest.approx(kl, rel=1e-5), 0]
    assert seen == [("judge narrow layers", done, 3) for done in range(4)]
    # Domains count by their shares, whatever number of blocks each has.
    alone = [narrow_kl(model, arch, batches[part], [readers], {"d": 1.0})[0] for part in (slice(1), slice(1, 3))]
    two = [replace(batch, domain=name) for batch, name in zip(batches, "abb", strict=True)]
    both = narrow_kl(model, arch, two, [readers], {"a": 0.6, "b": 0.2, "absent": 0.2})
    assert alone[0] != alone[1] and both == [pytest.approx(0.75 * alone[0] + 0.25 * alone[1], rel=1e-6)]


def test_the_law_goes_through_both_measured_points(narrow, monkeypatch):
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
    monkeypatch.setattr(module, "narrow_kl", lambda *_: [0.0, -1e-12])  # channels that cost nothing have a law too
    law = channel_law(model, arch, batches, {"d": 1.0}, 0.6, 1e-3, silent)
    assert law(torch.tensor([0.3, 0.6])).tolist() == pytest.approx([1e-9, 1e-9])
