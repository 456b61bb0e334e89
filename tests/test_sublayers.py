"""Whole attentions and MLPs as units of a budget: planned, cut, compensated, reloaded; exact at every step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gemma3, tiny_ids, tiny_llama, tiny_qwen2
from tiny_tokenizer import tiny_tokenizer
from torch import nn

import secateur
from secateur.arch import bind, decoder_layers
from secateur.errors import RecipeError
from secateur.level_database import LevelDatabase
from secateur.modeling_per_layer import skip_sublayer
from secateur.on_disk import LayersOnDisk
from secateur.per_layer import record_widths
from secateur.probe import Probe
from secateur.profile import ProfileSettings, profile
from secateur.walk import make_batches

TOKENIZER = tiny_tokenizer()
FACTORIES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gemma3": tiny_gemma3}
WRITERS = {"kv_heads": "self_attn.o_proj", "ffn": "mlp.down_proj"}


@pytest.fixture(scope="module")
def settings(recipe) -> dict[str, Any]:
    return {
        **recipe,
        "evaluate": False,
        "budget": "curve",
        "sublayers": True,
        "groups": ["ffn", "kv_heads"],
        "generations": 2,
        "offspring": 3,
    }


def quiet_model(factory: Any, **options: Any) -> Any:
    """Return a tiny model whose second attention and third MLP hardly matter."""
    model = factory(num_layers=4, **options)
    with torch.no_grad():
        for index, writer, norm in ((1, "self_attn.o_proj", "attention"), (2, "mlp.down_proj", "feedforward")):
            layer = model.model.layers[index]
            layer.get_submodule(writer).weight *= 1e-4
            if factory is tiny_gemma3:  # which norms what it has written, times 1 + weight
                layer.get_submodule(f"post_{norm}_layernorm").weight.fill_(-0.9999)
    return model


def gone(result: secateur.Result) -> set[tuple[int, str]]:
    return {key for key, keep in result.keeps.items() if len(keep) == 0}


def with_zeros(model: Any, result: secateur.Result) -> Any:
    """Return the dense model with what the result lacks set to zero: a mask in place of the cut."""
    arch = bind(model)
    layers = decoder_layers(model, arch)
    for group in arch.select(("ffn", "kv_heads")):
        removed = sorted(set(range(group.num_units)) - set(result.keeps[group.layer, group.name].tolist()))
        reader: Any = layers[group.layer].get_submodule(group.reader.module)
        width = group.width
        with torch.no_grad():
            for unit in removed:
                reader.weight[:, unit * width : (unit + 1) * width] = 0
            if len(removed) == group.num_units and reader.bias is not None:
                reader.bias.zero_()
    return model


@pytest.mark.parametrize("budget", ["curve", "search"])
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_sublayers_that_do_not_matter_go_and_the_reload_equals_the_mask(budget, factory, settings, tmp_path):
    model = quiet_model(factory)
    asked = {**settings, "budget": budget, "compensate": "none", "remove": 0.2}
    result = secateur.prune(model, asked, tokenizer=TOKENIZER, out=tmp_path / "out")
    assert {(1, "kv_heads"), (2, "ffn")} <= gone(result)
    expected = with_zeros(quiet_model(factory), result)(tiny_ids()).logits
    loaded: Any = secateur.load(tmp_path / "out")
    torch.testing.assert_close(loaded(tiny_ids()).logits, expected, atol=1e-5, rtol=0)
    assert not any(name.startswith("self_attn") for name, _ in loaded.model.layers[1].named_parameters())
    assert result.summary.remove_reached >= 0.2


def test_a_bias_of_the_reader_goes_with_its_sublayer(settings, tmp_path):
    model = quiet_model(tiny_llama, mlp_bias=True, attention_bias=True)
    reference = quiet_model(tiny_llama, mlp_bias=True, attention_bias=True)
    for each in (model, reference):
        with torch.no_grad():
            each.model.layers[2].mlp.down_proj.bias *= 1e-4
    asked = {**settings, "budget": "search", "compensate": "none", "remove": 0.2}
    result = secateur.prune(model, asked, tokenizer=TOKENIZER, out=tmp_path / "out")
    assert (2, "ffn") in gone(result)
    expected = with_zeros(reference, result)(tiny_ids()).logits
    torch.testing.assert_close(secateur.load(tmp_path / "out")(tiny_ids()).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_compensated_in_rounds_repeats_to_the_bit(factory, settings, tmp_path):
    asked = {**settings, "rounds": 3, "remove": 0.25, "keep_rounds": True}
    results = [
        secateur.prune(quiet_model(factory), asked, tokenizer=TOKENIZER, out=tmp_path / name) for name in ("a", "b")
    ]
    assert gone(results[0])
    assert results[0].summary.reload_max_abs_difference == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_way_back_brings_sublayers_back(tmp_path):
    model = tiny_llama()
    arch = bind(model)
    before, stored = model(tiny_ids()).logits, LayersOnDisk(tmp_path, "held")
    for index, layer in enumerate(decoder_layers(model, arch)):
        stored.keep(index, layer, [group for group in arch.groups if group.layer == index])
    for index, sublayer in ((0, "attention"), (2, "mlp")):
        skip_sublayer(decoder_layers(model, arch)[index], sublayer, index)
    record_widths(model, arch)
    assert model.config.per_layer_config[2].skip == ["mlp"]
    for index, layer in enumerate(decoder_layers(model, arch)):
        stored.put_back(index, layer)
    record_widths(model, arch)
    assert type(model) is type(tiny_llama()) and not model.config.is_heterogeneous
    assert torch.equal(model(tiny_ids()).logits, before)


def test_kl_without_a_group_is_that_of_the_model_without_it():
    model = tiny_qwen2()
    arch = bind(model)
    groups = arch.select(("ffn", "kv_heads"))
    ids = tiny_ids(batch=4, length=24)
    batches = make_batches("words", ids, held_out=False)
    settings = ProfileSettings("energy", {"words": 1.0}, 1e-3, 8, 8, 0.3, 4, 64, to_zero=True)
    found = profile(model, arch, groups, batches, settings)
    for group in groups:
        assert found[group.layer, group.name].levels[-1] == 0
        without = tiny_qwen2()
        probe = Probe(without, bind(without), batches, 4)
        writer: Any = without.model.layers[group.layer].get_submodule(WRITERS[group.name])
        nn.init.zeros_(writer.weight)
        expected = probe.kl()["words"]
        assert found[group.layer, group.name].kl_without["words"] == pytest.approx(expected, rel=1e-3)


def test_level_zero_of_the_database_is_nothing_and_the_first_level_all(tmp_path):
    reader = nn.Linear(6, 4)
    weight, bias = reader.weight.detach().clone(), reader.bias.detach().clone()
    database, all_columns = LevelDatabase(tmp_path), torch.arange(6)
    database.add((0, "ffn"), 6, all_columns, weight, reader.bias)
    database.add((0, "ffn"), 0, all_columns[:0], weight[:, :0], reader.bias)
    database.load_into(reader, (0, "ffn"), 0)
    assert not reader(torch.randn(3, 6)).any()
    database.load_into(reader, (0, "ffn"), 6)
    assert torch.equal(reader.weight, weight) and torch.equal(reader.bias, bias)


def test_a_layer_kept_on_disk_comes_back_with_what_was_skipped(tmp_path: Path):
    model = tiny_llama()
    layer: Any = model.model.layers[1]
    before = model(tiny_ids()).logits
    stored = LayersOnDisk(tmp_path, "dense")
    stored.keep(1, layer, [group for group in bind(model).groups if group.layer == 1])
    skip_sublayer(layer, "attention", 1)
    without = model(tiny_ids()).logits
    with stored.in_place(1, layer):
        assert torch.equal(model(tiny_ids()).logits, before)
    assert torch.equal(model(tiny_ids()).logits, without)
    assert sum(p.numel() for p in stored.modules[1]["self_attn"].parameters()) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "uniform"}, "sublayers: only budgets curve and search"),
        ({"min_keep": 0.2}, "sublayers: a group cannot go whole while min_keep: 0.2"),
    ],
)
def test_what_cannot_be_is_one_sentence(changes, message, settings):
    with pytest.raises(RecipeError, match=message):
        secateur.prune(tiny_llama(), {**settings, **changes}, tokenizer=TOKENIZER)
