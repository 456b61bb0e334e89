"""The reload check: passes for what was saved, in a fresh process, and fails for everything else."""

import pytest
import torch
from models import logits_of, tiny_ids, tiny_llama, written
from safetensors.torch import load_file, save_file

from secateur.errors import CheckpointError
from secateur.formats import save as proof
from secateur.formats.save import verify_reload

# What the fresh process says beside the logits.
SAID = {"problem": "", "class": "AutoModelForImageTextToText"}


def test_a_tensor_that_reloading_would_drop_is_refused(tmp_path):
    model = tiny_llama()
    written(tmp_path, model, num_bytes=100_000)
    tensors = {name: tensor for shard in tmp_path.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for shard in tmp_path.glob("*.safetensors*"):
        shard.unlink()
    bias = {"model.layers.0.mlp.down_proj.bias": torch.zeros(48)}
    save_file({**tensors, **bias}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected_keys: \['model.layers.0.mlp.down_proj.bias'\]"):
        verify_reload(tmp_path, tiny_ids(), logits_of(model))


IDS = tiny_ids(batch=2, length=3)


def reloaded_as(monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, problem: str = "") -> None:
    """Let the fresh process say this."""
    monkeypatch.setattr(proof, "_run_child", lambda *_: (logits, {**SAID, "problem": problem}))


def test_the_figures_are_those_of_the_largest_difference(monkeypatch, tmp_path):
    logits = torch.zeros(2, 3, 5)
    reloaded_as(monkeypatch, logits)
    for place in ((0, 0, 0), (1, 2, 4)):
        for sign in (1, -1):
            other = logits.clone()
            other[place] = sign * 0.25
            monkeypatch.setattr(proof, "TOLERANCE", 0.25)
            found = verify_reload(tmp_path, IDS, other)
            assert (found.max_abs_difference, found.loaded_by) == (0.25, "AutoModelForImageTextToText")
            monkeypatch.setattr(proof, "TOLERANCE", 0.249)
            with pytest.raises(CheckpointError, match=r"differ from those in memory by 0\.25, allowed is 0\.249"):
                verify_reload(tmp_path, IDS, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["reloaded", "memory", "both"])
def test_one_logit_that_is_no_number_is_refused(value, where, monkeypatch, tmp_path):
    whole, odd = torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)
    odd[1, 1, 3] = value
    reloaded_as(monkeypatch, whole if where == "memory" else odd)
    with pytest.raises(CheckpointError, match=r"differ from those in memory by (nan|inf), allowed is 1e-06"):
        verify_reload(tmp_path, IDS, whole if where == "reloaded" else odd)


def test_differences_are_taken_in_float32(monkeypatch, tmp_path):
    """The difference of two numbers in bfloat16 is rounded to one in bfloat16, but not in float32."""
    reloaded_as(monkeypatch, torch.full((2, 3, 1), 257.0).to(torch.bfloat16))
    monkeypatch.setattr(proof, "TOLERANCE", 1e3)
    found = verify_reload(tmp_path, IDS, torch.full((2, 3, 1), 1.0 / 3).to(torch.bfloat16))
    assert found.max_abs_difference == 256.0 - float(torch.tensor(1.0 / 3).to(torch.bfloat16))


def test_another_shape_and_the_loaders_complaints_are_refused(monkeypatch, tmp_path):
    reloaded_as(monkeypatch, torch.zeros(2, 3, 6))
    with pytest.raises(CheckpointError, match=r"have shape \[2, 3, 6\], not \[2, 3, 5\]"):
        verify_reload(tmp_path, IDS, torch.zeros(2, 3, 5))
    reloaded_as(monkeypatch, torch.zeros(2, 3, 5), "missing_keys: ['a']")
    with pytest.raises(CheckpointError, match=r"reloads it with problems \(missing_keys: \['a'\]\)"):
        verify_reload(tmp_path, IDS, torch.zeros(2, 3, 5))
