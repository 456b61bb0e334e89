"""Resuming: a run that was stopped anywhere ends with the same bytes; nothing half-written is taken for complete."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import secateur
from secateur.inspection import inspect
from secateur.journal import Journal
from secateur.recipe import parse_recipe
from secateur.verify import Verification

RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rounds": {"groups": ["ffn", "kv_heads"], "rounds": 3, "max_loss_rise": 9.0, "keep_rounds": True},
    "curve": {"budget": "curve", "rounds": 2},
    "sublayers": {"budget": "curve", "groups": ["ffn", "kv_heads"], "sublayers": True, "remove": 0.45},
    "depth": {"depth": 1},
    "taylor": {"score": "taylor", "rounds": 2, "evaluate": False},
    "hidden width": {"hidden_size": 40},
    "bias": {"compensate": "bias"},
    "on disk": {"memory_budget": "", "rounds": 2},
}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Neither reload nor report, which other tests are about."""
    proof = Verification(0.0, 0.0, "")
    with (
        patch("secateur.pruning.verify_reload", lambda *_: proof),
        patch("secateur.pruning.missing_plots", lambda: ("no plots",)),
    ):
        yield


class Stopped(Exception):
    """Stands for whatever ends a process."""


def asked(name: str, model: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    full = {**recipe, "remove": 0.35, **RECIPES[name]}
    if "memory_budget" in full:
        whole = inspect(model, parse_recipe(recipe)).memory
        full["memory_budget"] = f"{(whole.peak - 1) / 1000:.3f}KB"
    return full


def weights(out: Path) -> dict[str, bytes]:
    """Return what must be the same bytes, by its path inside the result."""
    names = ("model.safetensors", "config.json", "keep.json", "recipe.yaml")
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.name in names}


@pytest.fixture(scope="module")
def expected(checkpoints, recipe, tmp_path_factory) -> Callable[[str], Path]:
    """Where an uninterrupted run of a recipe has written."""
    found: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in found:
            found[name] = tmp_path_factory.mktemp("expected") / "out"
            secateur.prune(checkpoints["llama"], asked(name, checkpoints["llama"], recipe), out=found[name])
        return found[name]

    return of


def steps(out: Path) -> list[tuple[int, int, str]]:
    """Return round, layer and group of every group's step in the run log."""
    lines = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    return [(line["round"], line["layer"], line["group"]) for line in lines if line["event"] == "group"]


class stopped_after:
    """Within the context the run stops once it has noted that many more finished steps."""

    def __init__(self, num_steps: int) -> None:
        self.left, self.patches = num_steps, []

    def __enter__(self) -> None:
        for method in ("keep", "value"):
            whole = getattr(Journal, method)

            def counted(journal: Journal, *args: Any, _whole: Any = whole) -> Any:
                before = journal.num_kept
                found = _whole(journal, *args)
                self.left -= journal.num_kept - before
                if self.left <= 0 and journal.num_kept > before:
                    raise Stopped
                return found

            self.patches.append(patch.object(Journal, method, counted))
            self.patches[-1].start()

    def __exit__(self, *error: object) -> None:
        for each in self.patches:
            each.stop()


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_stopped_after_any_step_ends_with_the_same_bytes(name, checkpoints, recipe, expected, tmp_path):
    wanted, out = asked(name, checkpoints["llama"], recipe), tmp_path / "out"
    num_stops = 0
    while not out.exists():
        try:
            with stopped_after(3):
                secateur.prune(checkpoints["llama"], wanted, out=out, resume=True)
        except Stopped as stop:
            num_stops += 1
            assert stop.__notes__ and sorted(path.name for path in tmp_path.iterdir()) == [".out.resume"]
    assert num_stops >= 2
    assert weights(out) == weights(expected(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert steps(out) == steps(expected(name))


@pytest.mark.parametrize("num_kills", [4, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["rounds"])
def test_killed_at_random_instants(name, num_kills, checkpoints, recipe, expected, tmp_path):
    """SIGKILL, each time at an instant drawn from the seconds of a whole run; then on until it is done."""
    out, choose = tmp_path / "out", random.Random(0)
    wanted = {"model": str(checkpoints["llama"]), "recipe": asked(name, checkpoints["llama"], recipe), "out": str(out)}
    child = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("resume_child.py")],
        env=dict(os.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(kill_after: float | None) -> tuple[int, float]:
        assert child.stdin and child.stdout
        child.stdin.write(json.dumps({**wanted, "kill_after": kill_after}) + "\n")
        child.stdin.flush()
        answer = json.loads(child.stdout.readline())
        return answer["status"], answer["seconds"]

    with child:
        status, whole_seconds = run(None)
        assert status == 0 and weights(out) == weights(expected(name))
        shutil.rmtree(out)
        kills = 0
        while kills < num_kills:
            status, _ = run(choose.uniform(0.05, 1) * whole_seconds)
            kills += status == -9
            assert status in (0, -9)
            assert out.exists() or status == -9
            if out.exists():  # also where the kill came between the last rename and the end
                assert weights(out) == weights(expected(name))
                shutil.rmtree(out)
        if not out.exists():
            assert run(None)[0] == 0
        assert child.stdin
        child.stdin.close()
    assert weights(out) == weights(expected(name)) and steps(out) == steps(expected(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Path:
    """The library that makes writing calls fail; needs a C compiler and Linux."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux")
    built = tmp_path_factory.mktemp("faults") / "fault.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, Path(__file__).with_name("fault.c"), "-ldl"], check=True)
    return built


@pytest.mark.parametrize(
    ("error", "first", "step"),
    [
        ("ENOSPC", 3, 30),
        *(pytest.param(error, 1, 1, marks=pytest.mark.slow) for error in ("ENOSPC", "EIO", "SHORT")),
    ],
)
def test_a_failing_write_leaves_nothing_half(error, first, step, faults, checkpoints, recipe, tmp_path):
    """The n-th call that writes below the directory of OUT fails, for n = first, first + step, ..."""
    wanted = {**asked("defaults", checkpoints["llama"], recipe), "rounds": 2}
    arguments = [checkpoints["llama"], json.dumps(wanted), tmp_path, first, step, 10**6, error]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fault_child.py"), *map(str, arguments)],
        env=os.environ | {"LD_PRELOAD": str(faults)},
        capture_output=True,
        text=True,
        check=True,
    )
    *found, last = map(json.loads, done.stdout.splitlines())
    assert last["num_calls"] > 150 and len(found) == len(range(first, last["num_calls"] + 1, step))
    for each in found:
        # The last call of all, which flushes the rename, may fail when OUT is there and whole.
        assert each["whole"] if each["there"] else each["said"], each
        assert set(each["left"]) <= {".out.resume", "out"}, each
        assert each["again"] == "" and each["same"], each
        assert each["there"] or each["after"] == ["out"], each
