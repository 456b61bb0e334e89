"""A model without some tokens: logits of the others as before, ids in its configs, what cannot be cut."""

import copy
import json
import re
from typing import Any

import pytest
import torch
from models import logits_of, tiny_gemma3, tiny_llama, tiny_qwen2
from shown import assert_sentences, refusal
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig

from secateur.model.checkpoint import open_checkpoint
from secateur.vocabulary.kept import (
    KeptTokens,
    check_weights_by_token,
    ids_named_by,
    keep_tokens,
    kept_tokens_of,
    trim_between,
)
from tests.families import FAMILIES, SIZES, row, tiny_family
from tests.trims import trimmed_pair

NUM_ROWS = 331  # no other size of the tiny models


def kept_of(model: nn.Module, seed: int = 0) -> KeptTokens:
    """Return about half of the model's tokens, with those that its configs name."""
    drawn = torch.rand(NUM_ROWS, generator=torch.Generator().manual_seed(seed)) < 0.5
    named = {index for index in ids_named_by(model) if 0 <= index < NUM_ROWS}
    return KeptTokens(tuple(sorted({*drawn.nonzero().flatten().tolist(), *named})), NUM_ROWS)


@pytest.mark.parametrize("name", [row(name) for name in FAMILIES])
def test_logits_are_the_dense_ones_of_the_kept_tokens(name):
    text = FAMILIES[name][1].get("text_config")
    sizes = {"vocab_size": NUM_ROWS}
    model = tiny_family(name, **(sizes if text is None else {"text_config": SIZES | text | sizes}))
    kept = kept_of(model)
    new_BT = torch.randint(len(kept.dense_ids), (2, 12), generator=torch.Generator().manual_seed(1))
    dense_BTV = logits_of(model, torch.tensor(kept.dense_ids)[new_BT])[..., list(kept.dense_ids)]
    cut = copy.deepcopy(model)
    keep_tokens(cut, kept)
    # Hidden states are the same bits; a product with fewer rows may add up its 48 terms in another order.
    torch.testing.assert_close(logits_of(cut, new_BT), dense_BTV, rtol=1e-6, atol=1e-6)
    assert cut.config.get_text_config().vocab_size == len(kept.dense_ids)
    assert cut.get_input_embeddings().num_embeddings == len(kept.dense_ids)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (cut.get_output_embeddings().weight is cut.get_input_embeddings().weight) == tied
    assert all(NUM_ROWS not in each.shape for each in cut.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_ids_and_rows(tied):
    model = tiny_qwen2(tied=tied, vocab_size=NUM_ROWS, pad_token_id=9)
    ids = {"bos_token_id": 1, "eos_token_id": [2, 30], "suppress_tokens": [40, -1], "begin_suppress_tokens": [41]}
    ids |= {"forced_eos_token_id": [42], "forced_decoder_ids": [[1, 43]], "bad_words_ids": [[50, 51]]}
    ids |= {"sequence_bias": [[[60], 61], [[62, 63], -2.0]], "max_length": 70}
    model.generation_config = GenerationConfig(**ids)
    model.config.image_token_id, model.config.vision_start_token_id = 90, NUM_ROWS + 5
    assert ids_named_by(model) == {1, 2, 9, 30, 40, -1, 41, 42, 43, 50, 51, 60, 62, 63, 90, NUM_ROWS + 5}
    kept = KeptTokens((1, 2, 9, 30, 40, 41, 42, 43, 50, 51, 60, 62, 63, 90, 100), NUM_ROWS)
    embedding, head = model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()
    keep_tokens(model, kept)
    assert torch.equal(model.get_input_embeddings().weight, embedding[list(kept.dense_ids)])
    assert torch.equal(model.get_output_embeddings().weight, head[list(kept.dense_ids)])
    assert model.get_input_embeddings().padding_idx == model.model.padding_idx == model.config.pad_token_id == 2
    assert model.vocab_size == model.model.vocab_size == model.get_output_embeddings().out_features == 15
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.image_token_id) == (0, 1, 13)
    assert config.vision_start_token_id == NUM_ROWS + 5
    new = {"bos_token_id": 0, "eos_token_id": [1, 3], "suppress_tokens": [4, -1], "begin_suppress_tokens": [5]}
    new |= {"forced_eos_token_id": [6], "forced_decoder_ids": [[1, 7]], "bad_words_ids": [[8, 9]]}
    new |= {"sequence_bias": [[[10], 61], [[11, 12], -2.0]], "max_length": 70}
    assert {key: getattr(model.generation_config, key) for key in new} == new


