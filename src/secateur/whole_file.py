"""Files that appear complete or not at all, whatever happens to the process, the disk or the power.

In: a path and what belongs there. Out: the file, written under a hidden name, flushed to the disk, renamed. Tensors go
with one JSON object, which lies in the header of their file.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def sync(path: Path) -> None:
    """Have the disk hold what the file or directory holds by now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
