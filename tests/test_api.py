"""The Python API: a model in memory is pruned in place and stays a model, which a path gives too."""

import re
from pathlib import Path

import pytest
import torch
from models import tiny_ids, tiny_llama
from recipes import grouped
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import secateur
from secateur.model.checkpoint import check_in_memory, restore_buffers

TOKENIZER = tiny_tokenizer()


def test_names_are_sorted_there_and_those_of_the_docs():
    assert secateur.__all__ == sorted(secateur.__all__)
    assert all(hasattr(secateur, name) for name in secateur.__all__)
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: secateur\.(\w+)$", page, flags=re.MULTILINE)) == secateur.__all__


@pytest.fixture(scope="module")
def pruned(small) -> secateur.Result:
    """What a model in memory became."""
    result = secateur.prune(model := tiny_llama(), grouped(small), tokenizer=TOKENIZER)
    assert result.model is model and result.tokenizer is TOKENIZER and result.out is None
    return result


def test_a_model_in_memory_is_pruned_in_place_and_can_be_trained(pruned):
    model, result = pruned.model, pruned
    assert model.config.intermediate_size == 64
    assert result.summary.own_answers is None and result.summary.other_text is None, "nothing was to be judged"
    assert sum(p.numel() for p in model.parameters()) == result.summary.pruned_size.num_params
    assert {key: len(keep) for key, keep in result.keeps.items()} == {(layer, "ffn"): 64 for layer in range(3)}
    loss = model(tiny_ids(), labels=tiny_ids()).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.is_inference(), name
        assert torch.isfinite(parameter.grad).all(), name
    assert model.generate(tiny_ids(batch=1), attention_mask=torch.ones(1, 16), max_new_tokens=4).shape == (1, 20)


def test_a_path_and_a_model_in_memory_give_the_same_weights(checkpoints, small, pruned):
    loaded, weights = secateur.prune(str(checkpoints["llama"]), grouped(small)), pruned.model.state_dict()
    assert loaded.summary.model == checkpoints["llama"].name
    assert loaded.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())


def test_dropout_is_off_while_measuring_and_on_again_afterwards(small, pruned):
    noisy, quiet = tiny_llama(attention_dropout=0.5).train(), pruned.model.state_dict()
    noisy.lm_head.eval()
    secateur.prune(noisy, grouped(small), tokenizer=TOKENIZER)
    assert all(torch.equal(tensor, quiet[name]) for name, tensor in noisy.state_dict().items())
    assert noisy.training and noisy.model.layers[0].mlp.down_proj.training and not noisy.lm_head.training


def test_rounded_rotary_frequencies_become_those_of_the_checkpoint(checkpoints, small, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).to(torch.bfloat16)
    exact = tiny_llama().model.rotary_emb.inv_freq
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    result = secateur.prune(model, grouped(small), tokenizer=TOKENIZER, out=tmp_path / "out")
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    assert result.summary.reload_max_abs_difference == 0
    [note] = [note for note in result.summary.warnings if note.startswith("model.rotary_emb.inv_freq")]
    assert "differed from what loading the checkpoint computes" in note
    assert note in (tmp_path / "out" / "README.md").read_text()
    # The model knows where it was loaded from; what is saved must not.
    assert str(checkpoints["llama"]) not in (tmp_path / "out" / "config.json").read_text()


def test_rotary_frequencies_rounded_and_cast_back_are_found_by_value():
    model = tiny_llama().to(torch.float16).to(torch.float32)
    assert len(restore_buffers(model)) == 2
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny_llama().model.rotary_emb.inv_freq)
    assert restore_buffers(model) == ()
    assert "model.rotary_emb.inv_freq" not in model.state_dict()


def refused(match, *arguments, **options):
    with pytest.raises(secateur.SecateurError, match=match) as raised:
        secateur.prune(arguments[0], *map(grouped, arguments[1:]), **options)
    assert "\n" not in str(raised.value)


class MineConfig(LlamaConfig):
    model_type = "mine"


def test_a_model_type_of_the_users_own_is_refused_at_once_where_a_result_is_written(small, tmp_path):
    model, said = tiny_llama(), list[str]()
    model.config.__class__ = MineConfig
    match = "out: nobody could load the result, as transformers itself has no model of type 'mine'; leave OUT out"
    refused(match, model, small, tokenizer=TOKENIZER, out=tmp_path / "out", tell=said.append)
    assert said == [] and list(tmp_path.iterdir()) == []


def test_mistakes_are_one_sentence(small):
    refused("tokenizer: a model in memory comes without one; pass tokenizer=", tiny_llama(), small)
    quantised = tiny_llama()
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    refused("model: it was loaded from quantised weights", quantised, small, tokenizer=TOKENIZER)
    broken = tiny_llama()
    broken.model.norm.weight.data[0] = torch.nan
    refused("weight model.norm.weight of the model holds NaN or infinity", broken, small, tokenizer=TOKENIZER)
    assert broken.config.intermediate_size == 112
    with pytest.raises(secateur.SecateurError, match="must be a transformers PreTrainedModel or a path, got Linear"):
        check_in_memory(torch.nn.Linear(2, 2), TOKENIZER)
