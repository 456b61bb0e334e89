"""Memory of the block-wise stage: weights stay in their files, one layer at a time fills memory; same bytes."""

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_ids, tiny_llama
from tiny_tokenizer import tiny_tokenizer

import secateur
from secateur import recover_job
from secateur.arch import bind
from secateur.checkpoint import load_model
from secateur.checkpoint_quiet import quiet_transformers
from secateur.memory import release_freed
from secateur.recover_blocks import Pair, recover_blocks
from secateur.recover_job import open_job, prepare
from secateur.recover_recipe import BlockSettings
from secateur.recover_stages import run_stages
from secateur.recover_store import LayerStore
from secateur.walk import Batch

BLOCKS = {"num_tokens": 1024, "stages": ["blocks"], "blocks": {"batch_tokens": 128}}
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}


def anonymous_bytes() -> int:
    """Return what this process holds that no file backs."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def saved(place: Path, num_layers: int, seed: int) -> Path:
    with quiet_transformers():
        tiny_llama(num_layers=num_layers, seed=seed, **WIDE).save_pretrained(place)
        tiny_tokenizer().save_pretrained(place)
    return place


def growth(place: Path, num_layers: int, recipe: dict[str, Any]) -> int:
    """Return the most anonymous memory at any layer's end beyond what there was before the models were opened."""
    pruned, dense = saved(place / "pruned", num_layers, 0), saved(place / "dense", num_layers, 1)
    changes = {"calibration": recipe["calibration"], "recover": BLOCKS}
    seen = []
    gc.collect()
    release_freed()
    start = anonymous_bytes()
    job = open_job(pruned, dense, changes)
    work, _ = prepare(*job, place / "out", lambda *_: seen.append(anonymous_bytes()))
    run_stages(work)
    return max(seen) - start


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_layers(recipe, tmp_path):
    growth(tmp_path / "warm", 2, recipe)
    few, many = growth(tmp_path / "few", 4, recipe), growth(tmp_path / "many", 12, recipe)
    layer = (2 * WIDE["hidden_size"] ** 2 * 3 // 2 + 3 * WIDE["hidden_size"] * WIDE["intermediate_size"]) * 4
    print(f"\nbeyond the start, MB: 4 layers {few / 1e6:.1f}, 12 layers {many / 1e6:.1f}; a layer {layer / 1e6:.1f}")
    assert many - few < 8 * layer, "both models in memory would be 16 layers more"


def test_weights_on_disk_give_the_bytes_of_weights_in_memory(checkpoints, recipe, tmp_path, monkeypatch):
    secateur.prune(checkpoints["llama"], {**recipe, "remove": 0.3}, out=tmp_path / "pruned")
    changes = {"recover": {**BLOCKS, "num_tokens": 2048}}
    mapped = secateur.recover(tmp_path / "pruned", checkpoints["llama"], changes, out=tmp_path / "mapped")
    monkeypatch.setattr(recover_job, "load_model", lambda checkpoint, **_: load_model(checkpoint))
    whole = secateur.recover(tmp_path / "pruned", checkpoints["llama"], changes, out=tmp_path / "whole")
    assert mapped is not None and whole is not None and mapped.stages[0].held
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "mapped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_got_worse_has_its_own_weights_again(dtype, tmp_path):
    dense, pruned = (tiny_llama(seed=seed).to(dtype).requires_grad_(False) for seed in (0, 1))
    old = {name: parameter.clone() for name, parameter in pruned.named_parameters()}
    batches = [Batch("text", seed == 0, tiny_ids(seed=seed)) for seed in range(4)]
    lines: list[dict[str, Any]] = []
    pair = Pair(pruned, bind(pruned), dense, bind(dense), tuple(range(3)))
    num_changed = recover_blocks(
        pair, batches, {"text": 1.0}, BlockSettings(learning_rate=50.0), LayerStore(), lines.append
    )
    assert num_changed == 0 and all(line["loss"] and not line["held"] for line in lines)
    assert all(torch.equal(old[name], parameter) for name, parameter in pruned.named_parameters())
