"""Experts and channels inside them: their inputs, in which steps they go, and refits, in every family."""

import copy

import pytest
import torch
from recipes import grouped

from secateur.errors import RecipeError
from secateur.methods import experts
from secateur.methods.compensate import Guard, HeldOutError
from secateur.methods.experts import (
    _observe_channels,
    _steps,
    best_step,
    keep_experts,
    observe_routing,
    prune_expert_channels,
    refit_experts,
)
from secateur.methods.scores import SCORES, Score, wanda
from secateur.methods.select import Task
from secateur.model.bind import bind, decoder_layers
from secateur.model.group import Experts, Rows, Stacks
from secateur.pruning.group_step import method_of
from secateur.recipe import parse_recipe
from secateur.stream.walk import Walk, make_batches
from tests.families import DTYPES, FAMILIES, GROUPS, row, tiny_family
from tests.model.test_exactness import logits_of, prune_tiny, random_calibration
from tests.models import opened, tiny_ids

STACKS = Stacks("gate_up_proj", (1, 1), transposed=False)
READER = Rows("mlp.experts.down_proj", 0, (1,))


def expert_output(name: str, module: torch.nn.Module, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
    """What one expert gives, by the family's formula."""
    gate_up, down = module.gate_up_proj[expert], module.down_proj[expert]
    if name == "mixtral":
        gate, up = (x_TD @ gate_up.T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ down.T
    both = x_TD @ gate_up + module.gate_up_proj_bias[expert]
    gate, up = both[..., ::2].clamp(max=module.limit), both[..., 1::2].clamp(-module.limit, module.limit)
    return ((up + 1) * gate * torch.sigmoid(gate * module.alpha)) @ down + module.down_proj_bias[expert]


def test_steps_end_where_asked_and_groups_of_experts_keep_as_many_each() -> None:
    assert _steps(16, 8, 1) == [14, 12, 10, 8]
    assert _steps(6, 4, 1) == [5, 4]
    assert _steps(9, 6, 3) == [6] and _steps(256, 128, 8) == [224, 192, 160, 128]
    scores = torch.tensor([9.0, 8, 7, 1, 2, 3])
    for num_groups, kept in ((1, [0, 1, 2, 5]), (2, [0, 1, 4, 5])):
        assert keep_experts(scores, 4, Experts(READER, STACKS, num_groups=num_groups)).tolist() == kept


@torch.no_grad()
def test_experts_that_give_what_is_wanted_stay_as_they_are() -> None:
    model = tiny_family("gpt_oss")
    arch = bind(model)
    group = arch.select(("experts",))[1]
    batches = make_batches("a", tiny_ids(batch=6, length=20), held_out=False, batch_tokens=40)
    walk = Walk(model, arch, batches + make_batches("a", tiny_ids(batch=2, length=20, seed=7), held_out=True))
    walk.advance(0)
    before = {name: weight.clone() for name, weight in walk.layers[1].named_parameters()}
    _, wanted = observe_routing(walk, group, keep=True)
    judged = refit_experts(walk, group, wanted, 1e-3, "energy", {"a": 1.0})
    assert judged.error_before == {"a": 0.0}
    assert all(torch.equal(weight, before[name]) for name, weight in walk.layers[1].named_parameters())


# Not of experts whose inputs are weighted.
@pytest.mark.parametrize("name", [row(name) for name in FAMILIES if "experts" in GROUPS[name] and name != "llama4"])
def test_a_refit_brings_every_family_nearer_to_what_it_was(name: str) -> None:
    model = tiny_family(name).to(torch.bfloat16 if name == "gpt_oss" else torch.float32)
    _, lines = prune_tiny(model, random_calibration(blocks=48), groups=("experts",), remove=0.15)
    lines = [line for line in lines if line["kept"] < line["total"]]
    assert lines
    for line in lines:
        before, after = (sum(line[key].values()) for key in ("error_before", "error_after"))
        # phimoe's random router leaves experts without a token, so that nothing is lost but what rounding makes of it.
        assert (line["step"] > 0 and after < before) or (name == "phimoe" and before < 1e-12)


def test_the_step_is_the_best_for_the_mean_over_domains() -> None:
    better, worse = HeldOutError(2.0, 1.0, 1.0), HeldOutError(1.0, -0.05, 0.0)  # 2 -> 1 and 1 -> 1.1 with a whole step
    assert best_step({"a": better, "b": worse}) == Guard(1.0, {"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 1.1})
    far = HeldOutError(1.0, 1.0, 3.0)  # 1 -> 2 with a whole step, 0.69 with a quarter
    assert best_step({"a": far}).step == 0.25
    assert best_step({"a": HeldOutError(1.0, -1.0, 1.0)}).step == 0.0
    # Each domain counts by what its error was: 10 -> 9.2 is less than 0.1 -> 0.14.
    assert best_step({"loud": HeldOutError(10.0, 0.4, 0.0), "quiet": HeldOutError(0.1, -0.02, 0.0)}).step == 0.0
    assert best_step({}) == Guard(1.0, {}, {})


CHANNELS = ("expert_ffn",)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_the_readers_inputs_give_what_the_expert_gives(name: str) -> None:
    model = tiny_family(name)
    group = bind(model).select(CHANNELS)[0]
    mixture = group.experts.of(decoder_layers(model, bind(model))[0])
    module = mixture.module
    x_TD = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    for expert in range(3):
        inputs_TF = mixture.inputs(expert, x_TD)
        down = module.down_proj[expert]
        given = inputs_TF @ (down if name == "gpt_oss" else down.T)
        if name == "gpt_oss":
            given = given + module.down_proj_bias[expert]
        torch.testing.assert_close(given, expert_output(name, module, expert, x_TD), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_channels_kept_change_nothing(dtype: torch.dtype) -> None:
    model = tiny_family("mixtral").to(dtype)
    before = copy.deepcopy(model.state_dict())
    arch = bind(model)
    group = arch.select(CHANNELS)[0]
    walk = Walk(model, arch, make_batches("a", tiny_ids(), held_out=False))
    prune_expert_channels(Task(walk, group, group.num_units, method_of(parse_recipe(grouped({}))), {"a": 1.0}, 0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_the_sample_is_of_every_domain_by_its_share(monkeypatch) -> None:
    monkeypatch.setattr(experts, "NUM_SAMPLED", 40)
    model, shares = tiny_family("mixtral"), {"a": 0.5, "b": 0.3, "c": 0.2}
    arch, method = bind(model), method_of(parse_recipe(grouped({})))
    group = arch.select(CHANNELS)[0]
    assert method.weighting == "energy"
    batches = {
        name: make_batches(name, tiny_ids(batch=4, seed=number), held_out=False, batch_tokens=16)
        for number, name in enumerate(shares)
    }

    def sampled(seed: int, order: int) -> dict[str, torch.Tensor]:
        walk = Walk(model, arch, [batch for each in batches.values() for batch in each[::order]])
        return _observe_channels(Task(walk, group, 60, method, shares, seed)).samples

    found, backwards, other = sampled(0, 1), sampled(0, -1), sampled(1, 1)
    assert {name: len(each_TD) for name, each_TD in found.items()} == {"a": 20, "b": 12, "c": 8}
    for name, each_TD in found.items():
        inputs = expert_inputs(model, arch, group, batches[name])
        blocks = [[place for place, x_TD in enumerate(inputs) if (x_TD == token_D).all(1).any()] for token_D in each_TD]
        assert all(len(places) == 1 for places in blocks) and len({place for (place,) in blocks}) > 2
        # A rank sees some batches only, so what came before must not count.
        assert torch.equal(backwards[name], each_TD)
        assert not torch.equal(other[name], each_TD)


def expert_inputs(model, arch, group, batches) -> list[torch.Tensor]:
    """Return what the experts' module gets of each batch."""
    calls: list[torch.Tensor] = []
    module = decoder_layers(model, arch)[group.layer].get_submodule(group.reader.module)
    with module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0])):
        list(Walk(model, arch, batches).run(group.layer))
    return calls


def test_a_score_of_channels_and_heads_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of another package is, unless it says otherwise."""
    monkeypatch.setitem(SCORES, "wanda", Score(wanda))
    model = tiny_family("mixtral")
    recipe = parse_recipe(grouped({"groups": ["expert_ffn"], "score": "wanda"}))
    with pytest.raises(RecipeError, match="wanda is of channels and heads, not of experts"):
        opened(model, recipe)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_refits_lower_held_out_error_and_the_models(name: str) -> None:
    calibration = random_calibration(num_domains=2, blocks=48)
    ids_BT = torch.cat([domain.held_out.ids_NT for domain in calibration.domains])
    dense, errors = logits_of(tiny_family(name), ids_BT), {}
    for compensate in ("none", "least_squares"):
        model = tiny_family(name)
        _, lines = prune_tiny(model, calibration, groups=CHANNELS, remove=0.2, compensate=compensate)
        errors[compensate] = float((logits_of(model, ids_BT) - dense).square().mean())
        for line in lines:
            assert ("step" in line) == (compensate == "least_squares")
            for domain in line.get("error_after", ()):
                assert line["error_after"][domain] <= line["error_before"][domain]
    assert errors["least_squares"] < errors["none"]
