"""Depth: removal is skipping, saved too; KL by brute force; folds, narrow readers and the choice by the reference."""

import copy

import numpy as np
import pytest
import reference_methods as reference
import torch
from families import FAMILIES as ROWS
from families import row, tiny_family
from models import logits_of, tiny_ids, tiny_llama, tiny_qwen2
from reference import kl_per_token
from transformers import AutoModelForCausalLM

from secateur.errors import NumericsError
from secateur.log import silent
from secateur.methods import depth
from secateur.methods.depth import choose_layers, fold_patch, layer_kl, narrow_readers, remove_layers
from secateur.model.bind import bind
from secateur.stream.walk import Batch, make_batches
from tests.methods.test_repair import observed

SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
FAMILIES = [(tiny_llama, {"tied": True}), (tiny_qwen2, SLIDING)]


def logits_skipping(model, ids_BT, layers):
    handles = [model.model.layers[index].register_forward_hook(lambda _, inputs, __: inputs[0]) for index in layers]
    logits = logits_of(model, ids_BT)
    for handle in handles:
        handle.remove()
    return logits


def brute_force_kl(model, other, texts, layers):
    """The mean over all tokens, of whichever text."""
    pairs = [(logits_of(model, ids_BT), logits_skipping(other, ids_BT, layers)) for ids_BT in texts]
    return float(torch.cat([kl_per_token(*pair)[:, :-1].flatten() for pair in pairs]).mean())


def one_domain(ids_NT, *, held_out=False, batch_tokens=128):
    return make_batches("d", ids_NT, held_out=held_out, batch_tokens=batch_tokens)


@pytest.mark.parametrize("factory, settings", FAMILIES)
@pytest.mark.parametrize("removed", [(), (0, 2)])
def test_layer_kl_equals_brute_force(factory, settings, removed):
    model, texts = factory(num_layers=4, **settings), [tiny_ids(batch=5, length=40), tiny_ids(length=9, seed=2) % 20]
    batches = [*one_domain(texts[0]), Batch("e", False, texts[1]), Batch("d", True, tiny_ids(seed=9))]  # held out: none
    left = [index for index in range(4) if index not in removed]
    expected = {index: brute_force_kl(model, model, texts, (*removed, index)) for index in left}
    for asked in (left, [3], left[:2]):
        found = layer_kl(model, bind(model), batches, removed, asked, {})
        assert found == pytest.approx({index: expected[index] for index in asked}, rel=1e-4)


@pytest.mark.parametrize("factory", [tiny_llama, tiny_qwen2])
def test_a_layer_is_weighed_in_the_narrow_model_against_the_dense_one(factory):
    model, probe = factory(num_layers=4), one_domain(tiny_ids(batch=3, length=24))
    arch, fit = bind(model), one_domain(tiny_ids(batch=96, length=32, seed=3), batch_tokens=512)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (readers,) = narrow_readers(model, arch, fit, [{0: 0.5, 1: 0.25, 3: 1.0}], 1e-3)
    found = layer_kl(model, arch, probe, (1,), [0, 2], readers)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    narrow = copy.deepcopy(model)
    for index, weight in readers.items():
        narrow.model.layers[index].mlp.down_proj.weight.data = weight
    for layer in (0, 2):
        expected = brute_force_kl(model, narrow, [batch.ids_BT for batch in probe], [1, layer])
        assert found[layer] == pytest.approx(expected, rel=1e-4)
    assert found.keys() == {0, 2}


def test_further_narrow_models_are_fitted_on_the_stream_of_the_first():
    model, fit = tiny_llama(), one_domain(tiny_ids(batch=96, length=32, seed=3), batch_tokens=512)
    arch, shares = bind(model), [{0: 0.25, 1: 0.5}, {0: 0.75, 1: 0.75, 2: 0.5}]
    first, second = narrow_readers(model, arch, fit, shares, 1e-3)
    (alone,) = narrow_readers(model, arch, fit, shares[:1], 1e-3)
    (mixed,) = narrow_readers(model, arch, fit, [{0: 0.25, 1: 0.75}], 1e-3)
    assert first.keys() == alone.keys() and all(torch.equal(first[index], alone[index]) for index in alone)
    assert second.keys() == {0, 1, 2} and torch.equal(second[1], mixed[1])
    (own,) = narrow_readers(model, arch, fit, shares[1:], 1e-3)
    assert torch.equal(second[0], own[0]) and not torch.equal(second[1], own[1])


