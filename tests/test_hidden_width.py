"""Hidden width: the cut equals zeroed channels after a stock reload; scores equal brute force; refits help."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.arch import bind, decoder_layers
from secateur.arch_spec import ArchSpec, load_specs
from secateur.checkpoint import load_model, open_checkpoint
from secateur.cut import cut
from secateur.errors import ArchError, NumericsError, RecipeError
from secateur.hidden_cut import check_hidden_size, cut_hidden, hidden_of
from secateur.hidden_width import channel_scores, narrow, remove_channels
from secateur.per_layer import record_widths
from secateur.recipe import Recipe
from secateur.summary import Size
from secateur.walk import make_batches
from tests.families import tiny_family
from tests.models import tiny_ids, tiny_llama, tiny_qwen2
from tests.test_exactness import FAMILIES, logits_of

# Families that take their residual stream from another family's file.
LIKE_OTHERS = [
    pytest.param(partial(tiny_family, name), id=name)
    for name in ("ministral", "ministral3", "gemma2", "smollm3", "hunyuan_dense", "ernie4_5", "seed_oss")
]
KEEP = torch.tensor([j for j in range(48) if j % 6 != 1])


def zero_channels(model, arch, removed):
    """Set the removed channels to zero in everything that writes to the stream."""
    hidden = hidden_of(arch)
    with torch.no_grad():
        model.get_submodule(hidden.embedding).weight[:, removed] = 0
        for layer in decoder_layers(model, arch):
            for writer in (layer.get_submodule(name) for name in hidden.writers):
                writer.weight[removed] = 0
                if writer.bias is not None:
                    writer.bias[removed] = 0


@pytest.mark.parametrize("factory", [*FAMILIES, *LIKE_OTHERS])
def test_cut_saved_and_reloaded_by_stock_transformers_equals_zeroed_channels(factory, tmp_path):
    model = factory(rms_norm_eps=1e-10)  # the one thing that weighs more over fewer channels
    arch, before = bind(model), Size.of(model).num_params
    zeroed = copy.deepcopy(model)
    zero_channels(zeroed, arch, sorted(set(range(48)) - set(KEEP.tolist())))
    narrow = cut_hidden(model, arch, KEEP)
    assert before - Size.of(model).num_params == 8 * arch.hidden.params_per_channel
    assert (narrow.hidden.num_channels, narrow.hidden.params_per_channel) == (40, arch.hidden.params_per_channel)
    assert [group.num_units for group in narrow.groups] == [group.num_units for group in arch.groups]
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is type(zeroed)
    assert (reloaded.config.hidden_size, reloaded.config.head_dim) == (40, zeroed.model.layers[0].self_attn.head_dim)
    ids_BT = tiny_ids()
    expected = logits_of(zeroed, ids_BT)
    assert not torch.allclose(logits_of(factory(), ids_BT), expected, atol=0.1)
    torch.testing.assert_close(logits_of(model, ids_BT), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(reloaded, ids_BT), expected, atol=1e-5, rtol=1e-5)
    assert Size.of(reloaded) == Size.of(model)
    tied = reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()
    assert tied == zeroed.config.tie_word_embeddings


@pytest.mark.parametrize("factory", [*FAMILIES, *LIKE_OTHERS])
def test_permuting_channels_changes_nothing(factory):
    model, ids_BT = factory(), tiny_ids()
    before = logits_of(model, ids_BT)
    cut_hidden(model, bind(model), torch.randperm(48, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(logits_of(model, ids_BT), before, atol=1e-5, rtol=1e-5)


def test_a_model_with_widths_per_layer_is_cut_too(tmp_path):
    model = tiny_llama(rms_norm_eps=1e-10)
    arch = bind(model)
    group = arch.select(("ffn",))[1]
    cut(decoder_layers(model, arch)[1], group, torch.arange(40), group.num_units)
    record_widths(model, arch)
    arch, before = bind(model), Size.of(model).num_params
    zeroed = copy.deepcopy(model)
    zero_channels(zeroed, arch, sorted(set(range(48)) - set(KEEP.tolist())))
    cut_hidden(model, arch, KEEP)
    assert before - Size.of(model).num_params == 8 * arch.hidden.params_per_channel
    model.save_pretrained(tmp_path)
    for each in (model, load_model(open_checkpoint(tmp_path))):
        torch.testing.assert_close(logits_of(each, tiny_ids()), logits_of(zeroed, tiny_ids()), atol=1e-5, rtol=1e-5)


def test_widths_that_cannot_be_say_so():
    arch = bind(tiny_llama())  # four heads, of which a llama's hidden size must be a multiple
    for size, message in ((42, "multiples of its number of heads, 4, got 42; use 40 or 44"), (48, "below the model's"),
                          (2, "use 4"), (0, "above 0")):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            check_hidden_size(arch, size)
    check_hidden_size(bind(tiny_qwen2()), 42)
    with pytest.raises(ArchError, match="hidden_size: family llama cannot lose hidden width"):
        hidden_of(dataclasses.replace(arch, hidden=None))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"embedding": "model.embed"}, "did you mean 'model.embed_tokens'"),
        ({"readers": {"input_layernrm": ["mlp.up_proj"]}}, "did you mean 'input_layernorm'"),
        ({"writers": ["mlp.up_proj"]}, "layer 0, mlp.up_proj is 112 wide, but config hidden_size=48"),
        ({"writers": ["mlp"]}, "mlp is a LlamaMLP"),
        ({"embedding_scales": ["embed_scale"]}, "model.embed_tokens has no 'embed_scale'"),
    ],
)
def test_a_broken_spec_is_caught(monkeypatch, wrong, message):
    spec = load_specs()["llama"].model_dump()
    spec["hidden"].update(wrong)
    monkeypatch.setattr("secateur.arch.find_spec", lambda _: ("llama", ArchSpec.model_validate(spec)))
    with pytest.raises(ArchError, match=message):
        bind(tiny_llama())


def batches_of(*, blocks=64, length=32, domains=("a", "b")):
    batches = []
    for seed, name in enumerate(domains):
        batches += make_batches(name, tiny_ids(batch=blocks, length=length, seed=seed), held_out=False)
        batches += make_batches(name, tiny_ids(batch=4, length=length, seed=seed + 50), held_out=True)
    return batches


SHARES = {"a": 0.5, "b": 0.5}


def norm_output(model, norm, ids_BT):
    seen = []
    handle = norm.register_forward_hook(lambda _, __, output: seen.append(output))
    logits_of(model, ids_BT)
    handle.remove()
    return seen[0].flatten(0, 1).double()


@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_what_is_lost_after_refitting(tied):
    model, recipe = tiny_qwen2(num_layers=1, tied=tied), Recipe()
    ids = {"a": tiny_ids(batch=16, seed=0), "b": tiny_ids(batch=16, seed=1)}
    batches = [batch for name, ids_BT in ids.items() for batch in make_batches(name, ids_BT, held_out=False)]
    scores = channel_scores(model, bind(model), batches, SHARES, recipe)
    layer, head = model.model.layers[0], model.lm_head.weight.detach().double()
    attention = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    weights = [torch.cat([reader.weight.detach().double() for reader in readers])
               for readers in (attention, [layer.mlp.gate_proj, layer.mlp.up_proj])]  # fmt: skip
    norms = [layer.input_layernorm, layer.post_attention_layernorm, model.model.norm]
    for channel in (0, 7, 47):
        rest = [j for j in range(48) if j != channel]
        expected = 0.0
        for norm, weight in zip(norms, [*weights, head - head.mean(0)], strict=True):
            hessian = torch.zeros(48, 48, dtype=torch.float64)
            for ids_BT in ids.values():
                output = norm_output(model, norm, ids_BT)
                hessian += 0.5 * output.T @ output / (output @ weight.T).square().sum()
            damped = hessian + recipe.damping * hessian.diagonal().mean() * torch.eye(48)
            new = weight.clone()
            new[:, channel] = 0
            if norm is norms[2] and tied:
                damped = hessian
            else:
                new[:, rest] += (
                    weight[:, [channel]] @ torch.linalg.solve(damped[rest][:, rest], damped[rest, channel])[None]
                )
            error = (((weight - new) @ damped) * (weight - new)).sum()
            expected += float(error)
        assert float(scores[channel]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("factory", FAMILIES)
def test_refitted_readers_bring_the_model_nearer_and_reload(factory, tmp_path):
    dense, errors, lines = factory(), {}, []
    ids_BT, batches, arch = tiny_ids(batch=16, length=32, seed=99), batches_of(), bind(dense)
    for compensate in ("none", "least_squares"):
        model = factory()
        narrow(model, arch, batches, SHARES, KEEP, Recipe(compensate=compensate), lines.append)
        assert model.config.hidden_size == 40
        errors[compensate] = float((logits_of(model, ids_BT) - logits_of(dense, ids_BT)).square().mean())
    assert errors["least_squares"] < errors["none"]
    assert len(lines) == 5 * 3 + (not dense.config.tie_word_embeddings)
    assert all(line["error_after"][name] <= line["error_before"][name] for line in lines for name in SHARES)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), ids_BT), logits_of(model, ids_BT)
    )


@pytest.mark.parametrize("factory", [tiny_llama, tiny_qwen2])
def test_a_share_of_the_drift_brings_the_model_nearer_still(factory):
    dense, errors = factory(), {}
    ids_BT, arch = tiny_ids(batch=16, length=32, seed=99), bind(dense)
    for mix in (0.0, 0.5):
        model, lines = factory(), []
        narrow(model, arch, batches_of(blocks=128), SHARES, KEEP, Recipe(target_mix=mix), lines.append)
        errors[mix] = float((logits_of(model, ids_BT) - logits_of(dense, ids_BT)).square().mean())
    assert errors[0.5] < errors[0.0]
    mended = [line for line in lines if "norm" not in line]
    assert [line["layer"] for line in mended] == [0, 1, 2] and {line["reader"] for line in mended} == {"mlp.down_proj"}
    assert all(line["error_after"][name] <= line["error_before"][name] for line in mended for name in SHARES)


def test_without_drift_nothing_is_made_up_for():
    """Channels that say nothing go: the dense stream and the narrow one are the same, so the readers stay."""
    model = tiny_llama()
    zero_channels(model, bind(model), sorted(set(range(48)) - set(KEEP.tolist())))
    before = [layer.mlp.down_proj.weight.detach()[KEEP] for layer in model.model.layers]
    narrow(model, bind(model), batches_of(blocks=16), SHARES, KEEP, Recipe(target_mix=0.5))
    for layer, weight in zip(model.model.layers, before, strict=True):
        torch.testing.assert_close(layer.mlp.down_proj.weight.detach(), weight, atol=1e-3, rtol=1e-3)


def test_rows_are_refitted_by_parts_as_all_at_once(monkeypatch):
    found = []
    for max_rows in (100, 16384):
        monkeypatch.setattr("secateur.hidden_width.MAX_ROWS", max_rows)
        model, lines = tiny_llama(), []
        narrow(model, bind(model), batches_of(), SHARES, KEEP, Recipe(), lines.append)
        assert {line["step"] for line in lines} == {1}
        found.append((model, [line["first_row"] for line in lines if line["reader"] == "lm_head"]))
    assert [rows for _, rows in found] == [[0, 100, 200, 300], [0]]
    for name, tensor in found[0][0].state_dict().items():
        torch.testing.assert_close(tensor, found[1][0].state_dict()[name], atol=1e-5, rtol=1e-5)


def test_channels_that_say_nothing_go_first():
    model, silent = tiny_llama(), [3, 10, 11, 40]
    zero_channels(model, bind(model), silent)
    before = logits_of(model, tiny_ids())
    arch, keep = remove_channels(model, bind(model), batches_of(blocks=16), SHARES, 44, Recipe())
    assert sorted(set(range(48)) - set(keep.tolist())) == silent and arch.hidden.num_channels == 44
    torch.testing.assert_close(logits_of(model, tiny_ids()), before, atol=1e-3, rtol=1e-3)


def test_an_output_that_is_not_finite_names_layer_norm_and_domain():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(NumericsError, match=r"layer 1, input_layernorm, domain a"):
        channel_scores(model, bind(model), batches_of(blocks=4), SHARES, Recipe())