def test_a_bias_by_tokens_as_a_dict_a_head_s_bias_and_a_padding_id_below_zero():
    model = tiny_llama(vocab_size=NUM_ROWS, pad_token_id=-1)
    model.lm_head.bias = nn.Parameter(torch.arange(NUM_ROWS, dtype=torch.float32), requires_grad=False)
    model.generation_config.sequence_bias, model.generation_config.pad_token_id = {(5, 6): 7.0, (8,): -1.0}, None
    keep_tokens(model, KeptTokens((0, 1, 2, 5, 6, 8, 330), NUM_ROWS))
    assert model.generation_config.sequence_bias == {(3, 4): 7.0, (5,): -1.0} and model.config.pad_token_id == -1
    assert model.lm_head.bias.tolist() == [0, 1, 2, 5, 6, 8, 330] and not model.lm_head.bias.requires_grad
    model.generation_config = None
    keep_tokens(model, KeptTokens((1, 2, 3), 7))
    assert model.lm_head.bias.tolist() == [1, 2, 5] and model.config.bos_token_id == 0


@pytest.mark.parametrize("tied", [False, True])
def test_models_without_weights(tied):
    with torch.device("meta"):
        model = tiny_llama(tied=tied, vocab_size=NUM_ROWS)
    keep_tokens(model, kept := kept_of(model))
    head = model.get_output_embeddings().weight
    assert head.shape == model.get_input_embeddings().weight.shape == (len(kept.dense_ids), 48)
    assert head.is_meta and (head is model.get_input_embeddings().weight) == tied


def more_weights(model: Any) -> None:
    model.model.layers[1].other = nn.Embedding(NUM_ROWS, 4)


def a_bias_of_logits(model: Any) -> None:
    model.register_buffer("final_logits_bias", torch.zeros(1, NUM_ROWS))


def a_vocabulary_by_layer(model: Any) -> None:
    model.config.vocab_size_per_layer_input = 100


def a_head_of_fewer(model: Any) -> None:
    model.lm_head = nn.Linear(48, NUM_ROWS - 1, bias=False)


def a_token_that_goes(model: Any) -> None:
    model.generation_config.suppress_tokens = [0]


def test_what_cannot_be_cut_is_refused_and_nothing_is_changed():
    said = dict[str, str]()
    for change in (more_weights, a_bias_of_logits, a_vocabulary_by_layer, a_head_of_fewer, a_token_that_goes):
        model = tiny_llama(vocab_size=NUM_ROWS)
        check_weights_by_token(model)
        change(model)
        before, named = copy.deepcopy(model.state_dict()), model.config.to_dict()
        said[change.__name__] = refusal(keep_tokens, model, KeptTokens((1, 2, 3), NUM_ROWS))
        if change is not a_token_that_goes:
            assert refusal(check_weights_by_token, model) == said[change.__name__]
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert model.config.to_dict() == named
    model = tiny_gemma3(vocab_size=NUM_ROWS)
    said["a set of another model"] = refusal(keep_tokens, model, KeptTokens((0, 1, 2), 300))
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == NUM_ROWS
    assert_sentences("vocabulary/kept", said)


# What families' configs say of tokens without naming one.
NO_ID = {"num_experts_per_tok", "mm_tokens_per_image", "img_max_token_num", "tokens_per_second"}