@pytest.mark.parametrize("factory, settings", FAMILIES)
@pytest.mark.parametrize("layers", [[1], [3, 0]])
def test_removed_saved_and_reloaded_equals_skipping_and_generates_with_a_cache(factory, settings, layers, tmp_path):
    dense, ids_BT = factory(num_layers=4, **settings), tiny_ids(length=24)
    dense.config.eos_token_id = dense.generation_config.eos_token_id = None
    model = copy.deepcopy(dense)
    arch = remove_layers(model, bind(model), layers)
    assert (arch.num_layers, len(arch.select(("ffn",)))) == (4 - len(layers), 4 - len(layers))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = logits_skipping(dense, ids_BT, layers)
    for each in (model, reloaded):
        torch.testing.assert_close(logits_of(each, ids_BT), expected)
        asked = {"attention_mask": torch.ones_like(ids_BT), "max_new_tokens": 10, "do_sample": False}
        texts = [each.generate(ids_BT, **asked, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*texts) and texts[0].shape == (2, 34)
    if factory is tiny_qwen2:
        types = dense.config.layer_types
        assert reloaded.config.layer_types == [kind for index, kind in enumerate(types) if index not in layers]
    cache = model(ids_BT, use_cache=True).past_key_values
    assert [cache.get_seq_length(index) for index in range(arch.num_layers)] == [24] * arch.num_layers
    assert len(cache.layers) == arch.num_layers


# In the last, experts come at every second layer.
@pytest.mark.parametrize(
    "name, changes", [*(row(name, {}) for name in ROWS), ("qwen2_moe", {"decoder_sparse_step": 2})]
)
def test_the_config_builds_the_layers_that_stay(name, changes, monkeypatch):
    dense, ids_BT = tiny_family(name, **changes), tiny_ids()
    arch = bind(dense)
    monkeypatch.setattr(depth, "bind", lambda model: arch)  # what is found in the smaller model is not asked here
    for layer in (0, 1):
        model = copy.deepcopy(dense)
        remove_layers(model, arch, [layer])
        again = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(logits_of(again, ids_BT), logits_of(model, ids_BT))


# Domains of unequal size: a fold and a divergence are sums over tokens, not means over domains.
TEXT = {"a": tiny_ids(batch=24, length=20, seed=1), "b": tiny_ids(batch=6, length=20, seed=2) % 20}
HELD_OUT = {"a": tiny_ids(batch=3, length=20, seed=3), "b": tiny_ids(batch=2, length=20, seed=4) % 20}


def batches_of(text: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]) -> list[Batch]:
    parts = [(text, False), (held_out, True)]
    return [b for ids, flag in parts for name, each in ids.items() for b in make_batches(name, each, held_out=flag)]


def seen_by(model, ids_BT: torch.Tensor, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The FFN reader's inputs in the layer before `layer`, and what `layer` adds to the hidden state."""
    (inputs_TF, before_TD), (_, after_TD) = (observed(model, ids_BT, index) for index in (layer - 1, layer))
    return inputs_TF, after_TD - before_TD


FOLDS = [("float32", 0.1, 24, 1.0, 1), ("float32", 1e-4, 24, 0.5, 1), ("float32", 1e-3, 6, 0.25, 1)]
FOLDS += [("float32", 1e-4, 2, 0.0, 1), ("bfloat16", 0.1, 24, 1.0, 1), ("bfloat16", 1e-4, 24, 0.5, 1)]
FOLDS += [("bfloat16", 0.1, 24, 1.0, 256)]  # the stored reader is coarse for what the fold would change


@pytest.mark.parametrize(("dtype", "damping", "blocks", "step", "loud"), FOLDS)
def test_a_fold_is_the_least_squares_of_the_reference(dtype, damping, blocks, step, loud) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data *= loud
    model = model.to(getattr(torch, dtype))
    text = {name: ids[:blocks] for name, ids in TEXT.items()}
    before = copy.deepcopy(model)
    parts = [seen_by(before, ids, 2) for ids in text.values()]
    held_out = {name: seen_by(before, ids, 2) for name, ids in HELD_OUT.items()}
    judged = fold_patch(model, bind(model), 2, batches_of(text, HELD_OUT), damping)

    x_TF, d_TD = (np.concatenate(each) for each in zip(*parts, strict=True))
    old_DF = before.model.layers[1].mlp.down_proj.weight.detach().double().numpy()
    ridge_F = reference.ridge(x_TF.T @ x_TF, damping)
    whole_DF = reference.rounded(reference.refit(old_DF, x_TF, range(112), ridge_F, d_TD), dtype)

    def errors(share: float) -> dict[str, float]:
        change_DF = share * (whole_DF - old_DF)
        return {n: float(((d - x @ change_DF.T) ** 2).sum() / (d**2).sum()) for n, (x, d) in held_out.items()}

    assert judged.step == reference.guard(errors) == step
    # In bfloat16 what a layer adds is a difference of rounded hidden states.
    tolerance = 1e-3 if dtype == "float32" else 0.01
    assert judged.error_before == pytest.approx(errors(0.0), rel=tolerance)
    assert judged.error_after == pytest.approx(errors(step), rel=tolerance)
    found_DF = model.model.layers[1].mlp.down_proj.weight.detach().double().numpy()
    expected_DF = old_DF + step * (whole_DF - old_DF)
    # bfloat16 has eight bits, and a number that falls on the other side of a half is one of them off.
    np.testing.assert_allclose(found_DF, expected_DF, rtol=2**-7 if dtype == "bfloat16" else 0, atol=2e-3 * loud)


def test_without_held_out_text_the_whole_fold_is_taken() -> None:
    model = tiny_llama()
    old_DF = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    judged = fold_patch(model, bind(model), 1, batches_of(TEXT, {}), 1e-3)
    assert (judged.step, judged.error_before, judged.error_after) == (1.0, {}, {})
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, old_DF)


