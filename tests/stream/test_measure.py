"""`measure()` against plain hooks on the whole model in float64: every sum, every domain, held-out inputs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import tiny_family
from models import tiny_ids, tiny_llama, tiny_qwen2
from reference import FLOAT32_STEP, Sums, domain_factor, domain_sums, weighted
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.model.bind import bind, decoder_layers
from secateur.model.group import Group, linear
from secateur.stream.measure import measure
from secateur.stream.statistics import Statistics
from secateur.stream.walk import Batch, Walk, make_batches
from tests.stream.test_walk import entered as entering

LENGTH = 12
# Blocks per domain; the last has one block only, and each batch holds two at most.
NUM_BLOCKS = {"a": 5, "b": 2, "c": 1}
NUM_HELD_OUT = 3
SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}
# A sum of so many terms lies behind each number: layers of 112 inputs, and the tokens of a domain.
NUM_TERMS = 3 * 112 + max(NUM_BLOCKS.values()) * LENGTH
TOLERANCE = NUM_TERMS * FLOAT32_STEP


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "ffn": (tiny_llama, "ffn"),
    "ffn with bias": (lambda: tiny_llama(mlp_bias=True), "ffn"),
    "kv heads": (tiny_qwen2, "kv_heads"),
    "kv heads with bias": (lambda: tiny_llama(attention_bias=True), "kv_heads"),
    "parallel with bias": (lambda: tiny_family("phi"), "ffn"),
}


def batches_of(num_blocks: dict[str, int] = NUM_BLOCKS) -> list[Batch]:
    """Calibration blocks and held-out blocks of each domain; the held-out ones of c come first."""
    found = []
    for seed, (name, number) in enumerate(num_blocks.items()):
        parts = [(number, 10 * seed, False), (NUM_HELD_OUT, 10 * seed + 1, True)]
        for count, own_seed, held_out in parts if name != "c" else parts[::-1]:
            ids_NT = tiny_ids(batch=count, length=LENGTH, seed=own_seed)
            found += make_batches(name, ids_NT, held_out=held_out, batch_tokens=2 * LENGTH)
    return found


@dataclass
class Seen:
    """What hooks saw in float64, by (domain, held out): a reader's inputs, outputs, and its layer's outputs."""

    x_TF: dict[tuple[str, bool], Tensor]
    y_TH: dict[tuple[str, bool], Tensor]
    after_TD: dict[tuple[str, bool], Tensor]


@torch.no_grad()
def hooked(model: nn.Module, group: Group, batches: list[Batch]) -> Seen:
    """Run the whole model in float64 and note what passes the group's reader, its bias subtracted."""
    whole: Any = copy.deepcopy(model).double()
    layer = decoder_layers(whole, bind(whole))[group.layer]
    reader = linear(layer, group.reader.module)
    notes: dict[tuple[str, bool], list[tuple[Tensor, Tensor, Tensor]]] = {}
    x, after = [], []
    reader.register_forward_hook(lambda _, inputs, __: x.append(inputs[0].flatten(0, -2)))
    layer.register_forward_hook(
        lambda _, __, out: after.append((out[0] if isinstance(out, tuple) else out).flatten(0, -2))
    )
    for batch in batches:
        whole(batch.ids_BT, use_cache=False)
        x_TF = x.pop()
        y_TH = x_TF @ reader.weight.T  # without the bias, whether it has one or not
        notes.setdefault((batch.domain, batch.held_out), []).append((x_TF, y_TH, after.pop()))
    return Seen(
        *({key: torch.cat([each[part] for each in found]) for key, found in notes.items()} for part in range(3))
    )


def near(found: Tensor, expected: Tensor, size: Tensor | float) -> None:
    """`size`: how large the terms of each sum are together."""
    error = (found.double() - expected).abs()
    assert bool((error <= TOLERANCE * torch.as_tensor(size).double()).all()), float((error / size).max())


def assert_statistics(found: Statistics, expected: Sums) -> None:
    root, mass = expected.squares_F.sqrt(), expected.mass
    assert found.mass == pytest.approx(mass, rel=TOLERANCE)
    near(found.sum_F, expected.inputs_F, root * mass**0.5)  # by Cauchy and Schwarz
    near(found.sum_squares_F, expected.squares_F, expected.squares_F)
    assert float(found.energy) == pytest.approx(expected.energy, rel=2 * TOLERANCE)
    if found.any_gram is not None:
        near(found.gram.full(), expected.gram_FF, root[:, None] * root)


def pooled_reference(
    seen: Seen, weighting: str, drift: dict[str, Tensor] | None = None
) -> tuple[Sums, dict[str, Sums]]:
    own = {}
    for name in SHARES:
        key = name, False
        own[name] = domain_sums(seen.x_TF[key], seen.y_TH[key], None if drift is None else drift[name])
    factors = [domain_factor(weighting, SHARES[name], each.energy) for name, each in own.items()]
    return weighted(list(zip(factors, own.values(), strict=True))), own


def group_of(model: nn.Module, layer: int, name: str) -> Group:
    [group] = [group for group in bind(model).groups if (group.layer, group.name) == (layer, name)]
    return group


