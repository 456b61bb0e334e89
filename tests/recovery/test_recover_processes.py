"""Recovery over two processes (gloo), copies or shards of the model, against one, on the same tiny model."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipes import grouped
from run_ranks import run_forked_ranks
from safetensors.torch import load_file
from warm import WarmProcesses

import secateur

WEIGHTS = "model.safetensors"
LITTLE_MAIN = Path(__file__).parents[1] / "little_main.py"
SETTINGS = {
    "num_tokens": 2048,
    "batch_tokens": 128,
    "blocks_per_device": 1,
    "learning_rate": 1e-3,
    "kl_share": 1.0,
}
LORA = {**SETTINGS, "train": "lora", "learning_rate": 3e-3}
GENTLE = {**SETTINGS, "learning_rate": 3e-4}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
FSDP = (
    "-m accelerate.commands.accelerate_cli launch --num_machines 1 --num_processes 2 --mixed_precision no "
    "--dynamo_backend no --use_fsdp --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_state_dict_type SHARDED_STATE_DICT --fsdp_version {} --main_process_port"
)


# Stops the first process behind the first checkpoint; the launcher then stops the other.
INTERRUPTED = """
import sys, yaml, secateur
def kill(name, done, total):
    if name == "recover" and done > 0.6 * total:
        sys.exit("killed")
pruned, teacher, out, recipe = sys.argv[1:]
secateur.recover(pruned, teacher, yaml.safe_load(open(recipe)), out=out, progress=kill)
"""

# No text beyond the recipe's to be judged by, as in the tests' own process.
PRUNE = """
import sys, yaml, secateur, secateur.data.pool
secateur.data.pool.JUDGED_TOKENS = 0
model, recipe, out = sys.argv[1:]
secateur.prune(model, yaml.safe_load(open(recipe)), out=out, overwrite=True)
"""


def run(
    launch: list[str],
    settings: dict[str, Any],
    pruned: Path,
    teacher: Path,
    place: Path,
    script: str = "",
    warm: WarmProcesses | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `secateur recover`, or a script, in two processes; what it wrote is in `place`/two."""
    file, code, out = place / "r.yaml", place / "script.py", place / "two"
    file.write_text(yaml.safe_dump({"recover": settings}), encoding="utf-8")
    code.write_text(script, encoding="utf-8")
    command = [LITTLE_MAIN, "recover", pruned, "--teacher", teacher, "--out", out, "--recipe", file]
    return launched(launch, [code, pruned, teacher, out, file] if script else command, warm)


