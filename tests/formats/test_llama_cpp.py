"""llama.cpp runs pruned models of every family that GGUF export knows and gives their logits (slow; needs it).

Where it is not installed, transformers' own reader of the file stands in its place, so that the check is a check.
"""

import sys
from collections.abc import Callable
from contextlib import closing
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from run_cli import run_cli

from secateur.errors import CheckpointError
from secateur.formats.gguf import export
from secateur.formats.gguf_tensors import gguf_family, gguf_specs, gguf_tensors, planned_tensors
from secateur.formats.save import TEXT, check_gguf, have_llama_cpp, open_llama_cpp
from secateur.model.bind import bind, decoder_layers
from secateur.model.checkpoint import load_model, load_tokenizer, meta_model, open_checkpoint
from secateur.model.per_layer import record_widths
from tests.bpe_tokenizer import bpe_tokenizer, sentencepiece_tokenizer
from tests.families import tiny_family
from tests.model.test_families import cut_units, kept_of
from tests.models import saved, tiny_ids, tiny_llama

GGUF_FAMILIES = gguf_specs()
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"mscale": 0.7, "mscale_all_dim": 0.7}
# What the rows of `families.FAMILIES` need to be as llama.cpp takes them to be.
CHANGES: dict[str, dict[str, Any]] = {
    "cohere2": {"num_hidden_layers": 4, "layer_types": None, "sliding_window_pattern": 4, "head_dim": 16},
    "deepseek_v2": {"num_key_value_heads": 4, "q_lora_rank": None, "rope_parameters": YARN},
    "deepseek_v3": {"num_key_value_heads": 4, "rope_parameters": YARN},
    "exaone4": {"layer_types": ["full_attention"] * 3, "sliding_window": None},
    "falcon-new": {"bias": False},
    "gpt_oss": {"num_hidden_layers": 4, "layer_types": None, "max_position_embeddings": 131072},
    "glm": {"head_dim": 16},
    "glm4_moe": {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
    "gemma2": {"num_hidden_layers": 4, "layer_types": None, "query_pre_attn_scalar": 16},
    "gemma3": {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 16},
    "ministral": {"sliding_window": 64, "layer_types": None},
    "ministral3": {
        "rope_parameters": YARN
        | {"original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
    },
    "mistral": {"sliding_window": None},
    "nemotron": {"head_dim": 16},
    "olmo": {"clip_qkv": 0.5},
    "olmo3": {"num_hidden_layers": 4, "layer_types": None},
    "olmoe": {"num_key_value_heads": 4},
    "phi": {"qk_layernorm": False},
    "phi3": {"sliding_window": None, "pad_token_id": 0},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4},
    "starcoder2": {"sliding_window": None},
}
ROWS = {"falcon": "falcon-new", "hunyuan_v1_dense": "hunyuan_dense", "gemma3_text": "gemma3"}
# llama.cpp keeps keys and values in half precision.
TOLERANCE = 2e-3


def pruned(name: str, place: Path) -> Path:
    """Save a model of the family without half of its channels, experts and, where llama.cpp takes fewer, heads."""
    row = ROWS.get(name, name)
    sizes = SIZES | CHANGES.get(row, {})
    config = tiny_family(row).config
    known = {*config.to_dict(), *config.attribute_map, "sliding_window_pattern"}
    model = tiny_family(row, **{key: value for key, value in sizes.items() if key in known})
    arch = bind(model)
    for group in arch.groups:
        heads = group.name in ("kv_heads", "query_heads")
        if group.name != "query_heads" and not (heads and GGUF_FAMILIES[name].full_width_heads):
            cut_units(decoder_layers(model, arch)[group.layer], group, kept_of(group, 0.5))
    record_widths(model, arch)
    tokenizer = sentencepiece_tokenizer("gemma") if name.startswith("gemma") else bpe_tokenizer()
    return saved(place, model, tokenizer)


def pruned_per_layer(name: str, place: Path) -> Path:
    """Save a model of which no two layers are alike."""
    sizes = SIZES | CHANGES.get(name, {}) | {"num_hidden_layers": 5}
    sizes |= {"attention_bias": True} if name == "seed_oss" else {"tie_word_embeddings": True}
    model = tiny_family(name, **sizes)
    arch = bind(model)
    layers = decoder_layers(model, arch)
    for index, group, share in ((0, "ffn", 0.5), (1, "ffn", 0.25), (2, "kv_heads", 0.5), (3, "ffn", 0.75)):
        (each,) = (found for found in arch.select((group,)) if found.layer == index)
        cut_units(layers[index], each, kept_of(each, share))
    record_widths(model, arch)
    return saved(place, model, bpe_tokenizer())


PRUNED = [pytest.param(pruned, name, id=name) for name in GGUF_FAMILIES]
PRUNED += [
    pytest.param(pruned_per_layer, name, id=f"{name}-per-layer") for name, row in GGUF_FAMILIES.items() if row.per_layer
]


@pytest.mark.parametrize(("prune", "name"), PRUNED)
def test_every_weight_is_in_the_file_once_as_the_config_alone_tells(
    prune: Callable[[str, Path], Path], name: str, tmp_path: Path
) -> None:
    source = prune(name, tmp_path / "source")
    export(source, tmp_path / "model.gguf", check=False)
    checkpoint = open_checkpoint(source)
    model, family = load_model(checkpoint), gguf_family(checkpoint)
    written = gguf_tensors(checkpoint, family, "f16"), planned_tensors(meta_model(checkpoint.config), family, "f16")
    found, planned = (sorted((each.gguf_name, each.shape, each.type_name) for each in tensors) for tensors in written)
    assert planned == found
    arrays = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    num_values = sum(int((array != 0).sum()) for array in arrays.values())
    assert num_values == sum(int((weight != 0).sum()) for weight in model.parameters())
    # Vectors keep their type and order; of norms the file holds what llama.cpp multiplies by.
    offset = GGUF_FAMILIES[name].norm_offset
    for many in (False, True):
        got = sum(
            float(np.abs(array.astype(np.float64)).sum()) for array in arrays.values() if (array.ndim > 1) == many
        )
        weights = [
            weight.detach().double() + (offset if key.endswith("norm.weight") else 0)
            for key, weight in model.named_parameters()
            if (weight.ndim > 1) == many
        ]
        assert got == pytest.approx(sum(float(weight.abs().sum()) for weight in weights), rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not have_llama_cpp(), reason="needs llama-cpp-python")
@pytest.mark.parametrize(("prune", "name"), PRUNED)
def test_llama_cpp_gives_the_pruned_models_logits(
    prune: Callable[[str, Path], Path], name: str, tmp_path: Path
) -> None:
    source = prune(name, tmp_path / "source")
    export(source, tmp_path / "model.gguf", check=False)
    ids = tiny_ids(batch=1, length=24, vocab_size=310)[0]
    with torch.inference_mode():
        expected = load_model(open_checkpoint(source))(ids[None], use_cache=False).logits[0]
    with closing(open_llama_cpp(tmp_path / "model.gguf", 64)) as model:
        model.eval(ids.tolist())
        got = torch.from_numpy(np.array(model.scores[: len(ids)]))
    difference = (got - expected).norm() / expected.norm()
    assert difference < TOLERANCE, f"{difference:.2e}"


class ReadByTransformers:
    """Reads a GGUF file as `llama_cpp.Llama` does, as far as the check asks, by other code than wrote it."""

    def __init__(self, file: str, *, n_ctx: int, logits_all: bool, **_: Any) -> None:
        link = Path(file).with_suffix(".gguf")  # what is not finished yet has another name
        if link != Path(file):
            link.symlink_to(file)
        checkpoint = open_checkpoint(link)
        if not logits_all or n_ctx > checkpoint.config.max_position_embeddings:
            raise ValueError("no logits for so many tokens")
        self.model, self.tokenizer = load_model(checkpoint, dtype=torch.float32), load_tokenizer(checkpoint)
        if link != Path(file):
            link.unlink()

    def tokenize(self, text: bytes, *, add_bos: bool, special: bool) -> list[int]:
        assert add_bos and not special
        return self.tokenizer.encode(text.decode())

    def eval(self, ids: list[int]) -> None:
        self.scores = self.model(torch.tensor([ids])).logits[0].numpy()

    def close(self) -> None:
        del self.model


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model whose export is checked."""
    module: Any = ModuleType("llama_cpp")
    module.Llama, module.__spec__ = ReadByTransformers, ModuleSpec("llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    model = tiny_llama(vocab_size=400, max_position_embeddings=2048)
    return saved(tmp_path / "model", model, bpe_tokenizer())


def test_an_export_says_what_its_check_has_found(checked: Path) -> None:
    file, steps = checked.with_name("a.gguf"), list[tuple[str, int, int]]()
    done = export(checked, file, progress=lambda *step: steps.append(step))
    assert done.check is not None and steps[-2:] == [("check", 0, 1), ("check", 1, 1)]
    found, expected = done.check.perplexity_llama_cpp, done.check.perplexity_transformers
    ids = torch.tensor(load_tokenizer(open_checkpoint(checked)).encode(TEXT))
    with torch.inference_mode():
        logits = load_model(open_checkpoint(checked))(ids[None], use_cache=False).logits[0, :-1]
    assert expected == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[1:]).exp()), rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-3) and done.check.num_tokens == len(ids)
    outcome = run_cli("export", checked, checked.with_name("b.gguf"))
    assert outcome.status == 0, outcome.stderr
    assert " ".join(outcome.stdout.split()).endswith(
        f" Checked: perplexity of {len(ids)} held-out tokens {found:.3f} in llama.cpp, {expected:.3f} in transformers."
    )


def test_a_file_that_llama_cpp_reads_otherwise_is_refused(checked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, file = open_checkpoint(checked), checked.with_name("a.gguf")
    other = tiny_llama(vocab_size=400, max_position_embeddings=2048, seed=1)
    export(saved(checked.with_name("other"), other, bpe_tokenizer()), file, check=False)
    with pytest.raises(
        CheckpointError,
        match=r"llama.cpp's perplexity \d+\.\d{3} is \d+\.\d% from .*, allowed is 1%; export with a more",
    ):
        check_gguf(file, checkpoint, "f16")
    assert check_gguf(file, checkpoint, "q2_k").num_tokens > 100  # as much as two bits may cost

    plain = ReadByTransformers.tokenize
    monkeypatch.setattr(
        ReadByTransformers, "tokenize", lambda *text, **how: [*(ids := plain(*text, **how))[:7], ids[7] + 1, *ids[8:]]
    )
    with pytest.raises(CheckpointError, match="splits text into other tokens than transformers, first at token 7 of"):
        check_gguf(file, checkpoint, "f16")
    with pytest.raises(CheckpointError, match=r"a.gguf: llama.cpp cannot load it \(no logits for so many tokens\)"):
        open_llama_cpp(file, 2049)
