"""Specs against real modules: sizes, parameter counts, and the errors that name the nearest known thing."""

import pytest

from secateur.errors import ArchError
from secateur.model.bind import bind
from tests.families import tiny_family
from tests.models import tiny_gemma, tiny_gemma3, tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3


@pytest.mark.parametrize("factory", [tiny_llama, tiny_qwen2, tiny_qwen3, tiny_mistral, tiny_gemma, tiny_gemma3])
def test_bound_groups_count_the_parameters_of_a_unit(factory) -> None:
    model = factory()
    arch = bind(model)
    assert arch.num_layers == 3
    assert [group.layer for group in arch.groups] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    head = model.config.head_dim if getattr(model.config, "head_dim", None) else 12
    expected = {  # name: (units, columns of a unit, parameters of a unit without biases)
        "ffn": (112, 1, 3 * 48),
        "kv_heads": (2, 2 * head, (2 + 1 + 1 + 2) * head * 48),
        "query_heads": (2, 2 * head, (2 + 2) * head * 48),
    }
    biases = {"kv_heads": 4 * head, "query_heads": 2 * head} if model.config.model_type == "qwen2" else {}
    for group in arch.groups:
        num_units, width, num_params = expected[group.name]
        assert (group.num_units, group.width) == (num_units, width)
        assert group.params_per_unit == num_params + biases.get(group.name, 0)


def test_biases_are_counted() -> None:
    arch = bind(tiny_llama(mlp_bias=True))
    assert {group.params_per_unit for group in arch.select(("ffn",))} == {3 * 48 + 2}


def test_groups_that_cut_the_same_reader_exclude_each_other() -> None:
    with pytest.raises(ArchError, match=r"kv_heads and query_heads cut the same self_attn\.o_proj"):
        bind(tiny_llama()).select(("kv_heads", "ffn", "query_heads"))


@pytest.mark.parametrize(("name", "biases"), [("mixtral", 0), ("qwen3_moe", 0), ("gpt_oss", 2)])
def test_channels_inside_experts_count_what_goes_with_one(name: str, biases: int) -> None:
    """One channel of each of six experts: two rows and a column, and two numbers of the writer's bias."""
    groups = [group for group in bind(tiny_family(name)).groups if group.name == "expert_ffn"]
    assert groups and {group.multiple_of for group in groups} == {8}
    assert {group.params_per_unit for group in groups} == {6 * (3 * 48 + biases)}
    assert not groups[0].allows(12) and groups[0].allows(16)


def test_layers_are_counted_one_by_one() -> None:
    model = tiny_family("qwen3_moe-mixed")
    counts = bind(model).params_per_layer
    assert counts == tuple(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    assert counts[0] != counts[1]


def test_a_switch_of_the_config_says_whether_an_mlp_adds_directly() -> None:
    """Granite scales what is added; OPT norms it if its config says so."""
    assert bind(tiny_family("opt")).mlp_adds_directly and not bind(tiny_family("opt-post-norm")).mlp_adds_directly
    assert bind(tiny_llama()).mlp_adds_directly and not bind(tiny_gemma3()).mlp_adds_directly
