"""Experts: in which steps they go, and a refit brings those that stay nearer, in every family."""

import pytest
import torch

from secateur.methods.compensate import Guard, HeldOutError
from secateur.methods.experts import _steps, best_step, keep_experts, observe_routing, refit_experts
from secateur.model.bind import bind
from secateur.model.group import Experts, Rows, Stacks
from secateur.stream.walk import Walk, make_batches
from tests.families import FAMILIES, GROUPS, row, tiny_family
from tests.model.test_exactness import prune_tiny, random_calibration
from tests.models import tiny_ids

STACKS = Stacks("gate_up_proj", (1, 1), transposed=False)
READER = Rows("mlp.experts.down_proj", 0, (1,))
ONE_GROUP = Experts(READER, STACKS, ("mlp.gate.weight",))


def expert_output(name: str, module: torch.nn.Module, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
    """What one expert gives, by the family's formula."""
    gate_up, down = module.gate_up_proj[expert], module.down_proj[expert]
    if name == "mixtral":
        gate, up = (x_TD @ gate_up.T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ down.T
    both = x_TD @ gate_up + module.gate_up_proj_bias[expert]
    gate, up = both[..., ::2].clamp(max=module.limit), both[..., 1::2].clamp(-module.limit, module.limit)
    return ((up + 1) * gate * torch.sigmoid(gate * module.alpha)) @ down + module.down_proj_bias[expert]


def test_steps_end_where_asked_and_take_from_every_group() -> None:
    assert _steps(16, 8, 1) == [14, 12, 10, 8]
    assert _steps(6, 4, 1) == [5, 4]
    assert _steps(9, 6, 3) == [6] and _steps(256, 128, 8) == [224, 192, 160, 128]


def test_groups_of_experts_keep_as_many_each() -> None:
    scores = torch.tensor([9.0, 8, 7, 1, 2, 3])
    assert keep_experts(scores, 4, ONE_GROUP).tolist() == [0, 1, 2, 5]
    two = Experts(READER, STACKS, num_groups=2)
    assert keep_experts(scores, 4, two).tolist() == [0, 1, 4, 5]


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
