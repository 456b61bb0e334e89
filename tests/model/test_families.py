"""Every family and group, on tiny random models: what the cuts promise holds for each row of `families.FAMILIES`.

Permuting units changes nothing; a cut, saved and reloaded by stock transformers, equals a mask; the walk equals the
forward pass, with its shortcut to the middle of a layer too; a model cut in one layer alone runs; parameters are as
many as the plan says.
"""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from secateur.methods.experts import keep_experts
from secateur.methods.prices import parameter_prices
from secateur.model.bind import EXPERT_CHANNELS, EXPERTS, bind, decoder_layers, head_of
from secateur.model.group import OF_EXPERTS, Group, add_zero_biases, linear, rows_of
from secateur.model.per_layer import record_widths
from secateur.model.spec import ArchSpec, find_spec, load_specs
from secateur.pruning.group_step import STEPS
from secateur.stream.losses import states_for_head
from secateur.stream.walk import Walk, make_batches
from tests.families import FAMILIES, tiny_family
from tests.model.test_exactness import logits_of, prune_tiny, random_calibration, zero_units
from tests.models import tiny_ids


def expert_groups(spec: ArchSpec) -> list[str]:
    if spec.experts is None:
        return []
    return [EXPERTS] if spec.experts.channels.num_units is None else [EXPERTS, EXPERT_CHANNELS]


DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
# Rows all of whose layers have experts.
NO_FFN = {"qwen2_moe", "qwen3_moe"}
ROWS = [
    pytest.param(name, group, id=f"{name}-{group}")
    for name, (model_type, _) in FAMILIES.items()
    for spec in load_specs().values()
    if model_type in spec.model_types
    for group in (*spec.groups, *expert_groups(spec))
    if group != "ffn" or name not in NO_FFN
]


def cut_units(layer: Any, group: Group, keep: torch.Tensor) -> None:
    STEPS[group.kind].cut(layer, group, own_channels(layer, group, keep) if group.kind == "expert_channels" else keep)


def own_channels(layer: Any, group: Group, keep: torch.Tensor) -> torch.Tensor:
    """Return a choice for every expert, each another one: the same channels, moved round by its number."""
    num_experts = len(next(layer.get_submodule(group.experts.module).parameters()))
    return (keep[None] + torch.arange(num_experts)[:, None]).remainder(group.num_units).sort(dim=1).values


def mask_units(layer: Any, group: Group, keep: torch.Tensor) -> None:
    """Let the units that do not stay give nothing: no reader column, or no token that the router sends there."""
    removed = torch.tensor(sorted(set(range(group.num_units)) - set(keep.tolist())))
    if group.kind not in OF_EXPERTS:
        zero_units(layer, group, removed)
        return
    stacks = group.experts.stacks
    if group.kind == "expert_channels":
        stays_EK = own_channels(layer, group, keep)
        down = layer.get_submodule(group.experts.module).get_parameter(stacks.down)
        mask = torch.zeros(len(stays_EK), group.num_units).scatter_(1, stays_EK, 1.0)
        down.data *= mask[:, :, None] if stacks.transposed else mask[:, None, :]
        return
    router = layer.get_submodule(group.experts.router)
    route, correction = router.forward, getattr(router, "e_score_correction_bias", None)
    if correction is not None:
        correction[removed] = -1e9

    def route_without(*inputs: Any) -> Any:
        linear_map = torch.nn.functional.linear
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                torch.nn.functional, "linear", lambda *x: linear_map(*x).index_fill(-1, removed, float("-inf"))
            )
            return route(*inputs)

    router.forward = route_without


