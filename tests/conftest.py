"""What several end-to-end tests share: saved tiny checkpoints, two domains of text, a small recipe. No network."""

import os

# Read when huggingface_hub and torch are imported, and inherited by subprocesses. Threads would only get in each
# other's way on matrices this small.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typed  # noqa: F401  # before anything of the package
import yaml
from hypothesis import HealthCheck, Phase, settings
from little import JUDGED_BY_LITTLE, UNPROVED
from models import saved, tiny_llama, tiny_qwen2
from recipes import grouped
from skips import pytest_terminal_summary  # noqa: F401  # a hook
from warm import WarmProcesses

# The same examples on each run and machine; how long one takes proves nothing.
SLOW = HealthCheck.too_slow
settings.register_profile("same", derandomize=True, deadline=None, database=None, suppress_health_check=[SLOW])
# For mutants the first example that fails is enough.
settings.register_profile("first", settings.get_profile("same"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("same")


def pytest_collection_finish() -> None:
    """Let the collector of cycles pass by torch, transformers and the tests: a million objects that stay."""
    gc.collect()
    gc.freeze()


WORDS = "the pruned channels of a layer are read by one linear map and written by two others".split()
CODE = "def keep(units):", "    return sorted(units)", "for layer in layers:", "    cut(layer)", "import torch"


@contextmanager
def patched(values: dict[str, Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def judged_by_little() -> Iterator[None]:
    with patched(JUDGED_BY_LITTLE):
        yield


@pytest.fixture(scope="module")
def unproved() -> Iterator[None]:
    """For tests of results that nobody has to load again in a process of its own."""
    with patched(UNPROVED):
        yield


@pytest.fixture(scope="module")
def judging() -> Iterator[None]:
    """For tests of what a user runs: text of its own judges a run, two blocks of each domain."""
    with patched({"secateur.data.pool.JUDGED_TOKENS": 64}):
        yield


@pytest.fixture(scope="session", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcesses]:
    """Processes that have torch imported; in them results are proved."""
    processes = WarmProcesses(tmp_path_factory.mktemp("warm"))
    with patched({"secateur.formats.save.subprocess": processes}):
        yield processes
    processes.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def checkpoints(shared: Path) -> dict[str, Path]:
    """Directories with a model and a tokenizer, by name. Tests copy one before they damage it."""
    makers = {"llama": tiny_llama, "qwen2": tiny_qwen2}
    models = {name: make() for name, make in makers.items()}
    models |= {f"{name}-tied": make(tied=True) for name, make in makers.items()}
    return {name: saved(shared / name, model) for name, model in models.items()}


@pytest.fixture(scope="session")
def texts(shared: Path) -> dict[str, Path]:
    """Two domains as files: prose of random words, code of random lines."""
    choose = random.Random(0)
    prose = [" ".join(choose.choices(WORDS, k=12)) for _ in range(200)]
    code = ["\n".join(choose.choices(CODE, k=3)) for _ in range(200)]
    files = {"prose": shared / "prose.txt", "code": shared / "code.txt"}
    for file, lines in zip(files.values(), (prose, code), strict=True):
        file.write_text("\n".join(lines), encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def recipe(texts: dict[str, Path]) -> dict[str, Any]:
    """A recipe that fits the tiny models; a test changes its own copy."""
    domains = {name: {"files": [str(file)]} for name, file in texts.items()}
    calibration = {"domains": domains, "num_tokens": 1280, "sequence_length": 32}
    return {"align": 8, "calibration": calibration}


@pytest.fixture(scope="session")
def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a run that nothing judges."""
    return {**recipe, "evaluate": False}


@pytest.fixture(scope="session")
def recipe_file(recipe: dict[str, Any], shared: Path) -> Path:
    file = shared / "recipe.yaml"
    file.write_text(yaml.safe_dump(grouped(recipe)), encoding="utf-8")
    return file
