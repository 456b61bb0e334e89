"""The cut itself against plain indexing: rows, columns, biases, counts, and the units' first names."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_ids, tiny_llama
from torch import nn

from secateur.model.bind import bind, decoder_layers
from secateur.model.group import Experts, Group, Linears, Rows, Stacks, cut, original_units, rows_of, unit_columns
from secateur.model.guesses import _by_router
from secateur.model.per_layer import record_widths
from tests.families import tiny_family

SEGMENTS = st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any).map(tuple)


@st.composite
def units(draw: st.DrawFn) -> tuple[tuple[int, ...], int, list[int]]:
    num_units = draw(st.integers(1, 7))
    keep = draw(st.sets(st.integers(0, num_units - 1), min_size=1).map(sorted))
    return draw(SEGMENTS), num_units, keep


@given(units())
def test_rows_are_those_that_a_labelled_tensor_shows(case):
    """Label every row with its unit, segment by segment, and read off who owns what."""
    segments, num_units, keep = case
    owners = [unit for width in segments for unit in range(num_units) for _ in range(width)]
    expected = [row for row, owner in enumerate(owners) if owner in keep]
    found = rows_of(torch.tensor(keep), segments, num_units)
    assert found.tolist() == expected
    columns = unit_columns(segments, num_units, torch.device("cpu"))
    assert [sorted(row.tolist()) for row in columns] == [
        [row for row, owner in enumerate(owners) if owner == unit] for unit in range(num_units)
    ]


def parts_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}


def with_biases(model: Any) -> Any:
    """Return the model with a bias of random numbers in every linear of its FFNs and attentions."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.bias = nn.Parameter(torch.randn(module.out_features))
    return model


@pytest.mark.parametrize("compensated", [False, True])
def test_a_cut_takes_rows_of_writers_columns_of_the_reader_and_nothing_else(compensated):
    torch.manual_seed(0)
    model = with_biases(tiny_llama())
    arch, layer = bind(model), model.model.layers[1]
    (group,) = (each for each in arch.select(("ffn",)) if each.layer == 1)
    layer.mlp.up_proj.weight.requires_grad_(False)
    before, keep = parts_of(layer), torch.tensor([0, 3, 50, 111])
    weight = torch.randn(48, 4, dtype=torch.float64)
    cut(layer, group, keep, weight if compensated else None)
    expected = dict(before)
    for name in ("gate_proj", "up_proj"):
        for part in ("weight", "bias"):
            expected[f"mlp.{name}.{part}"] = before[f"mlp.{name}.{part}"][keep]
    expected["mlp.down_proj.weight"] = before["mlp.down_proj.weight"][:, keep]
    if compensated:
        expected["mlp.down_proj.weight"] = weight.float()
    found = parts_of(layer)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    mlp = layer.mlp
    assert mlp.up_proj.out_features == mlp.gate_proj.out_features == mlp.down_proj.in_features == 4
    assert not mlp.up_proj.weight.requires_grad and mlp.gate_proj.weight.requires_grad
    assert all(parameter.is_contiguous() for parameter in layer.parameters())


def test_a_module_that_counts_its_units_counts_those_left():
    """Attention that repeats keys and values by hand needs the number; the fused one does without."""
    for name, implementation in (("llama", "eager"), ("gemma", "sdpa")):
        model = tiny_family(name, attn_implementation=implementation)
        group = bind(model).select(("query_heads",))[1]
        cut(model.model.layers[1], group, torch.tensor([1]))
        assert [layer.self_attn.num_key_value_groups for layer in model.model.layers] == [2, 1, 2]
        with torch.no_grad():
            assert model(tiny_ids(), use_cache=False).logits.isfinite().all()


def group_that(**limits: Any) -> Group:
    rows = Rows("down.weight", 1, (1,))
    return Group("ffn", "channels", "channel", Linears((rows,), rows), 0, 12, 1, **limits)


def test_counts_are_those_that_a_config_can_state_and_units_keep_their_first_names_through_rounds():
    assert [count for count in range(1, 13) if group_that(at_least=6, multiple_of=3).allows(count)] == [6, 9, 12]
    assert [count for count in range(1, 13) if group_that(divides=(4, 48)).allows(count)] == [1, 2, 3, 4, 6, 12]
    assert all(group_that().allows(count) for count in range(1, 13))
    first, second = torch.tensor([1, 3, 4, 8]), torch.tensor([0, 2])
    assert original_units(first, second).tolist() == [1, 4]
    by_expert = original_units(first, torch.tensor([[0, 2], [1, 3]]))
    assert by_expert.tolist() == [[1, 4], [3, 8]]
    assert original_units(by_expert, torch.tensor([[1], [0]])).tolist() == [[4], [3]]


def test_as_many_experts_stay_as_the_router_needs():
    stacks = Stacks("up_proj", (1,), transposed=False)
    experts = Experts(Rows("mlp.down_proj", 0, (1,)), stacks)
    two_of_three = {"n_group": 3, "topk_group": 2}
    needed = [({}, 2, 2), ({"n_group": 1, "topk_group": 1}, 2, 2), ({"n_group": None}, 2, 2)]  # as many as a token gets
    # Three groups with the two experts that rank each; ceil(5 / 2) in each.
    needed += [(two_of_three, 2, 6), (two_of_three, 5, 9), (two_of_three, 4, 6)]
    for config, num_chosen, at_least in needed:
        offer = Group("experts", "experts", "expert", experts, at_least=num_chosen)
        found = _by_router(offer, SimpleNamespace(**config))
        num_groups = config.get("n_group") or 1
        assert (found.experts.num_groups, found.multiple_of, found.at_least) == (num_groups, num_groups, at_least)


def test_a_config_that_named_code_of_its_own_names_none_once_widths_differ():
    model = tiny_llama()
    model.config.auto_map = {"AutoModelForCausalLM": "theirs.Model"}
    arch = bind(model)
    group = arch.select(("ffn",))[1]
    cut(decoder_layers(model, arch)[1], group, torch.arange(40))
    record_widths(model, arch)
    assert "auto_map" not in vars(model.config)
    assert [model.config.per_layer_config[index].intermediate_size for index in range(3)] == [112, 40, 112]


def test_a_transposed_linear_is_saved_and_loaded_as_it_was():
    """GPT-2's files hold inputs x outputs; in memory it is a linear like all others."""
    model, plain = tiny_family("gpt2"), tiny_family("gpt2")
    bind(model)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    other = tiny_family("gpt2", seed=1)
    bind(other)
    other.load_state_dict(theirs)
    for (name, ours), theirs in zip(other.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs[1]), name
