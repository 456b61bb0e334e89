"""The reload check: passes for what was saved, in a fresh process, and fails for everything else."""

from pathlib import Path

import pytest
import torch
from models import tiny_ids, tiny_llama, tiny_qwen2
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer

from secateur.errors import CheckpointError
from secateur.formats.save import save_checkpoint, verify_reload
from secateur.model.checkpoint import load_model, open_checkpoint


def save(directory: Path, model: torch.nn.Module) -> torch.Tensor:
    directory.mkdir(exist_ok=True)
    save_checkpoint(model, tiny_tokenizer(), directory, max_shard_size="100KB", carry_from=None)
    with torch.inference_mode():
        return model(tiny_ids(), use_cache=False).logits


def test_a_saved_model_reloads_exactly(tmp_path):
    save(tmp_path / "source", tiny_qwen2(tied=True).to(torch.bfloat16))
    # Loaded, for .to(bfloat16) also rounds the rotary frequencies, which no checkpoint holds.
    logits = save(tmp_path / "out", load_model(open_checkpoint(tmp_path / "source")))
    verification = verify_reload(tmp_path / "out", tiny_ids(), logits)
    assert verification.max_abs_difference == 0
    assert verification.seconds > 0
    assert isinstance(verification.generated_text, str) and verification.generated_text


def test_other_weights_are_refused(tmp_path):
    logits = save(tmp_path, tiny_llama())
    with pytest.raises(CheckpointError, match="logits differ from those in memory by"):
        verify_reload(tmp_path, tiny_ids(), logits + 1e-3)


def test_logits_that_are_nan_are_refused(tmp_path):
    model = tiny_llama()
    logits = save(tmp_path / "whole", model)
    logits = logits.clone()
    logits[0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="differ from those in memory by nan"):
        verify_reload(tmp_path / "whole", tiny_ids(), logits)
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="the reloaded model's logits hold NaN"):
        verify_reload(tmp_path / "nan", tiny_ids(), save(tmp_path / "nan", model))


def test_a_tensor_that_reloading_would_drop_is_refused(tmp_path):
    logits = save(tmp_path, tiny_llama())
    tensors = {name: tensor for shard in tmp_path.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for shard in tmp_path.glob("*.safetensors*"):
        shard.unlink()
    bias = {"model.layers.0.mlp.down_proj.bias": torch.zeros(48)}
    save_file({**tensors, **bias}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected_keys: \['model.layers.0.mlp.down_proj.bias'\]"):
        verify_reload(tmp_path, tiny_ids(), logits)


def test_a_directory_that_does_not_load_is_refused(tmp_path):
    logits = save(tmp_path, tiny_llama())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot reload it in a fresh process"):
        verify_reload(tmp_path, tiny_ids(), logits)