def launched(
    launch: list[str], command: list[Any], warm: WarmProcesses | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command in two processes of a launcher, or without one in two forks."""
    if not launch:
        assert warm is not None
        status, stdout, stderr = run_forked_ranks(warm, 2, *command)
        return subprocess.CompletedProcess(command, status, stdout, stderr)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked, environment = [sys.executable, *launch, port, *command], dict(os.environ)
    return subprocess.run(
        [*map(str, asked)], env=environment, capture_output=True, text=True, check=False, timeout=3600
    )


def assert_trained_alike(before: dict[str, Any], alone: dict[str, Any], together: dict[str, Any]) -> None:
    """Compare weights to a hundredth of what the training moved, and see that it moved them."""
    moved = max(float((alone[key] - before[key]).abs().max()) for key in before)
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, rtol=0, atol=moved / 100)
    assert moved > 1e-4


@pytest.mark.parametrize(
    ("launch", "settings", "name"),
    [
        ([], SETTINGS, "llama"),
        pytest.param(TORCHRUN, SETTINGS, "llama", marks=pytest.mark.slow),
        pytest.param(FSDP.format(2).split(), SETTINGS, "llama", marks=pytest.mark.slow),
        pytest.param(FSDP.format(2).split(), LORA, "llama", marks=pytest.mark.slow),
        pytest.param(FSDP.format(2).split(), GENTLE, "llama-tied", marks=pytest.mark.slow),
    ],
    ids=["forks", "copies", "FSDP", "FSDP and LoRA", "FSDP, tied"],
)
def test_two_processes_train_what_one_trains(launch, settings, name, checkpoints, recipe, warm, tmp_path):
    pruned, copies = tmp_path / "pruned", launch in ([], TORCHRUN)
    secateur.prune(checkpoints[name], grouped({**recipe, "remove": 0.3}), out=pruned)
    less = {**settings, "batch_tokens": 32} if copies else settings  # a block, so one for each process
    settings = {**settings, "batch_tokens": 64} if copies else settings
    done = run(launch, less, pruned, checkpoints[name], tmp_path, warm=warm)
    assert done.returncode == 0, done.stderr
    one = tmp_path / "one"
    record = secateur.recover(pruned, checkpoints[name], {"recover": settings}, out=one)
    assert record is not None and record.training.held, "weights that were put back would be equal whatever happened"
    before, alone, together = (load_file(place / WEIGHTS) for place in (pruned, one, tmp_path / "two"))
    assert_trained_alike(before, alone, together)
    notes = json.loads((tmp_path / "two" / "recovery.json").read_text(encoding="utf-8"))["notes"]
    assert any("in shards over 2 processes" in note for note in notes) != copies
    assert any("batch_tokens: 64 in place of 32" in note for note in notes) == copies
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "pruned", "r.yaml", "script.py", "two"]


def test_the_first_version_of_fsdp_is_refused_before_anything_runs(checkpoints, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    changes = {"calibration": recipe["calibration"], "recover": SETTINGS}
    with pytest.raises(secateur.RecipeError, match="set fsdp_version to 2"):
        secateur.recover(checkpoints["llama"], checkpoints["llama"], changes, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_shards_go_on_from_a_checkpoint(checkpoints, recipe, tmp_path):
    pruned, launch = tmp_path / "pruned", FSDP.format(2).split()
    secateur.prune(checkpoints["llama"], grouped({**recipe, "remove": 0.3}), out=pruned)
    killed = run(launch, SETTINGS, pruned, checkpoints["llama"], tmp_path, INTERRUPTED)
    assert killed.returncode != 0 and "killed" in killed.stderr and not (tmp_path / "two").exists()
    assert len(list(tmp_path.glob(".two.resume/recover-*/trainer/checkpoint-*/trainer_state.json"))) == 1
    done = run(launch, SETTINGS, pruned, checkpoints["llama"], tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [line for line in (tmp_path / "two" / "run.jsonl").read_text().splitlines() if '"recover_step"' in line]
    assert len(steps) == 16, "no step is missing, none is told twice"
    secateur.recover(pruned, checkpoints["llama"], {"recover": SETTINGS}, out=tmp_path / "one")
    before, alone, together = (load_file(tmp_path / name / WEIGHTS) for name in ("pruned", "one", "two"))
    assert_trained_alike(before, alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [TORCHRUN, FSDP.format(2).split()], ids=["copies", "FSDP"])
def test_two_processes_polish_what_one_polishes(launch, checkpoints, recipe, tmp_path):
    polish = {**SETTINGS, "num_tokens": 1024}
    asked = grouped({**recipe, "remove": 0.5, "polish": polish})
    file, code = tmp_path / "r.yaml", tmp_path / "script.py"
    file.write_text(yaml.safe_dump(asked, sort_keys=False), encoding="utf-8")  # domains keep their order
    code.write_text(PRUNE, encoding="utf-8")
    for _ in range(2):  # the second one replaces the first result
        done = launched(launch, [code, checkpoints["llama"], file, tmp_path / "two"])
        assert done.returncode == 0, done.stderr
    one = secateur.prune(checkpoints["llama"], asked, out=tmp_path / "one")
    secateur.prune(checkpoints["llama"], {**asked, "polish": False}, out=tmp_path / "before")
    assert one.summary.polish is not None and one.summary.polish.training.held
    before, alone, together = (load_file(tmp_path / name / WEIGHTS) for name in ("before", "one", "two"))
    assert_trained_alike(before, alone, together)
    warnings = json.loads((tmp_path / "two" / "result.json").read_text(encoding="utf-8"))["warnings"]
    assert any("in shards over 2 processes" in warning for warning in warnings) == (launch is not TORCHRUN)