def num_params(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def dtypes_of(model: Any) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def kept_of(group: Group, share: float) -> torch.Tensor:
    """Return an uneven choice of units, one that the config can state."""
    count = next(n for n in range(round(group.num_units * share), group.num_units + 1) if n and group.allows(n))
    if group.kind == "experts":
        scores = torch.rand(group.num_units, generator=torch.Generator().manual_seed(group.layer))
        return keep_experts(scores, count, group.experts)
    order = torch.randperm(group.num_units, generator=torch.Generator().manual_seed(group.layer))
    return order[:count].sort().values


def test_every_spec_has_a_row() -> None:
    tested = {model_type for model_type, _ in FAMILIES.values()}
    assert {model_type for spec in load_specs().values() for model_type in spec.model_types} == tested


@pytest.mark.parametrize(("name", "group_name"), ROWS)
def test_permuting_units_changes_nothing(name: str, group_name: str) -> None:
    model, ids_BT = tiny_family(name), tiny_ids()
    before = logits_of(model, ids_BT)
    arch = bind(model)
    torch.testing.assert_close(logits_of(model, ids_BT), before, atol=1e-6, rtol=1e-6)
    groups = arch.select((group_name,))
    for group in groups:
        # Of groups of experts the order stays theirs; within each it turns round.
        order = torch.arange(group.num_units).view(group.multiple_of if group.kind == "experts" else 1, -1)
        cut_units(decoder_layers(model, arch)[group.layer], group, order.flip(1).flatten())
    torch.testing.assert_close(logits_of(model, ids_BT), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "group_name"), ROWS)
def test_cut_saved_and_reloaded_by_stock_transformers_equals_mask(name: str, group_name: str, tmp_path: Path) -> None:
    model, ids_BT = tiny_family(name), tiny_ids()
    masked = copy.deepcopy(model)
    arch, dense_size = bind(model), num_params(model)
    bind(masked)
    groups = arch.select((group_name,))
    prices = parameter_prices(arch, groups, model)
    assert prices.total == dense_size
    kept = {}
    for group in groups:
        keep = kept_of(group, 0.6 if group.width == 1 else 0.5)
        kept[group.layer, group.name] = len(keep)
        assert 0 < len(keep) < group.num_units
        mask_units(decoder_layers(masked, arch)[group.layer], group, keep)
        cut_units(decoder_layers(model, arch)[group.layer], group, keep)
    record_widths(model, arch)
    assert num_params(model) == dense_size - prices.gone(groups, kept)
    expected = logits_of(masked, ids_BT)
    assert not torch.allclose(expected, logits_of(tiny_family(name), ids_BT), atol=1e-3)
    # Sums are split otherwise once there are fewer terms, how is up to the processor.
    close = 3e-6
    torch.testing.assert_close(logits_of(model, ids_BT), expected, atol=close, rtol=1e-6)
    model.save_pretrained(tmp_path)
    is_causal = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    reloaded = (AutoModelForCausalLM if is_causal else AutoModelForImageTextToText).from_pretrained(tmp_path)
    assert type(reloaded) is type(tiny_family(name))
    torch.testing.assert_close(logits_of(reloaded, ids_BT), expected, atol=close, rtol=1e-6)
    assert num_params(reloaded) == num_params(model)
    found = {(group.layer, group.name): group.num_units for group in bind(reloaded).select((group_name,))}
    assert found == kept


