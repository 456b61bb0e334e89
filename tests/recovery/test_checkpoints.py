"""Checkpoints of an interrupted training: one with a byte changed counts as absent, and the result is the same."""

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from damage import flip_a_bit_of, truncate
from recipes import grouped
from stops import Stopped, killed_in

import secateur
from secateur.errors import CheckpointError
from secateur.recovery import train
from secateur.recovery.train import Checkpoints

TRAINING = {"num_tokens": 768, "batch_tokens": 128, "learning_rate": 1e-3, "kl_share": 1.0}
WEIGHTS = "model.safetensors"


pytestmark = pytest.mark.usefixtures("unproved")


@pytest.fixture(scope="module", autouse=True)
def saved_often() -> Iterator[None]:
    """Save every second step."""
    with patch.object(train, "SAVED_STEPS", 2):
        yield


def test_a_write_of_torch_that_fails_is_a_full_disk_and_no_other_error_is(tmp_path):
    checkpoints = Checkpoints(tmp_path, "polish", lambda _: None)
    with pytest.raises(CheckpointError, match="a checkpoint could not be written whole; free some space"):
        with checkpoints.errors_told():
            torch.save({}, tmp_path / "nowhere" / "optimizer.pt")
    with pytest.raises(RuntimeError, match="shapes") as raised, checkpoints.errors_told():
        raise RuntimeError("shapes")
    assert type(raised.value) is RuntimeError


@pytest.fixture(scope="module")
def run(checkpoints, recipe) -> Callable[..., object]:
    """A prune with a polish, of six steps."""
    return partial(secateur.prune, checkpoints["llama"], grouped({**recipe, "remove": 0.4, "polish": TRAINING}))


@pytest.fixture(scope="module")
def killed(run, tmp_path_factory) -> Path:
    """A directory with what a run leaves that is killed behind its second checkpoint."""
    place = tmp_path_factory.mktemp("killed")
    with pytest.raises(Stopped):
        run(out=place / "out", progress=killed_in("polish", behind=0.7))
    return place


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory) -> bytes:
    """The weights of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(out=out)
    return (out / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("name", "damage"), [(WEIGHTS, flip_a_bit_of), ("optimizer.pt", truncate), ("trainer_state.json", flip_a_bit_of)]
)
def test_a_damaged_checkpoint_counts_as_absent(name, damage, run, killed, expected, tmp_path):
    place, told = Path(shutil.copytree(killed, tmp_path / "moved")), list[str]()
    [checkpoint] = place.glob(".out.*/**/trainer/checkpoint-4")
    damage(checkpoint / name, random.Random(0))
    run(out=place / "out", tell=told.append)
    assert (place / "out" / WEIGHTS).read_bytes() == expected
    assert [path.name for path in place.iterdir()] == ["out"]
    assert "polish: checkpoint-4, finished by an earlier run, is damaged on disk, so it is done again." in told


def saved(folder: Path, steps: Sequence[int]) -> Checkpoints:
    """Return checkpoints of these steps, as the Trainer leaves them."""
    made = Checkpoints(folder, "polish", tell=[].append)
    for step in steps:
        made.path(step).mkdir(parents=True)
        (made.path(step) / WEIGHTS).write_bytes(bytes([step]))
        made.finish(step)
    return made


def test_of_two_whole_checkpoints_the_later_one_is_taken(tmp_path):
    with patch.object(Checkpoints, "_remove"):  # killed before the first one went
        made = saved(tmp_path / "trainer", (4, 8))
    assert made.last() == made.path(8) and not made.path(4).exists()


@pytest.mark.parametrize(("steps", "damaged", "last", "left"), [((4, 8, 12), None, 12, [12]), ((4, 8), 8, None, [])])
def test_the_last_undamaged_checkpoint_is_taken(steps, damaged, last, left, tmp_path):
    made, told = saved(tmp_path / "trainer", steps), list[str]()
    if damaged is not None:
        flip_a_bit_of(made.path(damaged) / WEIGHTS, random.Random(0))
    half = made.path(16)  # the run ended while it was written
    half.mkdir()
    found = Checkpoints(tmp_path / "trainer", "polish", told.append).last()
    assert found == (None if last is None else made.path(last))
    names = [f"checkpoint-{step}" for step in left]
    assert sorted(path.name for path in (tmp_path / "trainer").glob("*/")) == sorted(names)
    assert told == [
        f"polish: checkpoint-{step}, finished by an earlier run, is damaged on disk, so it is done again."
        for step in ([] if damaged is None else [damaged])
    ]
