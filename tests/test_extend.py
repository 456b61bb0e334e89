"""docs/extend.md is followed to the letter: its package is laid out as if installed, and used from outside."""

import configparser
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from models import randomised, saved, sizes
from recipes import grouped
from shown import assert_sentences, refusal
from transformers import HeliumConfig, HeliumForCausalLM

from secateur import PluginError, Score, plugins
from secateur.data.sources import SOURCES
from secateur.formats.gguf import export as export_as
from secateur.methods.scores import SCORES, ScoreInputs, find_score, scored
from secateur.recipe import SCORE_NAMES, SOURCE_NAMES, parse_recipe
from secateur.stream.statistics import Statistics

DOCS = Path(__file__).parents[1] / "docs" / "extend.md"


def lay_out(root: Path, name: str, files: dict[str, str], entry_points: dict[str, dict[str, str]]) -> None:
    """Write a package and its metadata, as pip would into site-packages."""
    for place, text in files.items():
        file = root / place
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text, encoding="utf-8")
    metadata = root / f"{name.replace('-', '_')}-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n", encoding="utf-8")
    groups = configparser.ConfigParser()
    groups.read_dict(entry_points)
    with (metadata / "entry_points.txt").open("w", encoding="utf-8") as file:
        groups.write(file)


def printed_package() -> tuple[dict[str, str], dict[str, Any]]:
    """Return the files of the package that the page prints, by path, and its pyproject.toml."""
    blocks = re.findall(r"```\w+\n# (\S+\.\w+)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    toml = "".join(text for name, text in blocks if name == "pyproject.toml")
    return {name: text for name, text in blocks if name != "pyproject.toml"}, tomllib.loads(toml)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as site-packages would be, with the page's package."""
    files, project = printed_package()
    root = tmp_path_factory.mktemp("site")
    lay_out(root, project["project"]["name"], files, project["project"]["entry-points"])
    return root


@pytest.fixture(scope="module")
def helium(site: Path) -> Path:
    """A tiny model."""
    return saved(site / "helium", randomised(HeliumForCausalLM(HeliumConfig(**sizes(), head_dim=12)), 0))


# The command line in a process of its own, which finds what lies in a directory: each argument is a command in JSON.
COMMANDS = f"""
import json, sys
sys.path += [sys.argv[1], {str(Path(__file__).parent)!r}]
from run_cli import run_cli
for command in sys.argv[2:]:
    done = run_cli(*json.loads(command))
    print(json.dumps([done.status, " ".join((done.stdout + done.stderr).split())]))
"""


def test_the_package_of_the_page_prunes_and_exports(site, helium, texts, tmp_path, warm):
    calibration = {"domains": {"notes": {"files": str(texts["prose"])}}, "num_tokens": 640, "sequence_length": 32}
    keys = {"score": "loudest", "align": 8, "calibration": calibration, "evaluate": False}
    recipe, out, file = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "out.npz"
    recipe.write_text(yaml.safe_dump(grouped(keys)), encoding="utf-8")
    export = ("export", out, tmp_path / "b", "--format", "npz")
    commands = [("prune", helium, out, "--recipe", recipe), ("export", out, file, "--format", "npz")]
    commands += [(*export, "--type", "f16"), (*export, "--check")]
    given = [json.dumps(command, default=str) for command in commands]
    done = warm.run([sys.executable, "-c", COMMANDS, site, *given], env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    pruned, written, other_type, checked = map(json.loads, done.stdout.splitlines())
    assert pruned[0] == 0, pruned
    result = json.loads((out / "result.json").read_text())
    assert result["calibration"]["num_tokens"] == {"notes": 640} and result["versions"]["secateur-example"] == "0.1"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["choose"]["score"] == "loudest"
    assert written[0] == 0 and f"Written to {file}: f32," in written[1]
    width = json.loads((out / "config.json").read_text())["intermediate_size"]
    assert numpy.load(file)["model.layers.0.mlp.down_proj.weight"].shape == (48, width) and width < 112
    assert other_type[0] == checked[0] == 2
    assert "npz has f32 alone, got f16" in other_type[1] and "format npz has nothing that checks it" in checked[1]
    # Without the package, as in this process, its names are unknown.
    assert "unknown choose.score 'loudest'; allowed: random, " in refusal(parse_recipe, grouped(keys))
    said = refusal(export_as, helium, tmp_path / "out.npz", format="npz")
    assert "unknown exporter 'npz'; allowed: gguf; give one of these" in said


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a package into this process: `installed(name, files, entry_points)`."""
    forget = plugins._entry_points.cache_clear

    def install(name: str, *contents: Any) -> None:
        lay_out(tmp_path / name, name, *contents)
        monkeypatch.syspath_prepend(str(tmp_path / name))
        forget()

    forget()
    yield install
    monkeypatch.undo()
    forget()


def test_entry_points_that_are_wrong_are_a_sentence_each(installed, tmp_path):
    def give(package: str, module: str, **points: str) -> None:
        """Install a package with a score or an exporter, or both, of these names."""
        installed(package, {"bad/things.py": "thing = 3\n"}, {f"secateur.{k}": {v: module} for k, v in points.items()})

    def exporter(name: str) -> str:
        return refusal(export_as, tmp_path, tmp_path / "out", format=name)

    give("absent", "absent_module:mine", scores="mine")
    assert parse_recipe(grouped({"score": "mine"})).choose.score == "mine", "without an import"
    said = {"a name that is nearly known": refusal(parse_recipe, grouped({"score": "mino"}))}
    said["a module that is not there"] = refusal(find_score, "mine")
    give("bad", "bad.things:thing", scores="three", exporters="three")
    said |= {"a score that is a number": refusal(find_score, "three"), "an exporter that is one": exporter("three")}
    give("worse", "bad.things:thing", exporters="gguf")
    said["an exporter of our own"] = exporter("gguf")
    give("other", "other:mine", scores="mine")
    said["two packages with one name"] = refusal(find_score, "mine")
    give("worst", "bad.things:thing", scores="obs")
    said["a score of our own"] = refusal(find_score, "obs")
    assert_sentences("extend", said)


def test_entry_points_that_are_wrong_hide_no_others(installed: Callable[..., None]) -> None:
    scores = {"obs": "absent:thing", "twice": "absent:thing", "broken": "absent:thing"}
    installed("bad", {}, {"secateur.scores": scores})
    installed("worse", {}, {"secateur.scores": {"twice": "absent:thing"}})
    score = "from secateur import Score\nmine = Score(lambda inputs: inputs.reader_HF[0])\n"
    installed("good", {"good_score.py": score}, {"secateur.scores": {"mine": "good_score:mine"}})
    assert isinstance(find_score("mine"), Score) and find_score("wanda") is SCORES["wanda"]
    assert "allowed: random, magnitude, wanda, flap, obs, paper, reap, broken, mine, twice;" in refusal(find_score, "x")
    # The names that the recipe repeats are those of the tables.
    assert tuple(SCORES) == SCORE_NAMES
    assert tuple(SOURCES) == (*SOURCE_NAMES, "answers")  # without a source, the prompts that come with secateur


def test_a_score_of_the_wrong_shape_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, "mine", Score(lambda inputs: inputs.reader_HF))
    statistics = Statistics.empty(3, torch.device("cpu"), gram=False)
    inputs = ScoreInputs(torch.ones(2, 3), torch.ones(3), statistics, torch.arange(3)[:, None], 0.0, 0)
    with pytest.raises(PluginError, match=r"score 'mine': must return a tensor of 3 numbers, one a unit, got \(2, 3\)"):
        scored("mine", inputs)
    for wrong in ({"needs": "routing"}, {"units": "experts"}):
        with pytest.raises(ValueError, match="units: experts have needs: routing and no others do"):
            Score(lambda inputs: inputs, **wrong)  # type: ignore[arg-type]
