"""Tensors that transformers leaves aside on load: carried where they fit, told where not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import saved, shards_of
from recipes import grouped
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor

import secateur
from secateur.formats.save import save_checkpoint
from secateur.model.checkpoint import load
from secateur.vocabulary.kept import KeptTokens, keep_tokens
from tests.families import tiny_family

WIDTH, FFN = 48, 112


def saved_with(directory: Path, aside: dict[str, Tensor], family: str = "qwen3_5") -> Path:
    saved(directory, tiny_family(family))
    file = directory / "model.safetensors"
    save_file(load_file(file) | aside, file, {"format": "pt"})
    return directory


def head(*names: str) -> dict[str, Tensor]:
    """Return a head for a further token; `names`: parts of its layer, as wide as the FFN of the tiny model."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"mtp.fc.weight": (WIDTH, 2 * WIDTH), "mtp.norm.weight": (WIDTH,)}
    shapes |= {f"mtp.layers.0.mlp.{name}.weight": (FFN, WIDTH) for name in names}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_head_that_reads_hidden_states_alone_is_carried(recipe: dict[str, Any], tmp_path: Path) -> None:
    source = saved_with(tmp_path / "model", head())
    result = secateur.prune(source, grouped(recipe | {"remove": 0.15, "evaluate": False}), out=tmp_path / "out")
    assert result.summary.reload_max_abs_difference == 0
    carried = load_file(tmp_path / "out/model-aside.safetensors")
    assert carried.keys() == head().keys() and all(torch.equal(carried[name], each) for name, each in head().items())
    assert not secateur.verify(tmp_path / "out").mismatches
    again = secateur.prune(
        tmp_path / "out", grouped(recipe | {"remove": 0.15, "evaluate": False}), out=tmp_path / "again"
    )
    assert again.summary.reload_max_abs_difference == 0
    assert load_file(tmp_path / "again/model-aside.safetensors").keys() == head().keys()


def test_a_head_whose_layer_is_no_longer_like_the_others_is_left_out_and_told(recipe, tmp_path: Path) -> None:
    source = saved_with(tmp_path / "model", head("gate_proj"))
    shapes = {name: each.shape for name, each in load_file(source / "model.safetensors").items()}
    assert {shape for name, shape in shapes.items() if name.endswith(".mlp.gate_proj.weight")} == {(FFN, WIDTH)}
    secateur.prune(source, grouped(recipe | {"remove": 0.15, "evaluate": False}), out=tmp_path / "out")
    assert not (tmp_path / "out/model-aside.safetensors").exists()
    log = (tmp_path / "out/run.jsonl").read_text()
    assert "3 tensors that transformers leaves aside (mtp.fc.weight, ...) were left out: mlp.gate_proj.weight of" in log


@pytest.mark.parametrize("depth", [0, 1])
def test_a_head_numbered_as_a_further_layer_goes_with_the_number(depth, recipe, monkeypatch, unproved, tmp_path):
    family = type(tiny_family("glm4_moe"))
    monkeypatch.setattr(family, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*"])  # 46 or 92 in its models
    source = saved_with(tmp_path / "model", {"model.layers.3.enorm.weight": torch.ones(WIDTH)}, "glm4_moe")
    changes = {"depth": depth, "remove": 0.4} if depth else {"remove": 0.15}
    secateur.prune(source, grouped(recipe | changes | {"evaluate": False}), out=tmp_path / "out")
    assert (tmp_path / "out/model-aside.safetensors").exists() == (not depth)
    said = (
        "leaves aside (model.layers.3.enorm.weight, ...) were left out: they are numbered behind the layers, of which"
    )
    assert (f"1 tensors that transformers {said} some are gone." in (tmp_path / "out/run.jsonl").read_text()) == bool(
        depth
    )


@pytest.mark.parametrize("num_bytes", [10**9, 40_000])
def test_its_rows_by_token_are_trimmed_as_the_models(num_bytes: int, tmp_path: Path) -> None:
    rows = {"mtp.embed_tokens.weight": torch.randn(320, WIDTH)}
    source = saved_with(tmp_path / "model", head() | rows)
    model, kept = load(source), KeptTokens(tuple(range(0, 320, 2)), 320)
    model.generation_config = None
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config.get_text_config(), key, None)
    keep_tokens(model, kept)
    (tmp_path / "out").mkdir()
    tokenizer = tiny_tokenizer()
    with shards_of(num_bytes):
        assert save_checkpoint(model, tokenizer, tmp_path / "out", carry_from=source, kept=kept) == ()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    parts = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(each.nbytes for part in parts for each in part.values())
    carried = load_file(tmp_path / "out/model-aside.safetensors")
    assert torch.equal(carried["mtp.embed_tokens.weight"], rows["mtp.embed_tokens.weight"][::2])
    again = load(tmp_path / "out")
    assert all(torch.equal(each, again.state_dict()[name]) for name, each in model.state_dict().items())
