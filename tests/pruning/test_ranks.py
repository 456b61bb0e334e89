"""Many ranks: the text is split, every sum is the same, one rank decides and writes, a lost rank ends all."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch
import yaml
from models import saved, tiny_llama
from ranks_child import main as run_jobs
from recipes import grouped
from run_ranks import run_forked_ranks, run_machines, run_ranks, start_ranks
from safetensors.torch import load_file

import secateur
from secateur import ranks
from secateur.pruning.open import check_same_run
from secateur.recipe import parse_recipe
from tests.families import tiny_family

CHILD = Path(__file__).parents[1].joinpath("ranks_child.py")
# Largest change of a weight over the largest weight, for experts alone: they are refitted on pieces of the tokens that
# a rank's router sends them, so that products, not only their sums, are others than one process makes.
TOLERANCE = 1e-4


@pytest.fixture
def as_rank(monkeypatch):
    """Return a function that makes this process pretend to be one of several ranks."""

    def pretend(rank: int, size: int) -> None:
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(ranks, "size", lambda: size)

    return pretend


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_item_is_of_one_rank_and_their_numbers_differ_by_one_at_most(as_rank, size):
    items, parts = list(range(5)), []
    for rank in range(size):
        as_rank(rank, size)
        parts.append(ranks.own_part(items))
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_rank_passes_the_domains_of_which_it_has_no_text(as_rank):
    assert ranks.domains_ended("", "b", "abc") == []
    assert ranks.domains_ended("a", "c", "abc") == ["a"]
    as_rank(1, 2)
    assert ranks.domains_ended("", "a", "abc") == []
    assert ranks.domains_ended("", "b", "abc") == ["a"]
    assert ranks.domains_ended("a", "c", "abc") == ["a", "b"]
    assert ranks.domains_ended("b", "", "abc") == ["b", "c"]
    assert ranks.domains_ended("", "", "abc") == ["a", "b", "c"]


def test_each_rank_has_a_gpu_of_its_own_and_none_is_named(as_rank, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    numbered = lambda *_, device: SimpleNamespace(device=torch.device(device.type, device.index or 0))  # noqa: E731
    monkeypatch.setattr(torch, "empty", numbered)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(ranks.device_called("cuda")) == "cuda:0" and str(ranks.device_called("cuda:1")) == "cuda:1"
    as_rank(1, 2)
    assert str(ranks.device_called("cuda")) == str(ranks.device_called(None)) == "cuda:3"
    with pytest.raises(secateur.RecipeError, match="'cuda:1' cannot be that of 2 ranks; give cuda"):
        ranks.device_called("cuda:1")


def test_ranks_meet_and_one_process_alone_does_not_wait(monkeypatch):
    store = torch.distributed.HashStore()
    ranks.meet("end")
    monkeypatch.setattr(ranks, "_groups", [ranks._Group(store, 0, 1)])
    ranks.meet("end")
    assert store.add("meet-end", 0) == 1


def test_several_ranks_compare_what_they_run(monkeypatch):
    told: list[dict[str, str]] = []
    monkeypatch.setattr("secateur.pruning.open.check_same", told.append)
    check_same_run(tiny_llama(), parse_recipe({"remove": 0.2}))
    assert not told, "one process alone"
    monkeypatch.setattr("secateur.pruning.open.size", lambda: 2)
    for seed, share in ((0, 0.2), (1, 0.2), (0, 0.3)):
        check_same_run(tiny_llama(seed=seed), parse_recipe({"remove": share}))
    first, other_weights, other_recipe = told
    assert [key for key in first if first[key] != other_weights[key]] == ["model (weights)"]
    assert [key for key in first if first[key] != other_recipe[key]] == ["recipe"]


@pytest.fixture(scope="module")
def jobs(checkpoints, recipe, texts, unproved, tmp_path_factory) -> tuple[Path, Path]:
    """A file of jobs, and what one process makes of them."""
    model, blocks = str(checkpoints["llama"]), {"num_tokens": 2048, "sequence_length": 64}
    more = {**recipe, "remove": 0.2, "calibration": {**recipe["calibration"], **blocks}}
    few = {"calibration": {**recipe["calibration"], "num_tokens": 256}}
    experts = {**more, "groups": ["experts"], "align": 1}
    place = tmp_path_factory.mktemp("ranks")
    mixtral = str(saved(place / "mixtral", tiny_family("mixtral")))
    low = str(saved(place / "bfloat16", tiny_llama().to(torch.bfloat16)))
    described: dict[str, dict[str, Any]] = {
        "depth": {"model": model, "recipe": {**more, "remove": 0.35, "depth": 1}, "write": True},
        "curve in bfloat16": {"model": low, "recipe": {**more, "budget": "curve", "rounds": 2}},
        # Fewer batches than ranks: one rank has no text of a domain, and no held-out text at all.
        "few": {"model": model, "recipe": {**more, **few}},
        "experts": {"model": mixtral, "recipe": experts},
        "few tokens for experts": {"model": mixtral, "recipe": {**experts, **few}},
        "channels in experts": {"model": mixtral, "recipe": {**experts, **few, "groups": ["expert_ffn"]}},
        "like another": {"model": str(saved(place / "sibling", tiny_llama(seed=1))), "like": str(place / "pruned")},
        "by a measurement": {"model": model, "from_": str(place / "sizes")},
    }
    secateur.prune(model, grouped({**more, "remove": 0.3}), out=place / "pruned")
    secateur.measure(model, grouped({**recipe, "calibration": more["calibration"]}), out=place / "sizes")
    described = {name: {"write": False, **each} for name, each in described.items()}
    (place / "jobs.json").write_text(json.dumps(described), encoding="utf-8")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each of several ranks has
    run_jobs(str(place / "jobs.json"), str(place / "1"))
    torch.set_num_threads(num_threads)
    return place / "jobs.json", place / "1"


def check_against_one(jobs: tuple[Path, Path], num_ranks: int, launch: Callable[..., tuple[int, str, str]]) -> None:
    file, one = jobs
    out = file.with_name(str(num_ranks))
    status, _, stderr = launch(num_ranks, CHILD, file, out)
    assert status == 0, stderr
    for name in json.loads(file.read_text(encoding="utf-8")):
        alone, together = (json.loads((place / f"{name}.json").read_text(encoding="utf-8")) for place in (one, out))
        assert together["different_models"] == 1
        assert together["keeps"] == alone["keeps"] and together["layers"] == alone["layers"], name
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        weights, expected = (load_file(place / f"{name}.safetensors") for place in (out, one))
        for key, tensor in expected.items():
            close = TOLERANCE * float(tensor.abs().max()) if "experts" in name else 0.0
            torch.testing.assert_close(weights[key], tensor, rtol=0, atol=close)
    written = load_file(out / "depth" / "model.safetensors")
    assert all(torch.equal(tensor, written[key]) for key, tensor in load_file(out / "depth.safetensors").items())
    assert {"config.json", "keep.json", "run.jsonl", "tokenizer.json"} <= {p.name for p in (out / "depth").iterdir()}
    assert not list(out.glob(".*"))
    said = json.loads((out / "said.json").read_text(encoding="utf-8"))
    assert said["first"] == ["a mistake"] * num_ranks
    assert said["same"][0].startswith("rank 1: its colour is not that of rank 0;")
    assert "nothing" not in said["same"]
    assert said["turns"] == [[letter, 1] for letter in "abcde"]  # each done as by one process


def test_two_ranks_make_what_one_makes(jobs, warm):
    check_against_one(jobs, 2, partial(run_forked_ranks, warm))


def test_a_process_is_alive_until_it_ends_though_nobody_has_asked_how(monkeypatch):
    assert ranks.is_alive(psutil.Process().pid)
    process = subprocess.Popen(["true"])
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not ranks.is_alive(process.pid)
    process.wait()
    assert not ranks.is_alive(process.pid)
    monkeypatch.setattr(psutil, "Process", Mock(side_effect=psutil.AccessDenied()))
    assert ranks.is_alive(1), "another user's"


@pytest.mark.parametrize(("reason", "why"), [("", " (the launcher is gone too)"), ("no answer", " (no answer)")])
def test_a_lost_rank_that_nobody_can_name_is_told_too(reason, why, monkeypatch):
    def gone(*_: Any) -> Any:
        raise RuntimeError("connection closed")

    monkeypatch.setattr(ranks, "_groups", [ranks._Group(torch.distributed.HashStore(), 0, 3)])
    monkeypatch.setattr(ranks, "lost_ranks", gone)
    assert ranks.lost_text(reason).startswith(f"rank one of 3 no longer answers was lost{why}, so all ranks end")


@pytest.mark.slow
def test_four_ranks_of_a_launcher_make_what_one_makes(jobs):
    check_against_one(jobs, 4, run_ranks)


def command_of(model: Path, recipe: dict[str, Any], out: Path) -> list[object]:
    file = out.with_name("recipe.yaml")
    file.write_text(yaml.safe_dump(grouped(recipe)), encoding="utf-8")
    return ["-m", "secateur", "prune", model, out, "--recipe", file]


@pytest.mark.slow
def test_a_mistake_is_said_once_and_so_is_that_a_command_is_for_one_process(checkpoints, recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    model = checkpoints["llama"]
    for command, said in (
        (command_of(model, recipe, out), "OUT "),
        (["-m", "secateur", "inspect", model], "inspect: runs in one process, got 2 ranks"),
    ):
        status, _, stderr = run_ranks(2, *command)
        assert status != 0
        assert stderr.count(f"secateur: {said}") == stderr.count("secateur: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_ends_the_others(checkpoints, recipe, tmp_path, lost):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a long text" for number in range(20000)), encoding="utf-8")
    calibration = {"domains": {"a": {"files": [str(text)]}}, "num_tokens": 65536, "sequence_length": 64}
    long, out = {**recipe, "remove": 0.3, "rounds": 30, "align": 1, "calibration": calibration}, tmp_path / "out"
    with start_ranks(2, *command_of(checkpoints["llama"], long, out)) as process:
        wait_for_log_lines(tmp_path, 3, process)
        children = psutil.Process(process.pid).children()
        (victim,) = (child for child in children if child.environ().get("RANK") == str(lost))
        victim.kill()
        _, stderr = process.communicate(timeout=1200)
    assert process.returncode != 0
    assert stderr.count(f"secateur: rank {lost} of 2 was lost, so all ranks end") == 1
    assert "run the same command again, which goes on" in stderr
    assert not out.exists()
    # Only the killed rank itself could not clear up.
    assert len(list(tmp_path.glob(".out.partial-*"))) == (1 if lost == 0 else 0)
    assert not any(psutil.pid_exists(child.pid) and child.is_running() for child in children)
    if lost == 1:  # and another number of ranks does
        command = [sys.executable, *map(str, command_of(checkpoints["llama"], long, out))]
        again = subprocess.run(command, capture_output=True, text=True, check=False)  # judged as the ranks are
        assert again.returncode == 0, again.stderr
        assert " finished steps are of an earlier run" in (out / "run.jsonl").read_text(encoding="utf-8")


def wait_for_log_lines(place: Path, num_lines: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        logs = list(place.glob(".out.partial-*/run.jsonl"))
        if logs and logs[0].read_text(encoding="utf-8").count('"group"') >= num_lines:
            return
        time.sleep(0.1)
    pytest.fail(f"the run ended before it was cut: {process.communicate()[1]}")


@pytest.mark.slow
def test_ranks_share_the_cells_of_a_study_and_the_blocks_of_an_evaluation(checkpoints, recipe, tmp_path):
    file = study_file(checkpoints["llama"], recipe, tmp_path)
    for num_ranks in (1, 2):
        run(num_ranks, "compare", file, tmp_path / f"compared-{num_ranks}")
    one, two = (tmp_path / f"compared-{number}" for number in (1, 2))
    found = [json.loads((place / "results.json").read_text(encoding="utf-8"))["cells"] for place in (one, two)]
    alone, shared = [[{**cell, "seconds": 0} for cell in cells] for cells in found]
    assert alone == shared and len(alone) == 6
    assert {path.name for path in (one / "cells").iterdir()} == {path.name for path in (two / "cells").iterdir()}
    domains = [f"--domain={name}={source['files'][0]}" for name, source in recipe["calibration"]["domains"].items()]
    options = ["--num-blocks", 5, "--sequence-length", 32, "--against", checkpoints["llama"]]
    for num_ranks in (1, 2):
        run(num_ranks, "evaluate", checkpoints["llama-tied"], *domains, *options, "--out", tmp_path / str(num_ranks))
    assert (tmp_path / "1" / "evaluation.json").read_bytes() == (tmp_path / "2" / "evaluation.json").read_bytes()


@pytest.mark.slow
def test_machines_need_not_share_a_directory(checkpoints, recipe, tmp_path):
    """Two launchers, each in a directory of its own: the first one's has the result, which is that of two ranks."""
    machines = [tmp_path / "first", tmp_path / "second"]
    for place in machines:
        place.mkdir()
    command = command_of(checkpoints["llama"], recipe, tmp_path / "here")
    assert run_ranks(2, *command)[0] == 0
    run_machines(machines, *("out" if part == tmp_path / "here" else part for part in command))
    name = "model.safetensors"
    assert (machines[0] / "out" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert not list(machines[1].iterdir())
    file = study_file(checkpoints["llama"], recipe, tmp_path)
    run_machines(machines, "-m", "secateur", "compare", file, "compared")
    cells = [sorted(path.name for path in (place / "compared" / "cells").iterdir()) for place in machines]
    assert all(cells) and len(cells[0] + cells[1]) == 6
    assert (machines[0] / "compared" / "table.md").is_file() and not (machines[1] / "compared" / "table.md").exists()


def study_file(model: Path, recipe: dict[str, Any], directory: Path) -> Path:
    """Write a study of six cells, dense ones included."""
    wanda = {"recipe": {"choose": {"score": "wanda"}, "repair": {"compensate": "none"}}}
    study = {"question": "Which?", "model": str(model), "ratios": [0.2], "seeds": [0, 1], "recipe": grouped(recipe)}
    study |= {"methods": {"ours": {}, "wanda": wanda}}
    file = directory / "study.yaml"
    file.write_text(yaml.safe_dump(study), encoding="utf-8")
    return file


def run(num_ranks: int, *arguments: object) -> None:
    if num_ranks == 1:
        command = [sys.executable, "-m", "secateur", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        status, stderr = done.returncode, done.stderr
    else:
        status, _, stderr = run_ranks(num_ranks, "-m", "secateur", *arguments)
    assert status == 0, stderr