@pytest.mark.parametrize(("name", "group_name"), ROWS)
def test_a_model_cut_in_one_layer_alone_runs(name: str, group_name: str) -> None:
    model = tiny_family(name)
    arch = bind(model)
    group = arch.select((group_name,))[-1]
    keep = kept_of(group, 0.3)
    masked = copy.deepcopy(model)
    mask_units(decoder_layers(masked, arch)[group.layer], group, keep)
    cut_units(decoder_layers(model, arch)[group.layer], group, keep)
    torch.testing.assert_close(logits_of(model, tiny_ids()), logits_of(masked, tiny_ids()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("to_middle", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_walk_equals_forward(name: str, to_middle: bool, dtype: torch.dtype) -> None:
    model, ids_BT = tiny_family(name, dtype=dtype), tiny_ids(batch=5, length=24)
    arch = bind(model)
    walk = Walk(model, arch, make_batches("d", ids_BT, held_out=False, batch_tokens=48))
    assert len(walk.batches) == 3
    for index in range(arch.num_layers):
        if to_middle:
            entered = torch.cat(walk.hidden_BTD)
            assert len(list(walk.run(index, to_middle=True))) == 3
            assert torch.equal(entered, torch.cat(walk.hidden_BTD)) == (arch.middle is None)
        walk.advance(index)
    pairs = zip(walk.batches, walk.hidden_BTD, strict=True)
    with torch.no_grad():
        logits_PV = head_of(model, arch)(torch.cat([states_for_head(model, arch, *pair) for pair in pairs]))
    close = 1e-5 if dtype == torch.float32 else 1e-1
    torch.testing.assert_close(logits_PV, logits_of(model, ids_BT)[:, :-1].flatten(0, 1), atol=close, rtol=close)


def choices_of_groups(name: str) -> list[tuple[str, ...]]:
    """Return the family's groups as runs can ask for them."""
    names = {group.name for group in bind(tiny_family(name)).groups}
    together = tuple(sorted(names - {"query_heads", EXPERT_CHANNELS}))
    return [together, (EXPERT_CHANNELS,)] if EXPERT_CHANNELS in names else [together]


def check_what_stayed(model: Any, dense: Any, group: Group, keep: torch.Tensor, lines: list[dict[str, Any]]) -> None:
    """Writers have the dense model's rows of the kept units; the reader has other columns only if a step changed them.

    A step may change nothing: where all that went was silent, nothing was lost.
    """
    layer, whole = (decoder_layers(each, bind(each))[group.layer] for each in (model, dense))
    for axis in group.writers:
        rows = rows_of(keep, axis.segments, group.num_units)
        assert torch.equal(linear(layer, axis.module).weight, linear(whole, axis.module).weight[rows]), axis.module
    columns = rows_of(keep, group.reader.segments, group.num_units)
    left = torch.equal(linear(layer, group.reader.module).weight, linear(whole, group.reader.module).weight[:, columns])
    assert left or any(line.get("step", 0) > 0 for line in lines)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "groups"), [(name, groups) for name in FAMILIES for groups in choices_of_groups(name)]
)
def test_rounds_of_measuring_and_compensating_run(name: str, groups: tuple[str, ...], dtype: torch.dtype) -> None:
    """The whole loop for every group of a family: two rounds with the dense stream beside, layers put back from disk.

    In bfloat16 it is one round. Channels inside experts cannot go beside whole experts: they have a run of their own.
    """
    rounds = 2 if dtype == torch.float32 else 1
    model = tiny_family(name, dtype=dtype)
    dense_size = num_params(model)
    dense = copy.deepcopy(model)
    keeps, lines = prune_tiny(model, random_calibration(), groups=groups, rounds=rounds, remove=0.12)
    assert {group for _, group in keeps} == set(groups)
    assert len(lines) == rounds * len(keeps)
    assert dtypes_of(model) == dtypes_of(dense)
    assert num_params(model) == pytest.approx(0.88 * dense_size, rel=0.07)
    arch = bind(dense)
    chosen = arch.select(groups)
    counts = {(group.layer, group.name): keeps[group.layer, group.name].shape[-1] for group in chosen}
    assert num_params(model) == dense_size - parameter_prices(arch, chosen, dense).gone(chosen, counts)
    for group in chosen:
        mine = [line for line in lines if (line["layer"], line["group"]) == (group.layer, group.name)]
        assert [line["round"] for line in mine] == list(range(1, rounds + 1))
        assert all(later["total"] == earlier["kept"] >= later["kept"] for earlier, later in pairwise(mine))
        assert mine[-1]["kept"] == counts[group.layer, group.name]
        if group.kind not in OF_EXPERTS:
            check_what_stayed(model, dense, group, keeps[group.layer, group.name], mine)
    by_layer = (EXPERTS, EXPERT_CHANNELS)  # one step for all of a layer's experts, by the mean over domains
    steps = [line["step"] for line in lines if "step" in line and line["group"] not in by_layer]
    assert not steps or max(steps) > 0, "some of it is compensated"
    for line in (line for line in lines if "step" in line):
        rises = [line["error_after"][d] / before for d, before in line["error_before"].items() if before]
        assert sum(rises) <= len(rises) if line["group"] in by_layer else all(rise <= 1 for rise in rises)
    assert torch.isfinite(logits_of(model, tiny_ids())).all()


def broken(monkeypatch: pytest.MonkeyPatch, name: str, **wrong: Any) -> None:
    """Let the row's family be described by its spec with `wrong` in place; of groups only what is said anew."""
    family, spec = find_spec(FAMILIES[name][0])
    data = spec.model_dump()
    for group, keys in wrong.pop("groups", {}).items():
        data["groups"][group] = data["groups"].get(group, {}) | keys
    wrong_spec = ArchSpec.model_validate(data | wrong)
    monkeypatch.setattr("secateur.model.bind.find_spec", lambda model_type: (family, wrong_spec))


HEADS_OF_STABLELM = {
    "unit": "KV head",
    "num_units": "num_key_value_heads",
    "writers": {"self_attn.q_proj": ["q"], "self_attn.k_proj": ["kv"], "self_attn.v_proj": ["kv"]},
    "reader": {"self_attn.o_proj": ["q"]},
}


@pytest.mark.parametrize(
    ("name", "group", "wrong"),
    [
        pytest.param("phi3", "ffn", {"writers": {"mlp.gate_up_proj": [2]}}, id="wrong segment"),
        pytest.param("phi3", "kv_heads", {"writers": {"self_attn.qkv_proj": ["kv", "q", "kv"]}}, id="wrong order"),
        pytest.param("olmo2", "kv_heads", HEADS_OF_STABLELM, id="norm over all heads"),
    ],
)
def test_the_table_catches_units_that_are_no_units(
    monkeypatch: pytest.MonkeyPatch, name: str, group: str, wrong: dict[str, Any]
) -> None:
    broken(monkeypatch, name, groups={group: wrong})
    with pytest.raises(AssertionError, match="not close"):
        test_permuting_units_changes_nothing(name, group)


def test_the_table_catches_a_missing_writer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writers = {"self_attn.q_proj": ["q"], "self_attn.k_proj": ["kv"]}
    broken(monkeypatch, "qwen2", groups={"kv_heads": {"writers": writers}})
    with pytest.raises(AssertionError, match="its tensors and its config disagree"):
        test_cut_saved_and_reloaded_by_stock_transformers_equals_mask("qwen2", "kv_heads", tmp_path)


def test_the_table_catches_a_width_of_heads_that_the_config_cannot_pin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken(monkeypatch, "stablelm", groups={"kv_heads": HEADS_OF_STABLELM})
    test_permuting_units_changes_nothing("stablelm", "kv_heads")
    with pytest.raises(AssertionError, match="its tensors and its config disagree"):
        test_cut_saved_and_reloaded_by_stock_transformers_equals_mask("stablelm", "kv_heads", tmp_path)


def test_the_table_catches_numbers_of_heads_read_from_the_models_config(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "phi3", groups={"kv_heads": {"local_config": None}})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        test_a_model_cut_in_one_layer_alone_runs("phi3", "kv_heads")


def check_bias_reloads(name: str, directory: Path) -> None:
    """What compensation by bias does: the readers get a bias, the config says so, stock transformers loads it."""
    model = tiny_family(name)
    arch = bind(model)
    for group in arch.select(("ffn",)):
        layer = decoder_layers(model, arch)[group.layer]
        add_zero_biases(layer, group)
        torch.nn.init.normal_(linear(layer, group.reader.module).bias)
        assert group.bias_switch is not None
        setattr(model.config, group.bias_switch.config_key, True)
    model.save_pretrained(directory)
    reloaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], "the switch gives biases to other linears"
    torch.testing.assert_close(logits_of(reloaded, tiny_ids()), logits_of(model, tiny_ids()), atol=1e-6, rtol=1e-6)


