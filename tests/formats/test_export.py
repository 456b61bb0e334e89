"""GGUF export: the file opened again is the model and the tokenizer it was made from; what cannot be is refused."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bpe_tokenizer import bpe_tokenizer, sentencepiece_tokenizer
from models import tiny_gemma, tiny_gemma3, tiny_ids, tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3, written
from run_cli import run_cli
from shown import assert_shown
from transformers import AutoModelForCausalLM, GgufConfig, HunYuanDenseV1Config, LlamaConfig, OPTConfig, OPTForCausalLM
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding

from secateur.errors import SecateurError
from secateur.formats.gguf import export
from secateur.formats.gguf_tensors import interleave_rotary, rotary
from secateur.formats.save import have_llama_cpp, open_llama_cpp
from secateur.model.checkpoint import load_model, load_tokenizer, open_checkpoint
from secateur.model.stock import quiet_transformers
from secateur.vocabulary.kept import KeptTokens, keep_tokens
from secateur.vocabulary.tokenizer import read_vocabulary, trimmed_tokenizer, with_parts
from tests.families import tiny_family

needs_llama_cpp = pytest.mark.skipif(not have_llama_cpp(), reason="needs llama-cpp-python")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": lambda **more: tiny_llama(**SIZES, **more),
    "llama-tied": lambda **more: tiny_llama(tied=True, **SIZES, **more),
    "qwen2": lambda **more: tiny_qwen2(**SIZES, **more),
    "qwen2-tied": lambda **more: tiny_qwen2(tied=True, **SIZES, **more),
    "qwen3": lambda **more: tiny_qwen3(**SIZES, **more),
    "mistral": lambda **more: tiny_mistral(**SIZES | {"vocab_size": 400, "sliding_window": None} | more),
    "gemma-tied": lambda **more: tiny_gemma(**SIZES | {"vocab_size": 400} | more),
    "fewer-heads": lambda **more: tiny_llama(
        **SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=16, **more
    ),
    # As llama.cpp has it: every sixth layer without a window.
    "gemma3-tied": lambda **more: tiny_gemma3(
        num_layers=7, **SIZES | {"vocab_size": 400, "sliding_window_pattern": 6} | more
    ),
}
TOKENIZERS = {"mistral": "mistral", "gemma": "gemma", "gemma3_text": "gemma"}  # of families with SentencePiece's
SENTENCEPIECE = ["mistral", "llama", "gemma"]
PLAIN_PIECES = ["they said it's 12345  ferries\n\n\n", "Паром 海 \N{ROCKET}\0\r\n", "bananas, nanana leaves"]
PIECES = ["  odd", "a<s>b  </s>", *PLAIN_PIECES]
GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
LAYER |= {f"attn_{each}": f"self_attn.{each}_proj" for each in "qkv"} | {"attn_output": "self_attn.o_proj"}
LAYER |= {f"attn_{each}_norm": f"self_attn.{each}_norm" for each in "qk"}
LAYER |= {f"ffn_{each}": f"mlp.{each}_proj" for each in ("gate", "up", "down")}
GEMMA3_LAYER = LAYER | {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
GEMMA3_LAYER |= {"post_ffw_norm": "post_feedforward_layernorm"}
TEXTS = ["they said it's 12345 ferries", "  odd\n\n spacing\t ", "Паром 海 \N{ROCKET}", "<|start|>a<think>b<|end|>"]


def save(directory: Path, model: Any, tokenizer: object = None) -> Path:
    rule = TOKENIZERS.get(model.config.model_type)
    tokenizer = tokenizer or (sentencepiece_tokenizer(rule) if rule else bpe_tokenizer())
    return written(directory, model, tokenizer, num_bytes=100_000)


def reopened(file: Path, dtype: torch.dtype) -> torch.nn.Module:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )


def exported(directory: Path, model: Any, **options: Any) -> dict[str, np.ndarray]:
    """Save and export the model; return the file's arrays by name."""
    directory.mkdir(exist_ok=True)
    export(save(directory / "source", model), directory / "model.gguf", check=False, **options)
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(directory / "model.gguf").tensors}


def field(directory: Path, key: str) -> Any:
    return gguf.GGUFReader(directory / "model.gguf").fields[key].contents()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(tiny_ids(vocab_size=310), use_cache=False).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "llama", MODELS["llama"]())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen2-tied", "mistral", "fewer-heads"])
