"""What an interrupted recovery leaves: said when it stops and when it goes on, gone at the end, never run as code."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import grouped

import secateur
from secateur.store import Store

CHANGES = {
    "recover": {
        "num_tokens": 1024,
        "batch_tokens": 128,
        "learning_rate": 1e-3,
        "evaluations": 2,
    }
}


class Killed(Exception):
    """What stands for a kill: raised by the listener, where the run has no say."""


class Code:
    """An object whose pickle makes a file when it is opened as pickles are."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def pruned(checkpoints, recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "pruned"
    secateur.prune(checkpoints["llama"], grouped({**recipe, "remove": 0.3}), out=out)
    return out


def interrupt(pruned: Path, teacher: Path, out: Path) -> tuple[Path, list[str]]:
    """Stop a recovery behind its first checkpoint; return what it left and what it said."""

    def kill(name: str, done: int, total: int) -> None:
        if name == "recover" and done > 0.6 * total:
            raise Killed

    said: list[str] = []
    with pytest.raises(Killed):
        secateur.recover(pruned, teacher, CHANGES, out=out, progress=kill, tell=said.append)
    [left] = {path.parents[1] for path in out.parent.glob(".out.recover-*/trainer/checkpoint-*")}
    return left, said


def test_it_is_said_where_it_lies_and_gone_in_the_end(pruned, checkpoints, tmp_path):
    other = tmp_path / ".out.recover-0123456789ab"
    other.mkdir()
    (other / "layer-0.safetensors").write_bytes(bytes(1000))
    beside = tmp_path / ".out.recovered"
    beside.mkdir()
    out = tmp_path / "out"
    left, _ = interrupt(pruned, checkpoints["llama"], out)
    said: list[str] = []
    secateur.recover(pruned, checkpoints["llama"], CHANGES, out=out, tell=said.append)
    [goes_on] = [line for line in said if line.startswith(f"{left}: ")]
    [stale] = [line for line in said if line.startswith(f"{other}: ")]
    assert "this one goes on from there" in goes_on and "of other inputs; delete it" in stale
    assert not left.exists() and sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [other.name, beside.name, "out"]
    )


def test_pickles_in_it_are_opened_as_tensors_only(pruned, checkpoints, tmp_path):
    left, said = interrupt(pruned, checkpoints["llama"], tmp_path / "out")
    assert said[-1].startswith(f"{left}: keeps what is finished")
    [state] = left.glob("trainer/checkpoint-*/optimizer.pt")
    torch.save(Code(tmp_path / "ran"), state)
    Store(left / "trainer").save_files(state.parent.name, state.parent)  # by somebody who also writes the digests
    with pytest.raises(secateur.CheckpointError, match="holds more than tensors, so it is not opened") as caught:
        secateur.recover(pruned, checkpoints["llama"], CHANGES, out=tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    torch.load(state, weights_only=False)
    assert (tmp_path / "ran").exists(), "the pickle would have run"


def test_damaged_trained_weights_are_trained_again(pruned, checkpoints, tmp_path):
    secateur.recover(pruned, checkpoints["llama"], CHANGES, out=tmp_path / "whole")

    def kill(name: str, done: int, total: int) -> None:
        if name == "verify":
            raise Killed

    out, said = tmp_path / "out", list[str]()
    with pytest.raises(Killed):
        secateur.recover(pruned, checkpoints["llama"], CHANGES, out=out, progress=kill)
    [trained] = tmp_path.glob(".out.recover-*/trained/*.safetensors")
    raw = bytearray(trained.read_bytes())
    raw[-1] ^= 1
    trained.write_bytes(raw)
    secateur.recover(pruned, checkpoints["llama"], CHANGES, out=out, tell=said.append)
    told = f"recover: {trained.stem}, finished by an earlier run, is damaged on disk, so it is done again."
    assert said.count(told) == 1
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
