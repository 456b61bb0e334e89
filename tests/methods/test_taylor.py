"""Taylor scores: layer by layer equals autograd on the whole model; units of any width; nothing is left behind."""

from dataclasses import replace

import pytest
import torch
from models import tiny_ids, tiny_llama, tiny_qwen2

from secateur.errors import NumericsError
from secateur.methods.scores import taylor_scores
from secateur.model.bind import bind, decoder_layers
from secateur.model.group import Axis, Linears, cut, rows_of
from secateur.stream.walk import make_batches

HEAD_DIM = 12


def groups_of(arch):
    """Return the channels of every layer, and KV groups with their two query heads each."""
    channels = arch.select(("ffn",))
    attention = {
        f"self_attn.{name}": (rows * HEAD_DIM,) for name, rows in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1))
    }
    heads = [
        replace(
            group,
            name="heads",
            num_units=2,
            kind="heads",
            parts=Linears(tuple(Axis(*item) for item in attention.items()), Axis("self_attn.o_proj", (2 * HEAD_DIM,))),
        )
        for group in channels
    ]
    return (*channels, *heads)


def autograd_scores(model, arch, groups, ids_BT):
    """The definition, unit by unit, from one backward of the whole model."""
    model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    scores = {}
    for group in groups:
        layer = decoder_layers(model, arch)[group.layer]
        for unit in range(group.num_units):
            score = 0.0
            for axis in group.writers:
                module = layer.get_submodule(axis.module)
                rows = rows_of(torch.tensor([unit]), axis.segments, group.num_units)
                score += (module.weight * module.weight.grad)[rows].abs().sum()
                if module.bias is not None:
                    score += (module.bias * module.bias.grad)[rows].abs().sum()
            module = layer.get_submodule(group.reader.module)
            columns = rows_of(torch.tensor([unit]), group.reader.segments, group.num_units)
            score += (module.weight * module.weight.grad)[:, columns].abs().sum()
            scores.setdefault((group.layer, group.name), []).append(score.detach())
    model.zero_grad()
    return {key: torch.stack(values) for key, values in scores.items()}


def assert_close(found, expected, rtol):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=rtol, atol=0)


SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.mark.parametrize(
    "factory, settings",
    [
        (tiny_llama, {}),
        (tiny_llama, {"tied": True, "attention_bias": True, "mlp_bias": True}),
        (tiny_qwen2, {}),
        (tiny_qwen2, {"tied": True}),
        (tiny_qwen2, SLIDING),
    ],
)
def test_equals_autograd_on_the_whole_model(factory, settings):
    model, ids_BT = factory(**settings), tiny_ids(batch=5, length=80)
    arch = bind(model)
    groups = groups_of(arch)
    expected = autograd_scores(model, arch, groups, ids_BT)
    one, many = (make_batches("d", ids_BT, held_out=False, batch_tokens=size) for size in (400, 160))
    assert (len(one), len(many)) == (1, 3)
    for batches in (one, many):
        assert_close(taylor_scores(model, arch, groups, batches), expected, rtol=1e-5)


def test_only_calibration_counts_and_only_the_asked_groups():
    model, ids_BT = tiny_llama(), tiny_ids(batch=2)
    arch = bind(model)
    calibration = make_batches("d", ids_BT, held_out=False)
    both = calibration + make_batches("d", tiny_ids(seed=9), held_out=True)
    group = arch.select(("ffn",))[1]
    (alone,) = taylor_scores(model, arch, (group,), both).items()
    assert alone[0] == (1, "ffn")
    torch.testing.assert_close(alone[1], taylor_scores(model, arch, arch.select(("ffn",)), calibration)[1, "ffn"])


def test_nothing_is_left_behind():
    model, arch = tiny_qwen2(tied=True), bind(tiny_qwen2(tied=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: index % 3 > 0 for index, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    with torch.no_grad():  # as the loop runs
        scores = taylor_scores(model, arch, groups_of(arch), make_batches("d", tiny_ids(), held_out=False))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(score.requires_grad for score in scores.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_cut_model_can_be_scored_again():
    model, ids_BT = tiny_llama(), tiny_ids()
    arch = bind(model)
    cut(decoder_layers(model, arch)[1], arch.select(("ffn",))[1], torch.arange(40), 112)
    scores = taylor_scores(model, arch, arch.select(("ffn",)), make_batches("d", ids_BT, held_out=False))
    assert {key[0]: len(score) for key, score in scores.items()} == {0: 112, 1: 40, 2: 112}


def test_bfloat16_gradients_are_summed_in_float32():
    model, ids_BT = tiny_llama(), tiny_ids(batch=64)
    arch = bind(model)
    expected = taylor_scores(model, arch, arch.select(("ffn",)), make_batches("d", ids_BT, held_out=False))
    batches = make_batches("d", ids_BT, held_out=False, batch_tokens=16)
    found = taylor_scores(model.to(torch.bfloat16), arch, arch.select(("ffn",)), batches)
    for key, score in found.items():
        assert score.dtype == torch.float32
        assert float((score / expected[key] - 1).abs().mean()) < 0.05


def test_not_finite_is_an_error_that_says_where():
    model, arch = tiny_llama(), bind(tiny_llama())
    batches = make_batches("legal", tiny_ids(), held_out=False)
    weight = model.model.layers[1].mlp.up_proj.weight
    handle = weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NumericsError, match=r"layer 1, mlp\.up_proj: the gradient"):
        taylor_scores(model, arch, arch.select(("ffn",)), batches)
    handle.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        weight[3, 3] = torch.nan
    with pytest.raises(NumericsError, match="domain legal: the loss is nan"):
        taylor_scores(model, arch, arch.select(("ffn",)), batches)
