"""Recovery over two processes (gloo, through accelerate) against one process, on the same tiny model."""

from pathlib import Path

import pytest
import torch
import yaml
from run_ranks import run_ranks
from safetensors.torch import load_file

import secateur

WEIGHTS = "model.safetensors"
SETTINGS = {
    "num_tokens": 1536,
    "blocks_share": 0.34,
    "blocks": {"batch_tokens": 128},
    "logits": {"batch_tokens": 128, "blocks_per_device": 1, "learning_rate": 3e-4, "evaluations": 1},
}


@pytest.fixture(scope="module")
def pruned(checkpoints, recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "pruned"
    secateur.prune(checkpoints["llama"], {**recipe, "remove": 0.3}, out=out)
    return out


def run(num_processes: int, pruned: Path, teacher: Path, place: Path) -> Path:
    """Run `secateur recover` under torchrun and return what it wrote."""
    file, out = place / "r.yaml", place / str(num_processes)
    file.write_text(yaml.safe_dump({"recover": SETTINGS}), encoding="utf-8")
    arguments = ["recover", pruned, "--teacher", teacher, "--out", out, "--recipe", file, "--quiet"]
    status, _, stderr = run_ranks(num_processes, "-m", "secateur", *arguments)
    assert status == 0, stderr
    return out


def test_two_processes_train_what_one_trains(pruned, checkpoints, tmp_path):
    two = run(2, pruned, checkpoints["llama"], tmp_path)
    one = tmp_path / "one"
    secateur.recover(pruned, checkpoints["llama"], {"recover": SETTINGS}, out=one)
    before, alone, together = (load_file(place / WEIGHTS) for place in (pruned, one, two))
    moved = max(float((alone[name] - before[name]).abs().max()) for name in before)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=moved / 100)
    assert moved > 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "one", "r.yaml"]
