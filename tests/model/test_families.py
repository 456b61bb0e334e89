"""Every family and group, on tiny random models: what the cuts promise holds for each row of `families.FAMILIES`.

A cut, saved and reloaded by stock transformers, equals a mask, in what it generates too; the walk equals the
forward pass, with its shortcut to the middle of a layer too; a model cut in one layer alone runs; parameters are as
many as the plan says.
"""

import copy
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from shown import assert_shown
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from secateur.errors import ArchError
from secateur.methods.budget import params_gone
from secateur.methods.experts import keep_experts
from secateur.model.bind import EXPERT_CHANNELS, EXPERTS, Arch, bind, decoder_layers
from secateur.model.group import DOWN, OF_EXPERTS, Group, cut, linear, rows_of
from secateur.model.per_layer import record_widths
from tests.families import FAMILIES, GROUPS, KINDS, tiny_family
from tests.model.test_exactness import check_walk, logits_of, prune_tiny, random_calibration, zero_units
from tests.models import num_params, tiny_ids

ROWS = [(name, group) for name in FAMILIES for group in GROUPS[name]]
# Whose dtype may matter: norms between, experts in stacks, routers that stay in float32. The others' bfloat16 is slow.
IN_BFLOAT16 = {"qwen2", "gemma2", "gpt_oss", "deepseek_v3"}


def in_both_dtypes(rows: list[tuple[Any, ...]]) -> list[Any]:
    return [
        pytest.param(
            *(name, *others, dtype),
            id="-".join((name, *("-".join(each) if isinstance(each, tuple) else each for each in others), label)),
            marks=() if name in (KINDS if label == "float32" else IN_BFLOAT16) else pytest.mark.slow,
        )
        for name, *others in rows
        for label, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    ]


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The median over positions: in bfloat16 rounding may send a token to other experts, but not most of them."""
    return float(((logits.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)).median())


def assert_same(logits: torch.Tensor, expected: torch.Tensor, close: float = 3e-6) -> None:
    """Sums are split otherwise once there are fewer terms, how is up to the processor."""
    assert logits.dtype == expected.dtype
    if logits.dtype == torch.bfloat16:  # layers round what they add to a hundredth
        assert distance(logits, expected) < 0.02
    else:
        torch.testing.assert_close(logits, expected, atol=close, rtol=min(close, 1e-5))


def cut_units(layer: Any, group: Group, keep: torch.Tensor) -> None:
    cut(layer, group, own_channels(layer, group, keep) if group.kind == "expert_channels" else keep)


def own_channels(layer: Any, group: Group, keep: torch.Tensor) -> torch.Tensor:
    """Return a choice for every expert, each another one: the same channels, moved round by its number."""
    num_experts = len(next(layer.get_submodule(group.reader.module).parameters()))
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
        down = layer.get_submodule(group.reader.module).get_parameter(DOWN)
        mask = torch.zeros(len(stays_EK), group.num_units).scatter_(1, stays_EK, 1.0)
        down.data *= mask[:, :, None] if stacks.transposed else mask[:, None, :]
        return
    router = layer.get_submodule(group.experts.router_rows[0].rpartition(".")[0])
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


def _said(record: Any) -> list[tuple[str, Any]]:
    """Return the fields that are not as they are by default."""
    found = [(field.name, getattr(record, field.name), field.default) for field in fields(record)]
    return [(name, value) for name, value, default in found if value != default]


def generated(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return greedy tokens behind a text, written with the cache that the type has."""
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)


def told(arch: Arch) -> str:
    """Return all that was found, what several layers have alike once."""
    lines = [f"{key}: {value}" for key, value in _said(arch) if key not in ("groups", "omits")]
    layers: dict[str, list[int]] = {}
    for group in arch.groups:
        text = "\n    ".join(f"{key}: {value}" for key, value in _said(group) if key != "layer")
        layers.setdefault(text, []).append(group.layer)
    lines += [f"layers {indices}\n    {group}" for group, indices in layers.items()]
    return "\n".join([*lines, *(f"not {name}: {why}" for name, why in sorted(arch.omits.items()))])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_groups_of_a_type_are_those_known(name: str) -> None:
    """What is found in the modules is what somebody once wrote by hand, from reading them."""
    arch = bind(tiny_family(name))
    assert_shown(f"families/{name}", told(arch))
    assert {group.name for group in arch.groups} == set(GROUPS[name])
    assert not set(arch.omits) & set(GROUPS[name])
    assert {"kv_heads", "query_heads"} - set(GROUPS[name]) <= set(arch.omits)