@pytest.mark.parametrize(
    "model_type", sorted({model_type for model_type, _ in FAMILIES.values()} | {"hunyuan_vl", "molmo2"})
)
def test_every_id_that_a_family_s_config_names_is_found(model_type):
    config = CONFIG_MAPPING[model_type]()
    names = re.compile(r"token|(_id|_ids|_index)$|^suppress|pad_|eos|bos")

    def named(values: dict) -> set[int]:
        found: set[int] = set()
        for key, value in values.items():
            if isinstance(value, dict):
                found |= named(value)
            elif isinstance(key, str) and names.search(key) and key not in NO_ID and not isinstance(value, bool):
                found |= {value} if isinstance(value, int) else set(value) if isinstance(value, list) else set()
        return found

    model = tiny_llama(num_layers=1)
    model.config, model.generation_config = config, None
    assert ids_named_by(model) == named(config.to_dict())


def test_the_map_is_written_and_read(tmp_path):
    kept = KeptTokens((0, 2, 5), 7)
    kept.write(tmp_path)
    written = json.loads((tmp_path / "tokens.json").read_text(encoding="utf-8"))
    assert written == {"num_dense": 7, "num_kept": 3, "new_ids": [0, None, 1, None, None, 2, None]}
    assert kept_tokens_of(tmp_path) == kept and kept_tokens_of(tmp_path / "none") is None
    for damage in ("{", "[]", '{"new_ids": 3}', '{"new_ids": [1, 0]}', '{"new_ids": [0, 2]}', "{}"):
        (tmp_path / "tokens.json").write_text(damage, encoding="utf-8")
        assert "tokens.json: cannot be read" in refusal(kept_tokens_of, tmp_path)


def test_the_trim_between_two_models(tmp_path):
    pair = trimmed_pair(tmp_path)
    pruned, dense = open_checkpoint(pair.pruned), open_checkpoint(pair.dense)
    trim = trim_between(pruned, dense, "--against")
    assert trim is not None and trim.kept == pair.kept
    assert trim.tokenizer.get_vocab() == pair.tokenizer.get_vocab()
    assert trim.dense_tokenizer.get_vocab() == pair.dense_tokenizer.get_vocab()
    assert trim_between(pruned, pruned, "--against") is None and trim_between(dense, dense, "--against") is None
    file = pair.pruned / "tokens.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    ids = content["new_ids"]
    # Of a model with another row, of other tokens, with fewer, and none at all.
    for new_ids in ([*ids, None], [ids[-1], *ids[:-1]], ids[:-1], None):
        file.unlink()
        if new_ids is not None:
            file.write_text(json.dumps(content | {"new_ids": new_ids}), encoding="utf-8")
        assert refusal(trim_between, pruned, dense, "--against", "or else") == (
            f"CheckpointError: --against {pair.dense}: its tokenizer (701 tokens) is not that of {pair.pruned} "
            f"({len(pair.tokenizer)} tokens), so both would read different text; or else."
        )


def test_a_trim_of_padding_rows_alone_and_special_tokens_without_a_row(tmp_path):
    pair = trimmed_pair(tmp_path, share=1.0)
    pruned, dense = open_checkpoint(pair.pruned), open_checkpoint(pair.dense)
    assert pair.tokenizer.get_vocab() == pair.dense_tokenizer.get_vocab()
    found = trim_between(pruned, dense, "--against")
    assert found is not None and found.kept.dense_ids == tuple(range(701)) and found.kept.num_dense == 708
    for directory in (pair.dense, pair.pruned):  # a tokenizer that has lost it, and one that was saved with it
        content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        special = content["added_tokens"][0]  # behind the 701 tokens, the last two also behind the 7 padding rows
        content["added_tokens"] += [{**special, "id": 701 + i, "content": f"<|image{i}|>"} for i in range(9)]
        (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        assert trim_between(pruned, dense, "--against") is not None
    (pair.pruned / "tokens.json").unlink()
    said = refusal(trim_between, pruned, dense, "--against")
    assert f"it gives 708 logits and {pair.pruned} 701, so their predictions" in said