@torch.no_grad()
def test_a_narrow_reader_is_the_least_squares_of_the_reference_on_the_columns_of_highest_wanda_score() -> None:
    model = tiny_llama()
    found, beside, only = (
        narrow_readers(model, bind(model), batches_of(*texts), [{0: 0.3, 1: 0.451}], 1e-2)[0]
        for texts in ((TEXT, {}), (TEXT, HELD_OUT), (HELD_OUT, {}))
    )
    for index, reader in found.items():
        assert torch.equal(reader, beside[index]), "held-out text is not seen"
        assert not torch.equal(reader, only[index])
    (alone,) = narrow_readers(model, bind(model), batches_of(TEXT, {}), [{1: 0.451}], 1e-2)
    x_TF = np.concatenate([seen_by(model, ids, 2)[0] for ids in TEXT.values()])
    weight_DF = model.model.layers[1].mlp.down_proj.weight.double().numpy()
    scores = reference.unit_scores("wanda", weight_DF, x_TF, len(x_TF), [[j] for j in range(112)], np.zeros(112))
    keep = sorted(np.argsort(scores)[-51:])  # 0.451 x 112 = 50.5
    expected_DF = np.zeros_like(weight_DF)
    expected_DF[:, keep] = reference.refit(weight_DF, x_TF, keep, reference.ridge(x_TF.T @ x_TF, 1e-2))
    np.testing.assert_allclose(alone[1].double().numpy(), expected_DF, atol=1e-4)
    (least,) = narrow_readers(model, bind(model), batches_of(TEXT, {}), [{0: 0.001}], None)
    kept = (least[0] != 0).any(dim=0)  # and without a damping it is as it was
    assert int(kept.sum()) == 1 and torch.equal(least[0][:, kept], model.model.layers[0].mlp.down_proj.weight[:, kept])


def test_one_divergence_that_is_no_number_is_enough(monkeypatch) -> None:
    monkeypatch.setattr(depth, "_divergences", lambda *_: [torch.tensor([1.0, torch.inf, 2.0])])
    model = tiny_llama()
    with pytest.raises(NumericsError, match="KL without layer 1, domain a"):
        layer_kl(model, bind(model), batches_of(TEXT, {})[:1], (), [1], {})


def chosen_by(costs: dict[frozenset, float], num_layers: int, num_remove: int) -> tuple:
    """Choose by these costs of sets of removed layers; return the choice and what was measured, call by call."""
    calls = []

    def kl_without(removed, asked) -> dict[int, float]:
        calls.append(list(asked))
        return {index: costs[frozenset({*removed, index})] for index in asked}

    return choose_layers(kl_without, set(range(num_layers)), num_remove, silent), calls


def test_layers_are_measured_again_until_none_can_be_cheaper() -> None:
    single = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0, 5: 6.0, 6: 7.0, 7: 8.0}
    costs = {frozenset({index}): cost for index, cost in single.items()}
    # After layer 0 each adds what it did alone and more: the first four are dearer than layer 5 was alone.
    more = {1: 9.0, 2: 9.0, 3: 9.0, 4: 9.5, 5: 8.5, 6: 9.0, 7: 9.0}
    costs |= {frozenset({0, index}): cost for index, cost in more.items()}
    chosen, calls = chosen_by(costs, 8, 2)
    assert calls == [list(range(8)), [1, 2, 3, 4], [5, 6, 7]]
    assert chosen == {0: 1.0, 5: 8.5}
    # Layer 5 adds at least 6 to the 1 of before, which is more than what layer 1 now costs: one call is enough.
    costs |= {frozenset({0, 1}): 6.5}
    chosen, calls = chosen_by(costs, 8, 2)
    assert calls == [list(range(8)), [1, 2, 3, 4]] and chosen == {0: 1.0, 1: 6.5}


def test_of_equal_layers_the_first_goes_and_what_a_layer_adds_counts_from_what_is_gone() -> None:
    costs = {frozenset(each): float(len(each)) for each in ({0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2})}
    assert chosen_by(costs, 3, 2)[0] == {0: 1.0, 1: 2.0}
    single = {0: 1.0, 1: 2.0, 2: 3.0, 3: 3.1, 4: 3.2, 5: 3.5, 6: 3.6, 7: 3.7}
    costs = {frozenset({index}): cost for index, cost in single.items()}
    costs |= {frozenset({0, index}): 1 + cost for index, cost in single.items() if index}
    costs |= {frozenset({0, 1, index}): 3 + cost for index, cost in single.items() if index > 1}
    chosen, calls = chosen_by(costs, 8, 3)
    assert calls[1:] == [[1, 2, 3, 4], [2, 3, 4, 5]] and list(chosen) == [0, 1, 2]
