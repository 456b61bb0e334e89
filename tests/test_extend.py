"""docs/extend.md is followed to the letter: its package is laid out as if installed, and used from outside."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from models import randomised, saved
from recipes import grouped
from transformers import HeliumConfig, HeliumForCausalLM
from warm import WarmProcesses

from secateur import PluginError, RecipeError, Score, plugins
from secateur.data.sources import SOURCES
from secateur.formats import gguf as export
from secateur.methods.scores import SCORES, ScoreInputs, find_score, scored
from secateur.recipe import SCORE_NAMES, SOURCE_NAMES, parse_recipe
from secateur.stream.statistics import Statistics

DOCS = Path(__file__).parents[1] / "docs" / "extend.md"
WORDS = "the notes of a small office say who called and what was ordered on which day".split()

Installed = Callable[..., Path]


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
    groups = (
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in entry_points.items()
    )
    (metadata / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")


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
    sizes = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": 320, "max_position_embeddings": 256}
    config = HeliumConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
    saved(site / "helium", randomised(HeliumForCausalLM(config), 0))
    return site / "helium"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    choose = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (300, 20), generator=choose).tolist()
    (tmp_path / "notes.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(WORDS[i] for i in row)}) + "\n" for row in picks)
    )
    return tmp_path / "notes.jsonl"


def secateur_from(site: Path, warm: WarmProcesses, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, which finds what lies in `site`."""
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from secateur.cli import main; main()"
    return warm.run([sys.executable, "-c", code, *arguments], env=dict(os.environ))


def test_the_package_of_the_page_prunes_and_exports(
    site: Path, helium: Path, notes: Path, tmp_path: Path, warm: WarmProcesses
) -> None:
    calibration = {"domains": {"notes": {"files": str(notes)}}, "num_tokens": 640, "sequence_length": 32}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(grouped({"score": "loudest", "align": 8, "calibration": calibration, "evaluate": False})),
        encoding="utf-8",
    )
    out, file = tmp_path / "out", tmp_path / "out.npz"
    pruned = secateur_from(site, warm, "prune", helium, out, "--recipe", recipe)
    assert pruned.returncode == 0, pruned.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["calibration"]["num_tokens"] == {"notes": 640} and result["versions"]["secateur-example"] == "0.1"
    used = yaml.safe_load((out / "recipe.yaml").read_text())
    assert used["choose"]["score"] == "loudest"

    written = secateur_from(site, warm, "export", out, file, "--format", "npz")
    assert written.returncode == 0, written.stderr
    assert f"Written to {file}: f32," in " ".join(written.stdout.split())
    width = json.loads((out / "config.json").read_text())["intermediate_size"]
    assert numpy.load(file)["model.layers.0.mlp.down_proj.weight"].shape == (48, width) and width < 112
    refused = secateur_from(site, warm, "export", out, tmp_path / "b", "--format", "npz", "--type", "f16")
    assert refused.returncode == 2 and "npz has f32 alone, got f16" in refused.stderr
    refused = secateur_from(site, warm, "export", out, tmp_path / "b", "--format", "npz", "--check")
    assert refused.returncode == 2 and "format npz has nothing that checks it" in refused.stderr


def test_without_the_package_its_names_are_unknown(helium: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown choose.score 'loudest'; allowed: random, .* give one of these"):
        parse_recipe(grouped({"score": "loudest"}))
    with pytest.raises(RecipeError, match="unknown exporter 'npz'; allowed: gguf; give one of these"):
        export.export(helium, tmp_path / "out.npz", format="npz")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a package into this process: `installed(name, files, entry_points)`."""

    forget = plugins._entry_points.cache_clear

    def install(name: str, files: dict[str, str], entry_points: dict[str, dict[str, str]]) -> None:
        lay_out(tmp_path / name, name, files, entry_points)
        monkeypatch.syspath_prepend(str(tmp_path / name))
        forget()

    forget()
    yield install
    monkeypatch.undo()
    forget()


def test_names_are_checked_without_an_import(installed: Installed) -> None:
    installed("absent", {}, {"secateur.scores": {"mine": "absent_module:mine"}})
    assert parse_recipe(grouped({"score": "mine"})).choose.score == "mine"
    sentence = r"unknown choose.score 'mino'; allowed: .*, reap, mine; did you mean 'mine'\?"
    with pytest.raises(RecipeError, match=sentence):
        parse_recipe(grouped({"score": "mino"}))
    with pytest.raises(PluginError, match=r"package absent, score 'mine': cannot be loaded \(ModuleNotFoundError: "):
        find_score("mine")


@pytest.mark.parametrize(
    ("group", "name", "message"),
    [
        ("scores", "obs", "package bad, score 'obs': the name is secateur's own; rename it in bad"),
        ("exporters", "gguf", "package bad, exporter 'gguf': the name is secateur's own"),
        ("scores", "mine", "package bad, score 'mine': must be a secateur.Score, got int; see docs/extend.md"),
        ("exporters", "mine", "package bad, exporter 'mine': must be a secateur.Exporter, got int"),
    ],
)
def test_an_entry_point_that_is_wrong_is_one_sentence(
    group: str, name: str, message: str, installed: Installed, tmp_path: Path
) -> None:
    installed("bad", {"bad/things.py": "thing = 3\n"}, {f"secateur.{group}": {name: "bad.things:thing"}})
    with pytest.raises(PluginError, match=message):
        if group == "scores":
            find_score(name)
        else:
            export.export(tmp_path, tmp_path / "out", format=name)


def test_two_packages_with_one_name(installed: Installed) -> None:
    for name in ("one", "two"):
        installed(name, {}, {"secateur.scores": {"mine": f"{name}:mine"}})
    with pytest.raises(PluginError, match=r"score 'mine': (one|two) has one of that name too; uninstall one"):
        find_score("mine")


def test_a_score_of_the_wrong_shape_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, "mine", Score(lambda inputs: inputs.reader_HF))
    statistics = Statistics.empty(3, torch.device("cpu"), gram=False)
    inputs = ScoreInputs(torch.ones(2, 3), torch.ones(3), statistics, torch.arange(3)[:, None], 0.0, 0)
    with pytest.raises(PluginError, match=r"score 'mine': must return a tensor of 3 numbers, one a unit, got \(2, 3\)"):
        scored("mine", inputs)
    for wrong in ({"needs": "routing"}, {"units": "experts"}):
        with pytest.raises(ValueError, match="units: experts have needs: routing and no others do"):
            Score(lambda inputs: inputs, **wrong)  # type: ignore[arg-type]


def test_names_that_the_recipe_repeats_are_those_of_the_tables() -> None:
    assert tuple(SCORES) == SCORE_NAMES
    assert tuple(SOURCES) == (*SOURCE_NAMES, "answers")  # without a source, the prompts that come with secateur
