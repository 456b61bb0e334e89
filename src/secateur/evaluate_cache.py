"""Finished parts of an evaluation, one JSON file each, so that an interrupted evaluation goes on where it stopped.

In: a directory, what a part depends on (settings and the fingerprint of the model's files), and how to compute it.
Out: the part's result, computed or read. A file appears complete or not at all; parts of other settings lie beside it.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.checkpoint import Checkpoint
from secateur.checkpoint_locate import TOKENIZER_FILES
from secateur.ranks import from_first, is_first
from secateur.staged_file import staged_file

_READ_BY_LOADING = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
    "tokenizer_config.json",
)

Part = dict[str, Any]


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 over the names and bytes of the files that loading the model and its tokenizer reads."""
    patterns = (checkpoint.gguf_file,) if checkpoint.gguf_file else _READ_BY_LOADING
    paths = {path for pattern in patterns for path in checkpoint.directory.glob(pattern) if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as stream:
            digest.update(f"{path.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class PartCache:
    """Parts by name and by everything they depend on, in a directory that is there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, name: str, depends_on: Part) -> Part | None:
        """Return the part if it has been computed. All ranks get what the first one finds."""
        path = self._path(name, depends_on)
        return from_first(lambda: _result(path.read_text(encoding="utf-8")) if path.is_file() else None)

    def get_or_compute(self, name: str, depends_on: Part, compute: Callable[[], Part]) -> Part:
        """Return the part; compute and keep it first if it is new. All ranks compute together, the first one keeps."""
        found = self.get(name, depends_on)
        if found is None:
            computed = json.dumps({"depends_on": depends_on, "result": compute()}, indent=1, default=str)
            if is_first():
                with staged_file(self._path(name, depends_on), overwrite=True) as staged:
                    staged.write_text(computed + "\n", encoding="utf-8")
            found = _result(computed)  # a first and a second run then return the very same types
        return found

    def _path(self, name: str, depends_on: Part) -> Path:
        key = hashlib.sha256(json.dumps([name, depends_on], sort_keys=True).encode()).hexdigest()[:16]
        return self.directory / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{key}.json"


def _result(text: str) -> Part:
    return json.loads(text)["result"]
