"""Resuming: a run that was stopped anywhere ends with the same bytes; nothing half-written is taken for complete."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from damage import flip_a_bit
from families import tiny_family
from little import BEGUN
from models import saved
from old_results import old_result
from recipes import grouped
from run_cli import run_cli
from safetensors.torch import load_file, save_file
from stops import Stopped, lines_of, stopped_after, stopped_again_and_again, weights

import secateur
from secateur.result_directory import staging
from secateur.store import place_beside
from tests.pruning.test_memory_budget import budget_between

RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rounds": {"groups": ["ffn", "kv_heads"], "rounds": 3},
    "curve and depth on disk": {"budget": "curve", "rounds": 2, "depth": 1},
    "experts in bfloat16": {"groups": ["experts"], "rounds": 2, "align": 1},
    "channels inside experts": {"groups": ["expert_ffn"], "rounds": 2},
}


pytestmark = pytest.mark.usefixtures("unproved")


def asked(name: str, model: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    full = {**recipe, "remove": 0.35, **RECIPES[name]}
    return {**full, "memory_budget": budget_between(model, full)} if name.endswith("on disk") else full


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), tiny_family("mixtral").to(torch.bfloat16))


@pytest.fixture(scope="module")
def expected(checkpoints, mixtral, recipe, tmp_path_factory) -> Callable[[str], Path]:
    """Where an uninterrupted run of a recipe has written."""

    @cache
    def of(name: str) -> Path:
        out, model = tmp_path_factory.mktemp("expected") / "out", mixtral if "experts" in name else checkpoints["llama"]
        secateur.prune(model, grouped(asked(name, model, recipe)), out=out)
        return out

    return of


def steps(out: Path) -> list[tuple[int, int, str]]:
    """Return round, layer and group of every group's step in the run log."""
    return [(line["round"], line["layer"], line["group"]) for line in lines_of(out, "group")]


