"""What mkdocs asks of this project (`hooks` in mkdocs.yml)."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
SOURCES = tempfile.TemporaryDirectory()  # goes when the process ends


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: Any) -> Any:
    """Give mkdocstrings a copy of the sources in which each package has an `__init__.py`.

    secateur's packages have none, and what reads the docstrings passes over folders without one.
    """
    copied = shutil.copytree(ROOT / "src" / "secateur", Path(SOURCES.name) / "secateur", dirs_exist_ok=True)
    for package in copied.iterdir():
        if package.is_dir():
            (package / "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [SOURCES.name]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Make README.md the first page, with its links as seen from docs/."""
    text = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "index.md", content=text))
    return files