def test_float32_gives_the_same_logits(name, tmp_path):
    model = MODELS[name]()
    done = export(save(tmp_path / "source", model), tmp_path / "model.gguf", check=False)
    assert (done.type_name, done.num_bytes) == ("f32", (tmp_path / "model.gguf").stat().st_size)
    assert torch.equal(logits(reopened(tmp_path / "model.gguf", torch.float32)), logits(model))
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert ("output.weight" in names) != name.endswith("tied")


@pytest.mark.parametrize("name", ["qwen3", "gemma-tied", "gemma3-tied"])
def test_float32_holds_the_weights_of_what_transformers_cannot_read_back(name, tmp_path):
    model = MODELS[name]()
    arrays = exported(tmp_path, model)
    parameters = dict(model.named_parameters())  # tied ones once
    assert len(arrays) == len(parameters)
    layer = GEMMA3_LAYER if name == "gemma3-tied" else LAYER
    names = GLOBAL | {f"blk.1.{ours}": f"model.layers.1.{theirs}" for ours, theirs in layer.items()}
    for ours, theirs in names.items():
        if f"{theirs}.weight" in parameters:
            weight = parameters[f"{theirs}.weight"].detach()
            # llama.cpp multiplies by the weight where transformers' Gemma multiplies by 1 + weight.
            shifted = weight + 1 if "gemma" in name and "norm" in theirs else weight
            assert np.array_equal(arrays[f"{ours}.weight"], shifted.numpy()), ours


def test_the_joined_gate_of_experts_is_written_in_its_halves(tmp_path):
    model = tiny_family("granitemoe", vocab_size=400)
    arrays = exported(tmp_path, model)
    joined = next(each for name, each in model.named_parameters() if "layers.1." in name and each.ndim == 3)
    for name, half in zip(("gate", "up"), joined.detach().chunk(2, dim=1), strict=True):
        assert np.array_equal(arrays[f"blk.1.ffn_{name}_exps.weight"], half.numpy())


@pytest.mark.parametrize(("type_name", "tolerance"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2)])
def test_smaller_types_are_within_their_rounding(type_name, tolerance, llama, tmp_path):
    for name in ("model.gguf", "again.gguf"):
        export(llama, tmp_path / name, type_name=type_name, check=False)
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    expected = logits(load_model(open_checkpoint(llama)))
    difference = (logits(reopened(tmp_path / "model.gguf", torch.float32)) - expected).norm() / expected.norm()
    assert 0 < difference < tolerance
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == type_name.upper() and types["blk.0.attn_norm.weight"] == "F32"


