"""Studies: parsing, the grid, resuming, and what is written."""

import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from secateur.errors import RecipeError
from secateur.evaluation.compare import compare
from secateur.evaluation.study import (
    Comparison,
    FoundCell,
    cells,
    comparison_table,
    load_study,
    over_dense_table,
    quality_table,
    save_comparison,
    shipped_studies,
    task_table,
    verdict,
)
from tests.models import tiny_llama
from tests.tiny_tokenizer import tiny_tokenizer

TEXTS = {"left": "the quick brown fox jumps over the lazy dog {}\n", "right": "0123 + {} = 4567;\n"}


@pytest.fixture
def grid(tmp_path: Path) -> dict[str, Any]:
    """A study on a tiny model with two domains of its own."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
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
    assert list(dense.nats_per_token) == list(ours.nats_per_token) == list(alone.nats_per_token) == [*TEXTS, "self"]
    assert ours.num_tokens.keys() == dense.nats_per_token.keys() and list(alone.num_tokens) == ["self"]
    # What the model writes is what it finds likely.
    assert dense.nats_per_token["self"] < min(dense.nats_per_token[name] for name in TEXTS)


def test_a_grid_runs_once_and_is_read_afterwards(grid: dict[str, Any], tmp_path: Path) -> None:
    study = load_study(write(grid, tmp_path), small=False)
    out = tmp_path / "out"
    found = compare(study, out).cells
    assert len(found) == 2 * (1 + 2 * 3)
    files = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    texts = {name: (out / name).read_text() for name in ("table.md", "results.json", "study.yaml")}
    assert len(files) == len(found)
    assert compare(study, out).cells == found
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == files
    assert {name: (out / name).read_text() for name in texts} == texts
    by_method = {(cell.method, cell.ratio, cell.seed): cell for cell in found}
    assert by_method["left alone", 0.2, 0].num_tokens == {"left": 1024}
    assert by_method["ours", 0.2, 0].num_tokens == {"left": 512, "right": 512}
    assert by_method["dense", 0.0, 0].perplexity < by_method["wanda", 0.2, 0].perplexity
    assert abs(by_method["ours", 0.2, 1].remove_reached - 0.2) < 0.05
    assert "left alone" in texts["table.md"]
    gains = [
        math.log(by_method["wanda", 0.2, seed].perplexity / by_method["dense", 0.0, seed].perplexity) for seed in (0, 1)
    ]
    mean, error = sum(gains) / 2, abs(gains[0] - gains[1]) / 2
    start = "## Nats per token over the dense model on the same text"
    _, _, after = texts["table.md"].partition(start)
    row = next(line for line in after.splitlines() if line.startswith("| wanda | 20% |"))
    assert row.startswith(f"| wanda | 20% | {mean:+.3f} ± {error:.3f} | ")
    assert "| dense |" not in after.split("##")[0]
    save_comparison(study, Comparison.from_json(texts["results.json"], "results.json"), out)
    assert {name: (out / name).read_text() for name in texts} == texts
    perplexities = [by_method["wanda", 0.2, seed].perplexity for seed in (0, 1)]
    row = next(line for line in texts["table.md"].splitlines() if line.startswith("| wanda | 20% |"))
    assert f" | {statistics.mean(perplexities):.2f} ± {statistics.stdev(perplexities):.2f} | " in row


def test_a_changed_recipe_is_run_anew_and_the_rest_is_kept(grid: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(write(grid, tmp_path), out, small=True)
    before = set((out / "cells").iterdir())
    grid["methods"]["wanda"]["recipe"]["choose"] = {"score": "flap"}
    compare(write(grid, tmp_path), out, small=True)
    assert before < set((out / "cells").iterdir())
    assert len(set((out / "cells").iterdir()) - before) == 1


def test_changed_text_is_run_anew_though_the_judged_blocks_are_the_same(grid: dict[str, Any], tmp_path: Path) -> None:
    out, changes = tmp_path / "out", {"methods": {"ours": {}}, "evaluation": {"num_blocks": 1}}
    compare(write(grid | changes, tmp_path), out, small=True)
    before = set((out / "cells").iterdir())
    text = tmp_path / f"{next(iter(TEXTS))}.txt"
    text.write_text(text.read_text().replace("1", "one"))
    compare(write(grid | changes, tmp_path), out, small=True)
    assert len(set((out / "cells").iterdir()) - before) == len(before)


def test_a_damaged_cell_is_run_again(grid: dict[str, Any], tmp_path: Path) -> None:
    study, out, heard = load_study(write(grid, tmp_path), small=True), tmp_path / "out", list[str]()
    found = compare(study, out).cells
    cell = next((out / "cells").glob("wanda-*.json"))
    cell.write_text(re.sub(r"\d\.\d", "9.9", cell.read_text(), count=1))
    again = compare(study, out, tell=heard.append).cells
    assert [one.nats_per_token for one in again] == [one.nats_per_token for one in found]
    assert heard == [
        f"{cell.parent}: {cell.stem}, finished by an earlier run, is damaged on disk, so it is done again."
    ]


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on(grid: dict[str, Any], tmp_path: Path) -> None:
    reference, out = write(grid, tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "secateur", "compare", reference, str(out), "--quiet"]
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
        assert one["nats_per_token"] == other.nats_per_token


def test_every_shipped_study_is_valid_and_has_a_small_form() -> None:
    assert shipped_studies() == ["methods", "paper", "tokens", "vocabulary"]
    for name in shipped_studies():
        whole, small = (list(cells(load_study(name, small=small))) for small in (False, True))
        assert 0 < len(small) < len(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {}}, "unknown key 'method'; did you mean 'methods'"),
        ({"ratios": [1.5]}, "ratios.0"),
        ({"methods": {"a": {"domains": ["lef"]}}}, "unknown domain 'lef'; did you mean 'left'"),
        ({"methods": {"a": {"recipe": {"choose": {"score": "obss"}}}}}, "did you mean 'obs'"),
        ({"ratios": [0.9]}, "out of reach"),
        ({"methods": {"a": {"recipe": {"recover": {"num_tokens": 64}}}}}, "method 'a': compare runs no recover"),
    ],
)
def test_mistakes_surface_before_the_first_cell(
    grid: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        compare(write(grid | change, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_study_and_missing_small_form(grid: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'paper'"):
        load_study("papr", small=False)
    del grid["small"]
    with pytest.raises(RecipeError, match="no keys under 'small'"):
        load_study(write(grid, tmp_path), small=True)


def test_the_table_of_the_terminal_fits() -> None:
    cells = [*found("dense", 10.0, 11.0), *found("a method with a rather long name", 20.0, 21.0)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(Comparison(tuple(cells), {})))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    assert "By geometric-mean perplexity" in " ".join(shown.split())
    assert quality_table("quality", cells[2:], ()).rows[0][2].startswith("30.0"), "of 0.3 that went, in percent"


def found(method: str, *perplexities: float) -> list[FoundCell]:
    """Cells of a method at 30%, one a draw."""
    nats = [{"prose": math.log(each)} for each in perplexities]
    return [FoundCell(method, 0.3, seed, 0.3, 1.0, each, {}) for seed, each in enumerate(nats)]


def test_of_one_draw_the_error_is_over_documents() -> None:
    def cell(method: str, ratio: float, left: list[float], right: list[float]) -> FoundCell:
        blocks = {"left": left, "right": right}
        nats = {name: statistics.mean(each) for name, each in blocks.items()}
        sums = {name: [10 * value for value in each] for name, each in blocks.items()}
        tokens = {name: [10] * len(each) for name, each in blocks.items()}
        return FoundCell(method, ratio, 0, ratio, 1.0, nats, {}, document_nats=sums, document_tokens=tokens)

    # Documents differ by a nat or two, the differences of the same document by 0.1.
    dense = cell("dense", 0.0, [2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    ours = cell("ours", 0.2, [2.4, 3.5, 4.6], [1.0, 2.3, 3.0])
    table = over_dense_table([dense, ours])
    left, right = 0.1 / 3**0.5, 0.1
    mean = (left**2 + right**2) ** 0.5 / 2
    cells = (f"+0.300 ± {mean:.3f}", f"+0.500 ± {left:.3f}", f"+0.100 ± {right:.3f}")
    assert table.rows == [("ours", "20%", *cells)]


def test_accuracies_of_one_draw_have_the_error_over_questions_and_of_several_their_spread() -> None:
    def cell(seed: int, first: float, second: float) -> FoundCell:
        of_first = {"acc,none": 0.1, "acc_stderr,none": 0.9, "acc_norm,none": first, "acc_norm_stderr,none": 0.03}
        tasks = {"first": of_first, "second": {"acc,none": second, "acc_stderr,none": 0.04}}
        return FoundCell("ours", 0.2, seed, 0.2, 1.0, {"prose": 1.0}, tasks)

    (row,) = task_table([cell(0, 0.5, 0.3)]).rows
    assert row == ("ours", "20%", "0.400 ± 0.025", "0.500 ± 0.030", "0.300 ± 0.040")
    (row,) = task_table([cell(0, 0.5, 0.3), cell(1, 0.7, 0.3)]).rows
    assert row == ("ours", "20%", "0.450 ± 0.071", "0.600 ± 0.141", "0.300 ± 0.000")


def test_a_verdict_says_no_more_than_its_draws_carry() -> None:
    start = "By geometric-mean perplexity over domains, at 30% removed ours has the lowest"
    ours = found("ours", 20.0, 25.0, 30.0)
    assert verdict(ours + found("theirs", 21.0, 26.2, 31.5)) == f"{start} (25.00)."
    # Better in each draw, but within two standard errors; better on average, but not in each draw.
    for close in ((20.1, 25.2, 34.0), (23.0, 28.0, 29.9)):
        mean = sum(close) / 3
        assert (
            verdict(ours + found("theirs", *close))
            == f"{start} (25.00); 3 draws do not tell it from theirs ({mean:.2f})."
        )
    five = found("ours", *[20.0] * 5) + found("theirs", 22.0, 22.0, 22.0, 22.0, 19.9)
    assert "5 draws do not tell it from theirs (21.58)" in verdict(five)
    single = verdict(found("ours", 20.0) + found("theirs", 40.0) + found("others", 50.0))
    assert single == f"{start} (20.00); one draw does not tell it from theirs (40.00), others (50.00)."
    assert verdict(found("ours", 20.0)) == f"{start} (20.00)."