@pytest.mark.parametrize("weighting", ["tokens", "energy", "minimax"])
@pytest.mark.parametrize("name", MODELS)
def test_every_sum_is_that_of_the_model_in_float64(name: str, weighting: str) -> None:
    model, group, batches = MODELS[name][0](), None, batches_of()
    group = group_of(model, 1, MODELS[name][1])
    seen = hooked(model, group, batches)
    walk = Walk(model, bind(model), batches)
    walk.advance(0)
    found = measure(walk, group, weighting, SHARES, gram=True)
    pooled, own = pooled_reference(seen, weighting)
    assert_statistics(found.pooled, pooled)
    assert {each.dtype for each in found.pooled.sums} == {torch.float32, found.pooled.energy.dtype}  # half the memory
    assert found.pooled.cross_FH is None and found.held_out_drift_TH == {}
    assert list(found.energy) == list(SHARES)
    for domain, sums in own.items():
        assert found.energy[domain] == pytest.approx(sums.energy, rel=2 * TOLERANCE)
        if weighting == "minimax":
            assert_statistics(found.by_domain[domain], sums)
    assert set(found.by_domain) == (set(SHARES) if weighting == "minimax" else set())
    if weighting == "minimax":  # where a score of moments alone does without a Gram matrix, it does not
        without = measure(walk, group, weighting, SHARES, gram=False).by_domain
        assert all(each.gram is not None for each in without.values())
    assert_held_out(found.held_out_TF, seen.x_TF)


def assert_held_out(found: dict[str, Tensor], seen: dict[tuple[str, bool], Tensor]) -> None:
    """Tokens in the order of the text, of their own domain, and no others."""
    assert set(found) == set(SHARES)
    for domain, x_TF in found.items():
        expected = seen[domain, True]
        assert x_TF.shape == expected.shape == (NUM_HELD_OUT * LENGTH, expected.shape[1])
        near(x_TF, expected, expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("weighting", ["tokens", "energy"])
def test_drift_is_dense_less_pruned_behind_the_layer(weighting: str, gram: bool) -> None:
    model, batches = tiny_llama(mlp_bias=True), batches_of()
    group, dense = group_of(model, 1, "ffn"), copy.deepcopy(model)
    walk = Walk(model, bind(model), batches, dense=True)
    walk.advance_dense(0)
    with torch.no_grad():  # as a cut of layer 0 would change the stream
        model.model.layers[0].mlp.down_proj.weight[:, ::3] = 0
    walk.advance(0)
    walk.advance_dense(1)
    found = measure(walk, group, weighting, SHARES, gram=gram, drift=True)
    before, seen = hooked(dense, group, batches), hooked(model, group, batches)
    drift = {key: before.after_TD[key] - seen.after_TD[key] for key in seen.after_TD}
    pooled, _ = pooled_reference(seen, weighting, {name: drift[name, False] for name in SHARES})
    assert_statistics(found.pooled, pooled)
    assert (found.pooled.any_gram is not None) == gram
    assert found.pooled.cross_FH is not None and pooled.cross_FH is not None
    # The drift is a difference of two streams, so its error is one of theirs.
    factors = {name: domain_factor(weighting, SHARES[name], found.energy[name]) for name in SHARES}
    streams = sum(factors[name] * seen.after_TD[name, False].square().sum(0) for name in SHARES)
    near(found.pooled.cross_FH, pooled.cross_FH, 2 * pooled.squares_F.sqrt()[:, None] * torch.as_tensor(streams).sqrt())
    assert_held_out(found.held_out_TF, seen.x_TF)
    for domain, drift_TH in found.held_out_drift_TH.items():
        near(drift_TH, drift[domain, True], 2 * seen.after_TD[domain, True].norm(dim=1, keepdim=True))
    assert list(found.held_out_drift_TH) == list(found.held_out_TF)


@pytest.mark.parametrize("name", ["ffn with bias", "kv heads with bias", "parallel with bias"])
def test_the_stream_stays_or_moves_to_where_it_is_asked(name: str) -> None:
    model, batches = MODELS[name][0](), batches_of()
    arch = bind(model)
    group, ffn = group_of(model, 1, MODELS[name][1]), group_of(model, 1, "ffn")
    entered = entering(model, batches)

    def standing(**ways: bool) -> Walk:
        walk = Walk(model, arch, batches)
        walk.advance(0)
        measure(walk, group, "tokens", SHARES, gram=True, **ways)
        return walk

    def is_at(walk: Walk, layer: int) -> bool:
        pairs = zip(walk.hidden_BTD, entered, strict=True)
        return all(torch.allclose(hidden.double(), each[layer], rtol=1e-4, atol=1e-4) for hidden, each in pairs)

    assert is_at(standing(), 1) and is_at(standing(to_end=True), 2)
    middle = standing(to_middle=True)
    assert is_at(middle, 1) == (arch.middle is None)
    again = measure(middle, ffn, "energy", SHARES, gram=True)
    assert_statistics(again.pooled, pooled_reference(hooked(model, ffn, batches), "energy")[0])
    middle.advance(1)
    assert is_at(middle, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["inputs", "outputs"])
@pytest.mark.parametrize("gram", [True, False])
def test_what_is_not_finite_is_named_by_layer_reader_and_domain(value: float, where: str, gram: bool) -> None:
    """One token of domain b gives NaN or infinity, or the reader's weights do for all tokens."""
    model, batches = tiny_llama(), batches_of()
    group = group_of(model, 1, "ffn")
    walk = Walk(model, bind(model), batches)
    walk.advance(0)
    layer = model.model.layers[1]
    with torch.inference_mode():
        if where == "outputs":
            layer.mlp.down_proj.weight[2, 3] = value
        for batch, hidden in zip(batches, walk.hidden_BTD, strict=True):
            if where == "inputs" and batch.domain == "b" and not batch.held_out:
                hidden[0, 3, 5] = value
    domain = "b" if where == "inputs" else "a"
    with pytest.raises(NumericsError, match=rf"^layer 1, mlp\.down_proj, domain {domain}: .*\.$"):
        measure(walk, group, "energy", SHARES, gram=gram)
    assert not layer.mlp.down_proj._forward_hooks  # nothing stays behind
