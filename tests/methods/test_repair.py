"""Repairs against the reference: exact identities, fits on random and degenerate inputs, the guard, whole layers."""

import copy

import numpy as np
import pytest
import reference_methods as reference
import torch
from grams import gram_from, gram_of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_ids, tiny_llama
from random_readers import Reader, readers

from secateur.errors import NumericsError
from secateur.methods.compensate import Method, least_squares, repair
from secateur.methods.select import Task
from secateur.model.bind import bind
from secateur.model.group import cut
from secateur.pruning.group_step import prune_channels
from secateur.stream.statistics import GroupStatistics, Statistics, domain_weight
from secateur.stream.walk import Batch, Walk, make_batches

# Sums of float32 products: a few hundred times 2^-24, over the root of the smallest damping (1e-4) in the fit's norm.
FIT, ERROR = 1e-3, 1e-4


def method(**changes) -> Method:
    settings = {"score": "obs", "compensate": "least_squares", "damping": 1e-3}
    return Method(**settings | {"target_mix": 0.0, "weighting": "energy"} | changes)


def as64(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: part.astype(np.float64) for name, part in parts.items()}


def measured(case: Reader, *, drift: bool) -> GroupStatistics:
    """What `measure` would return for these inputs."""
    weight_HF = torch.from_numpy(case.weight_HF)
    num_outputs, num_inputs = weight_HF.shape
    sizes = {"gram": True, "drift_size": num_outputs if drift else 0}
    found = Statistics.empty(num_inputs, torch.device("cpu"), dtype=torch.float32, **sizes)
    energy = {}
    for name, x in case.inputs_TF.items():
        x_TF, own = torch.from_numpy(x), Statistics.empty(num_inputs, torch.device("cpu"), **sizes)
        own.update(x_TF, x_TF @ weight_HF.T, torch.from_numpy(case.drift_TH[name]) if drift else None)
        energy[name] = float(own.energy)
        found.merge(own, domain_weight("energy", case.shares[name], energy[name]))
    held_out = {name: torch.from_numpy(x) for name, x in case.held_out_TF.items()}
    drifts = {name: torch.from_numpy(r) for name, r in case.held_out_drift_TH.items()} if drift else {}
    return GroupStatistics(found, energy, held_out, drifts, {})


class Reference:
    """The same by the reference: tokens of all domains under each other, rows weighted."""

    def __init__(self, case: Reader) -> None:
        self.weight_HF, self.inputs, self.drift = (
            case.weight_HF.astype(float),
            as64(case.inputs_TF),
            as64(case.drift_TH),
        )
        self.held_out, self.held_out_drift = as64(case.held_out_TF), as64(case.held_out_drift_TH)
        energy = {name: float(((x @ self.weight_HF.T) ** 2).sum()) for name, x in self.inputs.items()}
        factors = {n: reference.domain_factor("energy", case.shares[n], energy[n]) for n in energy}
        parts = {n: (x, self.drift[n]) for n, x in self.inputs.items()}
        self.x_TF, self.r_TH = reference.pooled(parts, factors)
        self.gram_FF = self.x_TF.T @ self.x_TF

    def refit(self, keep: list[int], damping: float, mix: float) -> np.ndarray:
        ridge_F = reference.ridge(self.gram_FF, damping)
        return reference.refit(self.weight_HF, self.x_TF, keep, ridge_F, mix * self.r_TH)

    def errors(self, keep: list[int], new_HS: np.ndarray, *, mix: float = 0.0):
        return {
            name: reference.output_error(self.weight_HF, x, keep, new_HS, extra_TH=mix * self.held_out_drift[name])
            for name, x in self.held_out.items()
        }

    def repair(self, keep: list[int], damping: float, mix: float, dtype: str = "float32"):
        """Return the errors at every step of the guard."""
        old_HS = self.weight_HF[:, keep]
        change_HS = reference.rounded(self.refit(keep, damping, mix), dtype) - old_HS
        return {s: self.errors(keep, old_HS + s * change_HS, mix=mix) for s in (*reference.GUARD_STEPS, 0.0)}


def is_near(found_HS: torch.Tensor, expected_HS: np.ndarray, gram_SS: np.ndarray, ridge_S: np.ndarray, scale: float):
    """Compare in the norm of the system that was solved: a direction that nothing sees may differ."""
    change = found_HS.double().numpy() - expected_HS
    return np.trace(change @ (gram_SS + np.diag(ridge_S)) @ change.T) <= FIT**2 * scale


