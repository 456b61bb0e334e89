"""A directory that appears complete or not at all: made under a hidden name beside its place, renamed at the end.

In: a path. Out: the hidden directory, then the path itself. SIGKILL leaves the hidden directory behind (never a
half-written OUT), which the next run for the same OUT removes.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from secateur.errors import CheckpointError
from secateur.output import disk_errors
from secateur.ranks import from_first, is_first, size
from secateur.whole_file import sync


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
