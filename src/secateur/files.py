"""Files and directories that appear complete or not at all, and JSON read back into its dataclass.

In: a path and what is to be written. Out: the file or directory under its name, after an atomic rename; a hidden
name before that. Errors of the disk are one sentence.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType

from huggingface_hub.serialization._base import parse_size_to_int

from secateur.errors import CheckpointError, RecipeError
from secateur.ranks import from_first, is_first, size

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another place",
    errno.EFBIG: "no file there may become that large; raise the limit (ulimit -f) or lower max_shard_size",
    errno.EACCES: "permission denied; choose another place or change its permissions",
    errno.EPERM: "permission denied; choose another place or change its permissions",
    errno.EROFS: "it is on a read-only file system; choose another place",
    errno.EIO: "the disk reports an input/output error; choose another disk",
}


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


def parse_size(key: str, text: str) -> int:
    """Return the bytes that a size such as "5GB" stands for. Raises RecipeError, naming `key`, if it is none."""
    try:
        num_bytes = parse_size_to_int(text)
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes <= 0:
        raise RecipeError(f"{key}: must be a number and KB, MB, GB or TB, such as 5GB, got '{text}'.")
    return num_bytes


class disk_errors:  # reads as a statement: with disk_errors(place):
    """Turn an error of the disk inside the block into a CheckpointError naming `place`; other errors pass.

    safetensors and tokenizers raise exceptions of their own (tokenizers: a bare Exception), whose text holds
    "(os error 28)"; hence a class with `__exit__` and not an except clause.
    """

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        rust = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(rust[1]) if rust else None
        if number not in _DISK_ERRORS:
            return
        # Of a copy the second is where it was written to.
        named = (error.filename2 or error.filename) if isinstance(error, OSError) else None
        place = re.sub(r"\.([^/]+)\.(partial-\d+|resume)", r"\1", str(named or self.place))  # hidden names say nothing
        raise CheckpointError(f"{place}: {_DISK_ERRORS[number]}.") from None


def check_free_space(directory: Path, num_bytes: int) -> None:
    """Raise CheckpointError if the disk of `directory` has fewer than `num_bytes` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(
            f"{directory.parent}: the run needs {num_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another place."
        )


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


@contextmanager
def staging(out: Path, *, overwrite: bool, protected: Path | None = None) -> Iterator[Path]:
    """Yield a hidden empty directory beside `out`; when the block ends well, it becomes `out` by one rename.

    After any exception, KeyboardInterrupt included, nothing is left: neither the directory nor parents made for it.
    With `overwrite` an old model directory stays in its place until the new one is complete. `protected`, the model
    being read, and the directories above it are never replaced.

    Raises CheckpointError, before the block runs, if `out` exists or cannot be made, and for disk errors in the block.
    """
    out = Path(os.path.abspath(out))
    _clear_after_dead(out)
    check_replaceable(out, overwrite=overwrite, protected=protected)
    made = missing_parents(out)
    staged = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)  # of a killed process that had this process's id
    done = False
    try:
        make_hidden(staged, out)
        with disk_errors(out):
            yield staged
            _sync_tree(staged)
            check_replaceable(out, overwrite=overwrite, protected=protected)  # another process may have made it
            _swap(staged, out)
        done = True
    finally:
        if not done:
            shutil.rmtree(staged, ignore_errors=True)
            remove_empty(made)


def staging_if_any(out: Path | None, *, overwrite: bool, protected: Path | None) -> AbstractContextManager[Path | None]:
    """Return `staging` on the rank that writes; where nothing is to be written, a context that gives None."""
    if out is None:
        return nullcontext()
    # What is wrong with `out` is said before the others begin to wait for the first rank.
    if size() > 1:
        from_first(lambda: check_replaceable(out, overwrite=overwrite, protected=protected))
    return staging(out, overwrite=overwrite, protected=protected) if is_first() else nullcontext()


def missing_parents(out: Path) -> list[Path]:
    """Return the directories above `out` that are yet to be made, innermost first."""
    return [path for path in out.parents if not os.path.lexists(path)]


def remove_empty(directories: list[Path]) -> None:
    """Remove those of the directories that nobody uses by now."""
    for directory in directories:
        with suppress(OSError):  # not empty
            directory.rmdir()


def make_hidden(directory: Path, out: Path) -> None:
    """Make a directory beside `out`, and its parents. Raises CheckpointError if that cannot be."""
    # Trying is the only sure check: asking for permissions tells root that everything is writable.
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"OUT {out}: no directory can be made there ({error.strerror}); choose another place."
        ) from None


def check_replaceable(out: Path, *, overwrite: bool, protected: Path | None) -> None:
    """Raise CheckpointError if what stands at `out` may not be replaced, or holds the model that is read."""
    if protected is not None and out.resolve() in (protected.resolve(), *protected.resolve().parents):
        raise CheckpointError(f"OUT {out}: holds the model that is being pruned; choose another directory.")
    blocking = next((parent for parent in out.parents if os.path.lexists(parent)), out)
    if not blocking.is_dir():
        raise CheckpointError(f"OUT {out}: {blocking} is not a directory; choose another place.")
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir() or out.is_mount():
        kind = "a symbolic link" if out.is_symlink() else "a mount point" if out.is_dir() else "a file"
        raise CheckpointError(f"OUT {out}: is {kind}, which is never replaced; choose a new directory.")
    if not overwrite:
        raise CheckpointError(f"OUT {out}: already exists; choose a new directory or give --overwrite to replace it.")
    if not (out / "config.json").is_file() and any(out.iterdir()):
        raise CheckpointError(
            f"OUT {out}: has no config.json, so it is no model and --overwrite will not delete it; "
            "choose a new directory."
        )


def _clear_after_dead(out: Path) -> None:
    """Remove what killed processes have left beside `out`; one killed between two renames has left it aside."""
    for name in _names_beside(out):
        kind, _, process = name.removeprefix(f".{out.name}.").rpartition("-")
        if kind not in ("partial", "replaced") or not process.isdecimal() or _is_alive(int(process)):
            continue
        if kind == "replaced" and not os.path.lexists(out):
            out.with_name(name).rename(out)
        else:
            shutil.rmtree(out.with_name(name), ignore_errors=True)


def _names_beside(out: Path) -> list[str]:
    return [name for name in os.listdir(out.parent) if name.startswith(f".{out.name}.")] if out.parent.is_dir() else []


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _swap(staged: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    replacing = out.exists()
    if replacing:
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        staged.rename(out)
    finally:
        if replacing and not out.exists():
            old.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))
