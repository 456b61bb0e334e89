"""Domain weights: on the simplex within their bounds, towards the domain that a cut would hurt most, and worth it."""

import pytest
import torch
from models import tiny_ids, tiny_llama

from secateur.model.bind import bind
from secateur.stream.measure import measure, minimax_weights, removal_damage
from secateur.stream.statistics import Statistics, pool
from secateur.stream.walk import Batch, Walk, make_batches

NUM_COLUMNS, NUM_KEEP, DAMPING = 24, 15, 1e-3
COLUMNS = torch.arange(NUM_COLUMNS)[:, None]
READER = torch.randn(10, NUM_COLUMNS, generator=torch.Generator().manual_seed(1))


def inputs(seed: int, rank: int = NUM_COLUMNS, scale: float = 1.0) -> torch.Tensor:
    """Return reader inputs of (nearly) some rank: the lower, the less a refitted cut costs."""
    generator = torch.Generator().manual_seed(seed)
    x_TF = torch.randn(300, rank, generator=generator) @ torch.randn(rank, NUM_COLUMNS, generator=generator)
    return scale * (x_TF + 0.3 * torch.randn(300, NUM_COLUMNS, generator=generator))


def statistics(x_TF: torch.Tensor) -> Statistics:
    found = Statistics.empty(NUM_COLUMNS, torch.device("cpu"), gram=True)
    found.update(x_TF, x_TF @ READER.T)
    return found


def domains(*ranks: int) -> dict[str, Statistics]:
    """Return domains that differ in loudness too, which must not matter."""
    return {f"d{i}": statistics(inputs(i, rank, scale=10.0**i)) for i, rank in enumerate(ranks)}


def equal(by_domain: dict[str, Statistics]) -> dict[str, float]:
    return dict.fromkeys(by_domain, 1 / len(by_domain))


def weigh(by_domain: dict[str, Statistics], **shares: float) -> tuple[Statistics, dict[str, float]]:
    weights = minimax_weights(by_domain, shares or equal(by_domain), READER, COLUMNS, NUM_KEEP, DAMPING)
    return pool(by_domain, weights), weights


def damage(by_domain: dict[str, Statistics], weights: dict[str, float]) -> torch.Tensor:
    gram = pool(by_domain, weights).gram
    assert gram is not None
    return removal_damage(by_domain, gram, READER, COLUMNS, NUM_KEEP, DAMPING)


def test_minimax_raises_the_worst_domain_and_lowers_its_error() -> None:
    by_domain = domains(3, 4, 24)
    before = damage(by_domain, equal(by_domain))
    assert before.argmax() == 2 and before[2] > 2 * before[:2].max()
    pooled, weights = weigh(by_domain)
    assert weights["d2"] > 0.5 > 1 / 3 > max(weights["d0"], weights["d1"])
    after = damage(by_domain, weights)
    assert after.max() < 0.9 * before.max()
    assert pooled.gram is not None
    expected = sum(weights[name] / float(each.energy) * each.gram.full() for name, each in by_domain.items())
    torch.testing.assert_close(pooled.gram.full(), expected)


def test_a_silent_domain_has_no_error_and_no_say() -> None:
    by_domain = domains(5, 24) | {"silent": statistics(torch.zeros(300, NUM_COLUMNS))}
    pooled, weights = weigh(by_domain)
    assert weights["silent"] < min(weights["d1"], 1 / 3) and sum(weights.values()) == pytest.approx(1)
    assert damage(by_domain, weights)[2] == 0 and torch.isfinite(pooled.gram.full()).all()


@pytest.mark.parametrize("weighting", ["tokens", "energy", "minimax"])
def test_measure_keeps_domains_only_for_weightings_that_look_at_them(weighting: str) -> None:
    model = tiny_llama()
    arch = bind(model)
    batches = [
        batch
        for seed, name in enumerate("abc")
        for held_out in (False, True)
        for batch in make_batches(name, tiny_ids(batch=4, seed=10 * seed + held_out), held_out=held_out)
    ]
    walk, shares = Walk(model, arch, batches), {"a": 0.5, "b": 0.3, "c": 0.2}
    [group] = [group for group in arch.groups if (group.layer, group.name) == (0, "ffn")]
    found = measure(walk, group, weighting, shares, gram=True)
    if weighting != "minimax":
        assert found.by_domain == {}
        return
    assert list(found.by_domain) == list("abc")
    assert {name: float(each.energy) for name, each in found.by_domain.items()} == found.energy
    # Each its own tokens and no others: hooks say what they are.
    for name, each in found.by_domain.items():
        x_TF = reader_inputs(model, [batch for batch in batches if batch.domain == name and not batch.held_out])
        assert each.mass == len(x_TF) == 64
        gram_FF = x_TF.double().T @ x_TF.double()
        bound = len(x_TF) * 2**-23 * torch.sqrt(gram_FF.diagonal()[:, None] * gram_FF.diagonal())
        assert bool(((each.gram.full(torch.float64) - gram_FF).abs() <= bound).all())
    by_energy = measure(walk, group, "energy", shares, gram=True).pooled
    for pooled in (found.pooled, pool(found.by_domain, shares)):
        torch.testing.assert_close(pooled.gram.full(), by_energy.gram.full(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(pooled.sum_F, by_energy.sum_F, rtol=1e-6, atol=1e-6)
    # A score of moments alone does without a Gram matrix; this weighting does not.
    assert measure(walk, group, weighting, shares, gram=False).by_domain["a"].gram is not None


@torch.no_grad()
def reader_inputs(model: torch.nn.Module, batches: list[Batch]) -> torch.Tensor:
    """Return what enters the first layer's FFN reader in a plain forward."""
    found: list[torch.Tensor] = []
    reader = model.get_submodule("model.layers.0.mlp.down_proj")
    with reader.register_forward_hook(lambda _, inputs, __: found.append(inputs[0].flatten(0, 1))):
        for batch in batches:
            model(batch.ids_BT, use_cache=False)
    return torch.cat(found)
