"""Checkpoints of an interrupted training: one with a byte changed counts as absent, and the result is the same."""

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from damage import flip_a_bit_of, truncate
from recipes import grouped
from run_cli import run_cli
from stops import Stopped, lines_of

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


def killed_at_second_checkpoint(command: tuple[object, ...]) -> None:
    finish, steps = Checkpoints.finish, list[int]()

    def finish_and_die(checkpoints: Checkpoints, step: int) -> None:
        finish(checkpoints, step)
        steps.append(step)
        if len(steps) == 2:
            raise Stopped

    with patch.object(Checkpoints, "finish", finish_and_die), pytest.raises(Stopped):
        run_cli(*command)


@pytest.fixture(scope="module")
def commands(checkpoints, recipe, tmp_path_factory) -> dict[str, tuple[object, ...]]:
    """A prune with a polish, and a recovery."""
    place = tmp_path_factory.mktemp("commands")
    recipes = {"prune": grouped({**recipe, "remove": 0.4, "polish": TRAINING}), "recover": {"recover": TRAINING}}
    for name, content in recipes.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    secateur.prune(checkpoints["llama"], grouped({**recipe, "remove": 0.3}), out=place / "pruned")
    options = ("--recipe", place / "prune.yaml")
    models = place / "pruned", "--teacher", checkpoints["llama"]
    return {
        "prune": ("prune", checkpoints["llama"], "OUT", *options),
        "recover": ("recover", *models, "--out", "OUT", "--recipe", place / "recover.yaml"),
    }


def with_out(command: tuple[object, ...], out: Path) -> tuple[object, ...]:
    return tuple(out if part == "OUT" else part for part in command)


@pytest.fixture(scope="module")
def runs(commands, tmp_path_factory) -> dict[str, tuple[bytes, Path]]:
    """Per command: the weights of an undisturbed run, and a directory with what a killed one left."""
    found: dict[str, tuple[bytes, Path]] = {}
    for name, command in commands.items():
        whole, killed = tmp_path_factory.mktemp("whole") / "out", tmp_path_factory.mktemp("killed")
        assert run_cli(*with_out(command, whole)).status == 0
        killed_at_second_checkpoint(with_out(command, killed / "out"))
        found[name] = (whole / WEIGHTS).read_bytes(), killed
    return found


DAMAGES: dict[str, tuple[str, str, Callable[[Path, random.Random], None] | None]] = {
    "none": ("prune", WEIGHTS, None),
    "weights": ("prune", WEIGHTS, flip_a_bit_of),
    "optimizer cut short": ("prune", "optimizer.pt", truncate),
    "state": ("prune", "trainer_state.json", flip_a_bit_of),
    "weights of a recovery": ("recover", WEIGHTS, flip_a_bit_of),
}


@pytest.mark.parametrize(("verb", "name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_counts_as_absent(verb, name, damage, commands, runs, tmp_path):
    expected, killed = runs[verb]
    place = Path(shutil.copytree(killed, tmp_path / "moved"))
    [checkpoint] = place.glob(".out.*/**/trainer/checkpoint-4")
    if damage is not None:
        damage(checkpoint / name, random.Random(0))
    done = run_cli(*with_out(commands[verb], place / "out"))
    assert done.status == 0, done.stderr
    assert (place / "out" / WEIGHTS).read_bytes() == expected
    assert [path.name for path in place.iterdir()] == ["out"]
    label = "polish" if verb == "prune" else "recover"
    told = f"{label}: checkpoint-4, finished by an earlier run, is damaged on disk, so it is done again."
    assert (told in done.stderr) == (damage is not None)


def test_the_lines_of_a_training_that_was_whole_are_those_of_the_run_that_goes_on(commands, tmp_path):
    command = with_out(commands["prune"], tmp_path / "out")
    with patch("secateur.pruning.prune.save_checkpoint", side_effect=Stopped), pytest.raises(Stopped):
        run_cli(*command)
    assert run_cli(*command).status == 0
    assert [line["step"] for line in lines_of(tmp_path / "out", "polish_step")] == list(range(1, 7))


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


@pytest.mark.parametrize(
    ("steps", "damaged", "last", "left"),
    [((4, 8, 12), None, 12, [12]), ((4, 8), 8, None, [])],
)
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