@given(readers(), st.sampled_from([1e-4, 1e-2, 1.0]), st.sampled_from([0.0, 0.5, 1.0]), st.data())
@settings(max_examples=60)
def test_a_fit_is_the_least_squares_of_the_reference(case: Reader, damping: float, mix: float, data) -> None:
    own, size = Reference(case), case.weight_HF.shape[1]
    keep = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    found = measured(case, drift=True).pooled
    weight_HF = torch.from_numpy(case.weight_HF)
    new_HS = least_squares(weight_HF, found.gram, torch.tensor(keep), damping, found.cross_FH, mix)
    ridge_F = reference.ridge(own.gram_FF, damping)
    scale = ((own.x_TF @ own.weight_HF.T) ** 2).sum() + mix**2 * (own.r_TH**2).sum() + 1e-12
    inner = own.gram_FF[np.ix_(keep, keep)]
    assert is_near(new_HS, own.refit(keep, damping, mix), inner, ridge_F[keep], scale)


def agrees(step: float, by_step: dict[float, dict[str, float]]) -> bool:
    """Say whether the guard may have taken this step, within the rounding of float32 dot products."""
    before = by_step[0.0]

    def harmless(at: float, slack: float) -> bool:
        return all(by_step[at][name] <= before[name] + slack * (1 + before[name]) for name in before)

    larger = [each for each in reference.GUARD_STEPS if each > step]
    return (step == 0 or harmless(step, ERROR)) and not any(harmless(each, -ERROR) for each in larger)


def linear_of(case: Reader, dtype: torch.dtype = torch.float32, bias: bool = False) -> torch.nn.Linear:
    reader = torch.nn.Linear(case.weight_HF.shape[1], len(case.weight_HF), bias=bias)
    reader.weight = torch.nn.Parameter(torch.from_numpy(case.weight_HF).to(dtype), requires_grad=False)
    return reader


def assert_errors(found: dict[str, float], expected: dict[str, float]) -> None:
    """The parabola's terms cancel, so an error is as exact as the largest of them."""
    assert found.keys() == expected.keys()
    for name, error in found.items():
        assert error == pytest.approx(expected[name], rel=ERROR, abs=ERROR * (1 + expected[name])), name


@given(readers(), st.sampled_from([1e-3, 1e-1, 1.0]), st.sampled_from([0.0, 0.5]), st.data())
@settings(max_examples=60)
def test_least_squares_takes_the_guards_step(case: Reader, damping: float, mix: float, data) -> None:
    size = case.weight_HF.shape[1]
    keep = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1)))
    own, numbers = Reference(case), measured(case, drift=True)
    found = repair(linear_of(case), numbers, torch.tensor(keep), method(damping=damping, target_mix=mix))
    by_step = own.repair(keep, damping, mix)
    assert found.guard is not None
    assert agrees(found.guard.step, by_step)
    assert_errors(found.guard.error_before, by_step[0.0])
    assert_errors(found.guard.error_after, by_step[found.guard.step])
    if found.guard.step == 0:
        assert found.weight_HS is None
        return
    ridge_F = reference.ridge(own.gram_FF, damping)[keep]
    step, change_HS = found.guard.step, own.refit(keep, damping, mix) - own.weight_HF[:, keep]
    scale = ((own.x_TF @ own.weight_HF.T) ** 2).sum() + mix**2 * (own.r_TH**2).sum()
    expected_HS = own.weight_HF[:, keep] + step * change_HS
    assert is_near(found.weight_HS, expected_HS, own.gram_FF[np.ix_(keep, keep)], ridge_F, scale)


@given(readers(), st.data())
@settings(max_examples=25)
def test_without_drift_in_the_statistics_the_mix_has_no_effect(case: Reader, data) -> None:
    keep = torch.tensor(sorted(data.draw(st.sets(st.integers(0, case.weight_HF.shape[1] - 1), min_size=1))))
    numbers = measured(case, drift=False)
    mixed, plain = (repair(linear_of(case), numbers, keep, method(target_mix=mix)) for mix in (0.5, 0.0))
    assert mixed.guard == plain.guard
    assert mixed.weight_HS is plain.weight_HS is None or torch.equal(mixed.weight_HS, plain.weight_HS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@settings(max_examples=40)
@given(case=readers(min_channels=4), mix=st.sampled_from([0.0, 0.5]), data=st.data())
def test_weights_are_judged_as_they_are_stored(dtype: str, case: Reader, mix: float, data) -> None:
    size = case.weight_HF.shape[1]
    keep = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1)))
    case.weight_HF[:] = reference.rounded(case.weight_HF.astype(float), dtype)
    own, numbers = Reference(case), measured(case, drift=True)
    found = repair(linear_of(case, getattr(torch, dtype)), numbers, torch.tensor(keep), method(target_mix=mix))
    assert found.guard is not None
    assert_errors(found.guard.error_before, own.errors(keep, own.weight_HF[:, keep], mix=mix))
    if found.weight_HS is None:
        assert found.guard.step == 0 and found.guard.error_after == found.guard.error_before
        return
    # What is returned is what was judged: whole steps are the stored numbers themselves.
    now_HS = found.weight_HS.double().numpy()
    assert_errors(found.guard.error_after, own.errors(keep, now_HS, mix=mix))
    if found.guard.step == 1:
        np.testing.assert_array_equal(now_HS, reference.rounded(now_HS, dtype))


