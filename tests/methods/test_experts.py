"""Experts: what the observer sees equals brute force, scores equal their formulae, and a run ends in a checkpoint."""

import json

import pytest
import torch
from recipes import grouped

import secateur
from secateur.methods.experts import _steps, keep_experts, observe_routing
from secateur.model.bind import bind, decoder_layers
from secateur.model.group import Experts, Stacks
from secateur.stream.walk import Walk, make_batches
from tests.families import tiny_family
from tests.models import tiny_ids
from tests.tiny_tokenizer import tiny_tokenizer

STACKS = Stacks("gate_up_proj", None, "down_proj", alternating=False, transposed=False)
ONE_GROUP = Experts("mlp.experts", STACKS, ("mlp.gate.weight",))


def expert_output(name: str, module: torch.nn.Module, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
    """What one expert gives, by the family's formula."""
    gate_up, down = module.gate_up_proj[expert], module.down_proj[expert]
    if name == "mixtral":
        gate, up = (x_TD @ gate_up.T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ down.T
    both = x_TD @ gate_up + module.gate_up_proj_bias[expert]
    gate, up = both[..., ::2].clamp(max=module.limit), both[..., 1::2].clamp(-module.limit, module.limit)
    return ((up + 1) * gate * torch.sigmoid(gate * module.alpha)) @ down + module.down_proj_bias[expert]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_the_observer_sees_what_brute_force_computes(name: str) -> None:
    model = tiny_family(name)
    arch = bind(model)
    group = arch.select(("experts",))[1]
    batches = make_batches("a", tiny_ids(batch=6, length=20), held_out=False, batch_tokens=40)
    held_out = make_batches("a", tiny_ids(batch=2, length=20, seed=7), held_out=True)
    walk = Walk(model, arch, batches + held_out)
    walk.advance(0)
    found = observe_routing(walk, group)[0]["a"]
    layer = decoder_layers(model, arch)[1]
    router = layer.get_submodule(group.experts.router_rows[0].rpartition(".")[0])
    module = layer.get_submodule("mlp.experts")
    assert not module._forward_hooks
    seen = []
    handle = layer.get_submodule("mlp").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for _ in walk.run(1):
        pass
    handle.remove()
    x_TD = torch.cat([each.flatten(0, 1) for each in seen[: len(batches)]])
    _, weights_Tk, chosen_Tk = router(x_TD)
    for expert in range(group.num_units):
        weight_T = torch.where(chosen_Tk == expert, weights_Tk, 0).sum(dim=1)
        norms_T = torch.linalg.vector_norm(expert_output(name, module, expert, x_TD), dim=-1)
        assert found.num_tokens_E[expert] == (weight_T > 0).sum()
        assert float(found.norms_E[expert]) == pytest.approx(float((weight_T * norms_T).sum()), rel=1e-4)
        assert float(found.energy_E[expert]) == pytest.approx(float((weight_T * norms_T).square().sum()), rel=1e-4)


def test_steps_end_where_asked_and_take_from_every_group() -> None:
    assert _steps(16, 8, 1) == [14, 12, 10, 8]
    assert _steps(6, 4, 1) == [5, 4]
    assert _steps(9, 6, 3) == [6] and _steps(256, 128, 8) == [224, 192, 160, 128]


def test_groups_of_experts_keep_as_many_each() -> None:
    scores = torch.tensor([9.0, 8, 7, 1, 2, 3])
    assert keep_experts(scores, 4, ONE_GROUP).tolist() == [0, 1, 2, 5]
    two = Experts("mlp.experts", STACKS, num_groups=2)
    assert keep_experts(scores, 4, two).tolist() == [0, 1, 4, 5]


def test_a_run_ends_in_an_ordinary_checkpoint(recipe, tmp_path) -> None:
    model = tiny_family("qwen2_moe-mixed", vocab_size=512)
    settings = recipe | {"groups": ["experts", "shared", "ffn"], "remove": 0.25}
    result = secateur.prune(model, grouped(settings), out=tmp_path / "out", tokenizer=tiny_tokenizer())
    assert result.summary.reload_max_abs_difference == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_experts"] < 6 and config["shared_expert_intermediate_size"] < 80
    kept = json.loads((tmp_path / "out/keep.json").read_text())
    assert {(line["layer"], line["group"]) for line in kept} == {
        (0, "experts"), (0, "shared"), (1, "ffn"), (2, "experts"), (2, "shared"),
    }  # fmt: skip
