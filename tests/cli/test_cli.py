"""The command line end to end: `secateur prune` and `inspect` on tiny saved models, and what the result holds."""

import importlib.metadata
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from old_results import old_result
from recipes import grouped
from run_cli import Outcome, run_cli
from stops import lines_of

from secateur.__main__ import main as begin
from secateur.cli import app
from secateur.evaluation.study import SHIPPED
from secateur.recipe import parse_recipe, shipped_yaml

pytestmark = pytest.mark.usefixtures("judging")

NUM_LAYERS, NUM_UNITS, NUM_KEEP = 3, 112, 64


@dataclass(frozen=True, slots=True)
class Run:
    outcome: Outcome
    out: Path

    def result(self) -> Any:
        return json.loads((self.out / "result.json").read_text(encoding="utf-8"))


def write_recipe(path: Path, recipe: dict[str, Any], **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(grouped({**recipe, **changes})), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def happy(checkpoints, recipe, tmp_path_factory) -> Run:
    """One plain run with everything on; the tests below look at what it left."""
    place = tmp_path_factory.mktemp("happy")
    file = write_recipe(place / "mine.yaml", recipe)
    return Run(run_cli("prune", checkpoints["llama"], place / "smaller", "--recipe", file), place / "smaller")


def test_prune_ends_well_and_prints_one_table(happy):
    assert happy.outcome.status == 0
    shown = happy.outcome.stdout
    assert "20.7% of all 100,176 parameters" in " ".join(shown.split())  # it wraps at the table's width
    assert f"from_pretrained('{happy.out}')" in shown and "note: calibration" not in shown
    lines = happy.outcome.stderr.splitlines()
    plan = "llama: removes 20.0% of all 100,176 parameters (ffn 112 -> 64) in 1 round"
    stages = [line for line in lines if plan not in line]
    assert len(stages) == len(lines) - 1
    notes = happy.result()["warnings"]  # each said as soon as it is known
    assert all(line in notes or re.match(r"\d+:\d\d:\d\d ", line) for line in stages)
    assert "verify" in happy.outcome.stderr


def test_the_result_directory_is_complete_and_its_records_agree(happy):
    names = "README.md chat_template.jinja config.json generation_config.json keep.json model.safetensors recipe.yaml"
    names += " report.html result.json run.jsonl tokenizer.json tokenizer_config.json"
    assert sorted(path.name for path in happy.out.iterdir()) == names.split()
    assert {path.name for path in happy.out.parent.iterdir()} == {"mine.yaml", "smaller"}
    result = happy.result()
    assert result["widths"] == {"ffn": [NUM_UNITS, NUM_KEEP, NUM_KEEP]}
    assert result["reload_max_abs_difference"] == 0
    # In seconds, foretold twice and as they were; loading and the proof have one step and are not told.
    assert len(result["foretold"]["prune, round 1 of 1"]) == 3
    assert not {"load", "verify"} & result["foretold"].keys()
    steps = [(line["round"], line["layer"], line["group"]) for line in lines_of(happy.out, "group")]
    assert steps == [(1, layer, "ffn") for layer in range(NUM_LAYERS)]
    assert {(line["kept"], line["total"]) for line in lines_of(happy.out, "group")} == {(NUM_KEEP, NUM_UNITS)}


def test_inspect_promises_what_prune_reaches(happy, checkpoints):
    result = happy.result()
    arguments = ("inspect", checkpoints["llama"], "--recipe", happy.out.parent / "mine.yaml")
    told = json.loads(run_cli(*arguments, "--json").stdout)
    assert told["num_params_after"] == result["pruned_size"]["num_params"]
    assert told["num_bytes_after"] == result["pruned_size"]["num_bytes"]
    assert told["remove_reached"] == pytest.approx(result["remove_reached"], abs=1e-12)
    assert told["size"] == result["dense_size"]
    [ffn] = told["groups"]
    assert [ffn["num_units"], ffn["num_keep"]] == result["widths"]["ffn"][:2]
    assert told["num_calibration_tokens"] == sum(result["calibration"]["num_tokens"].values())
    assert told["num_tokens"] == 320 and told["num_token_params"] == 2 * 320 * 48  # not tied


def test_a_path_with_brackets_is_shown_as_it_is(checkpoints, recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my [bold]:bug:").symlink_to(checkpoints["llama"])
    assert "my [bold]:bug:: family llama" in run_cli("inspect", "my [bold]:bug:", "--recipe", recipe_file).stdout


def test_options_stand_over_the_recipe_and_an_old_result_is_replaced(checkpoints, recipe, texts, tmp_path, monkeypatch):
    write_recipe(tmp_path / "r.yaml", recipe, seed=1, evaluate=False)
    old_result(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    options = ["--set", "seed=7", "--remove", "0.3", "--overwrite"]
    arguments = (checkpoints["llama-tied"], "out", "--recipe", "r.yaml", "--domain", f"mine={texts['prose']}")
    outcome = run_cli("prune", *arguments, *options)
    assert outcome.status == 0, outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r.yaml"]
    result = json.loads(Path("out", "result.json").read_text())
    words = ["llama-tied", "out", "--recipe", "r.yaml", "--domain", "mine=prose.txt"]
    assert result["command"] == shlex.join(["secateur", "prune", *words, *options])
    assert list(result["calibration"]["num_tokens"]) == ["mine"]
    saved = parse_recipe(grouped(yaml.safe_load(Path("out", "recipe.yaml").read_text())))
    assert (saved.seed, saved.remove.share) == (7, 0.3)


def test_a_mistake_of_our_own_is_a_plain_traceback(monkeypatch, capsys):
    """Without the values of variables, which may hold text of the user's."""
    monkeypatch.setattr("secateur.verify", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError) as raised:
        run_cli("verify", "x")
    sys.excepthook(raised.type, raised.value, raised.tb)
    assert capsys.readouterr().err.startswith("Traceback (most recent call last):\n")


def test_help_has_an_example_and_the_console_script_is_main():
    alone, commands = run_cli(), typer.main.get_command(app).commands
    assert alone.status == 2 and all(command in alone.stdout for command in commands)
    for command in commands:
        shown = run_cli(command, "--help")
        assert shown.status == 0 and f"Example: secateur {command}" in shown.stdout
        if command == "compare":
            assert all(name in shown.stdout for name in shipped_yaml(SHIPPED))
    [script] = importlib.metadata.entry_points(group="console_scripts", name="secateur")
    assert script.load() is begin


def test_the_demo_prunes_times_writes_the_page_and_says_where_to_go(checkpoints, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.cli.measure.DEMO_MODEL", str(checkpoints["llama"]))
    monkeypatch.setattr("secateur.cli.measure.DEMO_RECIPE", grouped({**recipe, "remove": 0.2}))
    monkeypatch.setattr("secateur.cli.measure.DEMO_WORKLOAD", {"prompt_tokens": 16, "new_tokens": 2, "repeats": 1})
    out = tmp_path / f"a long {'name ' * 20}indeed"
    run = run_cli("demo", out)
    assert run.status == 0, run.stderr
    assert f"\nThe page: {out / 'report.html'}\nThe best result: " in run.stdout, "a path is on one line"
    assert f"Written to {out}. Load it with AutoModelForCausalLM.from_pretrained('{out}').\n" in run.stdout
    told = " ".join(run.stdout.split())
    parts = ["by a fifth", "minutes on two idle cores", "Written to", "prefill", "The page:"]
    places = [told.index(part) for part in [*parts, "--remove 0.2 --preset best, an hour"]]
    assert places == sorted(places), "what it will do, size and quality, speed, the page, what is best"
    assert {"model.safetensors", "result.json", "bench.json", "report.html"} <= {path.name for path in out.iterdir()}
    assert "tokens/s" in (out / "report.html").read_text()
    again = run_cli("demo", out)
    assert again.status == 2 and "already exists; choose a new directory or give --overwrite" in again.stderr
