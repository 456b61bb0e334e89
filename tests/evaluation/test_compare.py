"""Studies: parsing, the grid, resuming, and what is written."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter
from shown import assert_sentences, refusal

from secateur.evaluation.compare import compare
from secateur.evaluation.study import (
    SHIPPED,
    Comparison,
    FoundCell,
    Study,
    cells,
    load_study,
    save_comparison,
    study_verdict,
)
from secateur.facts import Loss
from secateur.recipe import shipped_yaml
from tests.models import saved, tiny_llama

TEXTS = {"left": "the quick brown fox jumps over the lazy dog {}\n", "right": "0123 + {} = 4567;\n"}


@pytest.fixture
def grid(tmp_path: Path) -> dict[str, Any]:
    """A study on a tiny model with two domains of its own."""
    saved(tmp_path / "model", tiny_llama())
    domains = {}
    for name, line in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text("".join(line.format(number) for number in range(2000)))
        domains[name] = {"files": [str(tmp_path / f"{name}.txt")]}
    return {
        "question": "Which?",
        "model": str(tmp_path / "model"),
        "ratios": [0.1, 0.2],
        "seeds": [0, 1],
        "recipe": {
            "remove": {"align": 8},
            "calibration": {"num_tokens": 1024, "sequence_length": 32, "domains": domains},
        },
        "evaluation": {"num_blocks": 3},
        "methods": {
            "ours": {},
            "left alone": {"domains": ["left"]},
            "wanda": {"recipe": {"choose": {"score": "wanda"}, "repair": {"compensate": "none"}}},
        },
        "small": {"ratios": [0.2], "seeds": [0]},
    }


def write(grid: dict[str, Any], folder: Path) -> str:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(grid))
    return str(path)


def test_a_study_may_let_its_model_answer(grid: dict[str, Any], tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"text": f"a{number}"}) + "\n" for number in range(60)))
    grid["recipe"]["calibration"]["domains"]["self"] = {"files": str(asked), "answers": True}
    changes = {"ratios": [0.1], "seeds": [0], "methods": {"ours": {}, "self alone": {"domains": ["self"]}}}
    dense, ours, alone = compare(write(grid | changes, tmp_path), tmp_path / "out").cells
    assert list(dense.losses) == list(ours.losses) == list(alone.losses) == [*TEXTS, "self"]
    assert ours.num_tokens.keys() == dense.losses.keys() and list(alone.num_tokens) == ["self"]
    # What the model writes is what it finds likely.
    nats = {name: loss.nats_per_token for name, loss in dense.losses.items()}
    assert nats["self"] < min(nats[name] for name in TEXTS)


def test_a_grid_runs_once_and_is_read_afterwards(grid: dict[str, Any], tmp_path: Path) -> None:
    assert len(list(cells(load_study(write(grid, tmp_path), small=False)))) == 2 * (1 + 2 * 3)
    study = load_study(write(grid | {"ratios": [0.2], "seeds": [1]}, tmp_path), small=False)
    out = tmp_path / "out"
    found = compare(study, out).cells
    assert len(found) == 1 + 3
    files = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    texts = {name: (out / name).read_text() for name in ("table.md", "results.json", "study.yaml")}
    assert len(files) == len(found)
    assert list(yaml.safe_load(texts["study.yaml"])) == list(Study.model_fields)
    assert compare(study, out).cells == found
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == files
    assert {name: (out / name).read_text() for name in texts} == texts
    by_method = {cell.method: cell for cell in found}
    assert by_method["left alone"].num_tokens == {"left": 1024}
    assert by_method["ours"].num_tokens == {"left": 512, "right": 512}
    assert by_method["dense"].perplexity < by_method["wanda"].perplexity
    assert abs(by_method["ours"].remove_reached - 0.2) < 0.05
    save_comparison(study, Comparison.from_json(texts["results.json"], "results.json"), out)
    assert {name: (out / name).read_text() for name in texts} == texts


def test_damaged_and_changed_cells_are_run_anew_and_the_rest_is_kept(grid: dict[str, Any], tmp_path: Path) -> None:
    out, heard = tmp_path / "out", list[str]()
    del grid["methods"]["left alone"]
    grid["evaluation"]["num_blocks"] = 1  # the blocks that judge are the same in the text that changes

    def run() -> tuple[Any, set[Path]]:
        found = compare(write(grid, tmp_path), out, small=True, tell=heard.append)
        return [one.losses for one in found.cells], set((out / "cells").iterdir())

    losses, files = run()
    cell = next((out / "cells").glob("wanda-*.json"))
    cell.write_text(re.sub(r"\d\.\d", "9.9", cell.read_text(), count=1))
    assert run() == (losses, files)
    assert heard == [
        f"{cell.parent}: {cell.stem}, finished by an earlier run, is damaged on disk, so it is done again."
    ]
    grid["methods"]["wanda"]["recipe"]["choose"] = {"score": "flap"}
    _, more = run()
    assert files < more and len(more) == len(files) + 1
    text = tmp_path / f"{next(iter(TEXTS))}.txt"
    text.write_text(text.read_text().replace("1", "one"))
    assert len(run()[1]) == len(more) + 3


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on(grid: dict[str, Any], tmp_path: Path) -> None:
    reference, out = write(grid, tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "secateur", "compare", reference, str(out)]
    kept: set[str] = set()
    for seconds in (6, 7, 8):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        done = {path.name for path in out.glob("cells/[!.]*.json")}
        assert kept <= done
        kept = done
    times = {path: path.stat().st_mtime_ns for path in out.glob("cells/[!.]*.json")}
    assert subprocess.run(command, capture_output=True, check=True).returncode == 0
    assert all(path.stat().st_mtime_ns == written for path, written in times.items())
    whole = compare(reference, tmp_path / "whole").cells
    results = json.loads((out / "results.json").read_text())["cells"]
    for one, other in zip(results, whole, strict=True):
        assert TypeAdapter(dict[str, Loss]).validate_python(one["losses"]) == other.losses


def test_every_shipped_study_is_valid_and_has_a_small_form() -> None:
    assert list(shipped_yaml(SHIPPED)) == ["methods", "paper", "tokens", "vocabulary"]
    for name in shipped_yaml(SHIPPED):
        whole, small = (list(cells(load_study(name, small=small))) for small in (False, True))
        assert 0 < len(small) < len(whole)


def test_mistakes_surface_before_the_first_cell(grid: dict[str, Any], tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "a key that nobody knows": {"method": {}},
        "too much": {"ratios": [1.5]},
        "more than can go": {"ratios": [0.9]},
        "a domain that nobody knows": {"methods": {"a": {"domains": ["lef"]}}},
        "a score that nobody knows": {"methods": {"a": {"recipe": {"choose": {"score": "obss"}}}}},
        "a recovery": {"methods": {"a": {"recipe": {"recover": {"num_tokens": 64}}}}},
    }
    said = {name: refusal(compare, write(grid | each, tmp_path), tmp_path / "out") for name, each in changes.items()}
    said["a name that nobody knows"] = refusal(load_study, "papr", small=False)
    del grid["small"]
    said["no small form"] = refusal(load_study, write(grid, tmp_path), small=True)
    assert not (tmp_path / "out").exists()
    assert_sentences("study/refused", said, tmp_path)


def found(method: str, *perplexities: float) -> list[FoundCell]:
    """Cells of a method at 30%, one a draw."""
    losses = [{"prose": Loss(math.log(each), None, 1)} for each in perplexities]
    return [FoundCell(method, 0.3, seed, 0.3, 1.0, each, {}) for seed, each in enumerate(losses)]


def test_a_verdict_says_no_more_than_its_draws_carry() -> None:
    start = "By geometric-mean perplexity over domains, at 30% removed ours has the lowest"
    ours = found("ours", 20.0, 25.0, 30.0)
    assert study_verdict(ours + found("theirs", 21.0, 26.2, 31.5)) == f"{start} (25.00)."
    # Better in each draw, but within two standard errors; better on average, but not in each draw.
    for close in ((20.1, 25.2, 34.0), (23.0, 28.0, 29.9)):
        mean = sum(close) / 3
        assert (
            study_verdict(ours + found("theirs", *close))
            == f"{start} (25.00); 3 draws do not tell it from theirs ({mean:.2f})."
        )
    five = found("ours", *[20.0] * 5) + found("theirs", 22.0, 22.0, 22.0, 22.0, 19.9)
    assert "5 draws do not tell it from theirs (21.58)" in study_verdict(five)
    single = study_verdict(found("ours", 20.0) + found("theirs", 40.0) + found("others", 50.0))
    assert single == f"{start} (20.00); one draw does not tell it from theirs (40.00), others (50.00)."
    assert study_verdict(found("ours", 20.0)) == f"{start} (20.00)."
