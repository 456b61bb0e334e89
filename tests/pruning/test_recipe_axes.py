"""What the recipe adds to a plain run: budgets, protection, domain weights, other scores, rounds, the safety net."""

import copy
import re

import pytest
import torch
from families import tiny_family
from models import num_params, opened, sizes, tiny_ids, tiny_llama, tiny_qwen2
from recipes import grouped
from stops import lines_of
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, BartConfig, GraniteMoeHybridConfig

import secateur
from secateur.errors import RecipeError
from secateur.pruning.resolve import resolve
from secateur.recipe import parse_recipe

TOKENIZER = tiny_tokenizer()

# Its one FFN is called shared, and there are no experts.
GRANITE = {"shared_intermediate_size": 112, "num_local_experts": 0, "num_experts_per_tok": 0}
GRANITE |= {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 16, "mamba_chunk_size": 8}
GRANITE |= {"layer_types": ["mamba", "attention", "mamba"]}
# Its config counts the layers of an encoder.
BART = {"d_model": 48, "decoder_layers": 3, "encoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 112}
BART |= {"vocab_size": 320, "max_position_embeddings": 64, "is_encoder_decoder": False}
from_config = AutoModelForCausalLM.from_config
ODD_MODELS = {
    "dense-granite-4": lambda: from_config(GraniteMoeHybridConfig(**sizes(tied=True), **GRANITE)).eval(),
    "longer-decoder": lambda: from_config(BartConfig(**BART)).eval(),
    "float64": lambda: tiny_llama().double(),
}


@pytest.mark.parametrize("name", ODD_MODELS)
def test_the_default_groups_of_odd_models_go(name, small):
    model = ODD_MODELS[name]()
    size = num_params(model)
    result = secateur.prune(model, grouped({**small, "remove": 0.2}), tokenizer=TOKENIZER)
    assert num_params(result.model) < 0.85 * size and len(result.keeps) == 3


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: tiny_family("ministral3"), "'num_attention_heads' is a per-layer attribute"),
        (lambda: type("Mine", (type(tiny_llama()),), {})(tiny_llama().config), "Mine is no class of transformers"),
    ],
)
def test_widths_by_layer_that_cannot_be_loaded_again_are_refused_at_once(model, why, small):
    settings = {**small, "budget": "curve", "groups": ["kv_heads"]}
    with pytest.raises(RecipeError, match=rf"cannot be saved with \({why}.*use budget uniform"):
        secateur.prune(model(), grouped(settings), tokenizer=TOKENIZER)


def test_a_curve_result_loads_both_ways_and_says_so(small, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 0.01  # a layer that hardly matters
    settings = {**small, "budget": "curve", "remove": 0.2}
    result = secateur.prune(model, grouped(settings), tokenizer=TOKENIZER, out=tmp_path / "out")
    found, step = {key: len(keep) for key, keep in result.keeps.items()}, 8 * 3 * 48
    assert 0.2 <= result.summary.remove_reached < 0.2 + step / num_params(tiny_llama())
    assert all(count % 8 == 0 for count in found.values())
    assert found[1, "ffn"] < min(found[0, "ffn"], found[2, "ffn"])
    assert result.summary.widths["ffn"] == (112, min(found.values()), max(found.values()))
    assert result.summary.reload_max_abs_difference == 0
    expected = result.model(tiny_ids()).logits
    trusting = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for loaded in (secateur.load(tmp_path / "out"), trusting):
        torch.testing.assert_close(loaded(tiny_ids()).logits, expected, atol=1e-6, rtol=0)
    assert "secateur.load" in (tmp_path / "out" / "README.md").read_text()


def test_a_protected_domain_is_planned_for(small):
    settings = grouped({**small, "budget": "curve", "remove": 0.3})
    settings["calibration"] = copy.deepcopy(settings["calibration"])
    settings["calibration"]["domains"]["code"]["protect"] = 0.001
    with pytest.raises(secateur.SecateurError, match=r"would raise a protected domain's loss .*code"):
        secateur.prune(tiny_llama(), settings, tokenizer=TOKENIZER)


def test_scores_of_other_methods_run_in_rounds(small, tmp_path):
    """Each round scores the units that are left anew, by the score asked for: others choose other units."""
    settings = {**small, "compensate": "none", "rounds": 2, "groups": ["ffn", "kv_heads"]}
    kept, whole = {}, num_params(tiny_qwen2())
    for name in ("paper", "magnitude"):
        out = tmp_path / name
        result = secateur.prune(tiny_qwen2(), grouped({**settings, "score": name}), tokenizer=TOKENIZER, out=out)
        assert result.summary.remove_reached == pytest.approx(0.2, abs=0.01)
        left = lines_of(out, "round")
        assert [1 - line["num_params"] / whole for line in left] == pytest.approx([0.1, 0.2], abs=0.04)
        assert left[-1]["num_params"] == num_params(result.model)
        assert set(left[0]["nats_per_token"]) == {"prose", "code"}
        kept[name] = [tuple(keep.tolist()) for (_, group), keep in result.keeps.items() if group == "ffn"]
    lines = lines_of(tmp_path / "paper", "group")
    assert [line["round"] for line in lines] == [1] * 6 + [2] * 6
    for first, second in zip(lines[:6], lines[6:], strict=True):
        assert first["kept"] == second["total"] >= second["kept"] == len(result.keeps[second["layer"], second["group"]])
        assert first["output_energy"] != second["output_energy"] or first["group"] == "kv_heads"
    assert all(ours != theirs for ours, theirs in zip(kept["paper"], kept["magnitude"], strict=True))


def test_the_least_size_that_is_named_is_one_that_a_cut_leaves(small):
    def asking(to: int):
        rest = {key: value for key, value in small.items() if key != "remove"}
        return opened(tiny_llama(), parse_recipe(grouped({**rest, "to": f"{to}"})))

    with pytest.raises(secateur.SecateurError, match=r"remove\.to: 1000 is less than a cut can leave") as caught:
        asking(1000)
    least = int(re.search(r"leave ([\d,]+) parameters", str(caught.value))[1].replace(",", ""))
    started = asking(least)
    assert resolve(started).plans[-1].cost_after == least
    with pytest.raises(secateur.SecateurError, match=rf"remove\.to: {least - 1} is less than a cut can leave"):
        asking(least - 1)