def by_hand(betas: dict[str, float], noise: float = 0.0) -> GroupStatistics:
    """Two equal channels, of which the second goes: the first takes over c = 1 / (1 + damping) of it.

    In held-out domain d the second channel is beta_d times the first, plus noise that nothing makes up for.
    """
    generator = torch.Generator().manual_seed(0)
    x_T, n_T = torch.linalg.qr(torch.randn(40, 2, generator=generator)).Q.T
    pair_TF = torch.stack([x_T, x_T], dim=1)
    found = Statistics.empty(2, torch.device("cpu"), gram=True)
    found.update(pair_TF, pair_TF.sum(dim=1, keepdim=True))
    held_out = {name: torch.stack([x_T, beta * x_T + noise * n_T], dim=1) for name, beta in betas.items()}
    return GroupStatistics(found, {"a": 4.0}, held_out, {}, {})


@pytest.mark.parametrize(
    ("beta", "step"),
    [(1.0, 1.0), (0.46, 1.0), (0.44, 0.5), (0.23, 0.5), (0.22, 0.25), (0.12, 0.25), (0.1, 0.0), (-0.5, 0.0)],
)
def test_steps_by_hand(beta: float, step: float) -> None:
    # With c = 0.9 a step s lowers the error of a domain as long as 0.9 s < 2 beta.
    reader = torch.nn.Linear(2, 1, bias=False)
    reader.weight = torch.nn.Parameter(torch.ones(1, 2), requires_grad=False)
    settings = method(damping=1 / 9)
    for numbers in (by_hand({"d": beta}), by_hand({"good": 1.0, "d": beta}), by_hand({"d": beta, "good": 1.0})):
        found = repair(reader, numbers, torch.tensor([0]), settings)
        assert found.guard is not None and found.guard.step == step
        expected = (beta - 0.9 * step) ** 2 / (1 + beta) ** 2
        assert found.guard.error_after["d"] == pytest.approx(expected, rel=1e-3)
        if step:
            assert float(found.weight_HS) == pytest.approx(1 + 0.9 * step, rel=1e-4)
        else:
            assert found.weight_HS is None and found.guard.error_after == found.guard.error_before


@torch.no_grad()
@pytest.mark.parametrize("score", ["wanda", "flap", "paper", "obs"])
@pytest.mark.parametrize("compensate", ["none", "least_squares"])
def test_a_silent_layer_stays_silent(score: str, compensate: str) -> None:
    """No domain has any output energy, so none counts and there is no mean input."""
    model = tiny_llama(num_layers=1, mlp_bias=True)
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight.zero_()
    (group,) = bind(model).select(("ffn",))
    batches = [b for held_out in (False, True) for b in make_batches("a", tiny_ids(), held_out=held_out)]
    bias_H = mlp.down_proj.bias.clone()
    task = Task(Walk(model, bind(model), batches), group, 80, method(score=score, compensate=compensate), {"a": 1.0}, 0)
    keep, _ = prune_channels(task)
    assert len(keep) == 80 and not mlp.down_proj.weight.any()
    assert torch.equal(mlp.down_proj.bias, bias_H)