@pytest.mark.parametrize(("name", "group_name", "dtype"), in_both_dtypes(ROWS))
def test_cut_saved_and_reloaded_by_stock_transformers_equals_mask(
    name: str, group_name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, ids_BT = tiny_family(name).to(dtype), tiny_ids()
    arch, dense_size = bind(model), num_params(model)
    masked, whole = copy.deepcopy(model), logits_of(model, ids_BT)
    groups = arch.select((group_name,))
    kept = {}
    for group in groups:
        keep = kept_of(group, 0.6 if group.width == 1 else 0.5)
        kept[group.layer, group.name] = len(keep)
        assert 0 < len(keep) < group.num_units
        mask_units(decoder_layers(masked, arch)[group.layer], group, keep)
        cut_units(decoder_layers(model, arch)[group.layer], group, keep)
    assert num_params(model) == dense_size - params_gone(groups, kept)
    expected = logits_of(masked, ids_BT)
    assert distance(whole, expected) > (1e-3 if dtype == torch.float32 else 0.06)
    assert_same(logits_of(model, ids_BT), expected)  # while its config says nothing of it, as in the midst of a run
    record_widths(model, arch)
    model.save_pretrained(tmp_path)
    is_causal = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    reloaded = (AutoModelForCausalLM if is_causal else AutoModelForImageTextToText).from_pretrained(tmp_path)
    assert type(reloaded) is type(masked)
    assert_same(logits_of(reloaded, ids_BT), expected)
    assert num_params(reloaded) == num_params(model)
    differ = dtypes_of(reloaded).items() - dtypes_of(model).items()  # routers that transformers keeps in float32
    assert all(".gate." in name and kept == torch.float32 for name, kept in differ)
    if dtype == torch.bfloat16:  # what is found is the same, and a rounding may choose another token
        return
    assert torch.equal(generated(reloaded, ids_BT), generated(masked, ids_BT))
    again = bind(reloaded)
    if group_name == EXPERTS and all(kept[group.layer, EXPERTS] == group.at_least for group in groups):
        with pytest.raises(ArchError, match=f"cannot lose experts: the router needs all {groups[0].at_least}"):
            again.select((EXPERTS,))
        return
    assert {(group.layer, group.name): group.num_units for group in again.select((group_name,))} == kept


@pytest.mark.parametrize(("name", "dtype"), in_both_dtypes([(name,) for name in FAMILIES]))
def test_walk_equals_forward(name: str, dtype: torch.dtype) -> None:
    model = tiny_family(name, dtype=dtype)
    check_walk(model, tiny_ids(batch=5, length=24), 1e-5 if dtype == torch.float32 else 1e-1)


def choices_of_groups(name: str) -> list[tuple[str, ...]]:
    """Return the family's groups as runs can ask for them."""
    together = tuple(sorted(set(GROUPS[name]) - {"query_heads", EXPERT_CHANNELS}))
    return [together, (EXPERT_CHANNELS,)] if EXPERT_CHANNELS in GROUPS[name] else [together]


def check_what_stayed(layer: Any, whole: Any, group: Group, keep: torch.Tensor, lines: list[dict[str, Any]]) -> None:
    """Writers have the dense model's rows of the kept units; the reader has other columns only if a step changed them.

    A step may change nothing: where all that went was silent, nothing was lost.
    """
    for axis in group.writers:
        rows = rows_of(keep, axis.segments, group.num_units)
        assert torch.equal(linear(layer, axis.module).weight, linear(whole, axis.module).weight[rows]), axis.module
    columns = rows_of(keep, group.reader.segments, group.num_units)
    left = torch.equal(linear(layer, group.reader.module).weight, linear(whole, group.reader.module).weight[:, columns])
    assert left or any(line.get("step", 0) > 0 for line in lines)


@pytest.mark.parametrize(
    ("name", "groups", "dtype"),
    in_both_dtypes([(name, groups) for name in FAMILIES for groups in choices_of_groups(name)]),
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
    assert num_params(model) == dense_size - params_gone(chosen, counts)
    for group in chosen:
        mine = [line for line in lines if (line["layer"], line["group"]) == (group.layer, group.name)]
        assert [line["round"] for line in mine] == list(range(1, rounds + 1))
        assert all(later["total"] == earlier["kept"] >= later["kept"] for earlier, later in pairwise(mine))
        assert mine[-1]["kept"] == counts[group.layer, group.name]
        if group.kind not in OF_EXPERTS:
            layer, whole = (decoder_layers(each, arch)[group.layer] for each in (model, dense))
            check_what_stayed(layer, whole, group, keeps[group.layer, group.name], mine)
    by_layer = (EXPERTS, EXPERT_CHANNELS)  # one step for all of a layer's experts, by the mean over domains
    steps = [line["step"] for line in lines if "step" in line and line["group"] not in by_layer]
    assert not steps or max(steps) > 0, "some of it is compensated"
    for line in (line for line in lines if "step" in line):
        rises = [line["error_after"][d] / before for d, before in line["error_before"].items() if before]
        assert sum(rises) <= len(rises) if line["group"] in by_layer else all(rise <= 1 for rise in rises)
    assert torch.isfinite(logits_of(model, tiny_ids())).all()
