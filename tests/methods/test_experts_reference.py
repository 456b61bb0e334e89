"""Experts against the reference: who goes, step by step, the refit of those that stay, channels inside them."""

import copy
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference_methods as reference
import torch
from torch.nn.functional import silu

from secateur.errors import NumericsError
from secateur.methods.experts import (
    _refit,
    _routing_of_weighted,
    observe_routing,
    prune_expert_channels,
    prune_experts,
    refit_experts,
)
from secateur.methods.select import Task
from secateur.model.bind import bind
from secateur.model.group import Mixture, cut
from secateur.stream.walk import Walk
from tests.families import tiny_family
from tests.methods.test_repair import HELD_OUT, SHARES, TEXT, batches_of
from tests.methods.test_repair import method as any_method

CHANNELS = 112


method = partial(any_method, compensate="none", damping=1e-2)


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


class Layer:
    """A layer of mixtral as the reference sees it: inputs of its experts by the model's own forward."""

    def __init__(self, model, index: int, text: dict[str, torch.Tensor]) -> None:
        self.mlp = model.model.layers[index].mlp
        self.hidden, self.call, self.given, self.behind = {}, {}, {}, {}
        for name, ids in text.items():
            seen: list[Any] = []
            with (
                self.mlp.experts.register_forward_hook(lambda _, *call, seen=seen: seen.extend(call)),
                model.model.layers[index].register_forward_hook(lambda _, __, output, seen=seen: seen.append(output)),
                torch.no_grad(),
            ):
                model(ids, use_cache=False)
            (hidden_TD, chosen_Tk, weights_Tk), given_TD, behind_BTD = seen
            self.hidden[name], self.call[name] = hidden_TD, (chosen_Tk.numpy(), numbers(weights_Tk))
            self.given[name], self.behind[name] = numbers(given_TD), numbers(behind_BTD.flatten(0, 1))

    @torch.no_grad()
    def inputs_of(self, name: str, expert: int) -> np.ndarray:
        """The inputs of an expert's reader for every token, by mixtral's formula."""
        gate, up = (self.hidden[name].double() @ self.mlp.experts.gate_up_proj[expert].double().T).chunk(2, dim=-1)
        return numbers(silu(gate) * up)

    def reader(self, expert: int) -> np.ndarray:
        return numbers(self.mlp.experts.down_proj[expert])

    def routing(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        num_experts = len(self.mlp.experts.down_proj)
        outputs = np.stack([self.inputs_of(name, j) @ self.reader(j).T for j in range(num_experts)])
        return reference.routing(*self.call[name], outputs)

    def routed(self, name: str, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that chose the expert, and its reader's inputs for them times the router's weight."""
        chosen_Tk, weights_Tk = self.call[name]
        tokens = [t for t, chosen in enumerate(chosen_Tk) if expert in chosen]
        gate_T = np.array([weights_Tk[t][list(chosen_Tk[t]).index(expert)] for t in tokens])
        return np.array(tokens, dtype=int), self.inputs_of(name, expert)[tokens] * gate_T[:, None]


def walk_to(model, index: int, text: dict[str, torch.Tensor] = TEXT) -> Walk:
    walk = Walk(model, bind(model), batches_of(text))
    for before in range(index):
        walk.advance(before)
    return walk


def group_of(model, name: str, index: int):
    return next(group for group in bind(model).select((name,)) if group.layer == index)


@torch.no_grad()
def prune(model, name: str, num_keep: int, index: int = 1, seed: int = 0, text=TEXT, **changes) -> tuple[Any, Any]:
    """Prune one layer's group; return what stays and the line of it."""
    pruned = prune_experts if name == "experts" else prune_expert_channels
    return pruned(
        Task(walk_to(model, index, text), group_of(model, name, index), num_keep, method(**changes), SHARES, seed)
    )


@pytest.mark.parametrize("weighting", ["energy", "tokens"])
@pytest.mark.parametrize("score", ["obs", "reap"])
@torch.no_grad()
def test_the_experts_of_least_score_go_and_the_line_says_what_is_left(score: str, weighting: str) -> None:
    model, before = tiny_family("mixtral"), tiny_family("mixtral")
    layer = Layer(before, 1, TEXT)
    routed = {name: layer.routing(name) for name in TEXT}
    scores = reference.expert_scores("energy" if score == "obs" else score, routed, SHARES, weighting)
    expected = sorted(sorted(range(6), key=lambda expert: -scores[expert])[:4])
    keep, line = prune(model, "experts", 4, score=score, weighting=weighting)
    assert keep.tolist() == expected and (line["kept"], line["total"]) == (4, 6)
    for name, (tokens_E, _, energy_E) in routed.items():
        assert line["routed_share_kept"][name] == pytest.approx(tokens_E[expected].sum() / tokens_E.sum())
        assert line["output_energy"][name] == pytest.approx(energy_E.sum(), rel=1e-4)
    mlp, old = model.model.layers[1].mlp, before.model.layers[1].mlp
    assert torch.equal(mlp.experts.down_proj, old.experts.down_proj[expected])
    assert torch.equal(mlp.experts.gate_up_proj, old.experts.gate_up_proj[expected])
    assert torch.equal(mlp.gate.weight, old.gate.weight[expected])
    counts = group_of(before, "experts", 1).counts
    assert counts
    for name in counts:
        parent, _, attribute = name.rpartition(".")
        assert getattr(model.model.layers[1].get_submodule(parent), attribute) == 4


@torch.no_grad()
def test_seeds_draw_experts_and_steps_draw_anew() -> None:
    """At random too, each step has a seed of its own: the layer's, plus its number."""

    def kept(seed: int, compensate: str = "none") -> list[int]:
        settings = {"score": "random", "compensate": compensate}
        return prune(tiny_family("mixtral"), "experts", 3, 0, seed, **settings)[0].tolist()

    def drawn(seed: int, count: int) -> list[float]:
        return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()

    for seed in (3, 4):
        order = sorted(range(6), key=lambda expert, seed=seed: drawn(seed, 6)[expert])
        assert kept(seed) == sorted(order[3:])
        left = list(range(6))
        for step in range(3):  # one of six, of five, of four
            scores = drawn(seed + step, len(left))
            del left[scores.index(min(scores))]
        assert kept(seed, "least_squares") == left


@torch.no_grad()
def test_with_a_refit_experts_go_in_steps_measured_on_what_the_last_step_left() -> None:
    model, stepwise = tiny_family("mixtral"), tiny_family("mixtral")
    keep, line = prune(model, "experts", 3, compensate="least_squares", damping=0.1)
    left, walk = list(range(6)), walk_to(stepwise, 1)
    group = group_of(stepwise, "experts", 1)
    _, wanted = observe_routing(walk, group, keep=True)
    for _ in range(3):
        layer = Layer(stepwise, 1, TEXT)
        scores = reference.expert_scores("energy", {name: layer.routing(name) for name in TEXT}, SHARES, "energy")
        gone = scores.index(min(scores))
        stays = [expert for expert in range(len(left)) if expert != gone]
        left = [left[expert] for expert in stays]
        cut(stepwise.model.layers[1], group, torch.tensor(stays))
        judged = refit_experts(walk, group, wanted, 0.1, "energy", SHARES)
    assert keep.tolist() == left
    assert {key: line[key] for key in ("step", "error_before", "error_after")} == asdict(judged)
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj, stepwise.model.layers[1].mlp.experts.down_proj)


@pytest.mark.parametrize(
    ("weighting", "mix", "damping"), [("energy", 0.5, 0.3), ("tokens", 0.0, 0.03), ("energy", 0.0, 1e-3)]
)
@torch.no_grad()
def test_a_refit_is_two_sweeps_of_damped_least_squares_towards_the_output_and_a_part_of_the_drift(
    weighting: str, mix: float, damping: float
) -> None:
    dense, model = (tiny_family("mixtral") for _ in range(2))
    model.model.layers[0].mlp.experts.down_proj *= 0.7  # so that the streams differ
    before, group = copy.deepcopy(model), group_of(model, "experts", 1)
    walk, of_dense = walk_to(model, 1), walk_to(dense, 1)
    of_dense.advance(1)
    walk.dense_BTD = of_dense.hidden_BTD
    _, wanted = observe_routing(walk, group, target_mix=mix, keep=True)
    cut(model.model.layers[1], group, torch.tensor([0, 2, 3, 5]))
    after = copy.deepcopy(model)
    judged = refit_experts(walk, group, wanted, damping, weighting, SHARES)

    own, dense_own, now = ([Layer(each, 1, text) for text in (TEXT, HELD_OUT)] for each in (before, dense, after))
    target, held_out_target = (
        {n: own[i].given[n] + mix * (dense_own[i].behind[n] - own[i].behind[n]) for n in TEXT} for i in range(2)
    )
    factors = {n: reference.domain_factor(weighting, SHARES[n], float((target[n] ** 2).sum())) for n in TEXT}
    residual = {n: target[n] - now[0].given[n] for n in TEXT}
    change = np.zeros((4, 48, CHANNELS))
    for _ in range(2):
        for expert in range(4):
            routed = {n: now[0].routed(n, expert) for n in TEXT}
            parts = {n: (x_TF, residual[n][tokens]) for n, (tokens, x_TF) in routed.items()}
            x_TF, e_TD = reference.pooled(parts, factors)
            few = reference.few_token_factor(len(x_TF), CHANNELS)
            assert few > 1
            ridge_F = reference.ridge(x_TF.T @ x_TF, damping * few)
            new_DF = reference.refit(np.zeros((48, CHANNELS)), x_TF, range(CHANNELS), ridge_F, e_TD)
            change[expert] += new_DF
            for name, (tokens, x_TF) in routed.items():
                residual[name][tokens] -= x_TF @ new_DF.T

    def errors(step: float) -> dict[str, float]:
        found = {}
        for name in HELD_OUT:
            missing = held_out_target[name] - now[1].given[name]
            for expert in range(4):
                tokens, x_TF = now[1].routed(name, expert)
                missing[tokens] -= step * x_TF @ change[expert].T
            found[name] = float((missing**2).sum() / (own[1].given[name] ** 2).sum())
        return found

    step = reference.best_step(errors)
    assert judged.step == step and (step > 0) == (damping > 1e-2)
    assert judged.error_before == pytest.approx(errors(0.0), rel=1e-3)
    assert judged.error_after == pytest.approx(errors(step), rel=1e-3)
    expected = np.stack([now[0].reader(expert) for expert in range(4)]) + step * change
    np.testing.assert_allclose(numbers(model.model.layers[1].mlp.experts.down_proj), expected, atol=1e-4)


FEW = {name: ids[:1, :2] for name, ids in TEXT.items()}  # four tokens, so that some expert has none


@pytest.mark.parametrize(
    ("weighting", "compensate", "text"),
    [("energy", "least_squares", TEXT), ("tokens", "none", TEXT), ("energy", "none", FEW)],
    ids=["energy", "tokens", "few"],
)
@torch.no_grad()
def test_channels_of_every_expert_go_as_the_reference_says(weighting: str, compensate: str, text) -> None:
    model, before = tiny_family("mixtral"), tiny_family("mixtral")
    keep_EK, line = prune(model, "expert_ffn", 60, text=text, weighting=weighting, compensate=compensate)
    own = Layer(before, 1, text)
    energy = {name: float(own.routing(name)[2].sum()) for name in TEXT}
    assert (0 in sum(own.routing(name)[0] for name in TEXT)) == (text is FEW)
    assert line["output_energy"] == pytest.approx(energy, rel=1e-4)
    factors = {name: reference.domain_factor(weighting, SHARES[name], energy[name]) for name in TEXT}
    change = np.zeros((6, 48, 60))
    for expert in range(6):
        routed = {name: own.routed(name, expert)[1:] for name in TEXT}
        (x_TF,) = reference.pooled(routed, factors)
        everyone_TF = np.concatenate([own.inputs_of(name, expert) for name in TEXT])
        gram_FF = reference.shrunk(x_TF.T @ x_TF, everyone_TF.T @ everyone_TF, len(x_TF))
        ridge_F = reference.ridge(gram_FF, 1e-2)
        reader_DF, units = own.reader(expert), [[channel] for channel in range(CHANNELS)]
        gone = reference.greedy_obs(reader_DF, gram_FF + np.diag(ridge_F), units, 60, 32)
        keep = sorted(set(range(CHANNELS)) - {channel for each in gone for channel in each})
        assert keep_EK[expert].tolist() == keep
        root_FF = np.linalg.cholesky(gram_FF + 1e-12 * np.trace(gram_FF) * np.eye(CHANNELS)).T
        change[expert] = reference.refit(reader_DF, root_FF, keep, ridge_F) - reader_DF[:, keep]
    experts = model.model.layers[1].mlp.experts
    step = line.get("step", 0.0)
    assert (step > 0) == (compensate == "least_squares")
    old = np.stack([own.reader(expert)[:, keep_EK[expert]] for expert in range(6)])
    np.testing.assert_allclose(numbers(experts.down_proj), old + step * change, atol=1e-4 if step else 0)
    for expert, keep in enumerate(keep_EK.tolist()):
        rows = [*keep, *(CHANNELS + channel for channel in keep)]
        assert torch.equal(experts.gate_up_proj[expert], before.model.layers[1].mlp.experts.gate_up_proj[expert][rows])


@torch.no_grad()
def test_at_random_every_expert_draws_its_own_channels() -> None:
    first, other = (prune(tiny_family("mixtral"), "expert_ffn", 60, 0, seed, score="random")[0] for seed in (7, 8))
    for expert, keep in enumerate(first.tolist()):
        order = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(7 + expert))
        assert keep == sorted(order[:60].tolist())
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["experts", "expert_ffn"])
def test_an_expert_that_gives_no_numbers_is_named(name: str) -> None:
    model = tiny_family("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"layer 1, mlp\.experts, domain a: an expert gives NaN"):
        prune(model, name, 4)


@torch.no_grad()
def test_an_expert_with_many_tokens_is_damped_as_asked() -> None:
    model = tiny_family("mixtral")
    group, experts = group_of(model, "experts", 0), model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    num_tokens = 10 * CHANNELS + 7
    hidden_TD, left_TD = (torch.randn(num_tokens, 48, generator=generator) for _ in range(2))
    parts = {"a": (hidden_TD, torch.ones(num_tokens, 1, dtype=torch.long), torch.rand(num_tokens, 1), left_TD.clone())}
    reader_DF, mixture = experts.down_proj[1].clone(), Mixture(experts, group.experts.stacks)
    new_DF = _refit(mixture, 1, reader_DF, parts, {"a": 1.0}, 0.1)
    x_TF = numbers(mixture.inputs(1, hidden_TD) * parts["a"][2])
    ridge_F = reference.ridge(x_TF.T @ x_TF, 0.1)
    expected_DF = reference.refit(np.zeros((48, CHANNELS)), x_TF, range(CHANNELS), ridge_F, numbers(left_TD))
    np.testing.assert_allclose(numbers(new_DF - reader_DF), expected_DF, atol=1e-5)


def test_weighted_inputs_count_tokens_that_are_not_zero() -> None:
    """Two experts that see all three tokens, each times its weight: expert 0 has tokens 0 and 2, expert 1 token 1."""
    inputs_XD = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    outputs_XD = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0], [6.0, 8.0], [0.0, 0.0]])
    assert _routing_of_weighted(inputs_XD, outputs_XD, 2).tolist() == [[2, 1], [7, 10], [29, 100]]