def test_biases_follow_their_weights(tmp_path):
    model = tiny_llama(**SIZES, attention_bias=True, mlp_bias=True)
    arrays = exported(tmp_path, model)
    layer = model.model.layers[1]
    assert np.array_equal(arrays["blk.1.ffn_down.bias"], layer.mlp.down_proj.bias.detach().numpy())
    assert interleave_rotary(torch.arange(8.0)[:, None], 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    # llama.cpp rotates neighbours: channel i of a head of 16 and channel i + 8 become neighbours.
    first_head = [channel for pair in zip(range(8), range(8, 16), strict=True) for channel in pair]
    assert np.array_equal(arrays["blk.1.attn_q.bias"][:16], layer.self_attn.q_proj.bias.detach().numpy()[first_head])
    assert np.array_equal(
        arrays["blk.1.attn_k.weight"][:16], layer.self_attn.k_proj.weight.detach().numpy()[first_head]
    )


def test_rotary_scaling_is_stated(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    arrays = exported(tmp_path / "llama3", tiny_llama(**SIZES, rope_parameters=rope))
    # Pair i turns once in 2 pi 10000^(i/8) tokens: 6, 20, 63, 199. Up to 64/4 nothing changes, beyond 64 all does.
    smooth = [(64 / (2 * np.pi * 10 ** (i / 2)) - 1) / (4 - 1) for i in (1, 2)]
    between = [1 / ((1 - share) / 8 + share) for share in smooth]
    assert arrays["rope_freqs.weight"][:4] == pytest.approx([1, *between, 8], rel=1e-5)
    rope = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"attention_factor": 1.25, "beta_fast": 30.0, "beta_slow": 2.0, "mscale_all_dim": 0.5}
    exported(tmp_path / "yarn", tiny_qwen2(**SIZES, rope_parameters=rope))
    keys = ("original_context_length", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier")
    assert [field(tmp_path / "yarn", f"qwen2.rope.scaling.{key}") for key in keys] == [64, 1.25, 30.0, 2.0, 0.5]


def test_hunyuans_alpha_is_the_theta_that_its_own_model_rotates_by():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
    config = HunYuanDenseV1Config(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=rope)
    found = rotary(config)
    assert found["rope_type"] == "default"
    own = HunYuanDenseV1RotaryEmbedding(config).inv_freq
    assert torch.allclose(found["rope_theta"] ** (-torch.arange(0, 16, 2) / 16), own, rtol=1e-6)
    assert rotary(LlamaConfig(rope_theta=3e5))["rope_theta"] == 3e5  # any other stays


@pytest.mark.parametrize("rule", ["gpt-2", "llama-bpe", "qwen2", *SENTENCEPIECE])
def test_the_tokenizer_gives_the_same_ids(rule, tmp_path):
    if rule in SENTENCEPIECE:
        # transformers makes merges of the scores: for Gemma of the order of its pieces, as Gemma's own file has it.
        tokenizer, name = sentencepiece_tokenizer(rule), "gemma3-tied" if rule == "gemma" else "mistral"
        texts = PIECES if rule == "gemma" else PLAIN_PIECES  # its Metaspace adds no space behind special tokens
    else:
        tokenizer, name, texts = bpe_tokenizer(rule), "llama", TEXTS
    source = save(tmp_path / "source", MODELS[name](), tokenizer)
    export(source, tmp_path / "model.gguf", check=False)
    before, after = (load_tokenizer(open_checkpoint(path)) for path in (source, tmp_path / "model.gguf"))
    for text in texts:
        ids = before.encode(text, add_special_tokens=rule in SENTENCEPIECE)
        assert after.encode(text, add_special_tokens=rule in SENTENCEPIECE) == ids
        assert after.decode(ids) == before.decode(ids)
    assert (after.bos_token, after.eos_token) == (before.bos_token, before.eos_token)
    assert after.chat_template == before.chat_template is not None
    assert rule not in SENTENCEPIECE or ids[0] == after.bos_token_id


def trimmed(directory: Path, name: str, rule: str) -> tuple[Path, Any]:
    """Save a model without some of its tokens; return its directory and its tokenizer."""
    model, is_bytes = MODELS[name](), rule not in SENTENCEPIECE
    dense = bpe_tokenizer(rule) if is_bytes else sentencepiece_tokenizer(rule)
    vocabulary = read_vocabulary(dense, model)
    kept_ids = with_parts(vocabulary, list(vocabulary.texts)[::3])
    assert len(kept_ids) < len(dense)
    kept = KeptTokens(tuple(sorted(kept_ids)), vocabulary.num_rows)
    keep_tokens(model, kept)
    tokenizer = trimmed_tokenizer(dense, kept)
    return written(directory, model, tokenizer, kept=kept), tokenizer


TRIMMED = [("llama", "llama-bpe"), ("llama-tied", "qwen2"), ("mistral", "mistral"), ("gemma-tied", "gemma")]


@pytest.mark.parametrize(("name", "rule"), TRIMMED)
def test_a_trimmed_model_has_its_own_tokens_in_the_file(name, rule, tmp_path):
    source, tokenizer = trimmed(tmp_path / "source", name, rule)
    export(source, tmp_path / "model.gguf", check=False)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    said = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in reader.fields.items()}
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert said["tokens"] == names
    assert (said["bos_token_id"], said["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    kinds = {token: gguf.TokenType(kind).name for token, kind in zip(names, said["token_type"], strict=True)}
    special = {str(each) for each in tokenizer.added_tokens_decoder.values() if each.special}
    assert {token for token, kind in kinds.items() if kind == "CONTROL"} == special and "UNUSED" not in kinds.values()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    if rule in SENTENCEPIECE:
        made = {left + right for left, right in merges} - {"\n\n"}  # cut out before merging
        ranked = sorted(made, key=dict(zip(names, said["scores"], strict=True)).get, reverse=True)
        assert ranked == sorted(made, key=[left + right for left, right in merges].index)
    else:
        assert said["merges"] == [f"{left} {right}" for left, right in merges]
    rows = {tensor.name: tensor.shape[-1] for tensor in reader.tensors}
    assert rows["token_embd.weight"] == len(names) == rows.get("output.weight", len(names))
    if rule != "gemma":
        after = load_tokenizer(open_checkpoint(tmp_path / "model.gguf"))
        for text in PLAIN_PIECES:
            assert after.encode(text) == tokenizer.encode(text)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize(("name", "rule"), TRIMMED)
def test_llama_cpp_gives_a_trimmed_model_s_ids_and_logits(name, rule, tmp_path):
    source, tokenizer = trimmed(tmp_path / "source", name, rule)
    export(source, tmp_path / "model.gguf", check=False)
    reference = load_model(open_checkpoint(source))
    with closing(open_llama_cpp(tmp_path / "model.gguf", 256)) as model:
        for text in PLAIN_PIECES:
            ids = list(tokenizer.encode(text))
            assert model.tokenize(text.encode(), add_bos=True, special=False) == ids
            model.reset()
            model.eval(ids)
            with torch.inference_mode():
                expected = reference(torch.tensor([ids]), use_cache=False).logits[0]
            got = torch.from_numpy(np.array(model.scores[: len(ids)]))
            assert (got - expected).norm() / expected.norm() < 2e-3  # llama.cpp keeps keys and values in half precision


def test_a_window_that_llama_cpp_lacks_bounds_the_context_and_the_rule_is_transformers_own(tmp_path):
    for window, expected in ((8, 8), (None, 256)):
        source = save(tmp_path / f"{window}", MODELS["mistral"](sliding_window=window))
        assert export(source, tmp_path / "model.gguf", check=False, overwrite=True).context_length == expected
        assert field(tmp_path, "llama.context_length") == expected
    # transformers splits every qwen2 checkpoint's text by Qwen's rule, whatever the file says.
    source = save(tmp_path / "source", MODELS["qwen2"](), bpe_tokenizer("gpt-2"))
    export(source, tmp_path / "model.gguf", check=False, overwrite=True)
    assert field(tmp_path, "tokenizer.ggml.pre") == "qwen2"


def test_the_command(llama, tmp_path):
    file = tmp_path / "model.gguf"
    outcome = run_cli("export", llama, file, "--type", "f16", "--no-check")
    assert outcome.status == 0 and "f16" in outcome.stdout
    assert "Not checked against llama.cpp: as asked." in outcome.stdout
    outcome = run_cli("export", llama, file, "--no-check")
    assert outcome.status == 2 and "already exists; choose another name or give --overwrite" in outcome.stderr
    outcome = run_cli("export", llama, file, "--no-check", "--overwrite", "--json")
    assert outcome.status == 0 and '"type_name": "f32"' in outcome.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def told(source: Path, file: str = "model.gguf", type_name: str = "f32", **options: Any) -> str:
    """Return the sentence by which an export is refused, which leaves no file."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SecateurError) as refused:
        export(source, Path(file), type_name=type_name, **options)
    assert sorted(Path().rglob("*")) == before
    return f"{source} to {file} as {type_name}: {type(refused.value).__name__}: {refused.value}"


def test_types_and_places_that_cannot_be(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, others = Path("llama"), Path("others")
    shutil.copytree(llama, source)
    shutil.copytree(llama, others)
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens([f"<extra{index}>" for index in range(50)])
    tokenizer.save_pretrained(others)
    lines = [told(source, type_name="q4_k"), told(source, "missing/model.gguf"), told(source, "."), told(Path())]
    export(source, Path("model.gguf"), check=False)
    lines += [told(Path("model.gguf"), "again.gguf"), told(others, "again.gguf", check=False)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines += [told(source, "again.gguf"), told(source, "again.gguf", check=True)]
    assert_shown("gguf/places", "\n".join(lines))


def test_structures_that_llama_cpp_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rope = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0}
    fewer_heads = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}
    models = {
        "opt": OPTForCausalLM(OPTConfig(hidden_size=24, ffn_dim=32, num_hidden_layers=1)),
        "qwen2-fewer-heads": tiny_qwen2(**fewer_heads, head_dim=16),
        "llama-gelu": tiny_llama(hidden_act="gelu"),
        "llama-dynamic-rope": tiny_llama(rope_parameters=rope),
        "gemma-silu": MODELS["gemma-tied"](hidden_act="silu"),
        "gemma-untied": tiny_gemma(tied=False),
        "qwen3-biases": MODELS["qwen3"](attention_bias=True),
        "gemma3-pattern": MODELS["gemma3-tied"](sliding_window_pattern=2),
        "gemma3-scalar": MODELS["gemma3-tied"](query_pre_attn_scalar=99),
        "gemma3-local-rope": MODELS["gemma3-tied"](rope_local_base_freq=5000.0),
        "gemma3-capped": MODELS["gemma3-tied"](final_logit_softcapping=30.0),
        "gemma3-both-ways": MODELS["gemma3-tied"](use_bidirectional_attention=True),
    }
    lines = [told(save(Path(name), model)) for name, model in models.items()]
    narrow = {"llama-narrow": tiny_llama(), "llama-narrow-mlp": tiny_llama(hidden_size=64, head_dim=16)}
    lines += [told(save(Path(name), model), type_name="q8_0") for name, model in narrow.items()]
    for name, value, type_name in (("llama-large", 1e6, "f16"), ("llama-nan", float("nan"), "f32")):
        model = MODELS["llama"]()
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[3, 5] = value
        lines.append(told(save(Path(name), model), type_name=type_name, check=False))
    assert_shown("gguf/structures", "\n".join(lines))


def hasten_a_merge(parsed: dict[str, Any]) -> None:
    """Move the second way to make a piece to the front, before the merges into others."""
    merges = parsed["model"]["merges"]
    second = next(i for i, pair in enumerate(merges) if i and "".join(pair) == "".join(merges[i - 1]))
    merges.insert(0, merges.pop(second))


def test_tokenizers_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {
        "llama-unigram": {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}},
        "llama-no-merges": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
        "llama-other-words": {"pre_tokenizer": {"type": "Whitespace"}},
        "llama-lowercase": {"normalizer": {"type": "Lowercase"}},
        "mistral-nfkc": {"normalizer": {"type": "NFKC"}},
        "mistral-ignores-merges": lambda parsed: parsed["model"].update(ignore_merges=True),
        "mistral-a-merge-less": lambda parsed: parsed["model"]["merges"].pop(),
        "mistral-another-order": hasten_a_merge,
    }
    for byte in ("<0xE2>", "<0xFF>", "<0x00>"):
        changes[f"mistral-without-{byte}"] = lambda parsed, byte=byte: parsed["model"]["vocab"].pop(byte)
    lines = []
    for name, change in changes.items():
        source = save(Path(name), MODELS[name.partition("-")[0]]())
        parsed = json.loads((source / "tokenizer.json").read_text())
        change(parsed) if callable(change) else parsed.update(change)
        (source / "tokenizer.json").write_text(json.dumps(parsed))
        lines.append(told(source))
    assert_shown("gguf/other-tokenizers", "\n".join(lines))


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", ["gpt-2", "llama-bpe", "qwen2", "tekken", "mistral", "llama", "gemma"])
def test_llama_cpp_agrees(name, rule, tmp_path):
    tokenizer = (sentencepiece_tokenizer if rule in SENTENCEPIECE else bpe_tokenizer)(rule)
    source = save(tmp_path / "source", MODELS[name](max_position_embeddings=2048, vocab_size=400), tokenizer)
    done = export(source, tmp_path / "model.gguf", check=True)
    assert done.check is not None
    assert done.check.perplexity_llama_cpp == pytest.approx(done.check.perplexity_transformers, rel=1e-3)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("rule", SENTENCEPIECE)
def test_llama_cpp_finds_the_same_pieces(rule, tmp_path):
    source = save(tmp_path / "source", MODELS["mistral"](), sentencepiece_tokenizer(rule))
    export(source, tmp_path / "model.gguf", check=False)
    tokenizer = load_tokenizer(open_checkpoint(source))
    # transformers' Metaspace adds no space behind special tokens nor before one, unlike SentencePiece and llama.cpp.
    texts = PLAIN_PIECES if rule == "llama" else PIECES
    with closing(open_llama_cpp(tmp_path / "model.gguf", 256)) as model:
        for text in texts:
            assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text)