@pytest.mark.parametrize("name", list(RECIPES)[1:])
def test_a_run_stopped_after_any_step_ends_with_the_same_bytes(name, checkpoints, mixtral, recipe, expected, tmp_path):
    model, out = mixtral if "experts" in name else checkpoints["llama"], tmp_path / "out"
    wanted = asked(name, model, recipe)
    stopped_again_and_again(lambda: secateur.prune(model, grouped(wanted), out=out), out, first=2, more=4)
    assert weights(out) == weights(expected(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert steps(out) == steps(expected(name))


PRUNE = """
import json, pathlib
from recipes import grouped
import secateur, secateur.api, secateur.report.report
model, recipe, out, imported = sys.argv[1:]
pathlib.Path(imported).touch()
secateur.prune(model, grouped(json.loads(recipe)), out=out)
"""


@pytest.mark.slow  # by a clock; steps are stopped one by one above
def test_killed_at_random_instants(checkpoints, recipe, expected, warm, tmp_path):
    """SIGKILL, each time at an instant drawn from the seconds of a whole run; then on until it is done.

    After every other kill one bit of the store flips: the step, or the whole store, must be done again.
    """
    out, choose, name, num_kills = tmp_path / "out", random.Random(0), "rounds", 30
    wanted, imported = json.dumps(asked(name, checkpoints["llama"], recipe)), tmp_path / "imported"

    def run(kill_after: float | None = None) -> tuple[int, float]:
        """Return the exit status and the seconds behind all imports."""
        command = [sys.executable, "-c", BEGUN + PRUNE, checkpoints["llama"], wanted, out, imported]
        process = warm.start(command, dict(os.environ))
        while psutil.pid_exists(process) and not imported.exists():
            time.sleep(0.002)
        imported.unlink()
        start = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # it may have ended before
                os.kill(process, signal.SIGKILL)
        return warm.wait(command).returncode, time.monotonic() - start

    status, whole_seconds = run()
    assert status == 0 and weights(out) == weights(expected(name))
    shutil.rmtree(out)
    kills = flips = 0
    while kills < num_kills:
        status, _ = run(choose.uniform(0.05, 1) * whole_seconds)
        kills += status == -9
        flips += kills % 2 and flip_a_bit(place_beside(out), choose)
        assert status in (0, -9)
        assert out.exists() or status == -9
        if out.exists():  # also where the kill came between the last rename and the end
            assert weights(out) == weights(expected(name))
            shutil.rmtree(out)
    assert flips >= num_kills // 4
    assert run()[0] == 0
    assert weights(out) == weights(expected(name)) and steps(out) == steps(expected(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Path:
    """The library that makes writing calls fail; needs a C compiler and Linux."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux")
    built, source = tmp_path_factory.mktemp("faults") / "fault.so", Path(__file__).parents[1].joinpath("fault.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, source, "-ldl"], check=True)
    return built


ERRORS = ("ENOSPC", "EIO", "SHORT")


EACH = [pytest.param(error, 1, 1, marks=pytest.mark.slow) for error in ERRORS]


@pytest.mark.parametrize(("error", "first", "step"), [("ENOSPC", 40, 110), *EACH])
def test_a_failing_write_leaves_nothing_half(error, first, step, faults, checkpoints, recipe, tmp_path):
    training = {"num_tokens": 128, "batch_tokens": 64}
    wanted = {**asked("defaults", checkpoints["llama"], recipe), "rounds": 2, "polish": training}
    found, num_calls = failed_writes(faults, checkpoints["llama"], wanted, tmp_path, "", first, step, error)
    assert num_calls > 150 and len(found) == len(range(first, num_calls + 1, step))
    assert sum(each["flipped"] for each in found) >= len(found) // 2


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_a_disk_full_in_the_training_leaves_what_it_can_go_on_from(error, faults, checkpoints, recipe, tmp_path):
    wanted = {**recipe, "remove": 0.35, "polish": {"num_tokens": 256, "batch_tokens": 64}}
    counted = place_beside(Path("out")).name + "/polish"
    found, num_calls = failed_writes(faults, checkpoints["llama"], wanted, tmp_path, counted, 1, 1, error)
    assert num_calls > 20 and len(found) == num_calls
    assert all(each["said"] and not each["there"] for each in found)


def failed_writes(
    faults: Path, model: Path, wanted: Any, place: Path, counted: str, first: int, step: int, error: str
) -> tuple[list[dict[str, Any]], int]:
    """Let the n-th call fail that writes to a path in `place` that begins with `counted`, n = first, first + step, ...

    Where that leaves a store, one bit of it flips before the run goes on. Return what came of each, and the number of
    such calls.
    """
    command = [sys.executable, Path(__file__).parents[1].joinpath("fault_child.py")]
    command += map(str, [model, json.dumps(wanted), place, counted, first, step, error])
    environment = os.environ | {"LD_PRELOAD": str(faults)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *found, last = map(json.loads, done.stdout.splitlines())
    for each in found:
        assert "\n" not in each["said"], each
        # The last call of all, which flushes the rename, may fail when OUT is there and whole.
        assert each["whole"] if each["there"] else each["said"], each
        assert set(each["left"]) <= {".out.resume", "out"}, each
        assert each["again"] == "" and each["same"], each
        assert each["there"] or each["after"] == ["out"], each
    return found, last["num_calls"]


def begun(model: Path, recipe: dict[str, Any], out: Path) -> None:
    """Leave what a run leaves that was stopped after its third step."""
    with pytest.raises(Stopped), stopped_after(3):
        secateur.prune(model, grouped(recipe), out=out)


def test_other_inputs_are_refused_and_nothing_is_lost(checkpoints, recipe, tmp_path):
    model, text = shutil.copytree(checkpoints["llama"], tmp_path / "model"), tmp_path / "mine.txt"
    text.write_text("\n".join(f"line {number} of the text" for number in range(2000)))
    calibration = {**recipe["calibration"], "domains": {"mine": {"files": [str(text)]}}}
    wanted, out = {**recipe, "remove": 0.35, "calibration": calibration}, tmp_path / "out"
    begun(model, wanted, out)
    finished = sorted(place_beside(out).iterdir())

    def check_refused(said: str, *options: str) -> None:
        (tmp_path / "r.yaml").write_text(json.dumps(grouped(wanted)))
        done = run_cli("prune", model, out, "--recipe", tmp_path / "r.yaml", *options)
        assert done.status == 2
        assert f"OUT {out}: an interrupted run had other inputs: {said}; give those" in done.stderr
        assert sorted(place_beside(out).iterdir()) == finished and not out.exists()

    check_refused("recipe remove share was 0.35 and is 0.3", "--remove", "0.3")
    before = text.read_text()
    text.write_text(before.replace("text", "book"))
    check_refused("the calibration text has changed")
    text.write_text(before)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check_refused("model file model.safetensors has changed")


def test_a_budget_of_memory_may_change_on_the_way(checkpoints, recipe, expected, tmp_path):
    out, model = tmp_path / "out", checkpoints["llama"]
    wanted = asked("defaults", model, recipe)
    begun(model, wanted, out)
    secateur.prune(model, grouped({**wanted, "memory_budget": budget_between(model, wanted)}), out=out)
    ours, theirs = weights(out), weights(expected("defaults"))
    assert ours["model.safetensors"] == theirs["model.safetensors"] and ours["config.json"] == theirs["config.json"]


def test_what_killed_processes_left_is_removed_and_an_old_result_comes_back(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    out, live = tmp_path / "out", tmp_path / f".out.partial-{os.getppid()}"
    for kind in ("partial", "replaced"):  # killed between the two renames of --overwrite
        old_result(tmp_path / f".out.{kind}-{gone.pid}", kind)
    live.mkdir()
    with staging(out, overwrite=True) as directory:
        assert (out / "config.json").read_text() == "replaced"
        (directory / "config.json").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", live.name])
    assert (out / "config.json").read_text() == "new"
