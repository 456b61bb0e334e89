"""Layers that compute in float32 one at a time, layers on disk, and weights brought to a device and back.

The device is the processor, and what moves is the dtype; `test_device` has a device of its own.
"""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny_ids, tiny_llama
from torch import Tensor, nn

from secateur.model.bind import bind, decoder_layers
from secateur.model.group import cut
from secateur.stream import device as product
from secateur.stream.device import (
    LayersOnDevice,
    LayersOnDisk,
    Placement,
    bring,
    embeddings_on_disk,
    fetch,
    float64_device,
    forget_weights,
    free_bytes,
    multiplies_in_software,
    offload,
    on_device,
    parameter_on,
    peak_bytes_on,
    raised,
    settle,
)

CPU = torch.device("cpu")
THIRD = 1 / 3  # no number of bfloat16
X = torch.ones(1, 4)


class Layer(nn.Module):
    """A linear with a buffer, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("factor", torch.ones(()))
        self.to(torch.bfloat16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor.to(x.dtype)


@pytest.fixture
def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Layer() for _ in range(3)]


@pytest.fixture
def owner(layers: list[nn.Module]) -> Iterator[LayersOnDevice]:
    """Brings one layer at a time, in float32."""
    owner = LayersOnDevice(layers, CPU, in_float32=True)
    yield owner
    owner.end()


def weights(layers: list[nn.Module]) -> list[nn.Parameter]:
    return [layer.get_submodule("linear").weight for layer in layers]  # type: ignore[misc]


def values(weight: Tensor) -> set[float]:
    return set(weight.flatten().tolist())


def test_one_layer_at_a_time_is_in_float32_and_unchanged_ones_return_as_they_were(layers: list[nn.Module]) -> None:
    seen: list[torch.dtype] = []
    hook = layers[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.linear.weight.dtype))
    hosts, owner = weights(layers), LayersOnDevice(layers, CPU, in_float32=True)
    for index, layer in enumerate(layers):
        layer(X)
        assert [weight.dtype for weight in weights(layers)].count(torch.float32) == 1
        assert weights(layers)[index].dtype == torch.float32
        assert torch.equal(weights(layers)[index], hosts[index].float())
    assert seen == [torch.float32], "the weights are there before anybody else's hook runs"
    hook.remove()
    owner.end()
    assert all(now is host for now, host in zip(weights(layers), hosts, strict=True))
    fetch(layers[0])  # nobody's any more
    assert not layers[0]._forward_pre_hooks and weights(layers)[0] is hosts[0]


def test_kept_layers_stay_in_float32_until_the_end(layers: list[nn.Module]) -> None:
    hosts, owner = weights(layers), LayersOnDevice(layers, CPU, in_float32=True, keeps=True)
    passes = []
    for _ in range(2):
        for layer in layers:
            layer(X)
        passes.append(weights(layers))
    assert [weight.dtype for weight in weights(layers)] == [torch.float32] * 3
    assert all(now is then for now, then in zip(*passes, strict=True)), "nothing was copied again"
    owner.end()
    assert all(now is host for now, host in zip(weights(layers), hosts, strict=True))


@pytest.mark.parametrize("keeps", [False, True])
def test_changes_survive_in_the_stored_dtype(layers: list[nn.Module], keeps: bool) -> None:
    owner = LayersOnDevice(layers, CPU, in_float32=True, keeps=keeps)
    fetch(layers[1])
    before = weights(layers)[1]._version
    settle(layers[1])
    assert weights(layers)[1]._version == before, "what nobody changed is left alone"
    weights(layers)[1].fill_(THIRD)  # in place
    settle(layers[1])
    rounded = float(torch.tensor(THIRD).bfloat16())
    assert weights(layers)[1].dtype == torch.float32 and values(weights(layers)[1]) == {rounded}
    layers[1].linear.bias = nn.Parameter(torch.full((4,), THIRD), requires_grad=False)  # anew
    settle(layers[1])
    assert values(layers[1].linear.bias) == {rounded}
    layers[1].linear.bias = nn.Parameter(layers[1].linear.bias.bfloat16(), requires_grad=False)  # anew, as stored
    fetch(layers[1])
    assert layers[1].linear.bias.dtype == torch.float32
    offload(layers[1])
    assert weights(layers)[1].dtype == layers[1].linear.bias.dtype == torch.bfloat16
    assert values(weights(layers)[1]) == values(layers[1].linear.bias) == {rounded}
    fetch(layers[1])
    assert values(weights(layers)[1]) == {rounded}
    owner.end()


@pytest.mark.parametrize("keeps", [False, True])
def test_nothing_of_a_layer_before_its_cut_is_left_in_memory(layers: list[nn.Module], keeps: bool) -> None:
    LayersOnDevice(layers, CPU, in_float32=True, keeps=keeps)
    stored = weakref.ref(weights(layers)[0])
    fetch(layers[0])
    computing = weakref.ref(weights(layers)[0])
    layers[0].linear.weight = nn.Parameter(torch.ones(2, 4), requires_grad=False)
    settle(layers[0])
    assert stored() is None and computing() is None


@pytest.mark.parametrize("how", ["in place", "data", "anew"])
def test_a_layer_that_changed_after_it_was_prefetched_is_copied_again(
    owner: LayersOnDevice, layers: list[nn.Module], how: str
) -> None:
    layers[0](X)  # prefetches the next
    assert owner.prefetched is not None and owner.prefetched[0] == 1
    owner.prefetched[1].result()
    host = weights(layers)[1]
    match how:
        case "in place":
            host.fill_(2)
        case "data":
            host.data = torch.full_like(host, 2)
        case "anew":
            layers[1].linear.weight = nn.Parameter(torch.full_like(host, 2), requires_grad=False)
    layers[1](X)
    assert values(weights(layers)[1]) == {2}
    owner.end()
    assert values(weights(layers)[1]) == {2}


def test_what_is_prefetched_is_used_and_the_last_layer_prefetches_nothing(
    owner: LayersOnDevice, layers: list[nn.Module]
) -> None:
    fetch(layers[1])
    assert owner.prefetched is not None
    copies = owner.prefetched[1].result()
    fetch(layers[2])
    assert weights(layers)[2] is copies[layers[2].linear, "weight"].device and owner.prefetched is None


@pytest.mark.usefixtures("owner")
def test_a_replaced_forward_needs_no_weights(layers: list[nn.Module]) -> None:
    layers[0].forward = lambda x: x  # type: ignore[method-assign]
    layers[0](X)
    assert weights(layers)[0].dtype == torch.bfloat16


def test_without_float32_layers_keep_their_dtype(layers: list[nn.Module]) -> None:
    hosts, owner = weights(layers), LayersOnDevice(layers, CPU)
    fetch(layers[0])
    assert weights(layers)[0] is hosts[0]
    owner.end()


def test_a_model_is_placed_in_float32_and_returns_bit_for_bit() -> None:
    model = tiny_llama(tied=True).to(torch.bfloat16)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    layers = decoder_layers(model, bind(model))
    placement = Placement(model, layers, CPU, one_at_a_time=False, in_float32=True)
    placement.onload()
    assert model.model.embed_tokens.weight.dtype == torch.float32 == model.model.norm.weight.dtype
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert {p.dtype for p in layers[0].parameters()} == {torch.bfloat16}  # until its turn
    in_float32 = model(tiny_ids()).logits
    assert in_float32.dtype == torch.float32
    with placement.on_host():
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(tiny_ids()).logits, in_float32)
    placement.offload()
    assert placement.layers_on_device is None and not layers[0]._forward_pre_hooks
    assert model.model.embed_tokens.weight is model.lm_head.weight
    for name, each in model.state_dict().items():
        assert each.dtype == torch.bfloat16 and torch.equal(each, before[name]), name


def test_on_the_processor_nothing_moves() -> None:
    model = tiny_llama()
    before = [id(p) for p in model.parameters()]
    placement = Placement(model, decoder_layers(model, bind(model)), CPU, one_at_a_time=True, in_float32=False)
    placement.onload()
    assert float64_device(CPU) == CPU
    assert placement.stays and placement.layers == [] and placement.layers_on_device is None
    placement.offload()
    assert [id(p) for p in model.parameters()] == before


def test_bringing_keeps_ties_and_leaves_out_what_it_is_told_to() -> None:
    root = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    root["b"].weight, root["b"].bias = root["a"].weight, None
    root["a"].register_buffer("mask", torch.ones(2))
    bring(root, torch.device("meta"), but=[root["c"]], dtypes={(root["a"], "bias"): torch.half})
    assert root["a"].weight.is_meta and root["a"].weight is root["b"].weight and root["b"].bias is None
    assert root["a"].bias.dtype == torch.half and root["a"].weight.dtype == torch.float32
    assert root["a"].mask.is_meta and not root["c"].weight.is_meta
    same = root["a"].weight
    bring(root, torch.device("meta"), but=[root["c"]])
    assert root["a"].weight is same


def test_parameters_made_in_inference_mode_can_be_changed() -> None:
    with torch.inference_mode():
        made = parameter_on(CPU, nn.Parameter(torch.ones(2), requires_grad=False), torch.float64)
    made.add_(1)
    assert made.tolist() == [2, 2] and made.dtype == torch.float64 and not made.requires_grad
    assert parameter_on(CPU, nn.Parameter(torch.ones(2)), None).requires_grad


def test_half_precision_is_raised_where_it_is_multiplied_in_software(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)
    assert {raised(dtype) for dtype in low} == {torch.float32} and all(raised(dtype) == dtype for dtype in high)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert multiplies_in_software(CPU, torch.bfloat16) and multiplies_in_software(CPU, torch.float16)
    assert not multiplies_in_software(CPU, torch.float32)
    assert not multiplies_in_software(torch.device("cuda"), torch.bfloat16)
    for model in (tiny_llama().to(torch.bfloat16), tiny_llama()):
        assert {p.dtype for p in on_device(model, CPU).parameters()} == {torch.float32}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    operator = torch.ops.mkldnn._is_mkldnn_bf16_supported
    assert multiplies_in_software(CPU, torch.bfloat16) is not operator()


@pytest.mark.parametrize(
    ("instructions", "in_software"),
    [({"avx512"}, True), ({"avx512", "avx512_bf16"}, False), ({"avx512", "amx_tile"}, False)],
)
def test_avx512_alone_multiplies_bfloat16_in_software(
    instructions: set[str], in_software: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("avx512", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in instructions)
    assert multiplies_in_software(CPU, torch.bfloat16) is in_software


def test_a_part_of_the_free_memory_is_for_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(CPU) is None and peak_bytes_on(CPU) is None and product.peak_bytes() > 10**7
    gpu = torch.device("cuda")
    nvidia = SimpleNamespace(mem_get_info=lambda _: (1000, 4000), max_memory_allocated=lambda _: 70)
    apple = SimpleNamespace(recommended_max_memory=lambda: 2000)
    devices = [(nvidia, 850, 70), (apple, 1700, None), (SimpleNamespace(), None, None)]
    for told, free, peak in devices:
        monkeypatch.setattr(torch, "get_device_module", lambda _, told=told: told)
        assert free_bytes(gpu) == free and peak_bytes_on(gpu) == peak


def test_embeddings_are_on_disk_inside_the_context_alone(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    expected, weight = model(tiny_ids()).logits, model.model.embed_tokens.weight
    before = weight.data_ptr()
    with embeddings_on_disk(model, tmp_path, are_there=False) as map_again:
        assert [path.name for path in tmp_path.iterdir()] == ["embeddings.safetensors"]
        assert weight.data_ptr() != before and torch.equal(model(tiny_ids()).logits, expected)
        mapped = weight.data_ptr()
        map_again()
        assert weight.data_ptr() != mapped
        mapped = weight.data_ptr()
    assert weight.data_ptr() != mapped  # in memory of its own
    assert list(tmp_path.iterdir()) == [] and torch.equal(model(tiny_ids()).logits, expected)
    assert model.lm_head.weight is weight
    with embeddings_on_disk(model, tmp_path, are_there=True) as nothing:
        nothing()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["restore", "restored"])
def test_a_layer_on_disk_is_what_it_was_when_saved(tmp_path: Path, way: str) -> None:
    model = tiny_llama()
    arch, saved = bind(model), LayersOnDisk(tmp_path, "dense")
    layer, kinds = decoder_layers(model, arch)[1], ("ffn", "kv_heads")
    groups = [group for group in arch.groups if group.layer == 1 and group.name in kinds]
    # As in a family whose modules count their units.
    groups = [replace(group, counts=(f"self_attn.{group.name}_left",)) for group in groups]
    layer.self_attn.ffn_left, layer.self_attn.kv_heads_left = 112, 2  # type: ignore[assignment, union-attr]
    dense = model(tiny_ids()).logits
    saved.save(1, layer, groups)
    assert saved.indices == [1] and [path.name for path in tmp_path.iterdir()] == ["dense-1.safetensors"]
    for group in groups:
        cut(layer, group, torch.arange(1, group.num_units))
    pruned = model(tiny_ids()).logits
    assert not torch.allclose(pruned, dense)
    assert counts(layer) == (111, 1)
    if way == "restore":
        saved.restore(1, layer)
        assert counts(layer) == (112, 2) and torch.equal(model(tiny_ids()).logits, dense)
        assert not any(parameter.requires_grad for parameter in layer.parameters())
    else:
        with pytest.raises(KeyError), saved.restored(1, layer):
            assert counts(layer) == (112, 2) and torch.equal(model(tiny_ids()).logits, dense)
            raise KeyError
        assert counts(layer) == (111, 1) and torch.equal(model(tiny_ids()).logits, pruned)
    for module in layer.modules():
        assert not isinstance(module, nn.Linear) or (module.out_features, module.in_features) == module.weight.shape


def counts(layer: nn.Module) -> tuple[int, int]:
    attention: Any = layer.get_submodule("self_attn")
    return attention.ffn_left, attention.kv_heads_left


def test_saving_a_layer_again_leaves_what_is_mapped(tmp_path: Path) -> None:
    model = tiny_llama()
    layer, saved = decoder_layers(model, bind(model))[0], LayersOnDisk(tmp_path, "dense")
    before = layer.mlp.up_proj.weight.clone()
    saved.save(0, layer, [])
    saved.restore(0, layer)  # its weights are mapped from the file now
    mapped = layer.mlp.up_proj.weight
    with torch.no_grad():
        layer.mlp.up_proj.weight = nn.Parameter(2 * before, requires_grad=False)
    saved.save(0, layer, [])
    assert torch.equal(mapped, before)
    saved.restore(0, layer)
    assert torch.equal(layer.mlp.up_proj.weight, 2 * before)


def test_forgotten_weights_take_no_memory() -> None:
    layer = nn.Linear(3, 3)
    forget_weights(layer)
    assert [p.numel() for p in layer.parameters()] == [0, 0]
