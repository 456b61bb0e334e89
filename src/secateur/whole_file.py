"""Files that appear complete or not at all, whatever happens to the process, the disk or the power.

In: a path and what belongs there. Out: the file, written under a hidden name, flushed to the disk, renamed. Tensors go
with one JSON object, which lies in the header of their file.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LINE = "line"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path`; when the block ends well, what was written there becomes `path`."""
    staged = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield staged
        sync(staged)
        os.replace(staged, path)
        sync(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor], line: dict[str, Any]) -> None:
    """Write the tensors as safetensors, and the line in the file's header."""
    with whole_file(path) as staged:
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(held, staged, metadata={LINE: json.dumps(line)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `save_tensors` wrote."""
    with safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(opened.metadata()[LINE])


def sync(path: Path) -> None:
    """Have the disk hold what the file or directory holds by now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
