"""Writing one file, which appears complete or not at all. In: a path. Out: a hidden path, renamed at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import CheckpointError
from secateur.output import disk_errors
from secateur.whole_file import whole_file


@contextmanager
def staged_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden path beside `path`; when the block ends well, what was written there becomes `path`.

    After any exception, KeyboardInterrupt included, nothing is left and an old file stays as it was.

    Raises CheckpointError if `path` exists and `overwrite` is False, or it cannot be a file, and for disk errors.
    """
    check_file(path, overwrite=overwrite)
    with disk_errors(path), whole_file(path) as staged:
        yield staged
        check_file(path, overwrite=overwrite)  # another process may have made it


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if `path` cannot be written as a file, or exists and may not be replaced."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no directory {path.parent}; make it first or choose another place.")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; give the name of a file.")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: already exists; choose another name or give --overwrite to replace it.")
