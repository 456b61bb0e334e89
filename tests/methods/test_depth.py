"""Depth: removal equals skipping, after a stock reload and with a cache; KL and greedy choice equal brute force."""

import copy

import pytest
import torch
from families import FAMILIES as ROWS
from families import row, tiny_family
from models import logits_of, tiny_ids, tiny_llama, tiny_qwen2
from reference import kl_per_token
from transformers import AutoModelForCausalLM

from secateur.methods import depth
from secateur.methods.depth import layer_kl, narrow_readers, remove_layers
from secateur.model.bind import bind
from secateur.stream.walk import Batch, make_batches

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


def batches_of(ids_NT, *, held_out=False, batch_tokens=128):
    return make_batches("d", ids_NT, held_out=held_out, batch_tokens=batch_tokens)


@pytest.mark.parametrize("factory, settings", FAMILIES)
@pytest.mark.parametrize("removed", [(), (0, 2)])
def test_layer_kl_equals_brute_force(factory, settings, removed):
    model, texts = factory(num_layers=4, **settings), [tiny_ids(batch=5, length=40), tiny_ids(length=9, seed=2) % 20]
    batches = [*batches_of(texts[0]), Batch("e", False, texts[1]), Batch("d", True, tiny_ids(seed=9))]  # held out: none
    left = [index for index in range(4) if index not in removed]
    expected = {index: brute_force_kl(model, model, texts, (*removed, index)) for index in left}
    for asked in (left, [3], left[:2]):
        found = layer_kl(model, bind(model), batches, removed, asked, {})
        assert found == pytest.approx({index: expected[index] for index in asked}, rel=1e-4)


@pytest.mark.parametrize("factory", [tiny_llama, tiny_qwen2])
def test_a_layer_is_weighed_in_the_narrow_model_against_the_dense_one(factory):
    model, probe = factory(num_layers=4), batches_of(tiny_ids(batch=3, length=24))
    arch, fit = bind(model), batches_of(tiny_ids(batch=96, length=32, seed=3), batch_tokens=512)
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
    model, fit = tiny_llama(), batches_of(tiny_ids(batch=96, length=32, seed=3), batch_tokens=512)
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
def test_removed_saved_and_reloaded_equals_skipping(factory, settings, layers, tmp_path):
    dense, ids_BT = factory(num_layers=4, **settings), tiny_ids(length=24)
    model = copy.deepcopy(dense)
    arch = remove_layers(model, bind(model), layers)
    assert (arch.num_layers, len(arch.select(("ffn",)))) == (4 - len(layers), 4 - len(layers))
    expected = logits_skipping(dense, ids_BT, layers)
    torch.testing.assert_close(logits_of(model, ids_BT), expected)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(reloaded, ids_BT), expected)
    if factory is tiny_qwen2:
        types = dense.config.layer_types
        assert reloaded.config.layer_types == [kind for index, kind in enumerate(types) if index not in layers]


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


@pytest.mark.parametrize("factory, settings", FAMILIES)
def test_generation_with_a_cache_equals_without(factory, settings, tmp_path):
    model, ids_BT = factory(num_layers=4, **settings), tiny_ids(length=12)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    remove_layers(model, bind(model), [0, 2])
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        texts = [
            each.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=10, do_sample=False, use_cache=cached
            )
            for cached in (True, False)
        ]
        assert torch.equal(*texts) and texts[0].shape == (2, 22)
    cache = model(ids_BT, use_cache=True).past_key_values
    assert [cache.get_seq_length(index) for index in range(2)] == [12, 12] and len(cache.layers) == 2
