"""How many threads a run computes with: the fastest number beside what else runs, and the user's own."""

import os
from types import SimpleNamespace

import pytest
import torch
from recipes import grouped
from stops import lines_of

import secateur
from secateur.cli import give_way
from secateur.stream import device
from secateur.stream.device import fastest_threads, threads_kept


@pytest.fixture(autouse=True)
def restored():
    with threads_kept():
        yield


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({4: 1.0, 2: 1.9, 1: 3.6}, 4),
        ({4: 2.0, 2: 1.5, 1: 1.4}, 1),
        ({4: 2.0, 2: 1.5, 1: 1.6}, 2),
        ({4: 1.0, 2: 1.1, 1: 0.5}, 1),  # half as many are hardly slower, so it looks further
        ({4: 1.0, 2: 1.5, 1: 0.5}, 4),  # where fewer are so much slower it does not
    ],
)
def test_the_fastest_number_is_taken(seconds, expected, monkeypatch):
    now = 0.0
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: now))

    def compute() -> None:
        nonlocal now
        now += seconds[torch.get_num_threads()]

    torch.set_num_threads(4)
    assert fastest_threads(compute) == expected
    assert torch.get_num_threads() == 4


def test_a_moment_that_something_else_takes_does_not_choose(monkeypatch):
    now, runs = 0.0, 0
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: now))

    def compute() -> None:
        nonlocal now, runs
        runs += 1
        now += 10.0 if runs in (2, 6) else 4.0 / torch.get_num_threads()  # two of five timed runs of all threads

    torch.set_num_threads(4)
    assert fastest_threads(compute) == 4


@pytest.mark.parametrize("said", [False, True], ids=["nothing said", "OMP_NUM_THREADS"])
def test_a_run_has_its_own_number_unless_the_user_says_one(said, recipe, checkpoints, tmp_path, monkeypatch):
    if not said:
        monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    monkeypatch.setattr("secateur.pruning.prepare.fastest_threads", lambda _: 1)
    seen: list[int] = []

    def note(stage: str, *_: int) -> None:
        if stage.startswith("prune"):
            seen.append(torch.get_num_threads())

    asked = grouped({**recipe, "evaluate": False})
    secateur.prune(checkpoints["llama"], asked, out=tmp_path / "out", progress=note)
    assert [line["count"] for line in lines_of(tmp_path / "out", "threads")] == ([] if said else [1])
    assert set(seen) == {2 if said else 1} and torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("load", "said", "expected"), [(50.0, None, "PASSIVE"), (50.0, "ACTIVE", "ACTIVE"), (5.0, None, None)]
)
def test_threads_sleep_where_other_programs_run(load, said, expected, monkeypatch):
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: load)
    monkeypatch.setenv("OMP_WAIT_POLICY", said or "")
    if said is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    give_way()
    assert os.environ.get("OMP_WAIT_POLICY") == expected