WITH_SWITCH = [
    name
    for name, (model_type, _) in FAMILIES.items()
    if any(
        model_type in s.model_types and s.groups["ffn"].bias_switch for s in load_specs().values() if "ffn" in s.groups
    )
]


@pytest.mark.parametrize("name", WITH_SWITCH)
def test_a_bias_switch_is_read_on_reload(name: str, tmp_path: Path) -> None:
    check_bias_reloads(name, tmp_path)


def test_the_table_catches_a_missing_bias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken(monkeypatch, "nemotron", groups={"ffn": {"bias_switch": {"mlp_bias": ["mlp.down_proj"]}}})
    with pytest.raises(AssertionError, match="the switch gives biases to other linears"):
        check_bias_reloads("nemotron", tmp_path)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("phi", {"middle": "mlp"}, id="a middle of blocks side by side"),
        pytest.param("gemma3", {"middle": "mlp"}, id="a middle behind the norm"),
        pytest.param("gemma2", {"logits": None}, id="missing cap"),
        pytest.param("cohere2", {"logits": {"divide": "logit_scale"}}, id="wrong factor"),
    ],
)
def test_the_table_catches_a_walk_that_is_not_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: dict[str, Any]
) -> None:
    broken(monkeypatch, name, **wrong)
    with pytest.raises(AssertionError, match="not close"):
        test_walk_equals_forward(name, to_middle=True, dtype=torch.float32)