@torch.no_grad()
def observed(model, ids_BT: torch.Tensor, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The FFN reader's inputs and the layer's output, by the model's own forward."""
    found, module = [], model.model.layers[layer]
    with (
        module.mlp.down_proj.register_forward_hook(lambda _, arguments, __: found.append(arguments[0])),
        module.register_forward_hook(lambda _, __, output: found.append(output)),
    ):
        model(ids_BT, use_cache=False)
    inputs_TF, outputs_TD = (each.flatten(0, 1).double().numpy() for each in found)
    return inputs_TF, outputs_TD


SHARES = {"a": 0.7, "b": 0.3}
TEXT = {"a": tiny_ids(batch=12, length=20, seed=1), "b": tiny_ids(batch=6, length=20, seed=2) % 30}
HELD_OUT = {"a": tiny_ids(batch=2, length=20, seed=3), "b": tiny_ids(batch=2, length=20, seed=4) % 30}


def batches_of(text: dict[str, torch.Tensor]) -> list[Batch]:
    """Each domain's text in batches of 60 tokens, its held-out text behind it."""
    return [
        batch
        for name in SHARES
        for held_out, ids in ((False, text[name]), (True, HELD_OUT[name]))
        for batch in make_batches(name, ids, held_out=held_out, batch_tokens=60)
    ]


@pytest.mark.parametrize("compensate", ["least_squares", "none"])
@torch.no_grad()
def test_a_layer_of_a_half_cut_model_gets_the_weights_of_the_reference(compensate: str) -> None:
    """Layer 0 has been cut, so the streams differ; layer 1 is pruned, towards half of the drift behind it."""
    dense, model = (tiny_llama(num_layers=2, mlp_bias=True) for _ in range(2))
    arch = bind(model)
    first, group = arch.select(("ffn",))
    cut(model.model.layers[0], first, torch.arange(0, 112, 2))
    before = copy.deepcopy(model)
    batches = batches_of(TEXT)
    mix = 0.5 if compensate == "least_squares" else 0.0
    walk, of_dense = (Walk(each, arch, batches) for each in (model, dense))
    walk.dense_BTD = of_dense.hidden_BTD if mix else []
    for index in range(2):
        if index == 0:
            walk.advance(0)
        of_dense.advance(index)
    settings = method(compensate=compensate, target_mix=mix, damping=1e-2)
    keep, line = prune_channels(Task(walk, group, 60, settings, SHARES, 0))

    reader = before.model.layers[1].mlp.down_proj
    parts = {n: observed(before, ids, 1) for n, ids in TEXT.items()}
    held_out = {n: observed(before, ids, 1) for n, ids in HELD_OUT.items()}
    drift, held_out_drift = (
        {n: (observed(dense, ids, 1)[1] - each[n][1]) for n, ids in text.items()}
        for each, text in ((parts, TEXT), (held_out, HELD_OUT))
    )
    case = Reader(
        reader.weight.double().numpy(),
        {n: x for n, (x, _) in parts.items()},
        drift,
        {n: x for n, (x, _) in held_out.items()},
        held_out_drift,
        SHARES,
    )
    own = Reference(case)
    hessian_FF = own.gram_FF + np.diag(reference.ridge(own.gram_FF, 1e-2))
    gone = reference.greedy_obs(own.weight_HF, hessian_FF, [[unit] for unit in range(112)], 60, 32)
    columns = sorted(set(range(112)) - {unit for each in gone for unit in each})
    assert keep.tolist() == columns and line["kept"] == 60
    now = model.model.layers[1].mlp.down_proj
    old_HS, bias_H = own.weight_HF[:, columns], reader.bias.double().numpy()
    if compensate == "least_squares":
        by_step = own.repair(columns, 1e-2, mix)
        step = reference.guard(by_step.__getitem__)
        assert step > 0
        expected_HS = old_HS + step * (own.refit(columns, 1e-2, mix) - old_HS)
        np.testing.assert_allclose(now.weight.numpy(), expected_HS, atol=1e-4)
        np.testing.assert_array_equal(now.bias.double().numpy(), bias_H)
    else:
        by_step, step = dict.fromkeys((0.0, 1.0), own.errors(columns, old_HS)), 1.0  # the whole of nothing
        np.testing.assert_array_equal(now.weight.double().numpy(), old_HS)
    assert line["step"] == step
    for key, at in (("error_before", 0.0), ("error_after", step)):
        assert line[key] == pytest.approx(by_step[at], rel=1e-3)


def problem(num_tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(10, 10, generator=generator)
    return torch.randn(6, 10, generator=generator), torch.randn(num_tokens, 10, generator=generator) @ mix + 0.5


KEEP = torch.tensor([0, 2, 3, 6, 7, 9])


def test_keeping_all_changes_nothing_and_dead_channels_keep_their_weights_and_leave_the_rest_alone() -> None:
    reader_HF, x_TF = problem()
    assert torch.equal(least_squares(reader_HF, gram_of(x_TF), torch.arange(10), 1e-3), reader_HF)
    without = least_squares(reader_HF[:, 1:], gram_of(x_TF[:, 1:]), KEEP[1:] - 1, 1e-3)
    x_TF[:, 0] = 0
    fit = least_squares(reader_HF, gram_of(x_TF), KEEP, 1e-3)
    assert torch.equal(fit[:, 0], reader_HF[:, 0])
    torch.testing.assert_close(fit[:, 1:], without, rtol=1e-5, atol=1e-6)
    silent = least_squares(reader_HF, gram_of(torch.zeros_like(x_TF)), KEEP, 1e-3)
    assert torch.equal(silent, reader_HF[:, KEEP])


def test_an_indefinite_system_is_refused_and_more_damping_makes_it_solvable() -> None:
    reader_HF, _ = problem()
    indefinite = torch.eye(10)
    indefinite[0, 2] = indefinite[2, 0] = 1.005
    least_squares(reader_HF, gram_from(indefinite), KEEP, 1e-2)
    with pytest.raises(NumericsError, match=r"^repair\.damping: least squares has no solution with 0\.001; raise it"):
        least_squares(reader_HF, gram_from(indefinite), KEEP, 1e-3)
