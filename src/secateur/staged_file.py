"""Writing one file, which appears complete or not at all. In: a path. Out: a hidden path, renamed at the end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import CheckpointError
from secateur.output import disk_errors


@contextmanager
def staged_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden path beside `path`; when the block ends well, what was written there becomes `path`.

    After any exception, KeyboardInterrupt included, nothing is left and an old file stays as it was.

    Raises CheckpointError if `path` exists and `overwrite` is False, or it cannot be a file, and for disk errors.
    """
    check_file(path, overwrite=overwrite)
    staged = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with disk_errors(path):
            yield staged
            with staged.open("rb") as written:
                os.fsync(written.fileno())
            check_file(path, overwrite=overwrite)  # another process may have made it
            staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if `path` cannot be written as a file, or exists and may not be replaced."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no directory {path.parent}; make it first or choose another place.")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; give the name of a file.")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: already exists; choose another name or give --overwrite to replace it.")
