"""The scripts of examples/ run to their end, on tiny models."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from bpe_tokenizer import bpe_tokenizer
from models import saved, tiny_llama

from tests.test_extend import lay_out

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def ran(place: Path, script: str, *arguments: object, path: tuple[Path, ...] = ()) -> str:
    """Run a script in a directory, as a user would; return what it prints."""
    paths = os.pathsep.join(filter(None, [*map(str, path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats about sums, enough to prune a tiny model by."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with file.open("w") as rows:
        for number in range(400):
            said = [f"What is {number} and {number + 7}?", f"{number} and {number + 7} are {2 * number + 7}."]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
            rows.write(json.dumps({"messages": turns}) + "\n")
    return file


@pytest.fixture(scope="module")
def smaller(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prune_and_chat.py` writes."""
    place = tmp_path_factory.mktemp("chat")
    said = ran(place, "prune_and_chat.py", checkpoints["llama"], "smaller", 1024)
    assert "of the parameters are gone." in said
    return place / "smaller"


def test_your_domains(checkpoints: dict[str, Path], chats: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    said = ran(tmp_path, "your_domains.py", checkpoints["llama"], "smaller", chats, texts["code"], 1024)
    assert [line.split(":")[0] for line in said.splitlines()] == ["chat", "code"]


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_fine_tune(smaller: Path, chats: Path, tmp_path: Path) -> None:
    ran(tmp_path, "fine_tune.py", smaller, "tuned", chats)
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_serve(tmp_path: Path) -> None:
    # llama.cpp wants merges.
    saved(tmp_path / "model", tiny_llama(hidden_size=64, intermediate_size=96), bpe_tokenizer())
    assert ran(tmp_path, "serve.py", "model").startswith(("llama.cpp: ", "llama-server -m "))


def test_own_score(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = EXAMPLES / "own_score"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    lay_out(tmp_path, project["name"], {}, project["entry-points"])
    said = ran(tmp_path, "own_score/loudness.py", checkpoints["llama"], path=(tmp_path, folder))
    assert [line.split(":")[0] for line in said.splitlines()] == ["random", "loudest", "obs"]


def test_study(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    said = ran(tmp_path, "study.py", checkpoints["llama"], "study")
    assert said.count("draw ") == 10 and (tmp_path / "study" / "table.md").is_file()
